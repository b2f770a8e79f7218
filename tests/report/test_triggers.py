from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.functional import InvertedTrigger
from lightning_backdoor.report import Evidence, trigger_sheet, write_trigger_sheet

pytest.importorskip("matplotlib")

from PIL import Image


def triggers(channels: int = 3) -> dict[float, InvertedTrigger]:
    """Two triggers of one colour each: the first row of the image, and the first two rows."""
    found = {}
    for rows, shade in ((1, 51), (2, 102)):
        mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
        mask[:, :, :rows] = True
        pattern = torch.full((1, channels, 8, 8), shade / 255) * mask
        found[rows / 8] = InvertedTrigger(target=rows, mask=mask, pattern=pattern, success=0.75)
    return found


def images(channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """One image of each class, of the colours 10, 20 and 30."""
    return torch.tensor([10, 20, 30]).byte().view(3, 1, 1, 1).expand(3, channels, 8, 8), torch.arange(1, 4)


def grays(png: bytes) -> dict[int, int]:
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    gray = pixels[(pixels == pixels[..., :1]).all(axis=2)][:, 0]
    return dict(zip(*(values.tolist() for values in np.unique(gray, return_counts=True)), strict=True))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_sheet_shows_patterns_masks_and_images(channels):
    found = grays(trigger_sheet(triggers(channels), *images(channels)))
    row = 225 * 225 / 8  # pixels of the picture that one row of a tile has
    assert found[51] == pytest.approx(2 * row, rel=0.1)  # alone and on the image
    assert found[102] == pytest.approx(4 * row, rel=0.1)
    assert found[20] == pytest.approx(15 * row, rel=0.1)  # target 1: the first image of another class is the second
    assert found[10] == pytest.approx(14 * row, rel=0.1)
    assert found[0] > 26 * row * 0.95  # what the triggers and the masks leave free


def test_floats_are_the_same_pixels():
    pixels, labels = images()
    assert trigger_sheet(triggers(), pixels.float() / 255, labels) == trigger_sheet(triggers(), pixels, labels)


def test_class_names_cannot_break_the_sheet():
    sheet = trigger_sheet(triggers(), *images(), classes=["a", "$\\frac{", "two\nlines 猫"])
    assert Evidence(figures={"Triggers": sheet}).figures["Triggers"] == sheet


def test_the_file_is_the_sheet(tmp_path):
    path = write_trigger_sheet(tmp_path / "new" / "triggers.png", triggers(), *images())
    assert path.read_bytes() == trigger_sheet(triggers(), *images())
    assert list(path.parent.iterdir()) == [path]


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ArgumentError, match="`triggers` must hold at least one trigger"):
        write_trigger_sheet(tmp_path / "triggers.png", {}, *images())
    pixels, labels = images()
    with pytest.raises(ArgumentError, match="`images` must hold one of another class than the target 1"):
        trigger_sheet(triggers(), pixels[:1], labels[:1])
    assert not list(tmp_path.iterdir())
