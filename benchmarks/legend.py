"""What the names of the benchmark stand for: its attacks and its defences."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from benchmarks.cells import ATTACKS, CALLBACKS, SOURCE, TARGET, Attack, clean_share
from benchmarks.plot import kind_of
from benchmarks.table import DEFENCES, table

CLASSES = 10  # with equally many images each

TRIGGERS: dict[str, tuple[str, str]] = {
    "badnets": ("3 x 3 grid of black and white pixels in the bottom-right corner", "Gu et al., 2017"),
    "blended": ("uniform noise mixed in, weight {t.alpha:g}", "Chen et al., 2017"),
    "sig": ("{t.frequency:g} periods of a sine from left to right, amplitude {t.delta:g}", "Barni et al., 2019"),
    "all-to-all": ("the grid of badnets", "Gu et al., 2017"),
    "label-specific": ("white square close to the bottom-right corner", "Gu et al., 2017"),
    "flower": ("photograph of a flower mixed in, weight {t.alpha:g}", "Chen et al., 2017, with Hello Kitty"),
    "flower-added": ("{t.alpha:g} of the photograph added", "as UltraClean's authors, with Hello Kitty"),
    "stripe": ("vertical bands, dark and light, mixed in, weight {t.alpha:g}", "as D-BR's authors"),
    "trojan": ("small coloured square added", "Liu et al., 2018, as D-BR's authors; other colours"),
    "watermark": ("translucent ring with a bar, trained to excite neurons of a clean model", "Liu et al., 2018"),
    "label-consistent": (
        "corner patterns on images that gradient steps made hard for a clean model; at test time the patterns alone",
        "Turner et al., 2019",
    ),
    "hidden-trigger": (
        "invisible steps to where a clean model sees images with a coloured patch; at test time the patch",
        "Saha et al., 2020",
    ),
    "wanet": ("smooth warp of the whole image; of covers with a jitter", "Nguyen and Tran, 2021"),
    "low-frequency": ("smooth pattern added, trained against a clean model", "in the manner of Zeng et al., 2021"),
    "sample-specific": ("what a small encoder adds, in every image another", "stands for SSBA, Li et al., 2021"),
    "colour-curve": ("one curve for each colour, as photo filters", "in the manner of Liu et al., 2019"),
    "adap-blend": (
        "{t.masked:.0%} of {t.pieces} pieces of the flower masked, the others mixed in, weight {t.alpha:g}; "
        "at test time all, weight {t.test_alpha:g}",
        "Qi et al., 2023",
    ),
    "adap-patch": ("one faint patch of four; at test time all four, clearly", "Qi et al., 2023"),
    "tact": ("white square, which counts on images of the source class alone", "Tang et al., 2021"),
    "denoised": ("what UltraClean's denoisers leave of the flower, added", "made here against UltraClean"),
    "invariant": ("pattern added, trained to outlive rotations and shifts", "made here against FCT"),
}
"""Words for the trigger ``t`` of each kind of attack, and where it is from."""

NO_CALLBACKS = {
    "undefended": "the network that the poisoned data make",
    "clean-model": "no defence: a network of the next seed, trained on clean data alone; its ASR is what the trigger "
    "does to a model that never saw it",
    "perfect": "a filter that knows the truth: the training set without its poisons",
    "random": "a filter that guesses: the training set without as many images as `ultraclean` removed",
    "random-reset": "is told the poisons and drops them; resets as many units of each layer as `NONE` did, by chance",
    "fine-tune": "five epochs on {share:.0%} of every class, known to be clean",
}
NOTES = {
    "ultraclean": "looks half-way and at the end; trains anew without what it removed",
    "ultraclean+NONE": "both, in one training",
    "NONE": "looks when training is about to end; drops images, resets the units that they drive, fine-tunes",
    "D-BR": "looks when training is about to end; unlearns suspects, relearns from trusted images",
    "D-ST": "looks before the first epoch; learns features by contrast, and a classifier from trusted images",
    "ultraclean-paper": "the authors' score on {c.output}, as in two of their four scripts (`from_paper()` alone: "
    "softmax), of a network that is trained to the end; trains anew; removes {c.fraction:.0%} whatever the data look "
    "like",
    "NONE-paper": "the authors' quotas, natural break and fine-tuning, whatever the data look like",
    "D-BR-paper": "the authors' shares and rate, whatever the data look like; trusts images class by class, trains its "
    "detector with AdamW",
    "AC": "the smaller of two clusters in a class, where it stands apart and has less than {c.size:.0%} of it",
    "spectral": "is told that at most {c.eps:.0%} of a class are poisoned, and removes one and a half times as many "
    "of every class",
    "STRIP": "{c.draws} images are blended in (default: {default.draws}), which are of the training set: the paper has "
    "clean ones",
    "deep-kNN": "in the paper rare classes are drawn more often, here not",
    "ABL": "isolates {c.isolate:.0%} of the images after a fifth of the epochs, as the paper; climbs on them for "
    "{c.epochs} epochs (default: {default.epochs})",
}
"""What to know of the callback ``c``; ``default`` is one without arguments."""

LABELS = f"""*Dirty* labels: images of all classes but {TARGET} are poisoned and get its label. *Clean* labels: images
of class {TARGET} are poisoned and keep their label. *All-to-all*: images of all classes are poisoned and get the label
of the next class. Covers show the trigger and keep their label. The ASR is that of all test images which have another
label than the one that the attacker wants, or of those of the source class (class {SOURCE}) alone; on clean data it is
that of the trigger of badnets, which nobody has learned there."""
SHEET = """![What every attack does to an image](figures/attacks.png)

Every trigger once, whatever its rate (all-to-all has that of badnets): a clean image, the same with the trigger, and
the difference from the clean image, ten times enlarged around grey: what is grey has not changed. Covers and images of
test time follow where they have the trigger in another form than the poisons."""


def legend() -> str:
    """Both tables, and the sheet of pictures."""
    return "\n\n".join([LABELS, attacks_legend(), SHEET, defences_legend()])


def attacks_legend() -> str:
    """One line for each kind of attack, with all its rates."""
    kinds: dict[str, list[Attack]] = {}
    for name, attack in ATTACKS.items():
        if name != "clean":
            kinds.setdefault(kind_of(name), []).append(attack)
    lines = []
    for kind, attacks in kinds.items():
        first, (words, source) = attacks[0], TRIGGERS[kind]
        classes = ", ".join(map(str, first.sources or ())) or "–"
        labels = first.labels.replace("_", "-")
        shown = [kind, _filled(words, t=first.trigger), source]
        lines.append([*shown, share(attacks), covers(attacks), labels, classes])
    head = ["attack", "trigger", "source", "poisons", "covers", "labels", "source class"]
    return table(head, lines, left=head)


def share(attacks: list[Attack]) -> str:
    """Poison rates of one kind of attack in per cent, and of what."""
    rates = sorted(attack.rate for attack in attacks)
    if attacks[0].rate_of == "target_class":
        return f"{_percents(rates)} of the target class = {_percents(rate / CLASSES for rate in rates)} of all"
    return f"{_percents(rates)} of all"


def covers(attacks: list[Attack]) -> str:
    """The same for covers."""
    rates = sorted(attack.covers for attack in attacks)
    return f"{_percents(rates)} of all" if any(rates) else "–"


def defences_legend() -> str:
    """One line for each defence: the call, or what is done in its place."""
    lines = []
    for name in DEFENCES:
        callbacks = CALLBACKS[name]() if name in CALLBACKS else []
        call = " and ".join(f"`{callback!r}`" for callback in callbacks) or "–"
        lines.append([name, call, _note(name, callbacks)])
    head = ["defence", "callback", "what to know"]
    return table(head, lines, left=head)


def _note(name: str, callbacks: list[Any]) -> str:
    if callbacks:
        return _filled(NOTES[name], c=callbacks[0], default=type(callbacks[0])())
    return _filled(NO_CALLBACKS[name], share=inspect.signature(clean_share).parameters["share"].default)


def _filled(words: str, **values: Any) -> str:
    return words.format(**values).replace("%", " %")


def _percents(rates: Iterable[float]) -> str:
    return f"{', '.join(f'{100 * rate:g}' for rate in rates)} %"
