"""``python -m benchmarks.natural``: does NONE make a network that nobody attacked harder to mislead?

The clean network of the benchmark on CIFAR-10, undefended and with NONE's natural mode: clean accuracy, and the success
rate of the best reverse-engineered trigger of at most 2, 4, ... 12 % of the pixels. Both go on from the undefended run
before its last epoch, which is made now if it is not in the cache.
"""

from __future__ import annotations

from benchmarks import command
from benchmarks.cache import undefended
from benchmarks.cells import BEYOND
from benchmarks.data import per_class
from benchmarks.training import accuracy, train_network
from lightning_backdoor import NONECallback, metrics

IMAGES = 1000  # of the test set; half of them make triggers, the other half score them


def main() -> None:
    parser = command.setting_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reset-fraction", type=float, default=0.05)
    options = parser.parse_args()
    train, test, setting = command.begin_setting(options)
    shared = undefended(train, setting, "clean", 0, options.cache)
    few = per_class(test, IMAGES // 10)
    defence = NONECallback(
        samples="keep", extra_epochs=BEYOND, rounds=options.rounds, reset_fraction=options.reset_fraction
    )
    print("| | clean accuracy | units reset | REASR@2% | @4% | @6% | @8% | @10% | @12% |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name, callbacks in {"undefended": [], "NONE": [defence]}.items():
        network = train_network(train, callbacks, setting, 0, shared)
        reasr = metrics.REASR(network, std=1 / 255, candidates=2, steps=80)
        reasr.update(*few.tensors)
        rates = [f"{100 * float(rate):.1f}" for key, rate in reasr.compute().items() if "@" in key]
        units = sum(len(past.units) for past in defence.history if not past.undone) if callbacks else 0
        print(f"| {name} | {100 * accuracy(network, test):.1f} | {units} | {' | '.join(rates)} |", flush=True)


if __name__ == "__main__":
    main()
