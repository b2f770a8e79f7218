"""What a defense found, what was done about it, and what came of that: one record for all methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["STILL_LABELED", "Event", "Signaled", "own_label", "repaired"]

OWN_LABEL = 0.9  # of the accuracy on ordinary samples: more removed ones that get their label may have the right one
STILL_LABELED = 0.1  # of the flagged samples get their label: the backdoor, or a part of it, may still be there


Signaled = tuple[int, float, float, float]
"""A label that may carry a signal in all of its images: label, share of images of other labels that its common pattern
turns into it, the largest such share of another label, and the chance of that among clean labels."""


@dataclass(frozen=True)
class Event:
    """One detection and what followed from it, in plain values that load with ``weights_only=True``.

    Attributes:
        epochs: Epochs trained before it, counted from the last restart.
        removed: Samples that it removed from training.
        num_flagged_before_cap: Samples that the rule flagged in all, before ``max_removed`` limited it.
        subpopulations: Label and standardized gap of every subpopulation that was found.
        response: Name of the response, see :mod:`lightning_backdoor.responses`.
        run: 1 before the first restart, 2 after it, and so on.
        all_to_all: Whether most labels share one subpopulation.
        restarts: Whether training starts anew because of it.
        suspects: Samples to be unlearned, or that the classifier is turned away from.
        left_out: Flagged samples that are not unlearned, since their labels may be right, but leave the training set.
        trusted: Samples to be learned anew, or whose labels count.
        units: Layer, unit, class and score of every unit that was reset.
        unconfident: Classes without a confident sample, whose threshold was replaced.
        no_room: Whether nothing was treated because no epoch was left.
        rechecked: Removed samples of earlier events, if all that was done is to measure them at the end of training.
        accuracies: Share of the samples in training that get their label, in ``[0, 1]``: before the treatment, then
            after each of its steps.
        flagged_label_rates: The same of the flagged samples; ``None`` where there is none.
        undone_steps: For every step whether the weights went back.
        reassigned: Whether the removed samples came back, because the model gives them their label without having
            trained on them.
        at_end: Both shares at the end of training, if it went on after the treatment.
        harmed: Label, and share of its samples that got it before and after a step that was undone because of it.
        of_labels: For labels of which samples are removed, most first: label, share of its kept samples that get it,
            and of its removed ones, as measured last.
        feature_epochs: Epochs of the contrastive stage.
        losses: Mean loss of every epoch of the two stages.
        agreement: Epoch, and share of the neighbors of trusted samples that have their label.
        became_trusted: Uncertain samples that became trusted between the stages.
        became_suspect: Uncertain samples that became suspect then.
        ended_early: Whether training ended before the second stage.
        whole_classes: Labels that may carry a signal in all of their images, see :data:`Signaled`.
    """

    epochs: int
    removed: int
    num_flagged_before_cap: int
    subpopulations: tuple[tuple[int, float], ...] = ()
    response: str = "report"
    run: int = 1
    all_to_all: bool = False
    restarts: bool = False
    suspects: int = 0
    left_out: int = 0
    trusted: int = 0
    units: tuple[tuple[str, int, int, float], ...] = ()
    unconfident: tuple[int, ...] = ()
    no_room: bool = False
    rechecked: int = 0
    accuracies: tuple[float, ...] = ()
    flagged_label_rates: tuple[float | None, ...] = ()
    undone_steps: tuple[bool, ...] = ()
    reassigned: bool = False
    at_end: tuple[float, float | None] | None = None
    harmed: tuple[int, float, float] | None = None
    of_labels: tuple[tuple[int, float, float], ...] = ()
    feature_epochs: int = 0
    losses: tuple[float, ...] = ()
    agreement: tuple[tuple[int, float], ...] = ()
    became_trusted: int = 0
    became_suspect: int = 0
    ended_early: bool = False
    whole_classes: tuple[Signaled, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        """Plain values that load with ``weights_only=True``."""
        return asdict(self)

    @property
    def when(self) -> str:
        """When it took place, for a reader, as ``epoch 5`` or ``epoch 5 of run 2``."""
        return f"epoch {self.epochs}" if self.run == 1 else f"epoch {self.epochs} of run {self.run}"

    @property
    def treated(self) -> bool:
        """Whether a treatment of the model is over."""
        return bool(self.undone_steps)

    @property
    def undone(self) -> bool:
        """Whether the last step of the treatment was undone."""
        return self.treated and self.undone_steps[-1]

    @property
    def outcome(self) -> tuple[float, float | None]:
        """Accuracy and flagged label rate of the weights after the last step that was not undone."""
        last = max((i + 1 for i, undone in enumerate(self.undone_steps) if not undone), default=0)
        return self.accuracies[last], self.flagged_label_rates[last]

    @property
    def remaining(self) -> float | None:
        """Share of the flagged samples that get their label, as measured last; ``None`` if that is not known.

        Samples that came back are not flagged any more, and weights that training started anew without are gone.
        """
        if self.reassigned or self.restarts:  # the weights that this was measured of are gone
            return None
        if self.at_end is not None:
            return self.at_end[1]
        return self.outcome[1] if self.flagged_label_rates else None

    @property
    def failed(self) -> bool:
        """Whether samples were flagged, and the repair has left the backdoor in the model, or never began.

        Samples that are not unlearned may be those of a clean-label attack, which the model has learned.
        """
        if self.left_out and not self.restarts:
            return True
        if self.reassigned or self.remaining is not None:
            return self.remains
        return self.no_room or (bool(self.removed or self.suspects) and not self.treated)

    @property
    def remains(self) -> bool:
        """Whether over a tenth of the flagged samples get their label, as measured last."""
        return self.remaining is not None and self.remaining > STILL_LABELED


def own_label(event: Event) -> bool:
    """Whether removed samples get their label about as often as ordinary samples get theirs: it may be the right one.

    Both are those after the last step of a treatment, by which the model has not been trained on them.
    """
    rate = event.flagged_label_rates[-1] if event.flagged_label_rates else None
    accuracy = event.accuracies[-1] if event.accuracies else 1.0
    return rate is not None and rate > max(OWN_LABEL * accuracy, STILL_LABELED)


def repaired(history: Sequence[Event]) -> bool | None:
    """Whether the model gives at most a tenth of the flagged samples their label, as measured last.

    Flagged samples whose labels are right get them from a good model, too.

    Args:
        history: All events so far.

    Returns:
        ``None`` if nothing was flagged, or it was not measured.
    """
    restarts = [place for place, event in enumerate(history) if event.restarts]
    latest = history[restarts[-1] :] if restarts else history
    known = [event for event in latest if event.remaining is not None]
    return None if not known else not known[-1].remains
