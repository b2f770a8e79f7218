"""How easily a few pixels mislead a network that nobody attacked, undefended and trained with NONE.

Run ``python examples/natural_backdoor.py``: no arguments, no download, about a minute on two CPU cores. Needs the
``examples`` extra (scikit-learn, matplotlib). The data are clean: what REASR finds are natural backdoors, patterns of a
few pixels that send most digits to one class although nobody planted them. One small network, one seed, easy images:
this script shows how the parts fit together and reproduces no published number. A reset that is meant for backdoors
does not make this network harder to mislead: see the row of NONE.
"""

from __future__ import annotations

import time
from pathlib import Path

from quickstart import Classifier, digits, right, train  # beside this script, which Python puts first on its path
from torch import Tensor

from lightning_backdoor import NONECallback, metrics
from lightning_backdoor.report import write_trigger_sheet

REPORT = Path("backdoor_report") / "natural"
BUDGETS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.12)  # of 1,024 pixels; the paper's begin at 2 %, which is too easy here


def prone(model: Classifier, images: Tensor, labels: Tensor) -> metrics.REASR:
    """Search for triggers of up to 12 % of the pixels. The network takes pixels from 0 to 255."""
    reasr = metrics.REASR(model, budgets=BUDGETS, std=1 / 255, candidates=2, steps=80, batch_size=32)
    reasr.update(images, labels)
    return reasr


def main() -> None:
    clean, test = digits()
    images, labels = test.tensors
    defence = NONECallback(samples="keep", extra_epochs=100, rounds=3, report_dir=REPORT)
    runs = {"undefended": [], "NONE": [defence]}  # the one line that changes
    print(f"{len(images)} clean test digits; success of the best trigger of at most b % of the pixels, in per cent:\n")
    for row, (name, callbacks) in enumerate(runs.items()):
        model, seconds = train(clean, callbacks)
        start = time.perf_counter()
        reasr = prone(model, images, labels)
        rates = reasr.compute()
        if row == 0:
            heads = "".join(f"{budget.removeprefix('reasr'):>7}" for budget in list(rates)[1:])
            print(f"{'':12} {'clean accuracy':>14} {heads} {'training':>9} {'search':>8}")
        cells = "".join(f"{100 * float(rate):7.1f}" for rate in list(rates.values())[1:])
        searched = time.perf_counter() - start
        print(f"{name:12} {right(model, test):14.1f} {cells} {seconds:7.1f} s {searched:6.1f} s")
        write_trigger_sheet(REPORT / f"triggers_{name.lower()}.png", reasr.triggers, images, labels)
    print(f"\nLower is better. The triggers: {REPORT}/triggers_*.png")


if __name__ == "__main__":
    main()
