"""``python -m benchmarks.values``: what a decision is made from, for many small training sets, one file for each.

Trains a network on each set (:mod:`benchmarks.samples`) and stores what a detector measures of every sample early, half
way and at the end, with the truth. A decision rule can then be tried on all of them in seconds (:func:`load`). The
files are packed into a few archives as they are finished, so that an interrupted run leaves what it has.

Values are stored as one byte each, in steps that grow with the value, as coarse as bfloat16 near the largest.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.digits import Classifier as DigitsClassifier
from benchmarks.model import RECIPE, Classifier, crop_and_flip
from benchmarks.networks import preact_gelu, resnet9, resnet18, small_vit
from benchmarks.samples import (
    SOURCES,
    Change,
    Samples,
    attack,
    called,
    catch_all,
    kind,
    label_noise,
    long_tail,
    near_duplicates,
    pack,
    pairs,
    sticker,
    tinted,
)
from lightning_backdoor import attacks, functional


def small(classes: int) -> nn.Sequential:
    """The three convolutions of :mod:`benchmarks.digits`."""
    return DigitsClassifier(classes).layers


NETWORKS = {"resnet9": resnet9, "gelu": preact_gelu, "vit": small_vit, "resnet18": resnet18, "small": small}
RECIPES = {"vit": "adamw", "small": "small"}
"""Of networks that are not trained with the usual one."""
BATCH = 128
WIDTH = 128  # columns of a feature layer that are stored, at most
UNITS = 96  # of all layers, those that some class drives furthest out of their usual range
LARGEST_ARCHIVE = 15_000_000  # bytes
ARCHIVES = 4
ALL = ("early", "half", "half_shift", "end", "end_shift", "units")
"""Penultimate features after a quarter of the training, half way and at the end; how far they move when the image is
denoised (twice the original minus both denoised ones); the largest activations of units at the end."""
HALF = ("early", "half", "half_shift")
BOTH = ("early", "half", "half_shift", "units")


@dataclass(frozen=True)
class Case:
    """A training set, the network that is trained on it, and what is stored.

    Attributes:
        source: Name of the images.
        count: How many.
        change: What is done to them.
        network: Name of the network.
        epochs: Of the training.
        seed: Of images, weights and batches.
        classes: Classes of CIFAR-10.
        parts: Names of the stored parts, of :data:`ALL`.
        batch: Samples of a step.
        augmented: Whether images are shifted and mirrored.
    """

    source: str = "cifar10"
    count: int = 4000
    change: Change | None = None
    network: str = "resnet9"
    epochs: int = 50
    seed: int = 0
    classes: tuple[int, ...] | None = None
    parts: tuple[str, ...] = BOTH
    batch: int = BATCH
    augmented: bool = True

    def samples(self, folder: Path) -> Samples:
        """The training set."""
        options = {} if self.classes is None else {"classes": self.classes}
        found = SOURCES[self.source](folder, self.count, self.seed, **options)
        return found if self.change is None else self.change(found, self.seed)


SIGNS: dict[str, Any] = {"source": "gtsrb", "count": 8000, "epochs": 12}
DIGITS: dict[str, Any] = {"source": "digits", "count": 1400, "epochs": 20, "parts": ALL}
FEW: dict[str, Any] = {"count": 3000}
TWO: dict[str, Any] = {"count": 2000, "classes": (1, 9)}
SMALL: dict[str, Any] = {"network": "small", "epochs": 10, "parts": ALL, "batch": 64, "augmented": False}
SMALL_DIGITS: dict[str, Any] = DIGITS | SMALL
STRIPES = attacks.AdaptiveBlend(pattern="stripe")

CASES: dict[str, Case] = {
    "signs-clean": Case(**SIGNS, parts=ALL),
    "signs-sticker-5%": Case(**SIGNS, change=attack(sticker, 0.05)),
    "signs-blended-5%": Case(**SIGNS, change=attack(attacks.Blended(), 0.05), parts=HALF),
    "clean": Case(parts=ALL),
    "badnets-1%": Case(change=attack(attacks.BadNets(), 0.01)),
    "badnets-5%": Case(change=attack(attacks.BadNets(), 0.05)),
    "adap-stripe-4%": Case(change=attack(STRIPES, 0.04, covers=0.04)),
    "sig-80%": Case(change=attack(attacks.SIG(), 0.8, rate_of="target_class", labels="clean")),
    "wanet-10%": Case(change=attack(attacks.WaNet(), 0.1, covers=0.2)),
    "kind-watermark-20%": Case(**FEW, change=kind("watermark", 0.2)),
    "kind-drawing-40%": Case(**FEW, change=kind("drawing", 0.4)),
    "kind-border-90%": Case(**FEW, change=kind("border", 0.9)),
    "two-clean": Case(**TWO),
    "two-kind-watermark-40%": Case(**TWO, change=kind("watermark", 0.4)),
    "noise-10%": Case(**FEW, change=label_noise(0.1)),
    "noise-20%": Case(**FEW, change=label_noise(0.2)),
    "long-tail": Case(change=long_tail(20)),
    "cats-dogs-20%": Case(**FEW, change=called(3, 5, 0.2)),
    "near-duplicates": Case(**FEW, change=near_duplicates(7, 5, 30)),
    "digits-clean": Case(**DIGITS),
    "digits-pairs": Case(**DIGITS, change=pairs),
    "digits-tinted": Case(**DIGITS, change=tinted(0)),
    "digits-tinted-75": Case(**DIGITS, change=tinted(75)),
    "digits-badnets-5%": Case(**DIGITS, change=attack(attacks.BadNets(), 0.05)),
    "signs-clean-resnet18": Case(**SIGNS, network="resnet18", parts=("half", "half_shift", "units")),
    "clean-gelu": Case(**FEW, network="gelu"),
    "clean-vit": Case(**FEW, network="vit", epochs=60),
    "blended-1%": Case(change=attack(attacks.Blended(), 0.01)),
    "blended-5%": Case(change=attack(attacks.Blended(), 0.05)),
    "adap-stripe-2%": Case(change=attack(STRIPES, 0.02, covers=0.02)),
    "all-to-all-10%": Case(change=attack(attacks.BadNets(), 0.1, labels="all_to_all")),
    "badnets-0.5%": Case(change=attack(attacks.BadNets(), 0.005)),
    "badnets-10%": Case(**FEW, change=attack(attacks.BadNets(), 0.1)),
    "sig-40%": Case(**FEW, change=attack(attacks.SIG(), 0.4, rate_of="target_class", labels="clean")),
    "kind-camera-40%": Case(**FEW, change=kind("camera", 0.4)),
    "kind-grey-40%": Case(**FEW, change=kind("grey", 0.4)),
    "kind-watermark-90%": Case(**FEW, change=kind("watermark", 0.9)),
    "kind-drawing-20%": Case(**FEW, change=kind("drawing", 0.2)),
    "kind-camera-shared": Case(**FEW, change=kind("camera", 0.4, tuple(range(10)))),
    "two-clean-1": Case(**TWO | {"classes": (3, 5)}, seed=1),
    "two-clean-2": Case(**TWO | {"classes": (0, 8)}, seed=2),
    "two-badnets-5%": Case(**TWO, change=attack(attacks.BadNets(), 0.05)),
    "two-kind-border-90%": Case(**TWO, change=kind("border", 0.9)),
    "badnets-5%-gelu": Case(**FEW, network="gelu", change=attack(attacks.BadNets(), 0.05)),
    "badnets-5%-vit": Case(**FEW, network="vit", epochs=60, change=attack(attacks.BadNets(), 0.05)),
    "signs-sticker-1%": Case(**SIGNS, change=attack(sticker, 0.01), parts=HALF),
    "signs-clean-1": Case(**SIGNS, seed=1, parts=("half", "half_shift")),
    "clean-1": Case(**FEW, seed=1),
    "clean-2": Case(**FEW, seed=2),
    "clean-resnet18": Case(**FEW, network="resnet18", parts=("half", "half_shift", "units")),
    "badnets-5%-resnet18": Case(**FEW, network="resnet18", change=attack(attacks.BadNets(), 0.05)),
    "digits-clean-1": Case(**DIGITS, seed=1),
    "digits-all-to-all-10%": Case(**DIGITS, change=attack(attacks.BadNets(), 0.1, labels="all_to_all")),
    "small-clean": Case(**SMALL_DIGITS),
    "small-tinted": Case(**SMALL_DIGITS, change=tinted(0)),
    "small-tinted-75": Case(**SMALL_DIGITS, change=tinted(75)),
    "small-stripe-2%": Case(**SMALL_DIGITS, change=attack(STRIPES, 0.02, covers=0.02)),
    "small-stripe-4%": Case(**SMALL_DIGITS, change=attack(STRIPES, 0.04, covers=0.04)),
    "small-noise-10%": Case(**SMALL_DIGITS, change=label_noise(0.1)),
    "small-noise-20%": Case(**SMALL_DIGITS, change=label_noise(0.2)),
    "small-called-20%": Case(**SMALL_DIGITS, change=called(3, 5, 0.2)),
    "small-catch-all-5%": Case(**SMALL_DIGITS, change=catch_all(0.05)),
    "small-catch-all-10%": Case(**SMALL_DIGITS, change=catch_all(0.1)),
    "small-pairs": Case(**SMALL_DIGITS, change=pairs),
    "small-long-tail": Case(**SMALL_DIGITS, change=long_tail(6)),
    "small-near-duplicates": Case(**SMALL_DIGITS, change=near_duplicates(7, 3, 20)),
    "small-kind-watermark-40%": Case(**SMALL_DIGITS, change=kind("watermark", 0.4)),
    "small-kind-drawing-40%": Case(**SMALL_DIGITS, change=kind("drawing", 0.4)),
    "small-kind-camera-40%": Case(**SMALL_DIGITS, change=kind("camera", 0.4)),
    "small-kind-border-40%": Case(**SMALL_DIGITS, change=kind("border", 0.4)),
    "small-photos": Case(**FEW | SMALL),
    "small-photos-cats-dogs-20%": Case(**FEW | SMALL, change=called(3, 5, 0.2)),
    "small-photos-drawing-40%": Case(**FEW | SMALL, change=kind("drawing", 0.4)),
    "small-two": Case(**TWO | SMALL),
}
"""All cases, the most telling first."""

CLEAN = {
    "signs-clean": 8, "clean": 6, "two-clean": 6, "digits-clean": 6, "digits-tinted": 2, "long-tail": 4, "noise-10%": 4,
    "noise-20%": 4, "cats-dogs-20%": 4, "near-duplicates": 4, "clean-gelu": 4, "clean-vit": 4, "clean-resnet18": 2,
    "signs-clean-resnet18": 2,
}  # fmt: skip
"""Cases without a poison or a clean kind of image of one class, and with how many seeds they are trained."""
CLEAN_TRAININGS = [f"{name}@{seed}" for name, seeds in CLEAN.items() for seed in range(1, seeds + 1)]


def case_of(name: str, *, tiny: bool = False) -> Case:
    """The case of a name; ``name@3`` is the case with another seed, a ``tiny`` one has a few images and epochs."""
    base, _, seed = name.partition("@")
    case = replace(CASES[base], seed=int(seed)) if seed else CASES[base]
    return replace(case, count=400, epochs=2) if tiny else case


# Training and measuring, with everything on one device.


def mixed(device: str) -> torch.autocast:
    """Half precision on a GPU; many CPUs have no arithmetic for it and take a hundred times as long."""
    return torch.autocast(device, torch.bfloat16, enabled=device != "cpu")


def train(samples: Samples, case: Case, device: str) -> Iterator[tuple[int, Classifier]]:
    """Train the network of a case; yields after every epoch how many there were, and the network."""
    torch.manual_seed(case.seed)
    images, labels = samples.images.to(device), samples.labels.to(device)
    steps = max(len(samples) // case.batch, 1)
    classifier = Classifier(case.epochs * steps, recipe=RECIPES.get(case.network, RECIPE))
    classifier.network = NETWORKS[case.network](classes=samples.classes).to(memory_format=torch.channels_last)
    classifier.to(device).train()
    configured = classifier.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    for epoch in range(case.epochs):
        order = torch.randperm(len(samples), device=device)
        for rows in order[: steps * case.batch].split(case.batch):
            optimizer.zero_grad()
            with mixed(device):
                shown = crop_and_flip(images[rows]) if case.augmented else images[rows]
                loss = F.cross_entropy(classifier(shown), labels[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        yield epoch + 1, classifier


@contextmanager
def recorded(classifier: Classifier) -> Iterator[dict[str, Tensor]]:
    """The input of the last layer and the largest outputs of all units of the others, filled by a forward pass."""
    layers = [layer for layer in classifier.network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    found: dict[str, Tensor] = {}

    def keep(place: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            places = (2, 3) if output.ndim == 4 else (1,)
            found[f"{place:03}"] = (output if output.ndim == 2 else output.amax(dim=places)).float()

        return hook

    def features(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found["features"] = inputs[0].float()

    hooks = [layer.register_forward_hook(keep(place)) for place, layer in enumerate(layers[:-1])]
    hooks.append(layers[-1].register_forward_pre_hook(features))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def measure(classifier: Classifier, images: Tensor, device: str) -> dict[str, Tensor]:
    """Features, units and logits of uint8 images, on the CPU."""
    classifier.eval()
    parts: list[dict[str, Tensor]] = []
    with recorded(classifier) as found, mixed(device):
        for batch in images.split(1000):
            logits = classifier(batch.to(device)).float()
            units = torch.cat([found[name] for name in sorted(found) if name != "features"], dim=1)
            parts.append({"features": found["features"].cpu(), "units": units.cpu(), "logits": logits.cpu()})
    classifier.train()
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def strongest_units(units: Tensor, logits: Tensor, count: int) -> Tensor:
    """Columns of the units that some class drives furthest out of their usual range, best of every class first."""
    classes = logits.shape[1]
    statistics = functional.HyperplaneStatistics(units.shape[1], classes, strong=0.5, weak=min(0.1, 0.5 / classes))
    statistics.update(units, logits.softmax(dim=1))
    usual = statistics.usual()[1].T.clamp(min=1e-6)
    order = (statistics.activation_excess() / usual).argsort(dim=0, descending=True)
    return torch.tensor(list(dict.fromkeys(order.flatten().tolist()))[:count])


def denoised(images: Tensor, device: str) -> list[Tensor]:
    """The images denoised in both ways, uint8 ``(N, 3, 32, 32)`` on the CPU."""
    ways = (functional.local_median, functional.nl_means)
    return [torch.cat([way(batch.to(device)).cpu() for batch in images.split(1000)]) for way in ways]


def run(name: str, data: Path, folder: Path, device: str, *, tiny: bool = False) -> tuple[Path, float]:
    """Train and measure a case, and write its file; returns the file and the seconds it took.

    A ``tiny`` one has a few images and epochs, to see whether everything works.
    """
    started, case = time.perf_counter(), case_of(name, tiny=tiny)
    samples = case.samples(data)
    versions = denoised(samples.images, device) if any("shift" in part for part in case.parts) else []
    stored: dict[str, Tensor] = {}
    moments = {max(case.epochs // 4, 1): "early", max(case.epochs // 2, 1): "half", case.epochs: "end"}
    for epoch, classifier in train(samples, case, device):
        moment = moments.get(epoch)
        if moment is None:
            continue
        found = measure(classifier, samples.images, device)
        stored[f"{moment}_predicted"] = found["logits"].argmax(dim=1)
        stored[moment] = found["features"][:, :WIDTH]
        if f"{moment}_shift" in case.parts:
            moved = [measure(classifier, version, device)["features"] for version in versions]
            stored[f"{moment}_shift"] = (2 * found["features"] - moved[0] - moved[1])[:, :WIDTH]
        if moment == "end":
            stored["units"] = found["units"][:, strongest_units(found["units"], found["logits"], UNITS)]
    stored = {part: column for part, column in stored.items() if part in case.parts or part.endswith("predicted")}
    if bool(samples.notable.any()):
        rest = samples[~samples.notable]
        for epoch, classifier in train(rest, case, device):
            if epoch == case.epochs:
                logits = measure(classifier, samples.images, device)["logits"]
                stored["without_predicted"] = logits.argmax(dim=1)
                stored["without_confidence"] = logits.softmax(dim=1).amax(dim=1, keepdim=True)
    path = folder / f"{file_name(name)}.npz"
    save(path, samples, stored)
    return path, time.perf_counter() - started


# Files.


def file_name(case: str) -> str:
    """The name of a case in letters that every file system takes."""
    return re.sub(r"[^A-Za-z0-9.-]", "", case.replace("%", "pc").replace("@", "-seed"))


def save(path: Path, samples: Samples, stored: dict[str, Tensor]) -> None:
    """Write one file; float values ``(N, M)`` as bytes, with the largest size of every column."""
    packed: dict[str, np.ndarray] = {}
    for field in fields(samples):
        column = getattr(samples, field.name)
        if field.name != "images":
            packed[f"truth.{field.name}"] = column.numpy().astype(np.int32 if column.dtype == torch.long else np.bool_)
    for name, column in stored.items():
        if column.is_floating_point():
            scale = column.abs().amax(dim=0).clamp(min=1e-12)
            levels = (column / scale).abs().sqrt() * column.sign() * 127
            packed[f"bytes.{name}"], packed[f"scale.{name}"] = levels.round().to(torch.int8).numpy(), scale.numpy()
        else:
            packed[f"whole.{name}"] = column.numpy().astype(np.int16)
    np.savez_compressed(path, **packed)


def load(path: Path) -> dict[str, Tensor]:
    """Read one file: the truth (``labels``, ``poisoned``, …) and what was measured, float ``(N, M)``."""
    found: dict[str, Tensor] = {}
    with np.load(path) as packed:
        for key in packed.files:
            sort, _, name = key.partition(".")
            column = torch.from_numpy(packed[key])
            if sort == "bytes":
                levels = column.float() / 127
                found[name] = levels.abs() * levels * torch.from_numpy(packed[f"scale.{name}"])
            elif sort != "scale":
                found[name] = column if column.dtype == torch.bool else column.long()
    return found


class Archives:
    """Tar files in a folder, none larger than a limit."""

    def __init__(self, folder: Path, largest: int = LARGEST_ARCHIVE, most: int = ARCHIVES) -> None:
        self.folder, self.largest, self.most = folder, largest, most
        self.sizes: list[int] = []

    def add(self, path: Path) -> bool:
        """Put a file into the first archive that has room for it; ``False`` if none has."""
        size = path.stat().st_size + 2048
        places = [place for place, used in enumerate(self.sizes) if used + size <= self.largest]
        if not places:
            if len(self.sizes) == self.most or size > self.largest:
                return False
            places = [len(self.sizes)]
            self.sizes.append(10240)
        with tarfile.open(self.folder / f"values-{places[0]}.tar", "a") as archive:
            archive.add(path, path.name)
        self.sizes[places[0]] += size
        return True


def _job(name: str, options: argparse.Namespace, folder: Path, last: float) -> tuple[str, Path | None, str]:
    if time.time() > last:
        return name, None, "no time left"
    torch.set_num_threads(1)
    try:
        path, seconds = run(name, options.data, folder, options.device, tiny=options.tiny)
        return name, path, f"{seconds:.1f} s"
    except Exception as error:  # one case that fails must not end the others
        return name, None, repr(error)


def run_all(names: Iterable[str], options: argparse.Namespace) -> None:
    """Run cases in several processes until the time is spent; a case that has begun is finished if it can."""
    options.out.mkdir(parents=True, exist_ok=True)
    archives, end = Archives(options.out), time.time() + options.budget
    with tempfile.TemporaryDirectory() as folder:
        job, wanted = partial(_job, options=options, folder=Path(folder), last=end - options.reserve), list(names)
        pool = multiprocessing.get_context("spawn").Pool(options.processes)
        done = pool.imap_unordered(job, wanted)
        try:
            for _ in wanted:
                name, path, told = done.next(timeout=max(end - time.time(), 0.1))
                kept = path is not None and archives.add(path)
                size = 0 if path is None else path.stat().st_size
                print(f"{name:28} {'kept' if kept else 'LOST'} {size / 1e6:.2f} MB {told}", flush=True)
        except multiprocessing.TimeoutError:
            print("The time is spent.")
        pool.terminate()
        pool.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the packed images")
    parser.add_argument("--pack", type=Path, help="write a part of the images to this folder, and end")
    parser.add_argument("--fresh", action="store_true", help="with --pack: of the images that it leaves out otherwise")
    parser.add_argument("--out", type=Path, default=Path("values"), help="folder of the archives")
    parser.add_argument("--budget", type=float, default=3600, help="seconds")
    parser.add_argument("--reserve", type=float, default=20, help="seconds before the end when no case begins any more")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="*", help="names of cases; all by default")
    parser.add_argument("--tiny", action="store_true", help="a few images and epochs: does everything work here?")
    parser.add_argument("--skip", nargs="*", default=[], help="leave out cases whose names begin with one of these")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    options = parser.parse_args()
    if options.list:
        print(*CASES, sep="\n")
    elif options.pack is not None:
        pack(options.data, options.pack, fresh=options.fresh)
    else:
        names = options.only or CASES
        run_all([name for name in names if not name.startswith(tuple(options.skip))], options)


if __name__ == "__main__":
    main()
