"""The protocols of the benchmark: which cells are run, in which order, and how long that takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.cells import ADAPTIVE, ATTACKS, BASELINES, FURTHER, STANDARD
from benchmarks.data import JPEG, SIGNS
from benchmarks.model import RECIPE
from benchmarks.networks import NAME

OURS = ("ultraclean", "NONE", "D-BR", "D-ST")
WORK: dict[str, tuple[float, float]] = {
    "undefended": (1, 0),
    "clean-model": (0, 3),
    "perfect": (1, 0),
    "random": (1, 0),
    "ultraclean": (1.8, 0),
    "ultraclean-paper": (1, 4),
    "ultraclean+NONE": (2.0, 3),
    "NONE": (0.2, 3),
    "NONE-paper": (0.2, 22),
    "random-reset": (0.2, 2),
    "D-BR": (0.1, 15),
    "D-BR-paper": (0.1, 40),
    "D-ST": (2.5, 20),
    "AC": (1, 2),
    "spectral": (1, 2),
    "STRIP": (1, 7),
    "deep-kNN": (1, 3),
    "fine-tune": (0.1, 7),
    "ABL": (1.1, 5),
}
"""Expected time of a defence: a multiple of an undefended training, and epochs whatever its length."""

GUESSED: dict[str, tuple[float, int]] = {
    "resnet18": (8, 50_000),
    "preact-resnet18": (8, 50_000),
    "vgg16-bn": (6, 50_000),
    "vgg19-bn": (6, 50_000),
    "convnext-atto": (9, 50_000),
    "vit-tiny": (8, 50_000),
}
"""As ``SECONDS_PER_EPOCH``, but never measured: for one H100."""

SECONDS_PER_EPOCH: dict[str, tuple[float, int]] = {
    NAME: (11.7, 20_000),  # measured, two CPU threads
    "preact-gelu": (9, 20_000),  # three ratios of single steps to those of the above, one thread
    "convnext": (8, 20_000),
    "vit": (28, 20_000),
    **GUESSED,
}
"""Seconds of an epoch over so many images."""


@dataclass(frozen=True)
class Setting:
    """How every training of a cell is done: the network, the number of images, the epochs, the recipe and the data."""

    model: str = NAME
    images: int = 20_000
    epochs: int = 12
    recipe: str = RECIPE
    dataset: str = JPEG

    @property
    def classes(self) -> int:
        """Number of classes of the data."""
        return 43 if self.dataset == SIGNS else 10

    def __str__(self) -> str:
        return f"{self.model}, {self.images:,} images, {self.epochs} epochs, recipe {self.recipe}"


@dataclass(frozen=True)
class Cell:
    """One training under one attack with one defence."""

    setting: Setting
    attack: str
    defence: str
    seed: int = 0

    @property
    def name(self) -> str:
        """What ``--only`` searches."""
        return f"{self.setting.model}/{self.attack}/{self.defence}/seed-{self.seed}/"

    @property
    def seconds(self) -> float:
        """Expected time, on the hardware of ``SECONDS_PER_EPOCH``."""
        share, further = WORK[self.defence]
        seconds, images = SECONDS_PER_EPOCH[self.setting.model]
        return (share * self.setting.epochs + further) * seconds * self.setting.images / images


@dataclass(frozen=True)
class Protocol:
    """A list of cells in the order in which they run: the most telling first, and what later ones need before them."""

    name: str
    hardware: str
    cells: tuple[Cell, ...]


def hours(cells: Iterable[Cell]) -> float:
    """Expected time of cells, one after the other."""
    return sum(cell.seconds for cell in cells) / 3600


def product(setting: Setting, attacks: Iterable[str], defences: Iterable[str], seed: int = 0) -> list[Cell]:
    """Every defence under every attack, defence by defence. UltraClean alone does not look for all-to-all attacks."""
    names = list(attacks)
    return [
        Cell(setting, attack, defence, seed)
        for defence in defences
        for attack in names
        if not (defence in ("ultraclean", "ultraclean-paper") and ATTACKS[attack].labels == "all_to_all")
    ]


def mini() -> Protocol:
    """For two CPU cores: the small network, all attacks, rates and seeds of the standard ones, ten clean trainings."""
    here, one_target = Setting(), [name for name in STANDARD if name not in ("clean", "all-to-all-10%")]
    further = (*FURTHER, *ADAPTIVE)
    stronger = [name for name in further if not name.endswith("-0.3%")]  # at 0.3 % none took
    long = [name for name in STANDARD if name not in ("badnets-1%", "blended-5%")]  # the rest would take hours
    rates = ("badnets-0.5%", "badnets-10%", "blended-0.5%", "blended-1%", "blended-10%")
    cells = [
        *product(here, STANDARD, ("undefended", *OURS)),
        *product(here, one_target, ("perfect", "random", "random-reset")),
        *product(here, further, ("undefended", "NONE", "fine-tune")),
        *product(here, stronger, ("D-BR",)),
    ]
    for seed in (1, 2):
        cells += product(here, ("badnets-5%", "blended-5%"), ("undefended", *OURS, "perfect"), seed)
    cells += [
        *product(here, STANDARD, BASELINES),
        *product(here, rates, ("undefended", "NONE", "D-BR", "fine-tune")),
        *product(here, long, ("NONE-paper", "ultraclean-paper")),
        *product(here, ("badnets-5%",), ("D-BR-paper",)),
        *product(here, ("clean", "all-to-all-10%", "flower-10%", "low-frequency-5%"), ("ultraclean+NONE",)),
        *product(here, (*stronger, *rates), ("ultraclean",)),
        *product(here, (*one_target, "all-to-all-10%", *stronger, *rates), ("clean-model",)),
    ]
    for seed in range(1, 10):
        cells += product(here, ("clean",), ("undefended",), seed)
    return Protocol("mini", "two CPU cores", tuple(cells))


def architectures() -> Protocol:
    """For two CPU cores: networks of other kinds, small ones, with and without a backdoor."""
    recipes = {"convnext": "adamw", "vit": "adamw", "preact-gelu": RECIPE}
    cells = []
    for attack in ("blended-5%", "clean", "badnets-5%"):
        for name, recipe in recipes.items():
            cells += product(Setting(name, recipe=recipe), (attack,), ("undefended", "NONE", "D-BR", "ultraclean"))
    return Protocol("architectures", "two CPU cores", tuple(cells))


def full() -> Protocol:
    """For one GPU: ResNet-18 by the papers' recipes, then five architectures from ten per cent of poison to none."""
    own = {name: Setting("resnet18", 50_000, 200, name) for name in ("NONE", "D-BR")}
    filtering = Setting("vgg16-bn", 50_000, 200, "UltraClean")
    cells = [
        *product(own["NONE"], ("clean", "badnets-5%", "label-specific-5%"), ("undefended", "NONE", "NONE-paper")),
        *product(
            own["D-BR"],
            ("clean", "badnets-10%", "all-to-all-10%", "trojan-10%", "stripe-10%", "flower-10%", "sig-10%"),
            ("undefended", "D-BR", "D-BR-paper", "D-ST"),
        ),
        *product(
            filtering,
            ("clean", "badnets-10%", "flower-added-10%"),
            ("undefended", "ultraclean", "ultraclean-paper"),
        ),
    ]
    rates = [f"{trigger}-{rate}%" for rate in ("5", "1", "10", "0.5", "0.1") for trigger in ("badnets", "blended")]
    for model in ("resnet18", "preact-resnet18", "vgg19-bn", "convnext-atto", "vit-tiny"):
        recipe = "adamw" if model in ("convnext-atto", "vit-tiny") else "BackdoorBench"
        cells += product(Setting(model, 50_000, 100, recipe), ("clean", *rates), ("undefended", *OURS))
    return Protocol("full", "one GPU", tuple(cells))


PROTOCOLS = {protocol.name: protocol for protocol in (mini(), architectures(), full())}
