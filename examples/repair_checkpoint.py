"""Repair a timm checkpoint that may hold a backdoor, with the data that it was trained on.

    python examples/repair_checkpoint.py --model resnet18 --size 224 --checkpoint suspicious.pt --data path/to/folder

D-BR finds the images that the backdoor was learned from and unlearns them. ``--data`` has ``train/<class>/*`` and
``test/<class>/*``; without it a model learns poisoned digits and is repaired. Needs the ``examples`` extra.
"""

import argparse
from typing import Any

import pytorch_lightning as pl
import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from lightning_backdoor import DBRCallback, attacks


class Classifier(pl.LightningModule):
    """A timm model on uint8 images (B, 3, H, W), with AdamW and a one-cycle schedule."""

    def __init__(self, model: str, classes: int) -> None:
        super().__init__()
        self.network = timm.create_model(model, num_classes=classes)
        self.normalize = v2.Normalize(*map(timm.data.resolve_model_data_config(self.network).get, ("mean", "std")))

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.normalize(images.float() / 255))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> dict[str, Any]:
        adamw = torch.optim.AdamW(self.parameters(), 2e-3, weight_decay=0.02)
        cycle = torch.optim.lr_scheduler.OneCycleLR(adamw, 2e-3, self.trainer.estimated_stepping_batches)
        return {"optimizer": adamw, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


def digits() -> tuple[TensorDataset, TensorDataset]:
    """The digits as uint8 images (3, 32, 32): 1,400 to train on, 397 to test on."""
    data = load_digits()
    pixels = torch.from_numpy(data.images * 255 / 16).float().unsqueeze(1)
    pixels = nn.functional.interpolate(pixels, size=32, mode="bilinear").round().to(torch.uint8).repeat(1, 3, 1, 1)
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return tuple(TensorDataset(pixels[part], labels[part]) for part in (order[:1400], order[1400:]))


def fit(model: Classifier, dataset: Dataset, callbacks: list[pl.Callback]) -> None:
    """Train for 12 epochs, or as the callbacks say."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=12, callbacks=callbacks, enable_model_summary=False, **quiet)
    trainer.fit(model.train(), DataLoader(dataset, batch_size=64, shuffle=True, drop_last=True))


@torch.no_grad()
def accuracy(model: Classifier, dataset: Dataset) -> float:
    """Per cent of the images that get the label that the dataset gives them."""
    model.eval().cpu()
    right = [model(images).argmax(dim=1) == labels for images, labels in DataLoader(dataset, batch_size=500)]
    return 100 * float(torch.cat(right).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="test_resnet", help="any timm name")
    parser.add_argument("--size", type=int, default=32, help="of the images of --data, in pixels")
    parser.add_argument("--checkpoint", help="state_dict of the timm model")
    parser.add_argument("--data")
    parser.add_argument("--save", default="repaired.pt")
    options = parser.parse_args()
    if (options.checkpoint is None) != (options.data is None):
        parser.error("--checkpoint and --data belong together")
    pl.seed_everything(0)
    if options.data:
        resize = v2.Compose([v2.Resize((options.size, options.size)), v2.PILToTensor()])
        train, test = (ImageFolder(f"{options.data}/{part}", resize) for part in ("train", "test"))
        held_out, model = {"clean accuracy": test}, Classifier(options.model, len(train.classes))
        model.network.load_state_dict(torch.load(options.checkpoint, weights_only=True))
    else:
        clean, test = digits()
        train = attacks.poison(clean, attacks.BadNets(), target=0, rate=0.05)
        held_out = {"clean accuracy": test, "ASR": attacks.triggered(test, attacks.BadNets(), target=0)}
        model = Classifier(options.model, 10)
        fit(model, train, callbacks=[])
    before = {name: accuracy(model, dataset) for name, dataset in held_out.items()}
    fit(model, train, callbacks=[DBRCallback(warmup_epochs=0, report_dir="backdoor_report")])  # 0: repair at once
    torch.save(model.network.state_dict(), options.save)
    for name, dataset in held_out.items():
        print(f"{name:16} {before[name]:6.1f} -> {accuracy(model, dataset):6.1f}")


if __name__ == "__main__":
    main()
