"""Find the head, the features and the units of a model, and reset units."""

from lightning_backdoor.surgery.heads import Head, find_head, head_features, unit_layers
from lightning_backdoor.surgery.reset import reset_units
from lightning_backdoor.surgery.rules import register_rule
from lightning_backdoor.surgery.taps import Taps, pool
from lightning_backdoor.surgery.units import UnitLayer, find_units

__all__ = [
    "Head",
    "Taps",
    "UnitLayer",
    "find_head",
    "find_units",
    "head_features",
    "pool",
    "register_rule",
    "reset_units",
    "unit_layers",
]
