"""``python -m examples.evidence.fractions``: how much should UltraClean remove, and what does each denoiser add?

The score of the paper, the L1 distance of the outputs (here logits), with the local median alone, non-local means alone
and both, from the undefended network after its first epochs. The images with the largest scores leave the training set,
a fraction of all, and a fresh network is trained on the rest. One JSON line per finished row in ``fractions.jsonl``; a
run that was interrupted goes on with the first missing one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from torch import Tensor
from torch.utils.data import Subset

from examples.evidence import rows
from examples.evidence.ablation import Case, Variants, ablation
from examples.evidence.run import EARLY, Snapshot, answers, early, images_of, restored, train_network
from examples.evidence.table import fractions_table
from lightning_backdoor import functional

RESULTS = Path(__file__).with_name("fractions.jsonl")
FRACTIONS = (0.05, 0.2, 0.1, 0.3)
DENOISERS = {
    "median": (functional.local_median,),
    "NLM": (functional.nl_means,),
    "both": (functional.local_median, functional.nl_means),
}


def susceptibility(case: Case) -> dict[str, Tensor]:
    """Scores (N,) by the denoisers that took part."""
    path = early(case.shared)
    if not path.exists():
        train_network(case.dataset, [Snapshot(path, EARLY, stop=True)], case.setting, 0, None)
    network = restored(path, case.setting)
    images = images_of(case.dataset)
    denoised = {name: answers(network, denoise(images)) for name, (denoise, *more) in DENOISERS.items() if not more}
    original, both = answers(network, images), list(denoised.values())
    scores = {name: functional.susceptibility_scores(original, [moved]) for name, moved in denoised.items()}
    return {**scores, "both": functional.susceptibility_scores(original, both)}


def filtered(case: Case, scores: Callable[[], dict[str, Tensor]], name: str, fraction: float) -> rows.Row:
    """What a training on the rest comes to."""
    keep, _ = functional.select_fraction(scores()[name], fraction)
    found = {"denoiser": name, "fraction": fraction, "tpr": float((~keep)[case.poisoned].float().mean())}
    return {**found, **case.trained([], dataset=Subset(case.dataset, keep.nonzero().squeeze(1).tolist()))}


def variants(case: Case) -> Variants:
    """All rows; the scores are computed when the first one is missing."""
    scores = cache(partial(susceptibility, case))
    return {
        f"{name}, {100 * fraction:g} %": partial(filtered, case, scores, name, fraction)
        for fraction in FRACTIONS
        for name in DENOISERS
    }


if __name__ == "__main__":
    ablation(__doc__, RESULTS, variants, fractions_table, attacks_by_default=("badnets-5%",))
