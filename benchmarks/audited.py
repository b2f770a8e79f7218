"""``python -m benchmarks.audited``: what ``audit`` finds in undefended networks, and what it costs.

For clean data and every standard attack the undefended network is trained to its end with the callbacks of UltraClean
and NONE beside it, which report alone; then ``audit`` looks at the network. Printed is, for the callbacks and for the
audit, how many poisons and how many other images are in a finding, and the time of the audit as a multiple of one
evaluation pass over the same images. With ``--digits`` these are scikit-learn's digits. Rows go to ``audited.jsonl``; a
run that was interrupted goes on with the first missing one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks import command, digits, rows
from benchmarks.cases import Case, opened
from benchmarks.cells import STANDARD
from benchmarks.protocols import Setting
from benchmarks.training import BATCH, train_network
from lightning_backdoor import NONECallback, UltraCleanCallback, Verdict, audit

RESULTS = Path(__file__).with_name("audited.jsonl")
DETECTORS = ("features", "units")
DIGITS_BATCH = 64
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
    """What a function returns, and how many seconds of the CPU it takes: others on the machine make no difference."""
    began = time.process_time()
    result = run()
    return result, time.process_time() - began


@torch.no_grad()
def evaluated(network: torch.nn.Module, loader: DataLoader[Any]) -> int:
    """One evaluation pass: how many images get their label."""
    return sum(int((network(images).argmax(dim=1) == labels).sum()) for images, labels in loader)


def of_digits(attack: str, epochs: int) -> tuple[pl.LightningModule, list[Any], Any, Any]:
    """Network, callbacks, training set and triggered test set, as :func:`of_case`, of the digits."""
    train, test = digits.digits()
    recipe = STANDARD[attack]
    dataset = recipe.train(train, 0)
    pl.seed_everything(0, verbose=False)
    network, loader = digits.Classifier(), DataLoader(dataset, DIGITS_BATCH, shuffle=True)
    looking = [kind(warmup_epochs=1, response="report") for kind in (UltraCleanCallback, NONECallback)]
    for length, callbacks in ((epochs - 1, []), (1, looking)):
        pl.Trainer(
            max_epochs=length, accelerator="cpu", callbacks=callbacks, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        ).fit(network, loader)  # fmt: skip
    return network, looking, dataset, recipe.test(test)


def of_case(case: Case, test: Any) -> tuple[pl.LightningModule, list[Any], Any, Any]:
    """The undefended network of a case after its last epoch, at whose end callbacks look at it, and the data."""
    looking = [
        kind(warmup_epochs=case.setting.epochs, response="report") for kind in (UltraCleanCallback, NONECallback)
    ]
    network = train_network(case.dataset, list(looking), case.setting, case.seed, case.undefended())
    return network, looking, case.dataset, case.recipe.test(test)


def measured(network: pl.LightningModule, looking: list[Any], dataset: Any, test: Any) -> rows.Row:
    """What the callbacks and the audit have found, and what the audit costs."""
    network.eval()
    loader = DataLoader(dataset, BATCH)
    poisoned = getattr(dataset, "poisoned", torch.zeros(len(dataset), dtype=torch.bool))
    evaluated(network, loader)  # the first pass is slower
    _, evaluation = timed(lambda: evaluated(network, loader))
    _, features = timed(lambda: audit(network, loader, detectors=("features",), progress=False))
    _, units = timed(lambda: audit(network, loader, detectors=("units",), progress=False))
    verdict, both = timed(lambda: audit(network, loader, progress=False))
    by_callbacks = in_findings([callback.verdict for callback in looking if callback.verdict is not None])
    by_audit = in_findings([verdict])
    return {
        **rows.poison(int(poisoned.sum()), len(poisoned)),
        "asr": evaluated(network, DataLoader(test, BATCH)) / len(test),
        "callbacks": counted(by_callbacks, poisoned),
        "audit": counted(by_audit, poisoned),
        "alike": float((by_callbacks == by_audit).float().mean()),
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
        alike = f"{100 * row['alike']:.2f} %"
        lines.append(f"| {row['attack']} | {100 * row['asr']:.1f} | {row['poisons']} | {counts} | {alike} | {passes} |")
    return "\n".join(lines)


def main() -> None:
    parser = command.setting_parser(__doc__)
    parser.set_defaults(images=5_000, epochs=8)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="*", default=list(STANDARD), choices=list(STANDARD))
    parser.add_argument("--digits", action="store_true", help="1,400 digits in the place of CIFAR-10")
    options = parser.parse_args()
    if options.digits:
        command.begin(options)
        setting = Setting("digits", 1_400, options.epochs, "adam", "digits")
    else:
        clean, test, setting = command.begin_setting(options)
    for attack in options.only:
        identity = rows.identity(setting, attack, 0)
        if rows.key(identity) in map(rows.key, rows.read(options.results)):
            continue
        if options.digits:
            looked = of_digits(attack, options.epochs)
        else:
            looked = of_case(opened(attack, clean, setting, 0, options.cache), test)
        told = rows.circumstances("benchmarks.audited", "cpu")
        rows.append(options.results, {**identity, **measured(*looked), **told})
        print(table(rows.read(options.results)[-1:]), flush=True)
    print(table(rows.read(options.results)))


if __name__ == "__main__":
    main()
