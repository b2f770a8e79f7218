"""``python -m benchmarks.activations``: does NONE's detection depend on the activation function?

The paper explains hyperplanes by piece-wise linear activations. This trains the quickstart's network on scikit-learn's
digits with eight of them, poisoned and clean, and prints what NONE finds. Ten minutes on two CPU cores at most.
"""

from __future__ import annotations

import argparse
import logging
import warnings

import pytorch_lightning as pl
from torch import nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.cells import BEYOND
from benchmarks.digits import Classifier, digits, right
from lightning_backdoor import NONECallback, attacks, metrics

ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus, nn.Tanhshrink)
EPOCHS = 12


def trained(activation: type[nn.Module], dataset: Dataset, callbacks: list[pl.Callback]) -> Classifier:
    """The quickstart's network with another activation."""
    pl.seed_everything(0, verbose=False)
    model = Classifier()
    for place, layer in enumerate(model.layers):
        if isinstance(layer, nn.ReLU):
            model.layers[place] = activation()
    trainer = pl.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(dataset, batch_size=64, shuffle=True))
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of the activations; all by default")
    only = parser.parse_args().only
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    clean, test = digits()
    poisoned = attacks.poison(clean, attacks.BadNets(), target=0, rate=0.05)
    attacked = attacks.triggered(test, attacks.BadNets(), target=0)
    print(
        "| activation | undefended | NONE | separation | TPR | FPR | removed from clean data | accuracy on clean data |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for activation in ACTIVATIONS:
        if only and activation.__name__ not in only:
            continue
        undefended = trained(activation, poisoned, [])
        defence, quiet = NONECallback(extra_epochs=BEYOND), NONECallback(extra_epochs=BEYOND)
        defended, untouched = trained(activation, poisoned, [defence]), trained(activation, clean, [quiet])
        rates = metrics.DetectionRates()
        rates.update(defence.verdict.scores, defence.verdict.keep, poisoned.poisoned)
        found = {name: 100 * float(rate) for name, rate in rates.compute().items()}
        standardized_gap = max((apart for past in defence.history for _, apart in past.subpopulations), default=0.0)
        pairs = [f"{right(model, test):.1f} / {right(model, attacked):.1f}" for model in (undefended, defended)]
        print(
            f"| {activation.__name__} | {' | '.join(pairs)} | {standardized_gap:.1f} | {found['tpr']:.1f} "
            f"| {found['fpr']:.1f} | {len(quiet.verdict.removed)} | {right(untouched, test):.1f} |",
            flush=True,
        )
    print(f"\nClean accuracy / ASR in per cent; {len(poisoned):,} digits, BadNets 5 %, {EPOCHS} epochs, one seed.")


if __name__ == "__main__":
    main()
