"""Strong views: pixels in, pixels out, by a seed."""

from __future__ import annotations

import pytest
import torch

from lightning_backdoor.data.strong import strong_view


@pytest.mark.parametrize("shape", [(5, 3, 32, 32), (5, 1, 28, 20), (5, 4, 9, 9)], ids=str)
def test_views_are_pixels_of_the_same_shape_by_a_seed(shape: tuple[int, ...]) -> None:
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before, state = pixels.clone(), torch.get_rng_state()
    view = strong_view(pixels, seed=1)
    assert view.shape == pixels.shape
    assert view.dtype == torch.uint8
    assert torch.equal(view, strong_view(pixels, seed=1))
    assert not torch.equal(view, strong_view(pixels, seed=2))
    assert torch.equal(pixels, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_image_is_changed_in_its_own_way() -> None:
    pixels = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8).repeat(64, 1, 1, 1)
    view = strong_view(pixels, seed=0)
    assert len(torch.unique(view.flatten(1), dim=0)) == 64
    gray = ((view[:, 0].int() - view[:, 1]).abs() <= 1).flatten(1).all(dim=1)
    assert 0.05 < float(gray.float().mean()) < 0.4, "one in five has no colours"


def test_a_crop_is_a_part_of_the_image() -> None:
    ramp = torch.arange(0, 256, 8, dtype=torch.uint8).expand(32, 1, 32, 32).contiguous()
    view = strong_view(ramp, seed=0).float()
    across = view[:, 0].diff(dim=2)
    assert bool(((across >= -1).flatten(1).all(dim=1) | (across <= 1).flatten(1).all(dim=1)).all()), "or its mirror"
    spread = view.flatten(1).amax(dim=1) - view.flatten(1).amin(dim=1)
    assert float(spread.min()) < 150 < float(spread.max())
