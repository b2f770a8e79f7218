"""What cannot work is said early, by words that name the remedy, and nothing of the user's is harmed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BaseFinetuning
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler

from lightning_backdoor import DBRCallback, DSTCallback, NONECallback, UltraCleanCallback
from lightning_backdoor.callbacks.base import Defense
from lightning_backdoor.errors import ArgumentError, BackdoorDefenseError, DataError, ModelError, TrainerError
from tests.callbacks.helpers import LIGHTNING_WARNS, Net, Pairs, Pictures, always, make_trainer, state_of

pytestmark = [
    *LIGHTNING_WARNS,
    pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined"),
    pytest.mark.filterwarnings("ignore:Total length of `(DataLoader|CombinedLoader)` across ranks is zero"),
]


def refused(
    callback: UltraCleanCallback, train: Any, match: str, kind: Any = BackdoorDefenseError, **kwargs: Any
) -> Any:
    """The fit raises; user objects, Trainer and weights are as before; a correct fit with the same Trainer works."""
    module, trainer = Net(), make_trainer([callback], epochs=2, **kwargs)
    methods = (set(vars(trainer.fit_loop)), set(vars(trainer.strategy)))
    loader = dict(vars(train)) if isinstance(train, DataLoader) else None
    dataset = dict(vars(train.dataset)) if loader else None
    weights = state_of(module)
    with pytest.raises(kind, match=match) as error:
        trainer.fit(module, train)
    assert isinstance(error.value, BackdoorDefenseError)
    assert "setup_data" not in set(vars(trainer.fit_loop)) - methods[0]
    assert "process_dataloader" not in set(vars(trainer.strategy)) - methods[1]
    if loader is not None:
        assert vars(train).keys() == loader.keys()
        assert all(vars(train)[key] is value for key, value in loader.items())
        assert vars(train.dataset) == dataset
    if not module.logged:
        assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    assert "log" not in vars(module)
    assert module.training
    fine, good = make_trainer([always(warmup_epochs=1)], epochs=1), Net()
    fine.fit(good, DataLoader(Pictures(), batch_size=16))
    return error.value


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from (Pairs()[i] for i in range(64))


class Changed(Pairs):
    """Pairs with one thing wrong."""

    def __init__(self, item: Any = None, n: int = 64) -> None:
        super().__init__(max(n, 1))
        self.n, self.item = n, item or (lambda image, label, i: (image, label))

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Any:
        return self.item(*super().__getitem__(i), i)


class Endless(Sampler[int]):
    def __init__(self) -> None:
        pass

    def __iter__(self) -> Iterator[int]:
        while True:
            yield 0


def test_iterable_dataset() -> None:
    refused(
        UltraCleanCallback(),
        DataLoader(Stream(), batch_size=16),
        r"map-style.*DataLoader over the Stream.*Load the data into",
        DataError,
    )


def test_empty_dataset() -> None:
    refused(
        UltraCleanCallback(), DataLoader(Changed(n=0), batch_size=16), r"empty.*length 0.*Check its path", DataError
    )


def test_nan_images_at_the_start_and_in_the_scan() -> None:
    def nan_at(*where: int) -> Any:
        return lambda x, y, i: (x.float() / 255 * (float("nan") if i in where else 1.0), y)

    words = r"(?s)(finite|NaN).*(remove|look|Remove|Look|Repair|repair)"
    refused(UltraCleanCallback(), DataLoader(Changed(nan_at(0)), batch_size=16), words, DataError)
    loader = DataLoader(Late(nan_at(151)), batch_size=40)
    callback = UltraCleanCallback(warmup_epochs=1)
    error = refused(callback, loader, words, DataError)
    assert "151" in str(error), "the position is named"
    assert callback.verdict is None


class Late(Changed):
    """More images than are looked at in the beginning."""

    def __init__(self, item: Any) -> None:
        Pairs.__init__(self, 200)
        self.n, self.item = 200, item


def test_labels_out_of_range() -> None:
    loader = DataLoader(Changed(lambda x, y, i: (x, y - 1)), batch_size=16)
    refused(UltraCleanCallback(), loader, r"class indices.*-1", DataError)

    class Loose(Net):
        def training_step(self, batch: Any, i: int) -> Tensor:
            return super().training_step((batch[0], batch[1] % 4), i)

    with pytest.raises(DataError, match=r"class indices below 4.*got 7.*more outputs or number the classes from 0"):
        make_trainer([UltraCleanCallback()], 1).fit(
            Loose(), DataLoader(Changed(lambda x, y, i: (x, y + 4)), batch_size=16)
        )


def test_labels_with_fractions() -> None:
    refused(
        UltraCleanCallback(),
        DataLoader(Changed(lambda x, y, i: (x, y + 0.5)), batch_size=16),
        r"not class indices.*float32.*fractions.*Let the dataset return",
        DataError,
    )


def test_no_labels_and_no_images() -> None:
    refused(UltraCleanCallback(), DataLoader(Changed(lambda x, y, i: (x,)), batch_size=16), r"no labels.*batch_fn")
    refused(UltraCleanCallback(), DataLoader(Changed(lambda x, y, i: (x.flatten(), y)), batch_size=16), r"`batch_fn`")


def test_a_sampler_without_length() -> None:
    refused(UltraCleanCallback(), DataLoader(Pairs(), batch_size=16, sampler=Endless()), r"__len__|length", DataError)


def test_pixel_space_that_cannot_be_inferred() -> None:
    strange = DataLoader(Changed(lambda x, y, i: (x.float() * 37 - 4000, y)), batch_size=16)
    refused(UltraCleanCallback(), strange, r"`mean`.*`std`", ArgumentError)
    callback = UltraCleanCallback(mean=[4000 / 37 / 255] * 3, std=[1 / 37 / 255] * 3)
    make_trainer([callback], 1).fit(Net(), strange)
    assert callback.verdict is not None


def test_a_mask_that_leaves_less_than_a_batch() -> None:
    callback = always(warmup_epochs=1, max_removed=0.9, fraction=0.6)
    error = refused(callback, DataLoader(Pictures(), batch_size=40, drop_last=True), r"batch", DataError)
    assert any(word in str(error) for word in ("batch_size", "drop_last", "max_removed"))


def test_a_mask_that_is_refused_leaves_no_verdict_and_no_report(tmp_path: Path) -> None:
    callback = always(warmup_epochs=1, max_removed=0.9, fraction=0.6, report_dir=tmp_path / "report")
    train = DataLoader(Pictures(), batch_size=40, drop_last=True)
    refused(callback, train, "less than one batch", DataError)
    assert callback.verdict is None
    assert [path.suffix for path in (tmp_path / "report").iterdir()] == [".ckpt"], "of the trained weights, no report"
    assert callback.history == []
    assert len(train) == 1


def test_one_label_only() -> None:
    train = DataLoader(Changed(lambda x, y, i: (x, torch.tensor(2))), batch_size=16)
    refused(UltraCleanCallback(warmup_epochs=1), train, r"at least two classes.*class 2.*without this", DataError)


def test_unknown_feature_layer() -> None:
    error = refused(UltraCleanCallback(feature_layer="boddy"), DataLoader(Pictures(), batch_size=16), r"feature_layer")
    assert "boddy" in str(error)
    assert "body" in str(error), "what there is"


def test_target_class_beyond_the_outputs() -> None:
    refused(UltraCleanCallback(target_class=4), DataLoader(Pictures(), batch_size=16), r"`target_class`.*4")


def test_forward_that_needs_more_than_images() -> None:
    class Two(Net):
        def forward(self, images: Tensor, labels: Tensor) -> Tensor:
            return super().forward(images)

        def training_step(self, batch: Any, i: int) -> Tensor:
            return nn_loss(self(batch["image"], batch["label"]), batch["label"])

    nn_loss = torch.nn.functional.cross_entropy
    with pytest.raises(ModelError, match="forward_fn"):
        make_trainer([UltraCleanCallback()], 1).fit(Two(), DataLoader(Pictures(), batch_size=16))
    callback = UltraCleanCallback(forward_fn=lambda module, batch: module(batch["image"], batch["label"]))
    make_trainer([callback], 1).fit(Two(), DataLoader(Pictures(), batch_size=16))
    assert callback.verdict is not None


@pytest.mark.parametrize(
    ("argument", "value", "match"),
    [
        ("max_removed", 5, r"`max_removed` must be a fraction between 0 and 1, got 5.*5 per cent, pass 0.05"),
        ("max_removed", 0, r"`max_removed` must be a fraction"),
        ("max_removed", 1.0, r"`max_removed` must be a fraction"),
        ("fraction", -0.1, r"`fraction` must be a fraction"),
        ("fraction", 20, r"20 per cent, pass 0.2"),
        ("warmup_epochs", 0, r"`warmup_epochs` must be a whole number of at least 1, or None, got 0"),
        ("warmup_epochs", 2.5, r"`warmup_epochs`.*2.5"),
        ("rescore_every", -1, r"`rescore_every`"),
        ("score", "logits", r"`score` must be one of 'auto', 'paper', got 'logits'"),
        ("output", "probs", r"`output` must be one of 'logits', 'softmax'"),
        ("rule", "top", r"`rule` must be one of 'auto', 'fraction'"),
        ("target_class", -1, r"`target_class` must be a class index"),
    ],
)
def test_arguments(argument: str, value: Any, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        UltraCleanCallback(**{argument: value})


def test_positional_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="positional"):
        UltraCleanCallback(5)  # type: ignore[misc]


def test_sharded_strategies() -> None:
    class FSDPStrategy(pl.strategies.SingleDeviceStrategy):
        """By its name a strategy that keeps parameters in pieces."""

    with pytest.raises(TrainerError, match=r"FSDPStrategy.*shards.*ddp"):
        make_trainer([UltraCleanCallback()], 1, strategy=FSDPStrategy("cpu")).fit(
            Net(), DataLoader(Pictures(), batch_size=16)
        )


def test_callbacks_that_cannot_go_back() -> None:
    class Thaw(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None: ...

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None: ...

    with pytest.raises(TrainerError, match=r'parameter groups.*response="continue'):
        make_trainer([UltraCleanCallback(), Thaw()], 1).fit(Net(), DataLoader(Pictures(), batch_size=16))


@pytest.mark.parametrize("schema", [0, 99])
@pytest.mark.parametrize("callback", [UltraCleanCallback, NONECallback, DBRCallback, DSTCallback])
def test_the_checkpoint_of_another_release_is_not_misread(callback: Any, schema: int) -> None:
    with pytest.raises(ArgumentError, match=r"another release of lightning_backdoor.*Resume with that release"):
        callback().load_state_dict({"schema": schema, "verdict": None})


def test_every_error_is_told_before_the_first_step() -> None:
    module = Net()
    with pytest.raises(DataError):
        make_trainer([UltraCleanCallback()], 1).fit(
            module, DataLoader(Changed(lambda x, y, i: (x, y + 0.5)), batch_size=16)
        )
    assert module.logged == []
    assert issubclass(UltraCleanCallback, Defense)
