"""Look into a model: its head, its features, its units."""

from lightning_backdoor.surgery.heads import Head, find_head, head_features, unit_layers
from lightning_backdoor.surgery.taps import Taps, pool

__all__ = ["Head", "Taps", "find_head", "head_features", "pool", "unit_layers"]
