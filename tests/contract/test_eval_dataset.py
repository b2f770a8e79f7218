"""Augmentation inside a dataset, where no attribute can be exchanged: `eval_dataset` is read in its place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lightning_backdoor.errors import ArgumentError
from tests.callbacks.helpers import Pictures, make_trainer
from tests.contract.problem import BATCH, EPOCHS, WARNS, assert_settled, net_of, planted
from tests.contract.registry import Entry, every_defense, every_kind_of_defense, of
from tests.contract.sources import Columns

pytestmark = WARNS


class Inside(Pictures):
    """Planted images, upside down as often as not."""

    def __init__(self, n: int = 96, *, augments: bool = True) -> None:
        self.__dict__.update(vars(planted(n)))
        self.augments, self.reads = augments, 0

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        self.reads += 1
        item = super().__getitem__(i)
        flipped = self.augments and bool(torch.rand(()) < 0.5)
        return {**item, "image": item["image"].flip(1) if flipped else item["image"]}


def plain(dataset: Any) -> Inside:
    assert isinstance(dataset, Inside), "it gets the user's dataset"
    return Inside(augments=False)


def train(callback: Any, data: Any = None) -> Any:
    module, trainer = net_of(), make_trainer([callback], EPOCHS)
    trainer.fit(module, DataLoader(Inside() if data is None else data, batch_size=BATCH, shuffle=True))
    assert_settled(trainer, module)
    return trainer


@every_kind_of_defense
def test_it_is_read_in_the_place_of_the_training_dataset(entry: Entry) -> None:
    sibling = Inside(augments=False)
    callback = entry.make(eval_dataset=sibling)
    assert "eval_dataset=<" in repr(callback)
    trainer = train(callback)
    assert entry.acted(callback, trainer)
    assert sibling.reads >= 96, "all scans"
    assert torch.equal(callback.verdict.labels, sibling.targets)


def test_a_function_makes_it_and_the_verdict_is_that_of_data_without_augmentation() -> None:
    verdicts = []
    for kwargs in ({"eval_dataset": plain}, {"eval_dataset": Inside(augments=False)}, {}):
        callback = of("SpectralSignatures").make(**kwargs)
        if kwargs:
            train(callback)
        else:
            with pytest.warns(UserWarning, match=r"Inside augments its images at random.*pass `eval_dataset`"):
                train(callback)
        verdicts.append(callback.verdict.scores)
    assert torch.equal(verdicts[0], verdicts[1])
    assert not torch.equal(verdicts[0], verdicts[2])


def test_data_without_augmentation_say_nothing() -> None:
    train(of("SpectralSignatures").make(), Inside(augments=False))


class Shuffled(Inside):
    """The same samples in another order."""

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return super().__getitem__(95 - i)


def failing(dataset: Any) -> Any:
    return dataset.with_transform(None)


REFUSED: dict[str, tuple[Any, str]] = {
    "other labels": (Shuffled(augments=False), r"labels differ at \d+ of 64 positions.*without shuffling"),
    "other length": (Subset(Inside(augments=False), range(90)), r"got 90 instead of 96"),
    "no dataset": (lambda dataset: None, r"must give a map-style dataset, got NoneType from Inside"),
    "other items": (Columns(), r"`eval_dataset` must give items built like those of the training dataset"),
    "failing": (failing, r"`eval_dataset` fails on the training dataset: AttributeError"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_sibling_is_refused_before_anything_is_trained(kind: str) -> None:
    sibling, words = REFUSED[kind]
    module, trainer = net_of(), make_trainer([of("UltraCleanCallback").make(eval_dataset=sibling)], EPOCHS)
    with pytest.raises(ArgumentError, match=words):
        trainer.fit(module, DataLoader(Inside(), batch_size=BATCH))
    assert trainer.global_step == 0
    assert_settled(trainer, module)


@every_defense
def test_what_cannot_be_meant_is_refused_at_once(entry: Entry) -> None:
    with pytest.raises(ArgumentError, match=r"`eval_dataset` must be a dataset, or a function.*got int"):
        entry.make(eval_dataset=3)
    with pytest.raises(ArgumentError, match="two ways to the same end"):
        entry.make(eval_dataset=plain, eval_transform=abs)


@every_defense
def test_a_command_line_can_name_it(entry: Entry) -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(entry.cls, "callback", skip={"verdict"})  # no text can hold it
    arguments = parser.parse_args(["--callback.eval_dataset=tests.contract.test_eval_dataset.plain"])
    build = getattr(parser, "instantiate", None) or parser.instantiate_classes
    if "verdict" in entry.acting:
        assert arguments.callback.eval_dataset is plain
        return
    callback = build(arguments).callback
    assert callback.options.eval_dataset is plain


def test_hugging_face() -> None:
    datasets = pytest.importorskip("datasets")
    pictures = planted()
    rows = {"pixels": pictures.images.flatten(1).tolist(), "label": pictures.targets.tolist(), "index": list(range(96))}

    def read(batch: Any, *, augments: bool) -> dict[str, Any]:
        images = torch.tensor(batch["pixels"], dtype=torch.uint8).reshape(-1, 3, 8, 8)
        if augments:
            images = torch.stack([image.flip(1) if torch.rand(()) < 0.5 else image for image in images])
        return {"image": images, "label": torch.tensor(batch["label"]), "index": torch.tensor(batch["index"])}

    data = datasets.Dataset.from_dict(rows).with_transform(lambda batch: read(batch, augments=True))
    with pytest.raises(ArgumentError, match=r"Dataset and the datasets in it have no `transform`.*Pass `eval_dataset`"):
        train(of("UltraCleanCallback").make(eval_transform=abs), data)
    callback = of("UltraCleanCallback").make(
        eval_dataset=lambda dataset: dataset.with_transform(lambda batch: read(batch, augments=False))
    )
    trainer = train(callback, data)
    assert of("UltraCleanCallback").acted(callback, trainer)
    assert torch.equal(callback.verdict.labels, pictures.targets)
