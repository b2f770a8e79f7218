"""``python -m examples.evidence.attacks --out attacks.png``: what every attack does to an image, on one sheet.

Each attack of the benchmark once: the clean image, the poison, the cover sample and the image of test time where they
differ from the poison, and after each the difference from the clean image, ten times enlarged around mid-grey. The
model that some attackers need comes from the cache of ``python -m examples.evidence run``, or is trained now.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from examples.evidence import command
from examples.evidence.cache import clean_model
from examples.evidence.cells import ATTACKS, SOURCE, TARGET, Attack
from lightning_backdoor.attacks import CraftedTrigger

COLUMNS = ("clean", "poison", "x10", "cover", "x10", "at test", "x10")
HOSTS = 50  # images of the target class that are crafted together
CLEAN_LABEL, OTHER = 3, 7  # which image of the target class, and which of the class of other attacks


def distinct(recipes: dict[str, Attack]) -> dict[str, Attack]:
    """One recipe for each kind of poisoned image: those that differ by rate alone are shown once."""
    kinds: dict[object, str] = {}
    for name, recipe in recipes.items():
        if recipe.trigger is not None or recipe.make is not None:
            kinds.setdefault((repr(recipe.trigger), recipe.make, recipe.sources), name)
    return {name: recipes[name] for name in kinds.values()}


def tiles(recipe: Attack, images: Tensor, labels: Tensor) -> Iterator[Tensor | None]:
    """The pictures of one line, uint8 (C, H, W), ``None`` where a form does not differ from the poison."""
    trigger = recipe.trigger
    crafted = isinstance(trigger, CraftedTrigger)
    hosts = images[labels == TARGET][CLEAN_LABEL:] if crafted else images[labels == SOURCE][OTHER:]
    clean, poison = hosts[0], (trigger.craft(hosts[:HOSTS], TARGET) if crafted else trigger(hosts[:1]))[0]
    cover = trigger.on_covers()(clean) if recipe.covers else poison
    test = trigger.at_test()(clean)
    yield clean
    for shown, needed in ((poison, True), (cover, not cover.equal(poison)), (test, not test.equal(poison))):
        yield shown if needed else None
        yield enlarged_difference(shown, clean) if needed else None


def enlarged_difference(image: Tensor, clean: Tensor) -> Tensor:
    """Ten times the difference, around mid-grey."""
    return (128 + 10 * (image.int() - clean.int())).clamp(0, 255).to(torch.uint8)


def sheet(recipes: dict[str, Attack], train: TensorDataset, model: nn.Module) -> Figure:
    """One line for each attack, in two blocks side by side."""
    lines = -(-len(recipes) // 2)
    with mpl.rc_context({"font.size": 7}):
        figure = Figure(figsize=(2 * (len(COLUMNS) + 1.4) * 0.7, lines * 0.74 + 0.4), layout="constrained", dpi=130)
        axes = figure.subplots(lines, 2 * len(COLUMNS), squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
            axis.set_box_aspect(1)
        for place, (name, recipe) in enumerate(recipes.items()):
            block, line = divmod(place, lines)
            row = axes[line, block * len(COLUMNS) : (block + 1) * len(COLUMNS)]
            pictures = tiles(recipe.made(train, lambda: model), *train.tensors)
            for axis, column, tile in zip(row, COLUMNS, pictures, strict=True):
                if tile is not None:
                    axis.imshow(tile.permute(1, 2, 0).numpy(), interpolation="nearest")
                if line == 0:
                    axis.set_title(column)
            row[0].text(-0.12, 0.5, name.rsplit("-", 1)[0], transform=row[0].transAxes, ha="right", va="center")
    return figure


def main() -> None:
    parser = command.setting_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("attacks.png"))
    options = parser.parse_args()
    train, _, setting = command.begin_setting(options)
    model = clean_model(train, setting, 0, options.cache)
    sheet(distinct(ATTACKS), train, model).savefig(options.out)
    print(options.out)


if __name__ == "__main__":
    main()
