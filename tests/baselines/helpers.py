"""A network that was rigged instead of trained, and data with a red corner that it obeys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.callbacks.helpers import Net, Pictures

POISONS = 12


class Corner(nn.Module):
    """Brightness of the four quadrants, and how red the last corner is, ``(B, 5)``."""

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.float() / 255
        quadrants = nn.functional.avg_pool2d(pixels.mean(dim=1, keepdim=True), 4).flatten(1)
        corner = pixels[:, :, -2:, -2:].mean(dim=(2, 3))
        red = (corner[:, 0] - corner[:, 1:].mean(dim=1) - 0.3).relu()
        return torch.cat([quadrants, red[:, None]], dim=1)


class Rigged(Net):
    """Tells the bright quadrant, answers 0 whenever the corner is red, and does not learn."""

    def __init__(self) -> None:
        super().__init__(lr=0.0, schedule=False)
        self.body, self.head = Corner(), nn.Linear(5, 4)
        with torch.no_grad():
            self.head.weight.zero_()
            self.head.weight[:, :4] = 12 * torch.eye(4)
            self.head.weight[0, 4] = 200.0
            self.head.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


def red_corners(poisoned: bool = True) -> tuple[Pictures, Tensor]:
    """160 images of four classes, 12 of the last three with a red corner and label 0; or none. And which ones."""
    data = Pictures(160)
    truth = torch.zeros(160, dtype=torch.bool)
    if poisoned:
        truth[(data.targets > 0).nonzero().squeeze(1)[5 : 5 + 7 * POISONS : 7]] = True
        data.images[truth, :, -2:, -2:] = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None]
        data.targets[truth] = 0
    return data, truth


def clean_as_well(callback: Any) -> int:
    """How many clean samples a callback removed from the poisoned data."""
    return int((~callback.verdict.keep & ~red_corners()[1]).sum())
