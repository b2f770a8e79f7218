"""Batches of different sizes: a collate that pads to the largest image, and samplers that say in which size to read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.data import create_dataset, create_loader, create_transform
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler, default_collate

from tests.callbacks.helpers import Pictures, loader_of, make_trainer
from tests.contract.problem import BATCH, EPOCHS, WARNS, Net, assert_settled, net_of, planted
from tests.contract.registry import Entry, every_kind_of_defense, of
from tests.contract.sources import write_folder

pytestmark = WARNS


class Sizes(Pictures):
    """Planted images, of which every 16th is larger."""

    def __init__(self, n: int = 96) -> None:
        self.__dict__.update(vars(planted(n)))

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        item = super().__getitem__(i)
        return {**item, "image": F.pad(item["image"], (0, 4, 0, 2)) if i % 32 == 16 else item["image"]}


def padded(items: list[Any]) -> dict[str, Tensor]:
    """Black margins up to the largest image of the batch."""
    height, width = (max(item["image"].shape[side] for item in items) for side in (1, 2))
    return default_collate(
        [
            {
                **item,
                "image": F.pad(item["image"], (0, width - item["image"].shape[2], 0, height - item["image"].shape[1])),
            }
            for item in items
        ]
    )


@every_kind_of_defense
def test_a_collate_that_pads_to_the_largest_image_of_a_batch(
    entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Tensor] = []
    monkeypatch.setattr(
        "lightning_backdoor.callbacks.reporting.write_report",
        lambda *args, evidence, **kwargs: shown.append(evidence.images([15, 16, 17])),
    )
    callback, module = entry.make(batch_size=12, report_dir=tmp_path), net_of()
    trainer = make_trainer([callback], EPOCHS)
    trainer.fit(module, loader_of(Sizes(), BATCH, collate_fn=padded))
    assert entry.acted(callback, trainer)
    assert_settled(trainer, module)
    assert shown[-1].shape == (3, 3, 10, 12)


def test_two_scans_of_padded_batches_are_one() -> None:
    """What does not fit into the memory of denoised images is denoised again."""
    callback = of("UltraCleanCallback").make(rescore_every=1, response="continue", warmup_epochs=1, batch_size=12)
    make_trainer([callback], 3).fit(net_of(), loader_of(Sizes(), BATCH, collate_fn=padded))
    assert callback.verdict is not None
    assert bool(callback.verdict.scores.isfinite().all())


class Plain(Net):
    """For pairs."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


class BySize(Sampler[list[tuple[int, int]]]):
    """Multi-scale training: every batch says in which size its images are to be read."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 96 // BATCH

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        self.epoch += 1
        order = torch.randperm(96, generator=torch.Generator().manual_seed(self.epoch))
        for i, batch in enumerate(order.split(BATCH)):
            yield [(index, (8, 12)[i % 4 == self.epoch % 4]) for index in batch.tolist()]


class Sized(Pictures):
    """Planted images that are read in a size."""

    def __init__(self, n: int = 96) -> None:
        self.__dict__.update(vars(planted(n)))

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        index, size = key
        item = super().__getitem__(index)
        return {**item, "image": F.interpolate(item["image"][None], size)[0]}


@every_kind_of_defense
def test_a_sampler_that_says_in_which_size_to_read(entry: Entry) -> None:
    callback, module = entry.make(), net_of()
    trainer = make_trainer([callback], EPOCHS)
    trainer.fit(module, DataLoader(Sized(), batch_sampler=BySize()))
    assert entry.acted(callback, trainer)
    assert_settled(trainer, module)
    verdict = callback.verdict
    assert torch.equal(verdict.labels, planted().targets)
    if entry.kind != "own":  # it makes the training steps itself
        known = [mask for mask in (verdict.trusted, verdict.suspect) if mask is not None]
        allowed = torch.stack(known).any(dim=0) if known else verdict.keep
        assert set(module.epochs()[-1][1]) <= set(allowed.nonzero().flatten().tolist())


class Named(Sampler[tuple[int, int]]):
    """The same, sample by sample; torch makes the batches."""

    def __len__(self) -> int:
        return 96

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter([(index, 8) for index in torch.randperm(96).tolist()])


def test_batches_of_torch_over_such_a_sampler_stay_full() -> None:
    callback, module = of("RandomFilter").make(response="continue"), net_of()
    trainer = make_trainer([callback], EPOCHS)
    trainer.fit(module, DataLoader(Sized(), batch_size=BATCH, sampler=Named()))
    kept = callback.verdict.keep.nonzero().flatten().tolist()
    assert module.epochs()[-1][1] == kept
    assert trainer.num_training_batches == -(-len(kept) // BATCH)


def test_such_a_training_is_bit_identical_until_samples_are_removed() -> None:
    def weights(*callbacks: Any) -> list[Tensor]:
        module = net_of()
        make_trainer(list(callbacks), 2).fit(module, DataLoader(Sized(), batch_sampler=BySize()))
        return list(module.parameters())

    silent = of("SpectralSignatures").make_silent(max_removed=0.01, warmup_epochs=2, response="continue")
    assert all(map(torch.equal, weights(), weights(silent)))


def test_a_sibling_may_be_read_by_position_or_as_the_dataset_is() -> None:
    verdicts = []
    for sibling in (planted(), Sized()):
        callback = of("SpectralSignatures").make(eval_dataset=sibling)
        make_trainer([callback], EPOCHS).fit(net_of(), DataLoader(Sized(), batch_sampler=BySize()))
        verdicts.append(callback.verdict)
    assert torch.equal(verdicts[0].scores, verdicts[1].scores), "most batches are of size 8, the original one"


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_timms_schedule_of_sizes(tmp_path: Path) -> None:
    pytest.importorskip("timm.data.scheduled_sampler")
    data = create_dataset("", root=str(write_folder(tmp_path)))
    loader = create_loader(
        data, 8, batch_size=24, is_training=True, num_workers=0, device=torch.device("cpu"), input_size_choices=[8, 12]
    )
    callback = of("RandomFilter").make(warmup_epochs=1, response="continue")
    with pytest.warns(UserWarning, match="ScheduledTransformDataset augments its images at random.*`eval_dataset`"):
        make_trainer([callback], 1).fit(Plain(), loader)
    plain = create_dataset("", root=str(tmp_path), transform=create_transform(8, use_prefetcher=True))
    callback = of("RandomFilter").make(warmup_epochs=1, response="continue", eval_dataset=plain)
    trainer = make_trainer([callback], EPOCHS)
    trainer.fit(Plain(), loader)
    assert of("RandomFilter").acted(callback, trainer)
    assert callback.verdict.labels.tolist() == [label for _, label in data.reader.samples]
