"""What a look that found nothing is worth while the model has learned little."""

from __future__ import annotations

__all__ = ["little_learned"]

LITTLE = 0.5  # of the training images that get their label


def little_learned(accuracy: float | None) -> str:
    """A sentence, after a space, for a model that gives under half of the training images their label; else nothing.

    Args:
        accuracy: Share of the training images that get their label, in ``[0, 1]``; ``None`` if that is not known.
    """
    if accuracy is None or accuracy >= LITTLE:
        return ""
    return (
        f" The model gives only {accuracy:.0%} of the training images their label: it may not have learned a backdoor "
        "yet. Look again after more training."
    )
