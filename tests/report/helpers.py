"""Fabricated verdicts and images for the report."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_backdoor.report import Evidence
from lightning_backdoor.verdict import Verdict


def verdict(n: int = 200, removed: int = 20, *, classes: int = 4, labels: bool = True) -> Verdict:
    """A verdict whose ``removed`` highest scores carry label 1."""
    generator = torch.Generator().manual_seed(n)
    scores = torch.rand(n, generator=generator)
    scores[:removed] += 2
    given = torch.arange(n) % classes
    given[:removed] = 1
    return Verdict(
        scores=scores,
        keep=torch.arange(n) >= removed,
        threshold=1.5 if removed else float("inf"),
        rule="auto(0.3)",
        labels=given if labels else None,
    )


def evidence(channels: int = 3, size: int = 8, **changes: object) -> Evidence:
    def images(positions: object) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, 256, (len(positions), channels, size, size), generator=generator).to(torch.uint8)

    def denoised(positions: object) -> list[Tensor]:
        return [images(positions) // 2, images(positions)]

    settings: dict[str, object] = {"classes": ["cat", "dog", "cow", "owl"], "images": images, "denoised": denoised}
    return Evidence(**{**settings, **changes})
