"""The filters from the literature in a Trainer: planted truth and its clean twin, and the contract of every defence."""

from __future__ import annotations

import html
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning_pytorch
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_backdoor import baselines
from lightning_backdoor.baselines import (
    STRIP,
    ActivationClustering,
    BaselineArguments,
    DeepKNN,
    RandomFilter,
    SpectralSignatures,
    strip,
)
from lightning_backdoor.baselines.strip import Blends
from lightning_backdoor.callbacks.base import Defense
from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.responses import Session
from tests.baselines.helpers import POISONS, Rigged, clean_as_well, red_corners
from tests.callbacks.helpers import LIGHTNING_WARNS, Pictures, fit, loader_of, make_trainer
from tests.callbacks.test_none import lightning_net

pytestmark = [
    *LIGHTNING_WARNS,
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]

ACTING: dict[type[Defense], dict[str, Any]] = {  # settings with which something is removed, whatever the data look like
    ActivationClustering: {"size": 0.6, "silhouette": 0.01},
    SpectralSignatures: {"eps": 0.1},
    DeepKNN: {"k": 3},
    STRIP: {"draws": 4, "false_rejection": 0.4},
    RandomFilter: {"fraction": 0.2},
}


def acting(cls: type[Defense], **kwargs: Any) -> Defense:
    return cls(**{**ACTING[cls], **kwargs})


def mislabelled() -> Pictures:
    data = Pictures()
    data.targets[:6] = data.targets[1:7].clone()
    return data


every_filter = pytest.mark.parametrize("cls", ACTING, ids=lambda cls: cls.__name__)


def test_every_public_filter_is_tested() -> None:
    public = {getattr(baselines, name) for name in baselines.__all__}
    assert set(ACTING) == {x for x in public if isinstance(x, type) and getattr(x, "shared", None) is BaselineArguments}


def scanned(callback: Defense, poisoned: bool = True, **kwargs: Any) -> Defense:
    """Let a filter scan the rigged network: shuffled batches of 24, the last one partial."""
    data, _ = red_corners(poisoned)
    loader = DataLoader(data, **{"batch_size": 24, "shuffle": True, **kwargs})
    make_trainer([callback], 1).fit(Rigged(), loader)
    return callback


@pytest.mark.parametrize(
    ("callback", "clean", "twin"),
    [
        (ActivationClustering(silhouette=0.45, components=2, response="continue"), 0, 0),
        (SpectralSignatures(eps=0.16, response="continue"), 27, 36),  # its share of every class
        (DeepKNN(response="continue"), 0, 0),
        (STRIP(draws=10, response="continue"), 5, 8),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Defense) else None,
)
def test_finds_planted_poisons_and_not_much_more(callback: Defense, clean: int, twin: int) -> None:
    _, truth = red_corners()
    scanned(callback)
    assert not (callback.verdict.keep & truth).any()
    assert clean_as_well(callback) <= clean
    again = scanned(type(callback)(**settings_of(callback)), poisoned=False)
    assert (~again.verdict.keep).sum() <= twin


def settings_of(callback: Defense) -> dict[str, Any]:
    names = type(callback).__signature__.parameters
    known = {**vars(callback.options), **vars(callback), **callback.arguments}
    return {name: known[name] for name in names}


def test_the_random_filter_finds_poisons_as_often_as_anything_else() -> None:
    found = [scanned(RandomFilter(fraction=0.5, seed=seed, response="continue")).verdict for seed in range(3)]
    truth = red_corners()[1]
    assert all((~verdict.keep).sum() == 80 for verdict in found)
    assert 6 < sum(int((~verdict.keep & truth).sum()) for verdict in found) < 3 * POISONS - 6
    assert not torch.equal(found[0].keep, found[1].keep)


@every_filter
def test_scores_do_not_depend_on_how_the_data_are_loaded(cls: type[Defense]) -> None:
    one = scanned(acting(cls, response="continue")).verdict
    for other in (
        scanned(acting(cls, response="continue", batch_size=7), shuffle=False, batch_size=160),
        scanned(acting(cls, response="continue", num_workers=1), batch_size=9, drop_last=True),
    ):
        torch.testing.assert_close(other.verdict.scores, one.scores, rtol=1e-4, atol=1e-4)
        assert torch.equal(other.verdict.keep, one.keep)
    assert torch.equal(one.labels, red_corners()[0].targets)


@every_filter
def test_scans_when_training_ends_goes_back_and_trains_on_what_is_left(cls: type[Defense], tmp_path: Path) -> None:
    callback = acting(cls, report_dir=tmp_path)
    trainer, module = fit([callback], mislabelled(), epochs=2)
    verdict, kept = callback.verdict, callback.verdict.keep.nonzero().squeeze(1).tolist()
    assert 0 < len(kept) < 64
    assert [epoch for epoch, _ in module.epochs()] == [0, 1, 0, 1]
    assert all(set(positions) <= set(kept) for _, positions in module.epochs()[2:])
    assert (verdict.scores[~verdict.keep] > verdict.threshold).all()
    assert trainer.callback_metrics[f"backdoor/{cls.__name__.lower()}/removed"] == 64 - len(kept)
    assert torch.equal(pickle.loads(pickle.dumps(callback)).verdict.keep, verdict.keep)
    assert html.escape(callback.meaning) in (tmp_path / "report.html").read_text()


@every_filter
def test_works_with_the_other_package_and_says_how_to_make_it_again(cls: type[Defense]) -> None:
    callback = acting(cls, warmup_epochs=1, name="mine", mean=[0.5], std=[0.2])
    text = repr(callback)
    assert all(f"{key}={value!r}" in text for key, value in ACTING[cls].items())
    assert repr(eval(text, vars(baselines))) == text
    callback = acting(cls, warmup_epochs=1, name="mine")
    make_trainer([callback], 1, package=lightning_pytorch).fit(lightning_net(), loader_of(mislabelled()))
    assert not callback.verdict.keep.all()
    assert callback.state_key == f"lightning_backdoor.{cls.__name__}.mine"


def test_max_removed_limits_what_the_rule_wants() -> None:
    callback = RandomFilter(fraction=0.5, max_removed=0.25)
    fit([callback], epochs=1)
    assert (~callback.verdict.keep).sum() == 16
    assert callback.verdict.rule == "random(0.5), max_removed(0.25)"


def test_an_image_is_not_blended_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    blended: list[Tensor] = []

    class Recording(Blends):
        def prepare(self, session: Session) -> None:
            super().prepare(session)
            blended.append(self._positions)

    monkeypatch.setattr(strip, "Blends", Recording)
    callback = scanned(STRIP(draws=5, response="continue"))
    (positions,) = blended
    data, _ = red_corners()
    network = Rigged()
    for i in [*positions.tolist(), 1]:
        others = [j for j in positions.tolist() if j != i][:5]
        blends = torch.stack([((data.images[i].int() + data.images[j]) / 2).round().byte() for j in others])
        shares = network(blends).detach().double().softmax(dim=1)
        expected = float((shares * shares.log2()).nan_to_num().sum(dim=1).mean())
        assert float(callback.verdict.scores[i]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("cls", "wrong", "name"),
    [
        (ActivationClustering, {"size": 35}, "size"),
        (ActivationClustering, {"silhouette": 0.0}, "silhouette"),
        (ActivationClustering, {"components": 0}, "components"),
        (SpectralSignatures, {"eps": 5}, "eps"),
        (SpectralSignatures, {"eps": 0.7}, "1.5 * eps"),
        (DeepKNN, {"k": 0}, "k"),
        (STRIP, {"draws": 0}, "draws"),
        (STRIP, {"weight": 1.0}, "weight"),
        (STRIP, {"false_rejection": 1}, "false_rejection"),
        (RandomFilter, {"fraction": 2}, "fraction"),
        (RandomFilter, {"max_removed": 2}, "max_removed"),
        (RandomFilter, {"warmup_epochs": 0}, "warmup_epochs"),
    ],
)
def test_wrong_arguments(cls: Any, wrong: dict[str, Any], name: str) -> None:
    with pytest.raises(ArgumentError, match=f"`{name}` must be".replace("*", r"\*")):
        cls(**wrong)
    with pytest.raises(TypeError, match="unexpected keyword"):
        cls(frction=0.1)
