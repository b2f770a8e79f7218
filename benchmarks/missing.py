"""What has not run: cells of the protocols, and rows of the ablations."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

from benchmarks.networks import NAME
from benchmarks.protocols import GUESSED, Cell, Protocol, Setting, hours
from benchmarks.rows import Row, cell_key, key
from benchmarks.sections import ABLATIONS
from benchmarks.table import DEFENCES


def missing(protocol: Protocol, rows: list[Row]) -> str:
    """The cells of a protocol that have no row, those of a setting and seed together; and what the others took."""
    known = {key(row): row for row in rows}
    left = [cell for cell in protocol.cells if cell_key(cell) not in known]
    took = sum(known[cell_key(cell)]["seconds"] for cell in protocol.cells if cell_key(cell) in known) / 3600
    done, size = len(protocol.cells) - len(left), f"{len(left)} of {len(protocol.cells)} cells"
    expected = f"about {hours(left):.1f} hours on {protocol.hardware}"
    told = [f"All cells together are expected to take {hours(protocol.cells):.1f} hours on {protocol.hardware}."]
    if done:
        told.append(f"The {done} that have run took {took:.1f} hours on the machines that measured them.")
    if guessed := sorted({cell.setting.model for cell in protocol.cells} & set(GUESSED)):
        told.append(f"The speeds of {', '.join(guessed)} are guesses, not measured.")
    lines = [f"### {protocol.name}: {f'{size}, {expected}' if left else 'nothing is missing'}", "", " ".join(told)]
    lines += [""] if left else []
    for (setting, seed), cells in groupby(sorted(left, key=_place), key=lambda cell: (cell.setting, cell.seed)):
        attacks: dict[str, list[str]] = {}
        for cell in cells:
            attacks.setdefault(cell.defence, []).append(cell.attack)
        lines.append(f"- {setting}, seed {seed}:")
        for some, defences in groupby(attacks, key=lambda defence: ", ".join(attacks[defence])):
            lines.append(f"  - {', '.join(defences)}: {some}")
    return "\n".join(lines)


def missing_ablations(rows: list[Row], ablations: Mapping[str, list[Row]]) -> str:
    """The rows that the ablations want and do not have, attack by attack."""
    lines = ["### Ablations", ""]
    for name, section in ABLATIONS.items():
        done = {key(row, "row") for row in ablations.get(name, [])}
        wanted = section.wanted(rows)
        left = [row for row in wanted if key(row, "row") not in done]
        lines.append(f"- `{name}`: {f'{len(left)} of {len(wanted)} rows' if left else 'nothing is missing'}")
        lines += [f"  - {place}: {told}" for place, told in _by_attack(left, wanted).items()]
    return "\n".join(lines)


def _by_attack(left: list[Row], wanted: list[Row]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    for row in left:
        found.setdefault(_attack(row), []).append(row.get("row", f"seed {row['seed']}"))
    size = {place: sum(_attack(row) == place for row in wanted) for place in found}
    return {place: "all" if len(names) == size[place] > 1 else "; ".join(names) for place, names in found.items()}


def _attack(row: Row) -> str:
    return row["attack"] if row["model"] == NAME else f"{row['attack']}, {row['model']}"


def _place(cell: Cell) -> tuple[bool, str, int, int]:
    return cell.setting != Setting(), str(cell.setting), cell.seed, DEFENCES.index(cell.defence)
