"""The rule that nobody has chosen acts by itself: it finds the planted images, and each callback does what it is for.

The other cells make a callback act by a share or by the paper's rule, whatever the data are; these leave ``rule`` as it
is. One training of each callback serves all that only looks at it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch

from lightning_backdoor import DBRCallback, DSTCallback, NONECallback, UltraCleanCallback
from lightning_backdoor.report.of_events import sentence
from tests.callbacks.helpers import Pictures, make_trainer, same_state
from tests.callbacks.test_ultraclean_resume import SaveAll
from tests.contract.problem import WARNS, Run, assert_settled, fit, net_of
from tests.contract.test_lifecycle import Cable
from tests.contract.test_resume import assert_same_end

pytestmark = WARNS

EPOCHS, IMAGES, POISONS = 4, 240, 18
QUICK = {"detector_steps": 20, "num_transforms": 1}
MAKE: dict[str, Callable[..., Any]] = {
    "UltraClean": lambda **kwargs: UltraCleanCallback(**{"warmup_epochs": 3, **kwargs}),
    "NONE": lambda **kwargs: NONECallback(finetune_epochs=1, extra_epochs=1, **kwargs),
    "D-BR": lambda **kwargs: DBRCallback(**QUICK, epochs=2, extra_epochs=2, **kwargs),
    "D-ST": lambda **kwargs: DSTCallback(**QUICK, **kwargs),
}
every_default = pytest.mark.parametrize("name", MAKE)


class Smooth(Pictures):
    """Bright quadrants under little noise."""

    def __init__(self, n: int = IMAGES) -> None:
        super().__init__(n)
        noise = torch.randint(0, 30, self.images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        places = torch.arange(self.images.shape[-1]) >= self.images.shape[-1] // 2
        rows, columns = self.targets // 2 % 2 == 1, self.targets % 2 == 1
        bright = (places == rows[:, None])[:, None, :, None] & (places == columns[:, None])[:, None, None, :]
        self.images = noise + 100 * bright.byte()


def clean() -> Smooth:
    return Smooth()


def planted() -> Smooth:
    """Some images of the other three classes with white dots and label 0; ``poisoned`` says which."""
    data = Smooth()
    others = (data.targets > 0).nonzero().flatten()
    data.poisoned = torch.zeros(IMAGES, dtype=torch.bool)
    data.poisoned[others[:: len(others) // POISONS][:POISONS]] = True
    data.images[data.poisoned, :, 1::3, 1::3] = 255
    data.targets[data.poisoned] = 0
    return data


def train(*callbacks: Any, **kwargs: Any) -> Run:
    return fit(list(callbacks), kwargs.pop("data", None) or planted(), epochs=EPOCHS, **kwargs)


class Whole(NamedTuple):
    """A training that nothing has interrupted."""

    callback: Any
    run: Run
    saved: list[Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Whole]:
    @cache
    def trained(name: str) -> Whole:
        callback, saver = MAKE[name](), SaveAll(tmp_path_factory.mktemp("whole"))
        return Whole(callback, train(callback, saver), saver.paths)

    return trained


def begun(run: Run) -> list[int]:
    """The epochs of the training, in their order."""
    return [epoch for epoch, _ in run.module.epochs()]


@every_default
def test_the_planted_images_are_found_and_no_others(name: str, whole: Any) -> None:
    callback, run, _ = whole(name)
    assert torch.equal(~callback.verdict.keep, planted().poisoned)
    assert "subpopulation" in callback.verdict.rule
    assert callback.verdict.threshold < float("inf")
    assert_settled(run.trainer, run.module, run.loader, run.before, epochs=EPOCHS)


@every_default
def test_the_clean_twin_is_left_alone(name: str) -> None:
    callback = MAKE[name]()
    run = train(callback, data=clean())
    assert bool(callback.verdict.keep.all())
    assert begun(run) == [*range(EPOCHS)]
    assert same_state(train(data=clean()).module, run.module)


def test_ultraclean_restarts_on_the_rest(whole: Any) -> None:
    callback, run, _ = whole("UltraClean")
    assert begun(run) == [*range(3), *range(EPOCHS)]
    assert run.module.epochs()[-1][1] == callback.verdict.keep.nonzero().flatten().tolist()


def test_after_its_restart_ultraclean_says_what_the_model_makes_of_the_images_and_of_their_class(whole: Any) -> None:
    callback = whole("UltraClean").callback
    ((label, kept, removed),) = callback.history[-1].of_labels
    assert (label, callback.history[-1].removed) == (0, 0)
    assert kept > 0.5 > removed, "it was not trained on them, and their labels are wrong"
    told = f"Label 0: {kept:.1%} of its kept images get it, {removed:.1%} of its removed ones."
    assert told in sentence(callback.history, len(callback.verdict))
    assert callback.history[0].of_labels == (), "the model before it was trained on them"


def test_none_resets_units_and_drops_the_images(whole: Any) -> None:
    callback, run, _ = whole("NONE")
    assert any(past.units for past in callback.history)
    assert run.module.epochs()[-1][1] == callback.verdict.keep.nonzero().flatten().tolist()


def test_dbr_unlearns(whole: Any) -> None:
    callback, run, _ = whole("D-BR")
    assert not all(callback.history[-1].undone_steps), "an epoch of the repair stands"
    assert torch.equal(callback.verdict.suspect, planted().poisoned)
    drawn = set(run.module.epochs()[-1][1])
    assert drawn == set((callback.verdict.suspect | callback.verdict.trusted).nonzero().flatten().tolist())


def test_dst_trains_in_two_stages(whole: Any) -> None:
    callback, run, _ = whole("D-ST")
    (history,) = callback.history
    assert len(history.losses) == run.trainer.current_epoch == EPOCHS
    assert 0 < history.feature_epochs < EPOCHS
    assert not bool((callback.verdict.trusted & planted().poisoned).any())


@every_default
@pytest.mark.parametrize("which", ["first", "middle", "last"])
def test_resumed_it_ends_the_same(name: str, which: str, whole: Any) -> None:
    expected = whole(name)
    paths = [path for path in expected.saved if "epoch_end" in path.name]
    path = paths[{"first": 0, "middle": len(paths) // 2, "last": -1}[which]]
    callback = MAKE[name]()
    run = train(callback, ckpt=path)
    assert_same_end(expected.callback, expected.run, callback, run, path.name)


@every_default
def test_after_an_error_the_next_fit_works(name: str, whole: Any) -> None:
    expected = whole(name)
    callback, cable, module = MAKE[name](), Cable(EPOCHS - 1), net_of()
    trainer = make_trainer([callback, cable], EPOCHS)
    with pytest.raises(RuntimeError, match="the cable"):
        fit([], planted(), module=module, trainer=trainer)
    assert_settled(trainer, module, epochs=EPOCHS)
    run = train(callback, cable)
    assert torch.equal(callback.verdict.keep, expected.callback.verdict.keep)
    assert_settled(run.trainer, run.module, run.loader, run.before, epochs=EPOCHS)


@pytest.mark.parametrize("names", [*pairwise(list(MAKE)[:3]), ("D-BR", "UltraClean")], ids=" and ".join)
def test_two_on_one_trainer_agree_on_the_images(names: tuple[str, str]) -> None:
    callbacks = [MAKE[name]() for name in names]
    run = train(*callbacks)
    removed = [~callback.verdict.keep for callback in callbacks]
    assert torch.equal(torch.stack(removed).any(dim=0), planted().poisoned)
    assert_settled(run.trainer, run.module, run.loader, run.before, epochs=EPOCHS)
