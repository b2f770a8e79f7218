"""``python -m benchmarks.audited``: what ``audit`` finds in undefended networks, and what it costs.

For clean data and every standard attack the undefended network is trained to its end with the callbacks of UltraClean
and NONE beside it, which report alone; then ``audit`` looks at the network. Printed is, for the callbacks and for the
audit, how many poisons and how many other images are in a finding, and the time of the audit as a multiple of one
evaluation pass over the same images. Rows go to ``audited.jsonl``; a run that was interrupted goes on with the first
missing one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks import command, rows
from benchmarks.cases import Case, opened
from benchmarks.cells import STANDARD
from benchmarks.training import BATCH, accuracy, train_network
from lightning_backdoor import NONECallback, UltraCleanCallback, Verdict, audit

RESULTS = Path(__file__).with_name("audited.jsonl")
DETECTORS = ("features", "units")
HEAD = (
    "| attack | ASR | poisons | callbacks: found, others | audit: the same | alike | passes: features | units | both |"
)


def in_findings(verdicts: Sequence[Verdict]) -> Tensor:
    """Samples that are in a finding of some verdict, bool (N,)."""
    return torch.stack([verdict.finding_indices >= 0 for verdict in verdicts]).any(dim=0)


def counted(found: Tensor, poisoned: Tensor) -> tuple[int, int]:
    """Poisons that were found, and other samples."""
    return int((found & poisoned).sum()), int((found & ~poisoned).sum())


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and how many seconds it takes."""
    began = time.perf_counter()
    result = run()
    return result, time.perf_counter() - began


@torch.no_grad()
def evaluated(network: torch.nn.Module, loader: DataLoader[Any]) -> int:
    """One evaluation pass: how many images get their label."""
    return sum(int((network(images).argmax(dim=1) == labels).sum()) for images, labels in loader)


def measured(case: Case, test: Any) -> rows.Row:
    """The row of a case."""
    looking = [
        kind(warmup_epochs=case.setting.epochs, response="report") for kind in (UltraCleanCallback, NONECallback)
    ]
    network = train_network(case.dataset, list(looking), case.setting, case.seed, case.undefended())
    loader = DataLoader(case.dataset, BATCH)
    evaluated(network, loader)  # the first pass is slower
    _, evaluation = timed(lambda: evaluated(network, loader))
    _, features = timed(lambda: audit(network, loader, detectors=("features",), progress=False))
    _, units = timed(lambda: audit(network, loader, detectors=("units",), progress=False))
    verdict, both = timed(lambda: audit(network, loader, progress=False))
    by_callbacks = in_findings([callback.verdict for callback in looking if callback.verdict is not None])
    by_audit = in_findings([verdict])
    return {
        "asr": accuracy(network, case.recipe.test(test)),
        "callbacks": counted(by_callbacks, case.poisoned),
        "audit": counted(by_audit, case.poisoned),
        "same": float((by_callbacks == by_audit).float().mean()),
        "evaluation_seconds": evaluation,
        "features_passes": features / evaluation,
        "units_passes": units / evaluation,
        "both_passes": both / evaluation,
    }


def table(found: Sequence[rows.Row]) -> str:
    """Markdown."""
    lines = [HEAD, f"|{' --- |' * (HEAD.count('|') - 1)}"]
    for row in found:
        counts = " | ".join("{}, {}".format(*row[name]) for name in ("callbacks", "audit"))
        passes = " | ".join(f"{row[f'{name}_passes']:.1f}" for name in (*DETECTORS, "both"))
        same = f"{100 * row['same']:.2f} %"
        lines.append(f"| {row['attack']} | {100 * row['asr']:.1f} | {row['poisons']} | {counts} | {same} | {passes} |")
    return "\n".join(lines)


def main() -> None:
    parser = command.setting_parser(__doc__)
    parser.set_defaults(images=5_000, epochs=8)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="*", default=list(STANDARD), choices=list(STANDARD))
    options = parser.parse_args()
    clean, test, setting = command.begin_setting(options)
    for attack in options.only:
        identity = rows.identity(setting, attack, 0)
        if rows.key(identity) in map(rows.key, rows.read(options.results)):
            continue
        case = opened(attack, clean, setting, 0, options.cache)
        told = rows.circumstances("benchmarks.audited", "cpu")
        rows.append(options.results, {**case.known, **measured(case, test), **told})
        print(table(rows.read(options.results)[-1:]), flush=True)
    print(table(rows.read(options.results)))


if __name__ == "__main__":
    main()
