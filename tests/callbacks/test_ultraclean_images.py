"""Images as people have them: integers of all widths, -1..1, standardised one by one, normalised by functions."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms as v1

from lightning_backdoor import BackdoorMonitor, DBRCallback, DSTCallback, NONECallback, UltraCleanCallback
from lightning_backdoor.attacks import BadNets
from lightning_backdoor.baselines import STRIP
from lightning_backdoor.errors import ArgumentError
from tests.callbacks.helpers import LIGHTNING_WARNS, Net, Pairs, make_trainer

pytestmark = LIGHTNING_WARNS

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORMALISE = v1.Normalize(MEAN, STD)


class Converted(Pairs):
    """Pairs with images of another kind."""

    def __init__(self, convert: Callable[[Tensor], Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.convert = convert

    def __getitem__(self, i: int) -> Any:
        return self.convert(self.images[i]), self.targets[i]


class Watching(Net):
    """Notes the dtype of what it is called with, and the smallest and largest value."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seen: list[tuple[torch.dtype, float, float]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append((images.dtype, float(images.double().min()), float(images.double().max())))
        return super().forward(images)


def standardised(image: Tensor) -> Tensor:
    values = image.float()
    return (values - values.mean()) / values.std()


def normalized_by_a_function(image: Tensor) -> Tensor:
    return NORMALISE(image.float() / 255)


KINDS: dict[str, tuple[Callable[[Tensor], Any], dict[str, Any]]] = {
    "uint16": (lambda image: image.numpy().astype(np.uint16) * 257, {}),
    "int16": (lambda image: image.short() * 12 - 1024, {}),
    "mode I divided": (lambda image: image.float() * 257 / (2**31 - 1), {}),
    "-1..1": (lambda image: image.float() / 127.5 - 1, {}),
    "z-scores": (standardised, {"mean": "per_image"}),
    "function": (normalized_by_a_function, {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_sees_what_it_knows(kind: str) -> None:
    convert, settings = KINDS[kind]
    data = Converted(convert)
    module, callback = Watching(), UltraCleanCallback(warmup_epochs=1, **settings)
    data.images[:, :, 0, 0], data.images[:, :, 0, 1] = 0, 255  # the ends of the range are there
    loader = DataLoader(data, batch_size=16)
    make_trainer([callback], 1).fit(module, loader)
    assert callback.verdict is not None
    images = torch.stack([torch.as_tensor(data[i][0]) for i in range(64)])
    dtypes, lows, highs = zip(*module.seen, strict=True)
    assert set(dtypes) == {images.dtype}
    width = float(images.double().max() - images.double().min())
    assert min(lows) >= float(images.double().min()) - width / 255
    assert max(highs) <= float(images.double().max()) + width / 255
    assert min(highs[1:]) > float(images.double().min()) + width / 4, "denoised images have the scale of the others"


@pytest.mark.parametrize(
    "callback",
    [
        lambda **given: DBRCallback(warmup_epochs=1, detector_steps=2, **given),
        lambda **given: DSTCallback(detector_steps=2, **given),
        lambda **given: STRIP(draws=2, **given),
        lambda **given: BackdoorMonitor(trigger=BadNets(), **given),
    ],
    ids=["D-BR", "D-ST", "STRIP", "monitor"],
)
def test_other_callbacks_take_standardised_images(callback: Any) -> None:
    made, data = callback(mean="per_image"), Converted(standardised, n=32)
    trainer = make_trainer([made], 2)
    trainer.fit(Watching(), DataLoader(data, batch_size=16), DataLoader(data, batch_size=16))
    acted(made, trainer)


def acted(callback: Any, trainer: Any) -> None:
    if isinstance(callback, BackdoorMonitor):
        assert "backdoor/attack_success_rate" in trainer.logged_metrics
    else:
        assert callback.verdict is not None


def test_a_hugging_face_dataset_that_normalizes() -> None:
    datasets, pictures = pytest.importorskip("datasets"), Pairs()

    def prepare(rows: dict[str, list[int]]) -> dict[str, list[Tensor]]:
        return {
            "pixel_values": [NORMALISE(pictures.images[i].float() / 255) for i in rows["at"]],
            "label": rows["label"],
        }

    made = datasets.Dataset.from_dict({"at": list(range(64)), "label": pictures.targets.tolist()})

    class Called(Watching):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return torch.nn.functional.cross_entropy(self(batch["pixel_values"]), batch["label"])

    callback, module = UltraCleanCallback(warmup_epochs=1), Called()
    pictures.images[:, :, 0, 0], pictures.images[:, :, 0, 1] = 0, 255
    make_trainer([callback], 1).fit(module, DataLoader(made.with_transform(prepare), batch_size=16))
    assert callback.verdict is not None
    assert min(low for _, low, _ in module.seen) >= -MEAN[0] / STD[0] - 1e-5
    assert max(high for _, _, high in module.seen) <= (1 - MEAN[2]) / STD[2] + 1e-5


def test_units_are_followed_from_integer_images() -> None:
    callback, data = NONECallback(warmup_epochs=1), Converted(KINDS["int16"][0], n=32)
    make_trainer([callback], 1).fit(Net(), DataLoader(data, batch_size=16))
    assert callback.verdict is not None


def test_standardised_images_without_the_argument_are_explained() -> None:
    loader = DataLoader(Converted(standardised), batch_size=16)
    with pytest.raises(ArgumentError, match=r"cannot be inferred.*mean=\"per_image\" alone"):
        make_trainer([UltraCleanCallback()], 1).fit(Net(), loader)


class Raw(Pairs):
    """16-bit images under keys that say nothing, next to something else of four dimensions."""

    def __getitem__(self, i: int) -> Any:
        raw = torch.from_numpy(self.images[i].numpy().astype(np.uint16) * 257)
        return {"raw": raw, "prior": self.images[i].float().mean(0, keepdim=True), "kind": self.targets[i]}


def fractions(batch: Any) -> Any:
    return batch["raw"].float() / 65535, batch["kind"]


def roots(batch: Any) -> Any:
    return (batch["raw"].float() / 65535).sqrt(), batch["kind"]


def as_they_are(batch: Any) -> Any:
    return batch["raw"], batch["kind"]


class Computing(Watching):
    """Computes its images in ``training_step``, as ``compute`` does."""

    compute = staticmethod(fractions)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.nn.functional.cross_entropy(self(self.compute(batch)[0]), batch["kind"])


class Rooting(Computing):
    compute = staticmethod(roots)


class Hooked(Computing):
    """Adds to the images on the device, in place."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch["prior"] += 1
        batch["raw"] = (batch["raw"].float() * 0.5).to(torch.uint16)
        return batch


def logits_of(module: Any, batch: Any) -> Tensor:
    return module(module.compute(batch)[0])


def scanned(module: Computing, **given: Any) -> Computing:
    callback = UltraCleanCallback(warmup_epochs=1, **given)
    make_trainer([callback], 1).fit(module, DataLoader(Raw(), batch_size=32))
    assert callback.verdict is not None
    assert {dtype for dtype, _, _ in module.seen} == {torch.float32}
    return module


@pytest.mark.parametrize(
    ("module", "given"),
    [
        (Computing, {"batch_fn": fractions}),
        (Computing, {"batch_fn": fractions, "forward_fn": logits_of}),
        (Hooked, {"batch_fn": fractions}),
        (Rooting, {"batch_fn": roots}),
    ],
    ids=["alone", "forward_fn", "hooks", "not to be undone"],
)
def test_computed_images_are_shown_denoised(module: Any, given: Any) -> None:
    seen = scanned(module(), **given).seen
    top = 0.95 if module is Rooting else 0.5 if module is Hooked else 0.9
    assert all(low >= 0 and high <= top for _, low, high in seen)
    originals, denoised = seen[-6::3], [*seen[-5::3], *seen[-4::3]]
    assert len({high for _, _, high in denoised} - {high for _, _, high in originals}) > 1
    assert min(high for _, _, high in denoised) > top / 2


@pytest.mark.parametrize("defense", [UltraCleanCallback, DSTCallback, STRIP, DBRCallback])
def test_images_that_cannot_be_replaced_are_told_at_the_start(defense: Any) -> None:
    module = Rooting()
    words = r"`batch_fn` computes.*`forward_fn` reads the batch.*Let `batch_fn` return.*or leave out `forward_fn`"
    with pytest.raises(ArgumentError, match=words):
        make_trainer([defense(batch_fn=roots, forward_fn=logits_of)], 4).fit(module, DataLoader(Raw(), batch_size=32))
    assert len(module.seen) < 6, "nothing was trained"


def test_both_ways_out_lead_out() -> None:
    scanned(Rooting(), batch_fn=as_they_are, forward_fn=logits_of)
    scanned(Rooting(), batch_fn=roots)


def test_hooks_that_change_computed_images() -> None:
    class Both(Hooked, Rooting):
        pass

    with pytest.raises(ArgumentError, match=r"the transfer hooks change them.*Let `batch_fn` return a tensor"):
        scanned(Both(), batch_fn=roots)
    scanned(Both(), batch_fn=as_they_are, forward_fn=logits_of)


@pytest.mark.parametrize(
    "callback",
    [
        lambda: DSTCallback(batch_fn=roots, detector_steps=2),
        lambda: DBRCallback(
            batch_fn=roots, warmup_epochs=1, detector_steps=2, detector=Net(), suspect=0.1, forward_fn=logits_of
        ),
        lambda: STRIP(batch_fn=roots, draws=2),
        lambda: BackdoorMonitor(trigger=BadNets(), batch_fn=roots, mean=[0.0], std=[1.0]),
    ],
    ids=["D-ST", "D-BR with a detector", "STRIP", "monitor"],
)
def test_other_callbacks_show_computed_images(callback: Any) -> None:
    made, loader = callback(), DataLoader(Raw(n=32), batch_size=16)
    trainer = make_trainer([made], 2)
    trainer.fit(Validating(), loader, loader)
    acted(made, trainer)


class Validating(Rooting):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


def test_a_monitor_says_what_it_cannot_paint() -> None:
    monitor = BackdoorMonitor(trigger=BadNets(), batch_fn=roots, forward_fn=logits_of, mean=[0.0], std=[1.0])
    loader = DataLoader(Raw(n=32), batch_size=16)
    with pytest.raises(ArgumentError, match=r"`forward_fn` reads the batch"):
        make_trainer([monitor], 1).fit(Validating(), loader, loader)


def test_the_range_of_integers_is_told(caplog: pytest.LogCaptureFixture) -> None:
    data = Converted(KINDS["int16"][0])
    with caplog.at_level(logging.INFO):
        make_trainer([UltraCleanCallback()], 1, limit_train_batches=1).fit(Net(), DataLoader(data, batch_size=16))
    assert "Pixels 0 and 255 stand for the values -1024 and" in caplog.text
