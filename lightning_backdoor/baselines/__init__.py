"""Defences from the literature, small and plainly named, to stand beside ours; most remove images from clean data."""

from lightning_backdoor.baselines.activation_clustering import (
    ActivationClustering,
    activation_clusters,
    select_clusters,
)
from lightning_backdoor.baselines.baseline import Baseline
from lightning_backdoor.baselines.deep_knn import DeepKNN, deep_knn_scores
from lightning_backdoor.baselines.random_filter import RandomFilter
from lightning_backdoor.baselines.spectral_signatures import (
    SpectralSignatures,
    select_per_class,
    spectral_signature_scores,
)
from lightning_backdoor.baselines.strip import STRIP, select_by_rejection, strip_scores

__all__ = [
    "STRIP",
    "ActivationClustering",
    "Baseline",
    "DeepKNN",
    "RandomFilter",
    "SpectralSignatures",
    "activation_clusters",
    "deep_knn_scores",
    "select_by_rejection",
    "select_clusters",
    "select_per_class",
    "spectral_signature_scores",
    "strip_scores",
]
