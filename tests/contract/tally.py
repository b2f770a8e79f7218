"""Counts for the summary that a run of the contract ends with."""

from __future__ import annotations

from collections import Counter

COUNTS: Counter[str] = Counter()
"""Fuzz cases, counted by the tests themselves."""
