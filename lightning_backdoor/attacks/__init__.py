"""Attacks for tests, examples and evidence. No defence reads from here.

A trigger paints pixel images; :func:`poison` makes a poisoned training set from a dataset and a trigger, and
:func:`triggered` the test set on which the attack success rate is measured.
"""

from lightning_backdoor.attacks.blends import SIG, AdaptiveBlend, Blended
from lightning_backdoor.attacks.crafted import HiddenTrigger, LabelConsistent
from lightning_backdoor.attacks.denoised import Denoised
from lightning_backdoor.attacks.encoder import SampleSpecific
from lightning_backdoor.attacks.patches import AdaptivePatch, BadNets, Corners, Trojan
from lightning_backdoor.attacks.poisoning import PoisonedDataset, poison, poisoned_mask, triggered
from lightning_backdoor.attacks.trained import Additive, Invariant, LowFrequency, TrojanWatermark
from lightning_backdoor.attacks.triggers import CraftedTrigger, Trigger
from lightning_backdoor.attacks.warps import ColourCurve, WaNet

__all__ = [
    "SIG",
    "AdaptiveBlend",
    "AdaptivePatch",
    "Additive",
    "BadNets",
    "Blended",
    "ColourCurve",
    "Corners",
    "CraftedTrigger",
    "Denoised",
    "HiddenTrigger",
    "Invariant",
    "LabelConsistent",
    "LowFrequency",
    "PoisonedDataset",
    "SampleSpecific",
    "Trigger",
    "Trojan",
    "TrojanWatermark",
    "WaNet",
    "poison",
    "poisoned_mask",
    "triggered",
]
