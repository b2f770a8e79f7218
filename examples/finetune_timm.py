"""Fine-tune any pretrained timm model on an image folder that somebody else may have touched.

    python examples/finetune_timm.py --model tf_efficientnet_lite0 --data path/to/folder --size 64

``--data`` has ``train/<class>/*`` and ``test/<class>/*``. timm downloads the pretrained weights; ``--weights FILE``
reads a state dict instead. Writes ``finetuned.pt``, and a report with the images that were left out. As a test of the
defense, ``--poison 0.05`` gives that share of the training images a trigger and the first label.
"""

import argparse
from functools import partial

import pytorch_lightning as pl
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from lightning_backdoor import DBRCallback, NONECallback, UltraCleanCallback, attacks

DEFENSES = {"UltraClean": UltraCleanCallback, "NONE": NONECallback, "D-BR": DBRCallback}


def pretrained(name: str, classes: int, weights: str | None) -> nn.Module:
    """The model with a new head, on the weights of a file, or on those that timm downloads."""
    if weights is None:
        return timm.create_model(name, pretrained=True, num_classes=classes)
    network = timm.create_model(name)
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    network.reset_classifier(classes)
    return network


class Classifier(pl.LightningModule):
    """AdamW and a one-cycle schedule."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("accuracy", (self(images).argmax(dim=1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> dict[str, object]:
        adamw = torch.optim.AdamW(self.parameters(), 1e-3, weight_decay=0.05)
        cycle = torch.optim.lr_scheduler.OneCycleLR(adamw, 1e-3, self.trainer.estimated_stepping_batches)
        return {"optimizer": adamw, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


def transforms(network: nn.Module, size: int, augment: bool) -> v2.Compose:
    """Resize and normalize as the model expects it; crop and mirror at random if ``augment``."""
    drawn = [v2.RandomCrop(size, padding=size // 8), v2.RandomHorizontalFlip()] if augment else []
    given = timm.data.resolve_model_data_config(network)
    finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(given["mean"], given["std"])]
    return v2.Compose([v2.Resize((size, size)), *drawn, *finish])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tf_efficientnet_lite0", help="any timm name")
    parser.add_argument("--weights", metavar="FILE", help="pretrained state dict of the model as timm makes it")
    parser.add_argument("--data", required=True)
    parser.add_argument("--size", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--defense", choices=DEFENSES, default="UltraClean")
    parser.add_argument("--poison", type=float, default=0.0, help="share of the training images that get a trigger")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    pl.seed_everything(0, verbose=False)
    train, test = (ImageFolder(f"{options.data}/{part}") for part in ("train", "test"))
    model = Classifier(pretrained(options.model, len(train.classes), options.weights))
    tests = {"accuracy": test}
    if options.poison:
        train = attacks.poison(train, attacks.BadNets(), target=0, rate=options.poison)
        tests["attack success rate"] = attacks.triggered(test, attacks.BadNets(), target=0)
    train.transform = transforms(model.network, options.size, augment=True)
    for dataset in tests.values():
        dataset.transform = transforms(model.network, options.size, augment=False)
    defense = DEFENSES[options.defense](report_dir="backdoor_report")
    trainer = pl.Trainer(max_epochs=options.epochs, callbacks=[defense], logger=False, enable_checkpointing=False)
    loader = partial(DataLoader, batch_size=64, num_workers=options.workers)
    trainer.fit(model, loader(train, shuffle=True, drop_last=True), loader(test))
    torch.save(model.network.state_dict(), "finetuned.pt")
    for name, dataset in tests.items():
        print(f"{name}: {100 * trainer.validate(model, loader(dataset), verbose=False)[0]['accuracy']:.1f} %")
    print(f"left out {len(defense.verdict.removed):,} of {len(train):,} images; see backdoor_report/report.html")


if __name__ == "__main__":
    main()
