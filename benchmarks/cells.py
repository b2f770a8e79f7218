"""The attacks and the defences of the benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

from lightning_backdoor import (
    DBRCallback,
    DSTCallback,
    NONECallback,
    UltraCleanCallback,
    Verdict,
    attacks,
    baselines,
    functional,
)

TARGET = 0
SOURCE = 1  # of attacks that work on one class alone


@dataclass(frozen=True)
class Attack:
    """A poisoned training set: the trigger, how much of it, and on which labels.

    ``make`` stands for a trigger that has to be made first, from clean training images and a classifier of pixels in
    ``[0, 1]`` trained on them; :meth:`made` makes it.
    """

    trigger: attacks.Trigger | None = None
    rate: float = 0.0
    rate_of: str = "dataset"
    labels: str = "dirty"
    covers: float = 0.0
    sources: tuple[int, ...] | None = None
    make: Callable[[TensorDataset, nn.Module], attacks.Trigger] | None = None

    def made(self, train: TensorDataset, model: Callable[[], nn.Module]) -> Attack:
        """The same attack with its trigger; ``model`` is asked for the classifier only if one is needed."""
        return self if self.make is None else replace(self, trigger=self.make(train, model()), make=None)

    def train(self, dataset: Dataset[Any], seed: int) -> Any:
        """The training set under this attack."""
        if self.trigger is None:
            return dataset
        return attacks.poison(
            dataset, self.trigger, TARGET, rate=self.rate, rate_of=self.rate_of, labels=self.labels, seed=seed,
            covers=self.covers, sources=None if self.labels == "clean" else self.sources,
        )  # fmt: skip

    def test(self, dataset: Dataset[Any]) -> Any:
        """The triggered test set; for clean data that of BadNets, to know the success rate of chance."""
        labels = "all_to_all" if self.labels == "all_to_all" else "dirty"
        return attacks.triggered(
            dataset, self.trigger or attacks.BadNets(), TARGET, labels=labels, sources=self.sources
        )


def _hidden(train: TensorDataset, model: nn.Module) -> attacks.Trigger:
    images, labels = train.tensors
    return attacks.HiddenTrigger(model, images[labels == SOURCE])


STANDARD: dict[str, Attack] = {
    "clean": Attack(),
    "badnets-1%": Attack(attacks.BadNets(), 0.01),
    "badnets-5%": Attack(attacks.BadNets(), 0.05),
    "blended-5%": Attack(attacks.Blended(), 0.05),
    "sig-80%": Attack(attacks.SIG(), 0.8, "target_class", "clean"),
    "all-to-all-10%": Attack(attacks.BadNets(), 0.1, "dataset", "all_to_all"),
}
"""The attacks of the full grid, each with every defence."""

FURTHER: dict[str, Attack] = {
    "label-specific-5%": Attack(attacks.BadNets("square"), 0.05, "dataset", "all_to_all"),
    "flower-10%": Attack(attacks.Blended(0.2, "flower"), 0.1),
    "flower-added-10%": Attack(attacks.Blended(0.2, "flower", additive=True), 0.1),
    "stripe-10%": Attack(attacks.Blended(0.2, "stripe"), 0.1),
    "trojan-10%": Attack(attacks.Trojan(), 0.1),
    "watermark-10%": Attack(rate=0.1, make=lambda _, model: attacks.TrojanWatermark.trained(model)),
    "label-consistent-40%": Attack(
        rate=0.4, rate_of="target_class", labels="clean", make=lambda _, model: attacks.LabelConsistent(model)
    ),
    "hidden-trigger-40%": Attack(rate=0.4, rate_of="target_class", labels="clean", sources=(SOURCE,), make=_hidden),
    "wanet-10%": Attack(attacks.WaNet(), 0.1, covers=0.2),
    "low-frequency-5%": Attack(
        rate=0.05, make=lambda train, model: attacks.LowFrequency.trained(model, train.tensors[0], TARGET)
    ),
    "sample-specific-10%": Attack(rate=0.1, make=lambda train, _: attacks.SampleSpecific.trained(train.tensors[0])),
    "colour-curve-5%": Attack(attacks.ColourCurve(), 0.05),
}
"""More published attacks."""

ADAPTIVE: dict[str, Attack] = {
    "adap-blend-0.3%": Attack(attacks.AdaptiveBlend(pattern="flower"), 0.003, covers=0.003),
    "adap-blend-2%": Attack(attacks.AdaptiveBlend(pattern="flower"), 0.02, covers=0.02),
    "adap-patch-0.3%": Attack(attacks.AdaptivePatch(), 0.003, covers=0.006),
    "adap-patch-2%": Attack(attacks.AdaptivePatch(), 0.02, covers=0.04),
    "tact-0.3%": Attack(attacks.BadNets("square"), 0.003, covers=0.003, sources=(SOURCE,)),
    "tact-2%": Attack(attacks.BadNets("square"), 0.02, covers=0.02, sources=(SOURCE,)),
    "denoised-5%": Attack(attacks.Denoised(attacks.Blended(0.2, "flower")), 0.05),
    "invariant-5%": Attack(
        rate=0.05, make=lambda train, model: attacks.Invariant.trained(model, train.tensors[0], TARGET)
    ),
}
"""Attacks that know a defence and work around it."""

RATES: dict[str, Attack] = {
    **{f"badnets-{rate:g}%": Attack(attacks.BadNets(), rate / 100) for rate in (0.1, 0.5, 10)},
    **{f"blended-{rate:g}%": Attack(attacks.Blended(), rate / 100) for rate in (0.1, 0.5, 1, 10)},
    "sig-10%": Attack(attacks.SIG(), 0.1, "target_class", "clean"),
}
"""Standard attacks at more poison rates."""

ATTACKS: dict[str, Attack] = STANDARD | FURTHER | ADAPTIVE | RATES

BEYOND = 100
"""Epochs that a repair may have beyond the plan: enough for all, so that each begins when training is about to end."""

CALLBACKS: dict[str, Callable[[], list[Any]]] = {
    "ultraclean": lambda: [UltraCleanCallback()],
    "ultraclean+NONE": lambda: [UltraCleanCallback(), NONECallback(extra_epochs=BEYOND)],
    "ultraclean-paper": lambda: [UltraCleanCallback.from_paper(output="logits")],
    "NONE": lambda: [NONECallback(extra_epochs=BEYOND)],
    "NONE-paper": lambda: [NONECallback.from_paper(extra_epochs=BEYOND)],
    "D-BR": lambda: [DBRCallback(extra_epochs=BEYOND)],
    "D-BR-paper": lambda: [DBRCallback.from_paper()],
    "D-ST": lambda: [DSTCallback()],
    "AC": lambda: [baselines.ActivationClustering()],
    "spectral": lambda: [baselines.SpectralSignatures()],
    "STRIP": lambda: [baselines.STRIP(draws=20)],
    "deep-kNN": lambda: [baselines.DeepKNN()],
    "ABL": lambda: [baselines.ABL(epochs=5, extra_epochs=BEYOND)],
}

CLEAN_MODEL = "clean-model"
"""In the place of a defence: a network that has not seen the poisons."""

BASELINES = ("AC", "spectral", "STRIP", "deep-kNN", "fine-tune", "ABL")
"""Defences from the literature."""

AT_THE_END = ("ultraclean-paper", "NONE", "NONE-paper", "random-reset", "D-BR", "D-BR-paper", *BASELINES[:-1])
"""Defences that act when training is about to end: they share the undefended training up to its last epoch."""


def filtered(dataset: Dataset[Any], defence: str, poisoned: torch.Tensor, size: int, seed: int) -> Dataset[Any]:
    """The training set of the two filters that are no defences: the one that knows, and the one that guesses."""
    if defence == "perfect":
        removed = poisoned.nonzero().squeeze(1)
    else:
        removed = torch.randperm(len(poisoned), generator=torch.Generator().manual_seed(seed))[:size]
    keep = torch.ones(len(poisoned), dtype=torch.bool)
    keep[removed] = False
    return Subset(dataset, keep.nonzero().squeeze(1).tolist())


def clean_share(labels: torch.Tensor, poisoned: torch.Tensor, seed: int, share: float = 0.05) -> Verdict:
    """Trust a share of the samples of every class, none of them poisoned: what papers on fine-tuning start from."""
    scores = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed))
    keep = torch.ones_like(poisoned)
    trusted = functional.select_trusted(scores, labels, ~poisoned, share)
    return Verdict(scores, keep, torch.inf, f"clean({share:g})", labels, trusted=trusted)
