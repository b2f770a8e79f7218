"""``python -m examples.evidence.combined``: does a verdict from several scores beat each of them?

For every attack whose undefended network is in the cache of ``python -m examples.evidence run``, every training image
is measured once (:mod:`examples.evidence.scores`), and every candidate for a verdict judges all images by that: single
scores, averages of ranks, second modes of the responses, and unions of such modes. The best candidate on half of the
attacks is reported on the other half. One JSON line per attack in ``combined.jsonl``; a run that was interrupted goes
on with the first missing one.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from examples.evidence import rows
from examples.evidence.cells import ATTACKS, STANDARD
from examples.evidence.data import packed_cifar10, per_class
from examples.evidence.plot import histogram
from examples.evidence.protocols import Setting
from examples.evidence.run import checkpoint, clean_model
from examples.evidence.scores import Scores, measured, scores_of
from examples.evidence.table import TOOK, percent, table
from lightning_backdoor import functional, metrics
from lightning_backdoor.report.figures import blank_figure

RESULTS = Path(__file__).with_name("combined.jsonl")
SHARE = 0.05  # that a cut without a gate removes
SEEDS = 3  # from 0 on, those that there are
DRAWN = ("susceptibility", "early susceptibility", "movement", "fct", "bias")
MOST_FPR = 0.001  # on average, of a candidate that may be chosen

Judged = tuple[Tensor, Tensor]
"""Scores, float (N,), larger is more suspicious; kept samples, bool (N,)."""
Candidate = Callable[[Scores], Judged]


def ranks(score: Tensor, labels: Tensor | None = None) -> Tensor:
    """Rank of every sample, in (0, 1]; with labels, among the samples of its own."""
    if labels is None:
        return (score.argsort(stable=True).argsort() + 1) / len(score)
    found = torch.empty(len(score))
    for label in labels.unique():
        found[labels == label] = ranks(score[labels == label])
    return found


def average(*names: str, within_labels: bool = False) -> Callable[[Scores], Tensor]:
    """The mean of the ranks that several scores give."""
    return lambda found: torch.stack([
        ranks(found[name], found["labels"] if within_labels else None) for name in names
    ]).mean(dim=0)  # fmt: skip


def top(score: Callable[[Scores], Tensor]) -> Candidate:
    """Remove a share, those with the largest scores; there is no gate."""

    def judge(found: Scores) -> Judged:
        scores = score(found)
        return scores, functional.select_fraction(scores, SHARE)[0]

    return judge


def gated(score: Callable[[Scores], Tensor]) -> Candidate:
    """Remove the second modes of one score inside the labels, if they pass the gate."""

    def judge(found: Scores) -> Judged:
        scores = score(found)
        decision = functional.decide(scores[:, None], scores, found["labels"])
        return scores, decision.keep

    return judge


def modes(*names: str, shared: bool = False) -> Candidate:
    """Remove the second modes of responses that are put side by side, if they pass the gate."""

    def judge(found: Scores) -> Judged:
        values = torch.cat([found[name] for name in names], dim=1)
        decision = functional.decide(values, found["bias"], found["labels"], shared=shared)
        return decision.scores, decision.keep

    return judge


PARTS = ("susceptibility", "fct", "raw bias")  # of the three published systems
CANDIDATES: dict[str, Candidate] = {
    **{
        f"{name}, top 5 %": top(average(name))
        for name in (*PARTS, "movement", "bias", "disagreement", "early susceptibility", "early movement")
    },
    "susceptibility early and late, top 5 %": top(average("susceptibility", "early susceptibility")),
    "three averaged, top 5 %": top(average(*PARTS)),
    "three averaged within labels, top 5 %": top(average(*PARTS, within_labels=True)),
    "six averaged within labels, top 5 %": top(
        average(*PARTS, "early movement", "movement", "bias", within_labels=True)
    ),
    **{f"{name}, gated": gated(lambda found, name=name: found[name]) for name in (*PARTS, "bias")},
    "three averaged within labels, gated": gated(average(*PARTS, within_labels=True)),
    "modes of denoised features": modes("denoised"),
    "modes of denoised features, early": modes("early denoised"),
    "modes of units": modes("units", shared=True),
    "modes of the detector's units": modes("detector units"),
    "modes of features and units": modes("denoised", "units", shared=True),
    "modes of all responses": modes("denoised", "units", "detector units", shared=True),
}
UNIONS = {
    name: tuple(f"modes of {part}" for part in parts)
    for name, parts in {
        "denoised features or units": ("denoised features", "units"),
        "early or late denoised features, or units": ("denoised features", "denoised features, early", "units"),
        "units or detector's units": ("units", "the detector's units"),
        "denoised features, units or detector's units": ("denoised features", "units", "the detector's units"),
    }.items()
}
"""What each of several candidates removes; the score is the largest of theirs."""
NAMES = (*CANDIDATES, *UNIONS)


def judged(found: Scores) -> dict[str, Judged]:
    """What every candidate says."""
    result = {name: candidate(found) for name, candidate in CANDIDATES.items()}
    for name, parts in UNIONS.items():
        scores, keep = (torch.stack(column) for column in zip(*(result[part] for part in parts), strict=True))
        result[name] = scores.amax(dim=0), keep.all(dim=0)
    return result


def rates(judgements: dict[str, Judged], poisoned: Tensor, covers: Tensor) -> dict[str, dict[str, float | None]]:
    """Detection rates of every candidate.

    Covers, triggered images with their own label, are told apart: to remove one is neither a hit nor a false alarm.
    """
    result = {}
    for name, (scores, keep) in judgements.items():
        metric = metrics.DetectionRates()
        metric.update(scores[~covers], keep[~covers], poisoned[~covers])
        result[name] = {key: None if rate.isnan() else round(float(rate), 5) for key, rate in metric.compute().items()}
        result[name] |= {"removed": int((~keep).sum()), "covers_removed": int((~keep & covers).sum())}
    return result


def halves(found: list[rows.Row]) -> tuple[list[rows.Row], list[rows.Row]]:
    """Attacks that took, from 1 to 10 % of the data, dealt out in turns in the order of the benchmark."""
    order = list(ATTACKS)
    told = [row for row in found if row["rate"] >= 0.01 and not row["void"]]
    told.sort(key=lambda row: (order.index(row["attack"]), row["seed"]))
    return told[::2], told[1::2]


def choose(half: list[rows.Row], clean: list[rows.Row]) -> str:
    """The candidate with the largest mean TPR of those that are quiet on clean data and hardly remove clean images."""

    def merit(name: str) -> tuple[bool, float]:
        quiet = all(row["candidates"][name]["removed"] == 0 for row in clean)
        return quiet and _mean(half, name, "fpr") <= MOST_FPR, _mean(half, name, "tpr")

    return max(NAMES, key=merit)


def _mean(half: Iterable[rows.Row], name: str, rate: str) -> float:
    return statistics.fmean(row["candidates"][name][rate] for row in half)


def combined_tables(found: list[rows.Row]) -> str:
    """All candidates; then what the best one of each half does on the other."""
    clean = [row for row in found if row["attack"] == "clean"]
    first, second = halves(found)
    if not second:
        return "Too few attacks have been measured for two halves."
    lines = [
        [
            name, *(percent([_mean(half, name, rate)], 2) for half in (first, second) for rate in ("tpr", "fpr")),
            percent(row["candidates"][name]["auroc"] for row in first + second),
            f"{max((row['candidates'][name]['removed'] for row in clean), default=0):,}",
        ]
        for name in NAMES
    ]  # fmt: skip
    head = ["verdict from", "TPR, half A", "FPR, half A", "TPR, half B", "FPR, half B", "AUROC", "removed, clean data"]
    parts = [table(head, lines, left=head[:1])]
    for chosen_on, reported_on, names in ((first, second, "AB"), (second, first, "BA")):
        name = choose(chosen_on, clean)
        parts.append(
            f"Chosen on half {names[0]}: *{name}*. On half {names[1]}, which had no part in it: TPR "
            f"{percent([_mean(reported_on, name, 'tpr')], 2)}, FPR {percent([_mean(reported_on, name, 'fpr')], 3)}."
        )
    best = choose(first + second, clean)
    lines = []
    for row in found:
        half = "A" if row in first else "B" if row in second else "–"
        told = row["candidates"][best]
        lines.append([
            f"{row['attack']}{' (void)' * row['void']}", str(row["seed"]), half, f"{row['poisons']:,}",
            *(percent([told[name]], 2) for name in ("tpr", "fpr")), f"{told['removed']:,}",
            f"{told['covers_removed']:,} of {row['covers']:,}" if row["covers"] else "–",
        ])  # fmt: skip
    head = ["attack", "seed", "half", "poisons", "TPR", "FPR", "removed", "covers among them"]
    return "\n\n".join([*parts, f"By attack, *{best}*:", table(head, lines, left=head[:1])])


def attacked(attack: str, clean: TensorDataset, setting: Setting, seed: int, cache: Path) -> tuple[Any, Tensor, Tensor]:
    """The training set under an attack, and which of its N samples are poisoned, and covers, bool (N,) each."""
    if not checkpoint(cache, setting, attack, seed).exists():
        raise SystemExit(f"No network of {attack}. First: python -m examples.evidence run --only /{attack}/undefended/")
    dataset = ATTACKS[attack].made(clean, lambda: clean_model(clean, setting, seed, cache)).train(clean, seed)
    if attack == "clean":
        return dataset, *torch.zeros(2, len(clean), dtype=torch.bool)
    return dataset, dataset.poisoned, dataset.covers


def draw(shown: dict[str, tuple[Scores, Tensor]], path: Path) -> None:
    """Histograms of clean and poisoned images, attacks down and scores across."""
    figure = blank_figure(2.6 * len(DRAWN), 0.4 + 1.6 * len(shown))
    axes = figure.subplots(len(shown), len(DRAWN), squeeze=False)
    for row, (attack, (found, poisoned)) in zip(axes, shown.items(), strict=True):
        row[0].set_ylabel(attack, fontsize=8)
        for place, name in zip(row, DRAWN, strict=True):
            histogram(place, found[name], poisoned)
    for place, name in zip(axes[0], DRAWN, strict=True):
        place.set_title(f"log10 {name}", fontsize=8)
    axes[0][0].legend(fontsize=7)
    figure.set_layout_engine("tight")
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--undefended", type=Path, default=RESULTS.with_name("results.jsonl"))
    parser.add_argument("--figure", type=Path, default=RESULTS.parent / "figures" / "scores.png")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS))
    options = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    torch.set_num_threads(options.threads)
    clean = per_class(packed_cifar10(options.data, "train"), options.images // 10)
    setting = Setting(images=len(clean), epochs=options.epochs)
    undefended = {rows.key(row): row for row in rows.read(options.undefended) if row["defence"] == "undefended"}
    for attack, seed in product(options.attacks, range(SEEDS)):
        known = rows.identity(setting, attack, seed)
        plain = undefended.get(rows.key({**known, "defence": "undefended"}))
        done = {rows.key(row, "row") for row in rows.read(options.results)}
        if plain is None or rows.key(known, "row") in done:
            continue
        dataset, poisoned, covers = attacked(attack, clean, setting, seed, options.cache)
        found = measured(dataset, setting, attack, seed, options.cache)
        row = {
            **known,
            **rows.poison(int(poisoned.sum()), len(clean)),
            "void": attack != "clean" and plain["asr"] < TOOK,
            "covers": int(covers.sum()),
            "candidates": rates(judged(found), poisoned, covers),
            **rows.circumstances("examples.evidence.combined", "cpu"),
        }
        rows.append(options.results, row)
        print(attack, seed, file=sys.stderr, flush=True)
    shown = {}
    for attack in (name for name in STANDARD if name != "clean"):
        if scores_of(checkpoint(options.cache, setting, attack, 0)).exists():
            dataset, poisoned, _ = attacked(attack, clean, setting, 0, options.cache)
            shown[attack] = measured(dataset, setting, attack, 0, options.cache), poisoned
    if shown:
        draw(shown, options.figure)
    print(combined_tables(rows.read(options.results)))


if __name__ == "__main__":
    main()
