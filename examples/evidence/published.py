"""Figures that others have published, and which of our cells they may be compared with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from examples.evidence.protocols import Setting
from examples.evidence.rows import Row
from examples.evidence.table import by_setting, percent

CHEN = "Chen et al. 2022 (D-BR, D-ST), CIFAR-10, ResNet-18"
BENCH = "BackdoorBench leaderboard (2025-06), CIFAR-10, PreActResNet-18"
MEAN = "mean of 8 to 10 attacks"
CHEN_SETTING = Setting("resnet18", 50_000, 200, "D-BR")
BENCH_SETTING = Setting("preact-resnet18", 50_000, 100, "BackdoorBench")


@dataclass(frozen=True)
class Figure:
    """A published result.

    Attributes:
        source: Paper or leaderboard, data and network.
        theirs: The attack by their name.
        defence: The defence by our name.
        accuracy: Clean accuracy in per cent.
        asr: Attack success rate in per cent.
        attack: The same attack by our name, ``None`` if we have none.
        setting: Where the two can be compared, ``None`` for nowhere.
    """

    source: str
    theirs: str
    defence: str
    accuracy: float
    asr: float
    attack: str | None = None
    setting: Setting | None = None


def _three(
    source: str, setting: Setting, lines: dict[str, tuple[str | None, tuple[tuple[float, float], ...]]]
) -> list[Figure]:
    """Figures of a table with a line for each attack: undefended, D-BR, D-ST."""
    return [
        Figure(source, theirs, defence, accuracy, asr, attack, setting if attack else None)
        for theirs, (attack, pairs) in lines.items()
        for defence, (accuracy, asr) in zip(("undefended", "D-BR", "D-ST"), pairs, strict=True)
    ]


FIGURES = (
    *_three(
        CHEN,
        CHEN_SETTING,
        {
            "BadNets all-to-one 10 %": ("badnets-10%", ((91.64, 100), (92.83, 0.40), (92.77, 0.03))),
            "BadNets all-to-all 10 %": ("all-to-all-10%", ((92.79, 88.01), (92.61, 0.56), (89.22, 2.05))),
            "Trojan 10 %": ("trojan-10%", ((91.91, 100), (92.21, 0.76), (93.72, 0.00))),
            "Blend-Strip 10 %": ("stripe-10%", ((92.09, 99.97), (92.40, 0.06), (93.59, 0.00))),
            "Blend-Kitty 10 %": ("flower-10%", ((92.69, 99.99), (92.11, 0.14), (91.82, 0.00))),
            "SIG 10 % of a class": ("sig-10%", ((92.88, 99.69), (92.73, 0.24), (90.07, 0.00))),
            "CL 10 % of a class": (None, ((93.20, 93.34), (92.08, 0.00), (90.46, 6.40))),
        },
    ),
    *_three(
        BENCH,
        BENCH_SETTING,
        {
            "BadNet 10 %": ("badnets-10%", ((91.32, 95.03), (29.41, 4.68), (82.63, 5.41))),
            "BadNet 1 %": ("badnets-1%", ((93.14, 74.73), (11.66, 0.86), (81.78, 2.21))),
            "BadNet 0.1 %": ("badnets-0.1%", ((93.61, 1.23), (11.63, 0.00), (84.59, 1.52))),
            "Blended 10 %": ("blended-10%", ((93.47, 99.92), (14.77, 7.70), (83.33, 79.49))),
            "Blended 1 %": ("blended-1%", ((93.76, 94.88), (10.99, 0.00), (79.92, 47.94))),
            "Blended 0.1 %": ("blended-0.1%", ((93.80, 56.11), (11.67, 0.00), (83.12, 5.32))),
        },
    ),
    Figure(BENCH, f"5 %, {MEAN}", "AC", 90.2, 92.9),
    Figure(BENCH, f"5 %, {MEAN}", "ABL", 62.0, 48.6),
    Figure(BENCH, f"5 %, {MEAN}", "fine-tune", 92.9, 64.9),
    Figure("Listing of NONE (2022), CIFAR-10, attack and network not known", "not known", "NONE", 94.01, 0.69),
)

DETECTION = (
    ("AGPD (2025), CIFAR-10, PreActResNet-18, mean of 12 attacks, 10 %", "AC", 6.6, 1.9),
    ("AGPD (2025), CIFAR-10, PreActResNet-18, mean of 12 attacks, 10 %", "spectral", 10.7, 2.6),
    ("AGPD (2025), CIFAR-10, PreActResNet-18, mean of 12 attacks, 10 %", "STRIP", 51.2, 10.7),
    ("AGPD (2025), CIFAR-10, PreActResNet-18, mean of 12 attacks, 10 %", "ABL", 43.5, 7.1),
    ("FLARE (2025), CIFAR-10, BadNets all-to-one", "AC", 0.0, 0.15),
    ("FLARE (2025), CIFAR-10, no poison", "AC", None, 0.49),
)
"""Source, defence by our name, TPR and FPR in per cent: other attacks or networks than ours throughout."""


def ours(figure: Figure, rows: Iterable[Row], defence: str) -> str:
    """Our accuracy / ASR beside a published figure, ``"not run"``, or ``"not comparable"`` with our small setting's."""
    if figure.attack is None:
        return "not comparable"
    found = by_setting(row for row in rows if (row["attack"], row["defence"]) == (figure.attack, defence))
    if figure.setting in found:
        return pair(found[figure.setting])
    return f"not comparable: {pair(found[Setting()])}" if Setting() in found else "not run"


def pair(rows: list[Row]) -> str:
    """Clean accuracy / ASR in per cent."""
    return f"{percent(row['clean_accuracy'] for row in rows)} / {percent(row['asr'] for row in rows)}"
