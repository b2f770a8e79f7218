"""Other networks: what our defences do in each of them, beside what has not been run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from benchmarks.protocols import OURS, PROTOCOLS, Setting
from benchmarks.published import pair
from benchmarks.rows import Row
from benchmarks.table import by_setting, grouped, is_void, marked, percent, table, void_trainings

SHOWN = ("clean", "badnets-5%", "blended-5%")
COLUMNS = ("undefended", *OURS)

ARCHITECTURES = """Clean accuracy / ASR, and the TPR of the defence, in per cent. – stands for what no protocol asks
for. The networks that are trained on 50,000 images are those of the protocol `full`, for a GPU; the small ones beside
the default are those of `architectures`."""


def settings() -> list[Setting]:
    """Settings in which a protocol asks for all three attacks, in the order of the protocols."""
    asked: dict[Setting, set[str]] = {}
    for protocol in PROTOCOLS.values():
        for cell in protocol.cells:
            asked.setdefault(cell.setting, set()).add(cell.attack)
    return [setting for setting, attacks in asked.items() if attacks >= set(SHOWN)]


def architectures(rows: Iterable[Row]) -> str:
    """Networks and attacks down, defences across; a network that ran on another version of the data once more."""
    found = by_setting(rows)
    planned = {(cell.setting, cell.attack, cell.defence) for p in PROTOCOLS.values() for cell in p.cells}
    lines = []
    for setting in settings():
        there = [other for other in found if other != setting and replace(other, dataset=setting.dataset) == setting]
        for here in (setting, *there):
            cells, void = grouped(found.get(here, [])), void_trainings(found.get(here, []))
            trained = f"{here.images:,} images, {here.epochs} epochs, {here.recipe}, {here.dataset}"
            for attack in SHOWN:
                line = [here.model, trained, attack]
                for defence in COLUMNS:
                    cell = cells.get((attack, defence), [])
                    asked = (setting, attack, defence) in planned
                    line.append(_told(cell, void) if cell else "not run" if asked else "–")
                lines.append(line)
    left = ["network", "training", "attack"]
    return table([*left, *COLUMNS], lines, left=left)


def _told(cell: list[Row], void: set[tuple[Setting, str, int]]) -> str:
    tpr = [row["tpr"] for row in cell if row.get("tpr") is not None]
    return marked(pair(cell) + (f", TPR {percent(tpr)}" if tpr else ""), is_void(cell, void))
