"""What a detector is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from lightning_backdoor.events import Event
from lightning_backdoor.responses.base import Detection, Session

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["Detector"]


class Detector:
    """What measures every training sample, and decides.

    Attributes:
        meaning: What the score measures, in one sentence for the report.
        by_subpopulations: Whether subpopulations are looked for.
        explains: Whether findings are explained: not if a share of all samples is flagged, whatever the evidence.
        features: Whether penultimate features are needed; where not, no classifier head is searched.
        rereads: Whether it reads the training images several times, so that they are kept in memory meanwhile.
    """

    meaning: str = ""
    by_subpopulations: bool = False
    explains: bool = True
    features: bool = True
    rereads: ClassVar[bool] = False

    def setup(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what a checkpoint may replace next; forget an earlier fit."""

    def require(self, session: Session) -> None:
        """Raise at the start of a fit where model or data rule the detector out."""

    def observe(self, session: Session, first: int) -> None:
        """Measure something before the first detection, which comes after ``first`` epochs."""

    def detect(self, session: Session) -> Detection:
        """Measure all samples and decide; every process calls it and gets the same result."""
        raise NotImplementedError(f"{type(self).__name__} must define `detect`.")

    def metrics(self, history: list[Event]) -> dict[str, float]:
        """What is logged beside the counts."""
        return {}

    def denoised_for(self, session: Session) -> Callable[[Sequence[int]], Sequence[Tensor]] | None:
        """A function from dataset positions to denoised versions of these images, for the report; ``None``: none."""
        return None

    def close(self) -> None:
        """Forget what is kept between detections; after the last one, and at the end of a fit or after an error."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that load with ``weights_only=True``."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint was written."""
