"""``python -m benchmarks.treatments``: what removes a backdoor from a network once its images are known?

The truth stands in the place of a detector, so that treatments alone are compared. All of a setting begin with the same
checkpoint, after half of the plan, and have the other half of it. Beside them are the undefended network, one that was
trained without the poisons from the start (what a restart gives), and one that was trained on clean data, with its
answers to triggered images. One JSON line per finished cell in ``treatments.jsonl``; a run that was interrupted goes on
with the first missing one. ``--data`` is the folder that ``python -m benchmarks.finetune --pack`` has written.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from benchmarks import command, finetune, rows
from benchmarks.cells import filtered
from benchmarks.cost import measured
from benchmarks.data import SIGNS
from benchmarks.digits import digits
from benchmarks.networks import NAME, NETWORKS, PRETRAINED, efficientnet_lite0
from benchmarks.protocols import Setting
from benchmarks.table import number, percent, table
from benchmarks.training import Snapshot, accuracy, train_network
from benchmarks.variants import GivenVerdict
from lightning_backdoor import Verdict
from lightning_backdoor.callbacks import Defense
from lightning_backdoor.responses import Continue, Detection, Event, ResetUnits, Response, Session, Unlearn

RESULTS = Path(__file__).with_name("treatments.jsonl")
DIGITS = "digits"
CASES = [
    (Setting(PRETRAINED, 1_500, 5, "adamw"), finetune.STICKER),
    (Setting(NAME, 1_400, 10, "adamw-signs", DIGITS), finetune.STICKER),
    (Setting("vit", 1_400, 12, "adamw-signs", DIGITS), finetune.STICKER),
    (Setting(NAME, 2_000, 8), finetune.STICKER),
    (Setting(NAME, 2_000, 8, "adamw-signs", SIGNS), finetune.STICKER),
]
"""Settings, each with an attack, the most telling first."""

BATCH, TEST_IMAGES = 64, 800
FAINT = 0.1  # of a unit's weights, where it is turned down


class Zeroed(ResetUnits):
    """Units are zeroed, and :meth:`instead` says what their weights, and those that read them, become."""

    def __init__(self) -> None:
        super().__init__(reset="prune")
        self.first: list[Tensor] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, title: str) -> None:
        super().setup(trainer, pl_module, title)
        self.first = [parameter.detach().clone() for parameter in pl_module.parameters()]

    def on_train_epoch_start(self, session: Session) -> None:
        before = [parameter.detach().clone() for parameter in session.module.parameters()]
        super().on_train_epoch_start(session)
        with torch.no_grad():
            for parameter, old, start in zip(session.module.parameters(), before, self.first, strict=True):
                parameter.copy_(torch.where(parameter == old, old, self.instead(old, start)))

    def instead(self, old: Tensor, start: Tensor) -> Tensor:
        """New values for a parameter, by those before the reset and those at the start of the fit."""
        return torch.zeros_like(old)


class TurnedDown(Zeroed):
    """A tenth of what they were."""

    def instead(self, old: Tensor, start: Tensor) -> Tensor:
        return FAINT * old


class BackToTheStart(Zeroed):
    """What they were at the start of the fit."""

    def instead(self, old: Tensor, start: Tensor) -> Tensor:
        return start


def project(session: Session, removed: Tensor) -> None:
    """Take the direction in which removed images differ from the others out of the weights of the head."""
    head = session.scanner.head.module
    features = session.scanner.features(session.trainer, session.module, description="direction").cpu()
    direction = features[removed].mean(dim=0) - features[~removed].mean(dim=0)
    with torch.no_grad():
        head.weight -= torch.outer(head.weight @ direction, direction) / direction.square().sum()


class Projected(Continue):
    """Training goes on after the head has lost the direction of the removed images."""

    features = True

    def respond(self, session: Session, detection: Detection, event: Event) -> Event:
        project(session, ~detection.verdict.keep)
        return super().respond(session, detection, event)


class RedrawnAndProjected(ResetUnits):
    """The same, and units are drawn anew."""

    features = True

    def respond(self, session: Session, detection: Detection, event: Event) -> Event:
        planned = super().respond(session, detection, event)
        project(session, ~detection.verdict.keep)
        return planned


class Relabeled(Continue):
    """Removed images stay, with other labels; without any, the most likely class beside the one that they had."""

    drops = False

    def __init__(self, labels: Tensor, others: Tensor | None) -> None:
        super().__init__()
        self.labels, self.others = labels, others

    def respond(self, session: Session, detection: Detection, event: Event) -> Event:
        removed, others = ~detection.verdict.keep, self.others
        if others is None:

            def second(indices: Tensor, batch: Any) -> dict[str, Tensor]:
                logits = session.scanner.logits(session.trainer, session.module, batch)
                own = session.scanner.labels(batch).to(logits.device)
                return {"second": logits.scatter(1, own[:, None], -torch.inf).argmax(dim=1)}

            others = session.scanner.scan(session.trainer, session.module, second, description="labels")["second"]
        self.labels[removed] = others.cpu()[removed]  # of the dataset itself
        return super().respond(session, detection, event)


class Given(Defense):
    """A treatment of the images that are given, from the first epoch of a resumed run on."""

    method = "given"
    title = "Given"

    def __init__(self, poisoned: Tensor, labels: Tensor, response: Response) -> None:
        self.poisoned, self.labels, self.response = poisoned, labels, response
        detector = GivenVerdict(Verdict(poisoned.float(), ~poisoned, 0.5, "truth", labels))
        super().__init__(detector=detector, response=response, warmup_epochs=None, max_removed=0.3, seed=0)
        self.detector = detector

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Detect as if at the end of the epoch that the checkpoint was written after."""
        super().on_train_start(trainer, pl_module)
        self.detector.session.case.detect(trainer.current_epoch)
        self.detector.session.loader_filter.restart_iterator()


UNDEFENDED, PERFECT, CLEAN = "undefended", finetune.PERFECT, "clean-model"
TREATMENTS: dict[str, Callable[[Tensor, Tensor], Response]] = {
    "redraw": lambda labels, true: ResetUnits(),
    "unlearn": lambda labels, true: Unlearn(),
    "second guess": lambda labels, true: Relabeled(labels, None),
    "continue": lambda labels, true: Continue(),
    "project": lambda labels, true: Projected(),
    "redraw and project": lambda labels, true: RedrawnAndProjected(),
    "redraw 15 %": lambda labels, true: ResetUnits(reset_fraction=0.15),
    "start": lambda labels, true: BackToTheStart(),
    "true labels": Relabeled,
    "turn down": lambda labels, true: TurnedDown(),
    "zero": lambda labels, true: Zeroed(),
    "unlearn once": lambda labels, true: Unlearn(epochs=1),
}
"""By name; made from the labels of the training set, and the true ones."""

NAMES = (UNDEFENDED, PERFECT, *TREATMENTS, CLEAN)


def loaded(setting: Setting, folder: Path) -> tuple[TensorDataset, TensorDataset]:
    """Clean training and test images."""
    if setting.dataset == DIGITS:
        return digits()
    test = finetune.loaded(folder, setting.dataset, "test")
    return finetune.trained_on(setting, folder), finetune.some(test, TEST_IMAGES)


def run_cell(setting: Setting, attack: str, name: str, options: argparse.Namespace) -> rows.Row:
    """Train one network, and return its row."""
    recipe, begins = finetune.ATTACKS[attack], setting.epochs - setting.epochs // 2
    clean, test = loaded(setting, options.data)
    attacked = recipe.train(clean, 0)
    poisoned, true = attacked.poisoned, clean.tensors[1]
    dataset = clean if name == CLEAN else finetune.in_memory(attacked)
    shared = options.cache / f"{setting.model}-{setting.dataset}-{setting.images}-{attack}.ckpt"
    defences: list[Any] = []
    if name == UNDEFENDED:
        defences = [Snapshot(shared, begins)]
    if name == PERFECT:
        dataset = finetune.in_memory(filtered(dataset, PERFECT, poisoned, 0, 0))
    if name in TREATMENTS:
        labels = dataset.tensors[1]
        defences = [Given(poisoned, labels.clone(), TREATMENTS[name](labels, true))]
    with measured("cpu") as meter:
        start = shared if name in TREATMENTS else None
        network = train_network(dataset, defences, setting, 0, start, mixed=False, batch=BATCH)
    return {
        **rows.identity(setting, attack, 0),
        **rows.poison(int(poisoned.sum()), len(clean)),
        "defence": name,
        "clean_accuracy": accuracy(network, test, mixed=False),
        "asr": accuracy(network, finetune.in_memory(recipe.test(test)), mixed=False),
        **(told(defences[0]) if name in TREATMENTS else {}),
        **meter.row(len(clean), begins if name in TREATMENTS else 0),
        "test_images": len(test),
        **rows.circumstances("benchmarks.treatments", "cpu"),
    }


def told(defence: Given) -> rows.Row:
    """What the treatment measured of itself on the training images."""
    return {
        "repaired": defence.repaired,
        "accuracies": [event.accuracies for event in defence.history],
        "flagged_label_rates": [event.flagged_label_rates for event in defence.history],
        "undone": [event.undone_steps for event in defence.history],
    }


def markdown(found: Sequence[rows.Row]) -> str:
    """One line per cell, in per cent."""
    lines = [
        [
            f"{row['model']}, {row['dataset']}, {row['images']:,}, {row['epochs']}", row["attack"], row["defence"],
            percent([row["clean_accuracy"]], 1), percent([row["asr"]], 1),
            "" if "undone" not in row else "yes" if any(map(any, row["undone"])) else "no",
            number([row["epoch_equivalents"]], 1),
        ]
        for row in found
    ]  # fmt: skip
    left = ["network, data, images, epochs", "attack", "treatment"]
    return table([*left, "accuracy", "ASR", "undone", "epochs' work"], lines, left=left)


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--weights", type=Path, help="ImageNet weights of EfficientNet-Lite0; without, none is tuned")
    parser.add_argument("--only", nargs="*", default=[""], help="only cells whose data/model/attack/name/ contains one")
    parser.add_argument("--table", action="store_true", help="print the rows; run nothing")
    options = parser.parse_args()
    command.begin(options)
    NETWORKS[PRETRAINED] = partial(efficientnet_lite0, options.weights)
    for setting, attack in [] if options.table else CASES:
        for name in NAMES:
            known = {"defence": name, **rows.identity(setting, attack, 0)}
            wanted = any(word in f"{setting.dataset}/{setting.model}/{attack}/{name}/" for word in options.only)
            if not wanted or (options.weights is None and setting.model == PRETRAINED):
                continue
            if rows.key(known) not in {rows.key(row) for row in rows.read(options.results)}:
                row = run_cell(setting, attack, name, options)
                rows.append(options.results, row)
                print(markdown([row]).splitlines()[-1], flush=True)
    print(markdown(rows.latest(rows.read(options.results))))


if __name__ == "__main__":
    main()
