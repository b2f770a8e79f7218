"""Every public callback, and how to make one that surely acts and one that never does.

A callback that is added to the package joins the whole suite with one entry here; without it, a test fails.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

import lightning_backdoor
from lightning_backdoor import (
    BackdoorMonitor,
    DBRCallback,
    DSTCallback,
    NONECallback,
    UltraCleanCallback,
    Verdict,
    attacks,
    baselines,
)
from lightning_backdoor.baselines import (
    ABL,
    STRIP,
    ActivationClustering,
    DeepKNN,
    FineTuneTrusted,
    RandomFilter,
    SpectralSignatures,
)
from tests.contract.problem import EPOCHS, IMAGES

BASES = {"Baseline", "RepairBaseline"}
"""Public classes that are there to be derived from."""


def given(images: int = IMAGES) -> Verdict:
    """The verdict of another defence, which knew the truth."""
    places = torch.arange(images)
    suspect = places % 8 == 3
    return Verdict(places.float(), ~suspect, 0.5, "known", trusted=(places + 1) % 8 < 4, suspect=suspect)


GIVEN = given()


@dataclass(frozen=True)
class Entry:
    """How one public callback takes part in the contract.

    Attributes:
        cls: The class.
        acting: Arguments with which it surely acts on the planted data within three epochs.
        silent: Arguments with which it never acts on clean data; ``None``: it always acts, as its documentation says.
        kind: ``"filter"`` takes samples out and starts anew, ``"repair"`` goes on beyond the plan, ``"own"`` trains by
            itself, ``"watch"`` only looks.
        first: The epoch whose beginning still sees the weights of a training without it.
        untouched: Arguments in place of ``acting`` for that.
        flags: Arguments for the command line in place of ``acting``.
    """

    cls: Callable[..., Any]
    acting: dict[str, Any]
    silent: dict[str, Any] | None
    kind: str
    first: int
    untouched: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """Name of the class."""
        return self.cls.__name__

    def make(self, **kwargs: Any) -> Any:
        """One that acts."""
        return self.cls(**{**self.acting, **kwargs})

    def make_silent(self, **kwargs: Any) -> Any:
        """One that looks and does nothing."""
        assert self.silent is not None
        return self.cls(**{**self.silent, **kwargs})

    def acted(self, callback: Any, trainer: Any) -> bool:
        """Whether it did what it is there for."""
        if self.kind == "watch":
            return any(key.startswith("backdoor/") for key in trainer.callback_metrics)
        return callback.verdict is not None and not bool(callback.verdict.keep.all())

    @property
    def epochs(self) -> int:
        """Epochs that its fit ends with."""
        return EPOCHS + (self.acting.get("epochs", self.acting.get("finetune_epochs", 0)))


DETECTOR = {"suspect": 0.1, "trusted": 0.25, "detector_steps": 3, "num_transforms": 1}

ENTRIES = [
    Entry(
        UltraCleanCallback,
        {"warmup_epochs": 2, "rule": "fraction", "fraction": 0.25},
        {"warmup_epochs": 1},
        "filter",
        2,
    ),
    Entry(NONECallback, {"rule": "paper", "finetune_epochs": 1, "extra_epochs": 1}, {}, "repair", 2),
    Entry(DBRCallback, {**DETECTOR, "epochs": 2, "extra_epochs": 2}, {"detector_steps": 3}, "repair", 3),
    Entry(DSTCallback, {**DETECTOR}, {"detector_steps": 3}, "own", 0),
    Entry(
        BackdoorMonitor,
        {"trigger": attacks.BadNets()},
        {"trigger": attacks.BadNets()},
        "watch",
        3,
        flags={"trigger": "lightning_backdoor.attacks.BadNets"},
    ),
    Entry(
        ActivationClustering,
        {"warmup_epochs": 1, "size": 0.6, "silhouette": 0.01},
        {"silhouette": 0.99},
        "filter",
        1,
    ),
    Entry(SpectralSignatures, {"warmup_epochs": 1, "eps": 0.1}, {"eps": 0.01}, "filter", 1),
    Entry(DeepKNN, {"warmup_epochs": 1, "k": 24}, {"max_removed": 0.001}, "filter", 1),
    Entry(
        STRIP,
        {"warmup_epochs": 1, "draws": 4, "false_rejection": 0.4},
        {"draws": 2, "max_removed": 0.001},
        "filter",
        1,
    ),
    Entry(RandomFilter, {"warmup_epochs": 1, "fraction": 0.2}, {"fraction": 0.001}, "filter", 1),
    Entry(
        ABL,
        {"warmup_epochs": 1, "isolate": 0.1, "gamma": 1.3, "epochs": 2, "extra_epochs": 2},
        None,
        "repair",
        1,
        untouched={"gamma": 0.0},
    ),
    Entry(FineTuneTrusted, {"verdict": GIVEN, "epochs": 2, "extra_epochs": 2}, None, "repair", 3),
]


def name_of(value: Any) -> str | None:
    """What a parametrized test is called by: the class, or what pytest takes."""
    return value.name if isinstance(value, Entry) else value.__name__ if inspect.ismodule(value) else None


every = pytest.mark.parametrize("entry", ENTRIES, ids=name_of)
every_defense = pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.kind != "watch"], ids=name_of)

KINDS = ["UltraCleanCallback", "NONECallback", "DBRCallback", "DSTCallback", "BackdoorMonitor"]
"""One callback of each kind, two of the repairs: they have one loop that resets units, and one that unlearns."""
every_kind = pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.name in KINDS], ids=name_of)
every_kind_of_defense = pytest.mark.parametrize(
    "entry", [entry for entry in ENTRIES if entry.name in KINDS and entry.kind != "watch"], ids=name_of
)


def in_turn(argument: str, values: Iterable[Any], entries: Sequence[Entry] = ENTRIES) -> pytest.MarkDecorator:
    """Pairs of a callback and a value in which every callback and every value is at least once.

    For what does not depend on the callback: which loader, logger or command line it works with.
    """
    values = list(values)
    count = max(len(values), len(entries))
    pairs = [(entries[i % len(entries)], values[i % len(values)]) for i in range(count)]
    return pytest.mark.parametrize(("entry", argument), pairs, ids=name_of)


def public_callbacks() -> dict[str, type]:
    """The callbacks among the public names of the package."""
    found = {}
    for module in (lightning_backdoor, baselines):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) and issubclass(value, pl.Callback) and name not in BASES:
                found[name] = value
    return found


def of(name: str) -> Entry:
    """The entry of one class."""
    return next(entry for entry in ENTRIES if entry.name == name)
