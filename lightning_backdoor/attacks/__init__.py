"""Attacks for tests, examples and evidence. No defence reads from here.

A trigger paints pixel images; :func:`poison` makes a poisoned training set from a dataset and a trigger, and
:func:`triggered` the test set on which the attack success rate is measured.
"""

from lightning_backdoor.attacks.poisoning import PoisonedDataset, poison, poisoned_mask, triggered
from lightning_backdoor.attacks.triggers import SIG, BadNets, Blended, Trigger, Trojan

__all__ = ["SIG", "BadNets", "Blended", "PoisonedDataset", "Trigger", "Trojan", "poison", "poisoned_mask", "triggered"]
