"""``python -m benchmarks.weights``: how much should the classifier of D-ST unlearn suspects?

The second stage of D-ST with other weights of the suspects in the mixed cross-entropy (the paper's lambda_p, 0.001),
all from the features of one first stage. One JSON line per finished row in ``weights.jsonl``; a run that was
interrupted goes on with the first missing one.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch.utils.data import TensorDataset

from benchmarks import rows
from benchmarks.ablation import Variants, ablation, expected
from benchmarks.cases import Case
from benchmarks.table import weights_table
from benchmarks.training import Snapshot, train_network
from lightning_backdoor import DSTCallback

RESULTS = Path(__file__).with_name("weights.jsonl")
WEIGHTS = (0.001, 0.0, 0.01, 0.1, 1.0, 0.0001)
CLASSIFIER = 1  # epochs of the second stage
BY_DEFAULT = ("badnets-5%",)


def features(case: Case) -> Path:
    """Checkpoint of a D-ST training before the last epoch of its first stage."""
    epochs = case.setting.epochs - CLASSIFIER - 1
    path = case.shared.with_suffix(f".features-{epochs}.ckpt")
    if not path.exists():
        until = Snapshot(path, epochs, stop=True)
        train_network(case.dataset, [DSTCallback(classifier_epochs=CLASSIFIER), until], case.setting, 0, None)
    return path


def classified(case: Case, weight: float, test: TensorDataset) -> rows.Row:
    """What the rest of the training comes to; its cost would be that of the rest alone."""
    callback = DSTCallback(classifier_epochs=CLASSIFIER, suspect_weight=weight)
    found = case.trained([callback], test, start=features(case))
    return {"weight": weight, "clean_accuracy": found["clean_accuracy"], "asr": found["asr"]}


def named() -> dict[str, float]:
    """The weight of each row."""
    return {f"weight {weight:g}": weight for weight in WEIGHTS}


def wanted() -> list[rows.Row]:
    """What tells apart the rows of a finished run."""
    return expected(BY_DEFAULT, named())


def variants(case: Case, test: TensorDataset) -> Variants:
    """All rows."""
    return {name: partial(classified, case, weight, test) for name, weight in named().items()}


if __name__ == "__main__":
    ablation(__doc__, RESULTS, variants, weights_table, attacks_by_default=BY_DEFAULT)
