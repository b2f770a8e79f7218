"""``python -m benchmarks.fractions``: how much should UltraClean remove, and what does each denoiser add?

The score of the paper, the L1 distance of the outputs (here logits), with the local median alone, non-local means alone
and both, from the undefended network after its first epochs. The images with the largest scores leave the training set,
a fraction of all, and a fresh network is trained on the rest. One JSON line per finished row in ``fractions.jsonl``; a
run that was interrupted goes on with the first missing one.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from benchmarks import rows
from benchmarks.ablation import Variants, ablation, expected
from benchmarks.cache import early, kept, restored
from benchmarks.cases import Case
from benchmarks.table import fractions_table
from benchmarks.training import images_of, logits_of
from lightning_backdoor import functional

RESULTS = Path(__file__).with_name("fractions.jsonl")
FRACTIONS = (0.05, 0.2, 0.1, 0.3)
DENOISERS = {"median": functional.local_median, "NLM": functional.nl_means}
NAMES = (*DENOISERS, "both")
BY_DEFAULT = ("badnets-5%",)


def susceptibility(case: Case) -> dict[str, Tensor]:
    """Scores (N,) by the denoisers that took part."""
    network, images = restored(case.undefended(at_first=True), case.setting), images_of(case.dataset)
    original = logits_of(network, images)
    moved = {name: logits_of(network, denoise(images)) for name, denoise in DENOISERS.items()}
    scores = {name: functional.susceptibility_scores(original, [one]) for name, one in moved.items()}
    return {**scores, "both": functional.susceptibility_scores(original, list(moved.values()))}


def filtered(case: Case, name: str, fraction: float, test: TensorDataset) -> rows.Row:
    """What a training on the rest comes to."""
    path = early(case.shared).with_suffix(".denoised.pt")
    keep, _ = functional.select_fraction(kept(path, partial(susceptibility, case))[name], fraction)
    found = {"denoiser": name, "fraction": fraction, "tpr": float((~keep)[case.poisoned].float().mean())}
    rest = Subset(case.dataset, keep.nonzero().squeeze(1).tolist())
    return {**found, **case.trained([], test, dataset=rest)}


def combinations() -> dict[str, tuple[str, float]]:
    """Denoiser and fraction of each row."""
    return {f"{name}, {100 * fraction:g} %": (name, fraction) for fraction in FRACTIONS for name in NAMES}


def wanted() -> list[rows.Row]:
    """What tells apart the rows of a finished run."""
    return expected(BY_DEFAULT, combinations())


def variants(case: Case, test: TensorDataset) -> Variants:
    """All rows."""
    return {row: partial(filtered, case, *how, test) for row, how in combinations().items()}


if __name__ == "__main__":
    ablation(__doc__, RESULTS, variants, fractions_table, attacks_by_default=BY_DEFAULT)
