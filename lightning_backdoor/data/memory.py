"""How much main memory is free."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

__all__ = ["free_memory", "return_page_locked"]

_MEMINFO = Path("/proc/meminfo")
_OWN_GROUPS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes of main memory that this process may still take; 0 where that cannot be told.

    On Linux what the kernel calls available, within the limits of the control groups of the process (a container's).
    """
    return max(min([_available(), *_left_in_groups()]), 0)


def return_page_locked() -> None:
    """Give page-locked memory that is no longer used back to the system; torch before 2.10 holds it for later use."""
    empty: Any = getattr(torch.accelerator, "empty_host_cache", None)
    if empty is not None:
        empty()


def _available() -> int:
    available = _entries(_MEMINFO).get("MemAvailable:")
    if available is not None:
        return available * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # no such function, or no such name
        return 0


def _left_in_groups() -> Iterator[int]:
    """What the limit of each control group around this process leaves; files that were read count as free."""
    for folder, limit, used, cached in _groups():
        most, now = _number(folder / limit), _number(folder / used)
        if most is not None and now is not None:
            yield most - now + _entries(folder / "memory.stat").get(cached, 0)


def _groups() -> Iterator[tuple[Path, str, str, str]]:
    """Folders of the control groups, of both versions, with the names of their files."""
    yield _GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
    try:
        lines = _OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    own = Path(next((line[3:] for line in lines if line.startswith("0::")), "/")).relative_to("/")
    for path in (own, *own.parents):
        yield _GROUPS / path, "memory.max", "memory.current", "inactive_file"


def _entries(path: Path) -> dict[str, int]:
    """Numbers of a file with a name and a number in each line."""
    try:
        rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
        return {row[0]: int(row[1]) for row in rows if len(row) > 1}
    except (OSError, ValueError):
        return {}


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no such file, or "max"
        return None
