"""The result rows as a Markdown table."""

from __future__ import annotations

from typing import Any

from examples.evidence.cells import ATTACKS

DEFENCES = (
    "undefended", "ultraclean", "NONE", "D-BR", "perfect", "random", "random-reset", "ultraclean-paper", "NONE-paper",
    "D-BR-paper", "AC", "spectral", "STRIP", "deep-kNN", "fine-tune", "ABL",
)  # fmt: skip


def markdown(rows: list[dict[str, Any]]) -> str:
    """One line per cell, attacks together; in per cent."""
    lines = [
        "| attack | poisons | defence | clean accuracy | ASR | removed | TPR | FPR | AUROC | seconds |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    attacks = list(ATTACKS)
    for row in sorted(rows, key=lambda r: (attacks.index(r["attack"]), DEFENCES.index(r["defence"]), r["seed"])):
        rates = [_percent(row.get(name)) for name in ("tpr", "fpr")]
        auroc = row.get("auroc")
        lines.append(
            f"| {row['attack']} | {row['poisons']:,} | {row['defence']} | {100 * row['clean_accuracy']:.1f} "
            f"| {100 * row['asr']:.1f} | {row['removed']:,} | {' | '.join(rates)} "
            f"| {'–' if auroc is None else f'{auroc:.3f}'} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"
