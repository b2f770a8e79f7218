"""Labels whose images turn images of other classes into their label by what they have in common, unlike other labels.

A label that is poisoned as a whole cannot be divided into poisons and others. The other labels of the same data are
what it is compared with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["WholeClass", "student_upper_tail", "whole_classes"]

TURNED = 0.5  # of the images of other classes, at least: less is no trigger that a person has to hear of
STEPS = 4001  # of the numerical integral, whose integrand is smooth


@dataclass(frozen=True)
class WholeClass:
    """A label that stands out as a whole.

    Attributes:
        label: Its class index.
        rate: Share of images of other classes that its common pattern turns into it.
        others: The largest share that another label's pattern turns into that label.
        p_value: Chance that one of all labels differs so far from the others, if the transformed rates are normal.
    """

    label: int
    rate: float
    others: float
    p_value: float


def whole_classes(
    rates: Tensor, labels: list[int], images: int, *, false_alarm_rate: float, scans: int = 1
) -> list[WholeClass]:
    """Labels whose own pattern turns other images into them, unlike the patterns of all other labels.

    The rate of a label is compared with two samples of a null: with what the patterns of the other labels do for these,
    and with how often these patterns lead to this label, since any change of an image may lead to one label. Rates are
    compared as ``asin(sqrt(rate))``, whose sampling error does not depend on the rate, by the prediction interval of a
    normal sample. The larger p-value counts, times the number of labels and of scans.

    Args:
        rates: Share of the images of other classes that get a label when the pattern of a label is put on them, of
            those that do not get it without, float ``(K, K)``: row of the pattern, column of the label that is given.
        labels: The K labels.
        images: Smallest number of images behind a rate.
        false_alarm_rate: Chance at most of a label in the result, over all scans of a training. It holds as far as
            the transformed rates of clean labels scatter as normal values.
        scans: Of a training.

    Example:
        >>> import torch
        >>> rates = torch.full((8, 8), 0.05)
        >>> rates[3, 3] = 0.9
        >>> [found.label for found in whole_classes(rates, list(range(8)), 200, false_alarm_rate=0.01)]
        [3]
    """
    count = len(labels)
    if count < 3:
        return []
    angles, own = rates.double().clamp(0, 1).sqrt().asin(), rates.double().diagonal()
    others = ~torch.eye(count, dtype=torch.bool, device=rates.device)
    tests = count * scans
    found = []
    for place in (own >= TURNED).nonzero().squeeze(1).tolist():
        mine = float(angles[place, place])
        nulls = angles.diagonal()[others[place]], angles[others[place], place]
        p_value = min(1.0, tests * max(_p_value(mine, null, images) for null in nulls))
        if p_value <= false_alarm_rate:
            found.append(WholeClass(labels[place], float(own[place]), float(own[others[place]].max()), p_value))
    return found


def _p_value(value: float, null: Tensor, images: int) -> float:
    """Chance of a value as large as this one beside a normal sample; its deviation is at least the sampling error."""
    size = len(null)
    deviation = max(float(null.std()), 0.5 / math.sqrt(images))
    return student_upper_tail((value - float(null.mean())) / (deviation * math.sqrt(1 + 1 / size)), size - 1)


def student_upper_tail(value: float, degrees: int) -> float:
    """Chance that Student's t with so many degrees of freedom exceeds a value.

    With ``t = sqrt(degrees) tan(a)`` the density of the angle is proportional to ``cos(a) ** (degrees - 1)``.

    Example:
        >>> round(student_upper_tail(3.355, 8), 4)
        0.005
    """
    angle = math.atan(value / math.sqrt(degrees))

    def integral(low: float) -> float:
        places = torch.linspace(low, math.pi / 2, STEPS, dtype=torch.float64)
        return float(torch.trapezoid(places.cos().clamp(min=0) ** (degrees - 1), places))

    return integral(angle) / integral(-math.pi / 2)
