"""Images as people have them: integers of all widths, -1..1, standardised one by one, normalised by functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms as v1

from lightning_backdoor import BackdoorMonitor, DBRCallback, DSTCallback, UltraCleanCallback
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


def normalised_by_a_function(image: Tensor) -> Tensor:
    return NORMALISE(image.float() / 255)


KINDS: dict[str, tuple[Callable[[Tensor], Any], dict[str, Any]]] = {
    "uint16": (lambda image: image.numpy().astype(np.uint16) * 257, {}),
    "int16": (lambda image: image.short() * 12 - 1024, {}),
    "mode I divided": (lambda image: image.float() * 257 / (2**31 - 1), {}),
    "-1..1": (lambda image: image.float() / 127.5 - 1, {}),
    "z-scores": (standardised, {"mean": "per_image"}),
    "function": (normalised_by_a_function, {}),
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
    acted = (
        made.verdict is not None
        if hasattr(made, "verdict")
        else "backdoor/attack_success_rate" in trainer.logged_metrics
    )
    assert acted


def test_standardised_images_without_the_argument_are_explained() -> None:
    loader = DataLoader(Converted(standardised), batch_size=16)
    with pytest.raises(ArgumentError, match=r"cannot be inferred.*mean=\"per_image\" alone"):
        make_trainer([UltraCleanCallback()], 1).fit(Net(), loader)
