"""``python -m benchmarks.explained``: what is said of attacks and of clean kinds of image, and what becomes of them.

One row for each training set and defence: accuracy, success rate of the attack or accuracy on the kind, and of every
finding the diagnosis and the estimated success rate. ``truth`` is an undefended training in which the poisons are known
at the end: what the estimate is for a perfect detector, beside the true success rate of the same network. Rows that are
there already are not made again. ``figures/estimated.png`` shows these estimates beside the true rates.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks import command, digits, model, rows
from benchmarks.figures import blank_figure, own_style
from benchmarks.plot import BLUE, DPI, RUST, SOFT
from benchmarks.samples import KINDS, clean_images
from benchmarks.table import table as markdown
from lightning_backdoor import DBRCallback, Finding, NONECallback, UltraCleanCallback, Verdict, attacks
from lightning_backdoor.callbacks import Defense, Detector
from lightning_backdoor.responses import Detection, Report, Session

FIGURE = Path(__file__).parent / "figures" / "estimated.png"
CLEAN: dict[str, Any] = {"rate_of": "target_class", "labels": "clean"}


@dataclass(frozen=True)
class Case:
    """A training set: an attack with target 0, or a share of the images of a class as another kind.

    Attributes:
        trigger: Of the attack.
        rate: Of the poisons, or of the kind in its class.
        options: Of :func:`lightning_backdoor.attacks.poison`.
        kind: Key of :data:`benchmarks.samples.KINDS`.
        label: Class that has the kind.
    """

    trigger: Any = None
    rate: float = 0.05
    options: dict[str, Any] = field(default_factory=dict)
    kind: str | None = None
    label: int = 7


CASES = {
    "badnets-5%": Case(attacks.BadNets()),
    "blended-5%": Case(attacks.Blended()),
    "sig-80%": Case(attacks.SIG(), 0.8, CLEAN),
    "wanet-10%": Case(attacks.WaNet(), 0.1, {"covers": 0.2}),
    "trojan-5%": Case(attacks.Trojan()),
    "adap-stripe-4%": Case(attacks.AdaptiveBlend(pattern="stripe"), 0.04, {"covers": 0.04}),
    "all-to-all-10%": Case(attacks.BadNets(), 0.1, {"labels": "all_to_all"}),
    "kind-watermark-20%": Case(kind="watermark", rate=0.2),
    "kind-border-40%": Case(kind="border", rate=0.4),
    "kind-drawing-40%": Case(kind="drawing", rate=0.4),
    "kind-camera-40%": Case(kind="camera", rate=0.4),
}


class Known(Detector):
    """Finds the samples of a mask, label by label, whatever the model says."""

    features = False

    def __init__(self, truth: Tensor) -> None:
        self.truth = truth

    def detect(self, session: Session) -> Detection:
        """One finding for each label; all samples are kept."""
        labels = session.scanner.read_labels(session.trainer, session.module)
        findings = tuple(
            Finding(
                label,
                (self.truth & (labels == label)).nonzero().squeeze(1),
                "truth",
                (),
                torch.tensor([0]),
                torch.tensor([1.0]),
                0.0,
            )
            for label in labels[self.truth].unique().tolist()
        )
        keep = torch.ones_like(self.truth)
        verdict = Verdict(self.truth.float(), keep, float("inf"), "truth", labels, findings=findings)
        return Detection(verdict, 0)


class Truth(Defense):
    """Changes nothing; at the end of training the poisons are known."""

    method = title = "truth"

    def __init__(self, truth: Tensor) -> None:
        super().__init__(detector=Known(truth), response=Report(), warmup_epochs=None, max_removed=0.5)


DEFENCES: dict[str, Callable[[Tensor], Defense]] = {
    "truth": Truth,
    "ultraclean": lambda truth: UltraCleanCallback(),
    "D-BR": lambda truth: DBRCallback(),
    "NONE": lambda truth: NONECallback(),
}


def made(case: Case, train: TensorDataset) -> tuple[Dataset[Any], Tensor]:
    """The training set of a case, and which of its samples are poisons or of the kind, bool ``(N,)``."""
    if case.kind is None:
        poisoned = attacks.poison(train, case.trigger, 0, case.rate, **case.options)
        return poisoned, poisoned.poisoned
    images, labels = train.tensors
    mine = (labels == case.label).nonzero().squeeze(1)
    mine = mine[: round(case.rate * len(mine))]
    images, truth = images.clone(), torch.zeros(len(labels), dtype=torch.bool)
    images[mine], truth[mine] = in_kind(case, images[mine]), True
    return TensorDataset(images, labels), truth


def in_kind(case: Case, images: Tensor) -> Tensor:
    """Images as others of the kind of a case."""
    return KINDS[case.kind or ""](images.float()).clamp(0, 255).round().to(torch.uint8)


def success(case: Case, network: pl.LightningModule, test: TensorDataset) -> float:
    """Share of triggered images of other classes that get the label of the attack, or accuracy on the kind."""
    if case.kind is None:
        return right(network, attacks.triggered(test, case.trigger, 0, labels=case.options.get("labels", "dirty")))
    images, labels = test.tensors
    own = labels == case.label
    return right(network, TensorDataset(in_kind(case, images[own]), labels[own]))


@torch.no_grad()
def right(network: pl.LightningModule, dataset: Dataset[Any]) -> float:
    """Share of the images that get the label of the dataset."""
    found = [(network(images).argmax(dim=1) == labels).float() for images, labels in DataLoader(dataset, 500)]
    return float(torch.cat(found).mean())


def trained(
    source: str, dataset: Dataset[Any], epochs: int, callbacks: list[pl.Callback], device: str, *, seed: int = 0
) -> pl.LightningModule:
    """The small network of a source after a training with callbacks."""
    pl.seed_everything(seed, verbose=False)
    batch = 128 if source == "cifar10" else 64
    loader = DataLoader(dataset, batch, shuffle=True, drop_last=True)
    network: pl.LightningModule = model.Classifier(epochs * len(loader))
    if source != "cifar10":
        network = digits.Classifier(classes=43 if source == "gtsrb" else 10)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator=device, callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(network, loader)
    return network.cpu().eval()


def told(finding: Finding, truth: Tensor) -> dict[str, Any]:
    """What a row says of a finding."""
    sure = finding.suggested_confidences
    return {
        "label": finding.label,
        "samples": len(finding),
        "true": int(truth[finding.positions].sum()),
        "diagnosis": finding.diagnosis,
        "own_label_rate": finding.own_label_rate,
        "confidence": None if sure is None else float(sure.mean()),
        "reference_accuracy": finding.reference_accuracy,
        "reference_confidence": finding.reference_confidence,
        "estimated_asr": finding.estimated_asr,
        "control_asr": finding.control_asr,
        "asr_method": finding.asr_method,
    }


def run(
    source: str, name: str, defence: str, data: tuple[TensorDataset, TensorDataset], *, epochs: int, device: str
) -> rows.Row:
    """Train and measure; the row of a case and a defence."""
    started, case, (train, test) = time.perf_counter(), CASES[name], data
    dataset, truth = made(case, train)
    callback = DEFENCES[defence](truth)
    network = trained(source, dataset, epochs, [callback], device)
    verdict = callback.verdict
    removed = torch.zeros_like(truth) if verdict is None else ~verdict.keep
    return {
        "source": source,
        "case": name,
        "defence": defence,
        "images": len(truth),
        "epochs": epochs,
        "accuracy": right(network, test),
        "asr" if case.kind is None else "accuracy_of_kind": success(case, network, test),
        "poisons": int(truth.sum()),
        "removed": int((removed & truth).sum()),
        "removed_others": int((removed & ~truth).sum()),
        "unlearned": sum(event.suspects for event in callback.history if event.response == "unlearn"),
        "findings": [told(finding, truth) for finding in (() if verdict is None else verdict.findings)],
        "seconds": round(time.perf_counter() - started),
        **rows.circumstances("benchmarks.explained", device),
    }


def percent(value: float | None, digits: int = 0) -> str:
    """A share for a table."""
    return "" if value is None else f"{100 * value:.{digits}f}"


def table(found: list[rows.Row]) -> str:
    """Rows as a table, the largest finding of each."""
    left, lines = ["images", "case", "defence"], []
    for row in found:
        most = largest(row)
        cells = [f"{row['source']} {row['images']:,}", row["case"], row["defence"]]
        cells += [percent(row.get(name)) for name in ("accuracy", "asr", "accuracy_of_kind")]
        cells += [f"{row['removed']} of {row['poisons']}", str(row["removed_others"]), str(row["unlearned"])]
        cells += [str(most.get("diagnosis", "")), percent(most.get("own_label_rate"))]
        cells += [percent(most.get("estimated_asr")), percent(most.get("control_asr")), most.get("asr_method") or ""]
        lines.append(cells)
    head = [*left, "accuracy", "ASR", "on the kind", "removed", "others", "unlearned", "diagnosis", "given label"]
    return markdown([*head, "estimated ASR", "control", "by"], lines, left=[*left, "diagnosis", "by"])


def largest(row: rows.Row) -> dict[str, Any]:
    """The finding of a row with the most samples; an empty one if there is none."""
    return max(row["findings"], key=lambda one: one["samples"], default={})


def draw(found: list[rows.Row], path: Path) -> None:
    """True success rate, estimate and control of every attack, a line each; rows of ``truth``."""
    shown = [row for row in found if row["defence"] == "truth" and "asr" in row]
    shown = [row for row in shown if largest(row).get("estimated_asr") is not None]
    with own_style():
        figure = blank_figure(8, 1.2 + 0.35 * len(shown))
        axes = figure.add_axes((0.26, 0.9 / figure.get_figheight(), 0.7, 1 - 1.3 / figure.get_figheight()))
        for place, row in enumerate(shown):
            most = largest(row)
            true, estimate, control = (100 * rate for rate in (row["asr"], most["estimated_asr"], most["control_asr"]))
            axes.plot([control, estimate], [place, place], color=SOFT, linewidth=0.8)
            axes.plot(true, place, "|", color=SOFT, markersize=14, markeredgewidth=2, label="true")
            axes.plot(estimate, place, "o", color=BLUE, label="estimate")
            axes.plot(control, place, "o", color=RUST, markersize=4, label="the same with ordinary images (control)")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles[:3], labels[:3], loc="upper center", ncols=3, frameon=False)
        axes.set_yticks(range(len(shown)), [f"{row['case']} ({row['source']})" for row in shown])
        axes.set(xlim=(-2, 102), ylim=(len(shown) - 0.5, -0.5), xlabel="images of other classes with the label, %")
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=DPI)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of cifar10_<split>.npz")
    parser.add_argument("--source", choices=("digits", "cifar10"), default="digits")
    parser.add_argument("--images", type=int, default=5000, help="of CIFAR-10")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--only", nargs="*", default=list(CASES), help="names of cases")
    parser.add_argument("--defences", nargs="*", default=list(DEFENCES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "explained.jsonl")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--show", action="store_true", help="print and draw what is there, and end")
    options = parser.parse_args()
    command.quiet(options.threads)
    done = {(row["source"], row["case"], row["defence"]) for row in rows.read(options.out)}
    data: tuple[TensorDataset, TensorDataset] | None = None
    for name in [] if options.show else options.only:
        for defence in options.defences:
            if (options.source, name, defence) in done:
                continue
            if data is None:
                data = clean_images(options.source, options.data, options.images)
            row = run(options.source, name, defence, data, epochs=options.epochs, device=options.device)
            rows.append(options.out, row)
            print(table([row]).splitlines()[-1], row["seconds"], "s", flush=True)
    found = rows.read(options.out)
    print(table(found))
    draw(found, FIGURE)


if __name__ == "__main__":
    main()
