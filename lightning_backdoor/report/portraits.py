"""Pictures of the findings: some of their images, ordinary images of the same label, and how their means differ.

Images are fetched in small parts and shrunk at once, so that memory does not depend on how many there are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_backdoor.report.evidence import Evidence
from lightning_backdoor.report.tiles import fetched, fitted, three_channels
from lightning_backdoor.verdict import Verdict

__all__ = ["Common", "Portrait", "portray"]

PICTURED = 24  # findings with pictures, at most: the first ones
FETCHED = 512  # images in all, of the findings and ordinary ones together
COMPARED = 64  # images of a finding, and as many ordinary ones, whose means are compared
SHOWN, FEWEST_ORDINARY = 24, 4  # images of a finding that are shown; a third as many ordinary ones, and no fewer
LARGE, SMALL, MANY = 160, 96, 4  # pixels of the longer side: of up to so many findings, and of more of them
PART = 64  # images that are fetched at once
_STRONGEST = 32  # amplification of a difference: beyond it rounding looks like a pattern


class Common(NamedTuple):
    """What the mean image of a group differs in.

    Args:
        tiles: Mean of the group, mean of ordinary images, and their difference, gray where there is none; uint8
            ``(3, H, W, 3)``.
        counts: Images of the group and ordinary images that the means are of.
        factor: The amplification of the difference.
    """

    tiles: Tensor
    counts: tuple[int, int]
    factor: float


class Portrait(NamedTuple):
    """Pictures of one finding.

    Args:
        members: Positions of images of the finding, most suspicious first.
        ordinary: Positions of images of the same label that are kept and in no finding.
        common: What the group has in common; ``None`` without images of both kinds.
    """

    members: list[int]
    ordinary: list[int]
    common: Common | None


def portray(verdict: Verdict, evidence: Evidence) -> tuple[list[Portrait], dict[int, Tensor]]:
    """Fetch pictures of the findings.

    Returns:
        One portrait of each of the first findings, and the images of all of them by position, uint8 ``(H, W, 3)``.
        Both are empty if the evidence has no ``images``.
    """
    findings = verdict.findings[:PICTURED]
    if evidence.images is None or not findings:
        return [], {}
    each = max(1, min(COMPARED, FETCHED // (2 * len(findings))))
    free = verdict.keep & (verdict.finding_indices < 0)
    chosen: list[tuple[Tensor, Tensor]] = []
    for finding in findings:
        others = free if verdict.labels is None else free & (verdict.labels == finding.label)
        chosen.append((spread(finding.positions, each), spread(others.nonzero().flatten(), each)))
    wanted = torch.unique(torch.cat([part for pair in chosen for part in pair]))
    pixels = _thumbnails(wanted, evidence, LARGE if len(findings) <= MANY else SMALL)
    portraits = []
    for members, ordinary in chosen:
        shown = spread(members, SHOWN)
        beside = spread(ordinary, max(len(shown) // 3, FEWEST_ORDINARY))
        common = None
        if len(members) and len(ordinary):
            common = _common(*(pixels[torch.searchsorted(wanted, part)] for part in (members, ordinary)))
        portraits.append(Portrait(shown.tolist(), beside.tolist(), common))
    needed = torch.tensor([position for one in portraits for position in (*one.members, *one.ordinary)])
    places = torch.searchsorted(wanted, needed).tolist()
    tiles = pixels.permute(0, 2, 3, 1)
    return portraits, {int(position): tiles[place] for position, place in zip(needed, places, strict=True)}


def spread(values: Tensor, amount: int) -> Tensor:
    """So many of the values, at even distances, from the first to the last."""
    if len(values) <= amount:
        return values.contiguous()
    return values[torch.linspace(0, len(values) - 1, amount, dtype=torch.float64).round().long()]


def _thumbnails(positions: Tensor, evidence: Evidence, largest: int) -> Tensor:
    """Small images at some positions, uint8 ``(n, 3, h, w)``; images of another size than the first are resized."""
    parts: list[Tensor] = []
    for some in torch.split(positions, PART):
        images = fitted(three_channels(fetched(some.tolist(), evidence)).float(), largest)
        if parts and images.shape != (len(images), *parts[0].shape[1:]):
            images = interpolate(images, size=parts[0].shape[2:], mode="area")
        parts.append(images.round().to(torch.uint8))
    return torch.cat(parts)


def _common(members: Tensor, ordinary: Tensor) -> Common:
    means = [images.float().mean(dim=0) for images in (members, ordinary)]
    difference = means[0] - means[1]
    strongest = float(difference.abs().flatten().sort().values[int(0.995 * (difference.numel() - 1))])
    factor = min(127 / max(strongest, 1.0), _STRONGEST)
    tiles = torch.stack([*means, (128 + factor * difference).clamp(0, 255)]).round().to(torch.uint8)
    return Common(tiles.permute(0, 2, 3, 1).contiguous(), (len(members), len(ordinary)), factor)
