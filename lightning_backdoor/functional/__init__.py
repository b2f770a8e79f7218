"""Plain functions on tensors: denoise, score, decide. They know nothing of trainers, files or ground truth."""

from lightning_backdoor.functional.consistency import center_repulsion_loss, fct_scores, select_trusted, split_by_rank
from lightning_backdoor.functional.contrastive import mixed_cross_entropy, ss_contrastive_loss
from lightning_backdoor.functional.decisions import limit_of_labels, limit_removed, natural_break, select_fraction
from lightning_backdoor.functional.denoising import local_median, nl_means
from lightning_backdoor.functional.evidence import Decision, decide
from lightning_backdoor.functional.hyperplane import (
    HyperplaneStatistics,
    bias_scores,
    compromise_scores,
    strong_thresholds,
)
from lightning_backdoor.functional.inversion import InvertedTrigger, PixelModel, invert_trigger
from lightning_backdoor.functional.modes import Mode, find_modes, mode_scores
from lightning_backdoor.functional.neighbours import neighbour_agreement, reconsider_uncertain
from lightning_backdoor.functional.shared import find_shared_modes
from lightning_backdoor.functional.splits import split_units
from lightning_backdoor.functional.susceptibility import susceptibility_scores
from lightning_backdoor.functional.unlearning import forgetting_loss

__all__ = [
    "Decision",
    "HyperplaneStatistics",
    "InvertedTrigger",
    "Mode",
    "PixelModel",
    "bias_scores",
    "center_repulsion_loss",
    "compromise_scores",
    "decide",
    "fct_scores",
    "find_modes",
    "find_shared_modes",
    "forgetting_loss",
    "invert_trigger",
    "limit_of_labels",
    "limit_removed",
    "local_median",
    "mixed_cross_entropy",
    "mode_scores",
    "natural_break",
    "neighbour_agreement",
    "nl_means",
    "reconsider_uncertain",
    "select_fraction",
    "select_trusted",
    "split_by_rank",
    "split_units",
    "ss_contrastive_loss",
    "strong_thresholds",
    "susceptibility_scores",
]
