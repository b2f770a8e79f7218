"""``python -m benchmarks.finetune``: fine-tuning a pretrained network, and a transformer from scratch, under attack.

EfficientNet-Lite0 with ImageNet weights on 4,000 images of CIFAR-10 and of GTSRB, enlarged to 64 pixels, and a small
vision transformer from random weights; each under several attacks, without a defence, with each defence as users write
it (no arguments), and beside the two that know the truth. One JSON line per finished cell in ``finetune.jsonl``; a run
that was interrupted, or ended by ``--budget``, goes on with the first missing one. ``--processes`` trains several cells
side by side on one device, so that times are of no use; what a defence costs is counted in epochs' work. ``--pack``
writes the images that are needed as small files, from which everything else reads; ``--table`` prints the rows.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from benchmarks import cells, command, rows
from benchmarks.cells import BEYOND, Attack, clean_share, filtered
from benchmarks.cost import measured
from benchmarks.data import SIGNS, cifar10, per_class
from benchmarks.networks import NETWORKS, PRETRAINED, efficientnet_lite0
from benchmarks.protocols import Cell, Setting
from benchmarks.run import judgement
from benchmarks.samples import drawn, pack_cifar10, packed_signs, whole_tracks
from benchmarks.table import number, percent, table
from benchmarks.training import accuracy, images_of, labels_of, train_network
from lightning_backdoor import DBRCallback, DSTCallback, NONECallback, UltraCleanCallback, attacks, baselines
from lightning_backdoor.callbacks import Defense

RESULTS = Path(__file__).with_name("finetune.jsonl")
UNDEFENDED, PERFECT, TRUSTED = "undefended", "perfect", "fine-tune"
DEFENCES: dict[str, Callable[[], Defense]] = {
    "NONE": NONECallback,
    "ultraclean": UltraCleanCallback,
    "D-BR": DBRCallback,
    "D-ST": DSTCallback,
    "NONE, redraw": partial(NONECallback, reset="reinit", fallback=None),
    "NONE, unlearn": partial(NONECallback, response="unlearn", fallback=None),
    "D-BR, no restart": partial(DBRCallback, fallback=None),
}
"""Each without arguments, and what repairs do by themselves."""

REPAIRS = ("NONE, redraw", "NONE, unlearn", "D-BR, no restart")
IMAGES = 4_000
PHOTOGRAPHS = Setting(PRETRAINED, IMAGES, 5, "adamw")
TRAFFIC = Setting(PRETRAINED, IMAGES, 5, "adamw-signs", SIGNS)
TRANSFORMER = Setting("vit", 10_000, 12, "adamw")
TEST_IMAGES = 2_000


class FourPlaces(attacks.Trigger):
    """A yellow sticker of six by six pixels with a dark cross, at one of four places that the image decides."""

    def paint(self, images: Tensor) -> Tensor:
        """Return the triggered copy of a uint8 batch ``(N, C, H, W)``."""
        painted = images.clone()
        for image, place in zip(painted, (images.long().sum(dim=(1, 2, 3)) % 4).tolist(), strict=True):
            top, left = (4, 20)[place // 2], (5, 21)[place % 2]
            sticker = image[:, top : top + 6, left : left + 6]
            sticker[:] = torch.tensor([250, 220, 30], dtype=torch.uint8, device=image.device)[:, None, None]
            sticker[:, 2:4, 1:5] = sticker[:, 1:5, 2:4] = 20
        return painted


STICKER = "sticker-5%"
FURTHER = ("sig-80%", "badnets-1%", "wanet-10%", "all-to-all-10%")
ATTACKS: dict[str, Attack] = {
    STICKER: Attack(FourPlaces(), 0.05),
    **{name: cells.ATTACKS[name] for name in ("clean", "badnets-5%", "blended-5%", *FURTHER)},
}


def product(attack: str, settings: Iterable[Setting], defences: Iterable[str]) -> list[Cell]:
    """Every defence in every setting, but those that remove poisons where there are none.

    UltraClean alone does not look for all-to-all attacks.
    """
    return [
        Cell(setting, attack, defence)
        for setting in settings
        for defence in defences
        if not (attack == "clean" and defence in (PERFECT, TRUSTED))
        and not (ATTACKS[attack].labels == "all_to_all" and defence == "ultraclean")
    ]


TUNED, USUAL = (PHOTOGRAPHS, TRAFFIC), (UNDEFENDED, "NONE", "ultraclean", "D-BR", PERFECT)
STRONG = ("clean", STICKER, "badnets-5%", "blended-5%")
CELLS = [
    *(cell for attack in STRONG for cell in product(attack, TUNED, USUAL)),
    *(cell for attack in STRONG for cell in product(attack, [TRANSFORMER], USUAL)),
    *(cell for attack in STRONG[1:] for cell in product(attack, (*TUNED, TRANSFORMER), REPAIRS)),
    *(cell for attack in FURTHER for cell in product(attack, TUNED, USUAL)),
    *(cell for attack in (*STRONG, *FURTHER) for cell in product(attack, TUNED, [TRUSTED])),
    *(cell for attack in STRONG for cell in product(attack, TUNED, ["D-ST"])),
    *(cell for attack in FURTHER for cell in product(attack, [TRANSFORMER], USUAL)),
]
"""The most telling first."""


def pack(source: Path, folder: Path) -> None:
    """Write the images of all cells: JPEG files of CIFAR-10, and arrays of GTSRB, where no track is in both splits.

    The classes of GTSRB are numbered by size, largest first, so that the target class of the attacks is one that a
    clean-label attack has room in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pack_cifar10(source, folder, "train", slice(TRANSFORMER.images // 10))
    pack_cifar10(source, folder, "test", slice(TEST_IMAGES // 10))
    signs = packed_signs(source)
    labels, track = signs["y"].astype(np.int64), signs["track"]
    by_size = np.argsort(np.argsort(-np.bincount(labels), kind="stable"), kind="stable")
    trained = whole_tracks(labels, track, int(1.1 * IMAGES), 0)
    others = np.setdiff1d(np.arange(len(labels)), trained)
    for split, rows_of, count in (("train", trained, IMAGES), ("test", others, TEST_IMAGES)):
        chosen = rows_of[drawn(len(rows_of), 0).numpy()[:count]]
        np.savez_compressed(folder / f"gtsrb_{split}.npz", x=signs["x"][chosen], y=by_size[labels[chosen]])


@cache
def loaded(folder: Path, dataset: str, split: str) -> TensorDataset:
    """The images of a split, uint8 (N, 3, 32, 32), and their labels."""
    if dataset != SIGNS:
        return cifar10(folder, split)
    with np.load(folder / f"gtsrb_{split}.npz") as packed:
        images, labels = packed["x"], packed["y"].astype(np.int64)
    return TensorDataset(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels))


def trained_on(setting: Setting, folder: Path) -> TensorDataset:
    """The clean training images of a setting."""
    everything = loaded(folder, setting.dataset, "train")
    if setting.dataset != SIGNS:
        return per_class(everything, setting.images // 10)
    return some(everything, setting.images)


def some(dataset: TensorDataset, count: int) -> TensorDataset:
    """So many samples, or all, at even distances."""
    return TensorDataset(*(column[:: max(len(dataset) // count, 1)][:count] for column in dataset.tensors))


def in_memory(dataset: Any) -> TensorDataset:
    """The samples as a victim receives them, as tensors."""
    return TensorDataset(images_of(dataset), labels_of(dataset))


def run_cell(cell: Cell, options: argparse.Namespace) -> rows.Row:
    """Train one cell, and return its row; an undefended clean network is measured under all attacks.

    In bfloat16 on a GPU alone: many CPUs have no arithmetic for it, and take several times as long.
    """
    setting, recipe, device, mixed = cell.setting, ATTACKS[cell.attack], options.device, options.device == "cuda"
    clean = trained_on(setting, options.data)
    test = some(loaded(options.data, setting.dataset, "test"), options.test_images)
    poisoned, dataset = torch.zeros(len(clean), dtype=torch.bool), clean
    if recipe.trigger is not None:
        attacked = recipe.train(clean, cell.seed)
        poisoned, dataset = attacked.poisoned, in_memory(attacked)
    defences: list[Any] = [DEFENCES[cell.defence]()] if cell.defence in DEFENCES else []
    if cell.defence == TRUSTED:
        verdict = clean_share(dataset.tensors[1], poisoned, cell.seed)
        defences = [baselines.FineTuneTrusted(verdict=verdict, epochs=5, extra_epochs=BEYOND)]
    if cell.defence == PERFECT:
        dataset = in_memory(filtered(dataset, PERFECT, poisoned, 0, cell.seed))
    with measured(device) as meter:
        network = train_network(dataset, defences, setting, cell.seed, None, device=device, mixed=mixed)
    wanted = ATTACKS if (cell.attack, cell.defence) == ("clean", UNDEFENDED) else (cell.attack,)
    rates = {name: accuracy(network, in_memory(ATTACKS[name].test(test)), device, mixed=mixed) for name in wanted}
    return {
        **rows.identity(setting, cell.attack, cell.seed),
        **rows.poison(int(poisoned.sum()), len(clean)),
        "defence": cell.defence,
        "clean_accuracy": accuracy(network, test, device, mixed=mixed),
        "asr": rates[cell.attack],
        **({"asr_under": rates} if len(rates) > 1 else {}),
        "removed": len(clean) - len(dataset),
        **(judgement(defences, poisoned) if defences else {}),
        **(outcome(defences[0]) if cell.defence in DEFENCES else {}),
        **meter.row(len(clean), 0),
        "side_by_side": options.processes,
        "test_images": len(test),
        **rows.circumstances("benchmarks.finetune", device),
    }


def outcome(defence: Defense) -> rows.Row:
    """What a defence did about what it found, and what came of that."""
    return {
        "repaired": defence.repaired,
        "responses": [event.response for event in defence.history],
        "fell_back": any(event.response == "fallback" for event in defence.history),
        "flagged_label_rates": [event.remaining for event in defence.history],
    }


def job(cell: Cell, options: argparse.Namespace) -> tuple[Cell, rows.Row | str]:
    """Run a cell in a process of its own; one that fails must not end the others."""
    command.begin(options)
    NETWORKS[PRETRAINED] = partial(efficientnet_lite0, options.weights)
    try:
        return cell, run_cell(cell, options)
    except Exception as error:
        return cell, repr(error)


def wanted_cells(options: argparse.Namespace) -> list[Cell]:
    """The cells that were asked for and have no row, with the changes that were asked for."""
    changes = {name: getattr(options, name) for name in ("images", "epochs") if getattr(options, name) is not None}
    done = set(map(rows.key, rows.read(options.results)))
    settings = [replace(cell, setting=replace(cell.setting, **changes)) for cell in CELLS]
    found = [replace(cell, seed=seed) for seed in options.seeds for cell in settings]
    words = options.only or [""]
    return [
        cell
        for cell in found
        if rows.cell_key(cell) not in done
        and any(word in f"{cell.setting.dataset}/{cell.name}" for word in words)
        and (options.weights is not None or cell.setting.model != PRETRAINED)
    ]


def run(options: argparse.Namespace) -> None:
    """Run the missing cells in several processes until the time is spent; finished ones are kept."""
    end, missing = time.monotonic() + options.budget, wanted_cells(options)
    command.begin(options)
    pool = multiprocessing.get_context("spawn").Pool(options.processes)
    done = pool.imap_unordered(partial(job, options=options), missing)
    try:
        for _ in missing:
            cell, row = done.next(timeout=max(end - time.monotonic(), 0.1))
            if isinstance(row, str):
                print(f"{cell.setting.dataset}/{cell.name} FAILED: {row}", flush=True)
                continue
            rows.append(options.results, row)
            told = f"accuracy {row['clean_accuracy']:.3f} ASR {row['asr']:.3f} {row['seconds']} s"
            print(f"{cell.setting.dataset}/{cell.name:60} {told}", flush=True)
    except multiprocessing.TimeoutError:
        print(f"The time is spent; {len(wanted_cells(options))} cells are missing.", flush=True)
    pool.terminate()
    pool.join()


def markdown(found: list[rows.Row]) -> str:
    """One line per cell, beside the ASR of the clean model and the accuracy of the perfect filter; in per cent."""
    order = [*dict.fromkeys(cell.setting.model + cell.setting.dataset for cell in CELLS)]
    names = [*ATTACKS]
    known = {rows.key(row): row for row in found}
    lines = []
    for row in sorted(found, key=lambda one: (order.index(one["model"] + one["dataset"]), names.index(one["attack"]))):
        setting = rows.setting_of(row)
        clean = known.get(rows.cell_key(Cell(setting, "clean", UNDEFENDED, row["seed"])), {})
        perfect = known.get(rows.cell_key(Cell(setting, row["attack"], PERFECT, row["seed"])), {})
        lines.append([
            f"{row['model']}, {row['dataset']}, {row['images']:,}, {row['epochs']}", row["attack"], row["defence"],
            str(row["seed"]), percent([row["clean_accuracy"]]), percent([row["asr"]]),
            percent([perfect.get("clean_accuracy")]), percent([clean.get("asr_under", {}).get(row["attack"])]),
            percent([row.get("tpr")], 1), percent([row.get("fpr")], 2),
            "restarted" if row.get("fell_back") else "", number([row["epoch_equivalents"]], 1),
        ])  # fmt: skip
    left = ["network, data, images, epochs", "attack", "defence"]
    header = [
        *left,
        "seed",
        "accuracy",
        "ASR",
        "accuracy, perfect filter",
        "ASR, clean model",
        "TPR",
        "FPR",
        "after a repair",
    ]
    return table([*header, "epochs' work"], lines, left=(*left, "after a repair"))


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--pack", type=Path, help="write the images that are needed to this folder, and end")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the rows; run nothing")
    parser.add_argument("--list", action="store_true", help="print the cells that have not run; run nothing")
    parser.add_argument("--budget", type=float, default=7 * 24 * 3600, help="seconds")
    parser.add_argument("--processes", type=int, default=1, help="cells that are trained side by side")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--weights", type=Path, help="ImageNet weights of EfficientNet-Lite0; without, none is tuned")
    parser.add_argument("--images", type=int, help="training images, in place of those of the cells")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of poisons, weights and batches")
    parser.add_argument("--test-images", type=int, default=TEST_IMAGES)
    parser.add_argument("--only", nargs="*", help="only cells whose data/model/attack/defence/seed-N/ contains one")
    options = parser.parse_args()
    if options.pack is not None:
        pack(options.data, options.pack)
    elif options.list:
        print(*(f"{cell.setting.dataset}/{cell.name}" for cell in wanted_cells(options)), sep="\n")
    else:
        if not options.table:
            run(options)
        print(markdown(rows.latest(rows.read(options.results))))


if __name__ == "__main__":
    main()
