"""What images have in common is put on others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_backdoor.detection.common_pattern import WAYS, agreed_region, put_on


def noise(n: int, seed: int = 0, side: int = 8) -> Tensor:
    return torch.randint(40, 200, (n, 3, side, side), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def stamped(images: Tensor) -> Tensor:
    changed = images.clone()
    changed[..., :2, :2] = 255
    return changed


def test_members_agree_where_their_trigger_is() -> None:
    region = agreed_region(stamped(noise(64)), noise(64, 1))
    assert bool(region[0, :2, :2].all())
    assert int(region.sum()) == 4
    assert not bool(agreed_region(noise(64), noise(64, 1)).any())


def test_members_agree_where_ordinary_images_agree_on_something_else() -> None:
    black = torch.zeros(64, 3, 8, 8, dtype=torch.uint8)
    assert int(agreed_region(stamped(black), black).sum()) == 4


def test_a_stamp_is_pasted() -> None:
    images, members = noise(5, 2), stamped(noise(64))
    region = agreed_region(members, noise(64, 1))
    changed = put_on(images, torch.arange(5), members, usual=noise(64, 3), region=region, way="paste")
    assert torch.equal(changed, stamped(images))


def test_a_sum_comes_back_as_a_difference() -> None:
    """Up to the noise of two means of 4,000 images each."""
    stripes = torch.zeros(3, 8, 8, dtype=torch.uint8)
    stripes[..., ::2] = 30
    images, members, usual = noise(5, 2), noise(4000) + stripes, noise(4000, 1)
    region = torch.zeros(1, 8, 8, dtype=torch.bool)
    changed = put_on(images, torch.arange(5), members, usual=usual, region=region, way="difference")
    assert float((changed.float() - (images + stripes).float()).abs().mean()) < 2


def test_members_are_blended_in_turn() -> None:
    images, members = noise(5, 2), noise(2)
    changed = put_on(images, torch.arange(5) + 1, members, usual=members, region=agreed_region(members, images),
                     way="blend")  # fmt: skip
    assert torch.allclose(changed[0].float(), (images[0].float() + members[1]) / 2, atol=0.5)
    assert torch.allclose(changed[1].float(), (images[1].float() + members[0]) / 2, atol=0.5)


@pytest.mark.parametrize("way", WAYS)
def test_members_of_another_size_are_resized(way: str) -> None:
    members = noise(6, side=12)
    region = torch.zeros(1, 12, 12, dtype=torch.bool)
    changed = put_on(noise(5), torch.arange(5), members, usual=members, region=region, way=way)
    assert changed.shape == (5, 3, 8, 8)
    assert changed.dtype == torch.uint8
