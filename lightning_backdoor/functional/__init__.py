"""Plain functions on tensors: denoise, score, decide. None of them needs a trainer, a file or ground truth."""

from lightning_backdoor.detection.decision import (
    Decision,
    decide,
    limit_of_labels,
    limit_removed,
    natural_break,
    select_fraction,
)
from lightning_backdoor.detection.diagnosis import diagnose
from lightning_backdoor.detection.near_duplicates import thumbnails
from lightning_backdoor.detection.neighbors import neighbor_agreement, reconsider_uncertain
from lightning_backdoor.detection.subpopulations import (
    Subpopulation,
    find_all_to_all_subpopulation,
    find_subpopulations,
    split_units,
    subpopulation_scores,
)
from lightning_backdoor.functional.consistency import center_repulsion_loss, fct_scores, select_trusted, split_by_rank
from lightning_backdoor.functional.contrastive import mixed_cross_entropy, ss_contrastive_loss
from lightning_backdoor.functional.denoising import local_median, nl_means, susceptibility_scores
from lightning_backdoor.functional.hyperplane import (
    HyperplaneStatistics,
    bias_scores,
    compromise_scores,
    strong_thresholds,
)
from lightning_backdoor.functional.inversion import InvertedTrigger, PixelModel, invert_trigger
from lightning_backdoor.functional.unlearning import forgetting_loss

__all__ = [
    "Decision",
    "HyperplaneStatistics",
    "InvertedTrigger",
    "PixelModel",
    "Subpopulation",
    "bias_scores",
    "center_repulsion_loss",
    "compromise_scores",
    "decide",
    "diagnose",
    "fct_scores",
    "find_all_to_all_subpopulation",
    "find_subpopulations",
    "forgetting_loss",
    "invert_trigger",
    "limit_of_labels",
    "limit_removed",
    "local_median",
    "mixed_cross_entropy",
    "natural_break",
    "neighbor_agreement",
    "nl_means",
    "reconsider_uncertain",
    "select_fraction",
    "select_trusted",
    "split_by_rank",
    "split_units",
    "ss_contrastive_loss",
    "strong_thresholds",
    "subpopulation_scores",
    "susceptibility_scores",
    "thumbnails",
]
