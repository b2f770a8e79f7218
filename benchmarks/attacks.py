"""``python -m benchmarks.attacks``: what every attack does to an image, on one sheet, ``figures/attacks.png``.

Each attack of the benchmark once: a clean image, the same poisoned, and their difference, ten times enlarged around
mid-grey; and the same again of cover samples and of images at test time, where the trigger has another form there. The
model that some attackers need comes from the cache of ``python -m benchmarks run``, or is trained now.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks import command
from benchmarks.cache import clean_model
from benchmarks.cells import ATTACKS, SOURCE, TARGET, Attack
from benchmarks.figures import blank_figure, own_style
from benchmarks.plot import DPI, SOFT, kind_of
from lightning_backdoor.attacks import CraftedTrigger

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURE = Path(__file__).parent / "figures" / "attacks.png"
HEADER = ("clean", "triggered", "difference × 10")
COLUMNS = 3
GAP = 2  # pixels of an image, between images
SCALE = 3  # a whole number, or patterns of pixels would look uneven
MARGIN, TEXT = 16, 24  # pixels of the sheet, beside strips and for a line of text
HOSTS = 50  # images of the target class that are crafted together
CLEAN_LABEL, OTHER = 3, 7  # which image of the target class, and which of the class of other attacks


def distinct(recipes: dict[str, Attack]) -> dict[str, Attack]:
    """One recipe for each kind of poisoned image: those that differ by rate alone are shown once."""
    kinds: dict[object, str] = {}
    for name, recipe in recipes.items():
        if recipe.trigger is not None or recipe.make is not None:
            kinds.setdefault((repr(recipe.trigger), recipe.make, recipe.sources), name)
    return {name: recipes[name] for name in kinds.values()}


def forms(recipe: Attack, images: Tensor, labels: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What a form is called, and a clean and a triggered image, uint8 (C, H, W); the poison first, and what differs."""
    trigger = recipe.trigger
    crafted = isinstance(trigger, CraftedTrigger)
    other = images[labels == SOURCE][OTHER]
    hosts = images[labels == TARGET][CLEAN_LABEL:] if recipe.labels == "clean" else other[None]
    clean, poison = hosts[0], (trigger.craft(hosts[:HOSTS], TARGET) if crafted else trigger(hosts[:1]))[0]
    yield "", clean, poison
    if recipe.covers and not (cover := trigger.on_covers()(clean)).equal(poison):
        yield " on covers", clean, cover
    if not trigger.at_test()(clean).equal(poison):
        yield " at test", other, trigger.at_test()(other)


def enlarged_difference(image: Tensor, clean: Tensor) -> Tensor:
    """Ten times the difference, around mid-grey."""
    return (128 + 10 * (image.int() - clean.int())).clamp(0, 255).to(torch.uint8)


def strip(clean: Tensor, triggered: Tensor) -> Tensor:
    """Both images and their difference side by side, uint8 (C, H, 3 W and two gaps)."""
    gap = clean.new_full((*clean.shape[:2], GAP), 255)
    return torch.cat([clean, gap, triggered, gap, enlarged_difference(triggered, clean)], dim=2)


def sheet(recipes: dict[str, Attack], train: TensorDataset, model: nn.Module) -> Figure:
    """The forms of every attack, in columns; every pixel of an image is as large as the others."""
    strips = [
        (kind_of(name) + form, strip(clean, triggered))
        for name, recipe in recipes.items()
        for form, clean, triggered in forms(recipe.made(train, lambda: model), *train.tensors)
    ]
    return laid_out(strips)


def laid_out(strips: list[tuple[str, Tensor]]) -> Figure:
    """Named strips of images, uint8 (C, H, W), one below the other in columns."""
    height, width = (SCALE * length for length in strips[0][1].shape[1:])
    lines = -(-len(strips) // COLUMNS)
    across, down = COLUMNS * (width + MARGIN), TEXT + lines * (height + TEXT)
    with own_style():
        figure = blank_figure(across / DPI, down / DPI)
        for place, (name, picture) in enumerate(strips):
            column, line = divmod(place, lines)
            left, bottom = MARGIN / 2 + column * (width + MARGIN), down - TEXT - (line + 1) * (height + TEXT)
            axes = figure.add_axes((left / across, bottom / down, width / across, height / down))
            axes.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.axis("off")
            axes.set_title(name, fontsize=10, loc="left", pad=3)
            for slot, told in enumerate(HEADER if line == 0 else ()):
                x = (left + (slot + 0.5) * width / len(HEADER)) / across
                figure.text(x, 1 - 5 / down, told, fontsize=9, color=SOFT, ha="center", va="top")
    return figure


def main() -> None:
    parser = command.setting_parser(__doc__)
    parser.add_argument("--out", type=Path, default=FIGURE)
    options = parser.parse_args()
    train, _, setting = command.begin_setting(options)
    model = clean_model(train, setting, 0, options.cache)
    sheet(distinct(ATTACKS), train, model).savefig(options.out, dpi=DPI)
    print(options.out)


if __name__ == "__main__":
    main()
