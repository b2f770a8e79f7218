"""The loop of every ablation: rows with a name, for several attacks, each measured once and kept in its own file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from torch.utils.data import TensorDataset

from benchmarks import command, rows
from benchmarks.cases import Case, opened
from benchmarks.protocols import Setting

Variants = dict[str, Callable[[], rows.Row]]
"""The rows under one attack: the name of each, and what measures it."""


def expected(attacks: Iterable[str], names: Iterable[str]) -> list[rows.Row]:
    """What tells apart the rows that an ablation has when it is done, in its default setting."""
    known = list(names)
    return [{**rows.identity(Setting(), attack, 0), "row": name} for attack in attacks for name in known]


def ablation(
    description: str | None,
    results: Path,
    variants: Callable[[Case, TensorDataset], Variants],
    table: Callable[[list[rows.Row]], str],
    *,
    attacks_by_default: Sequence[str],
) -> None:
    """Read the command line, measure the rows that are missing, and print all.

    Args:
        description: What the command is for.
        results: The file of its rows.
        variants: The rows under one attack, for clean test images.
        table: Rows as a table.
        attacks_by_default: Names of attacks.
    """
    parser = command.setting_parser(description)
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument("--attacks", nargs="+", default=list(attacks_by_default))
    options = parser.parse_args()
    clean, test, setting = command.begin_setting(options)
    for attack in options.attacks:
        case = opened(attack, clean, setting, 0, options.cache)
        for name, measure in variants(case, test).items():
            known = {**case.known, "row": name}
            if rows.key(known, "row") not in {rows.key(row, "row") for row in rows.read(options.results)}:
                told = rows.circumstances(f"benchmarks.{results.stem}", "cpu")
                rows.append(options.results, {**known, **measure(), **told})
                print(attack, name, file=sys.stderr, flush=True)
    print(table(rows.read(options.results)))
