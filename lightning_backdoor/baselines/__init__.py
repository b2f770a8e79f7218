"""Defences from the literature, small and plainly named, to stand beside ours; most remove images from clean data."""

from lightning_backdoor.baselines.abl import ABL, easiness_scores
from lightning_backdoor.baselines.activation_clustering import (
    ActivationClustering,
    activation_clusters,
    select_clusters,
)
from lightning_backdoor.baselines.deep_knn import DeepKNN, deep_knn_scores
from lightning_backdoor.baselines.finetune_trusted import FineTuneTrusted
from lightning_backdoor.baselines.random_filter import RandomFilter
from lightning_backdoor.baselines.repair import RepairArguments
from lightning_backdoor.baselines.scored import BaselineArguments
from lightning_backdoor.baselines.spectral_signatures import (
    SpectralSignatures,
    select_per_class,
    spectral_signature_scores,
)
from lightning_backdoor.baselines.strip import STRIP, blend, select_by_rejection, strip_scores

__all__ = [
    "ABL",
    "STRIP",
    "ActivationClustering",
    "BaselineArguments",
    "DeepKNN",
    "FineTuneTrusted",
    "RandomFilter",
    "RepairArguments",
    "SpectralSignatures",
    "activation_clusters",
    "blend",
    "deep_knn_scores",
    "easiness_scores",
    "select_by_rejection",
    "select_clusters",
    "select_per_class",
    "spectral_signature_scores",
    "strip_scores",
]
