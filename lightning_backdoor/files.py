"""Files that are complete or absent."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["atomic_file"]


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under its name only once it is complete.

    The bytes go to a hidden neighbour first, which then takes the name in one step. After an exception the neighbour
    is gone and an older file of that name is still there, unchanged. The neighbour's name cannot be guessed and nothing
    of that name is opened, so that in a folder of many users no other user can put a link there first.
    """
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    file = unfinished.open("xb")  # unlike those of `tempfile`, with the permissions that the user's umask leaves
    try:
        with file:
            yield file
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
