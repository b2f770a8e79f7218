"""Fabricated verdicts and images for the report."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_backdoor.report import Evidence
from lightning_backdoor.verdict import Finding, GateFigure, Verdict


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


def finding(label: int, positions: Tensor, **changes: object) -> Finding:
    """A group that passed a gate, with the defaults of a finding that nothing more is known of."""
    figures = (
        GateFigure("standardized_gap", 5.125, ">=", 2.5),
        GateFigure("largest_other_gap", 0.5, "<", 1.6),
        GateFigure("a_new_figure", 3.0, ">", 1.0),
    )
    settings: dict[str, object] = {"gate": "strict", "figures": figures, "threshold": 0.5, **changes}
    return Finding(label=label, positions=positions, units=torch.arange(2), weights=torch.ones(2), **settings)


def explained(n: int = 200) -> Verdict:
    """Three findings: 20 removed images with wrong labels, 30 with right ones, 6 of which are kept, and 5 unclear."""
    plain = verdict(n, 20)
    keep, labels = plain.keep.clone(), plain.labels.clone()
    labels[50:80], labels[90:95] = 2, 3
    keep[50:74], keep[90:95] = False, False
    sure = torch.linspace(0.8, 1.0, 20)
    first = finding(
        1,
        torch.arange(20),
        diagnosis="wrong labels",
        suggested_labels=torch.tensor([0] * 12 + [3] * 6 + [1, -1]),
        suggested_confidences=sure,
        reference_accuracy=0.97,
        reference_confidence=0.95,
        estimated_asr=0.93,
        control_asr=0.02,
        asr_method="paste",
    )
    second = finding(2, torch.arange(50, 80), diagnosis="right labels", suggested_labels=torch.full((30,), 2))
    changed = {"keep": keep, "labels": labels, "findings": (first, second, finding(3, torch.arange(90, 95)))}
    return Verdict(**{**vars(plain), **changed})
