"""What D-BR and D-ST share: a detector, or another defence, that tells suspects and trusted samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from lightning_backdoor.callbacks.base import Defense, require_fraction, require_one_of, require_positive
from lightning_backdoor.callbacks.suspects import Judge
from lightning_backdoor.scanning.measure_fct import Detector
from lightning_backdoor.scanning.scanner import DatasetScanner, ScanOptions
from lightning_backdoor.verdict import Verdict

__all__ = ["Detecting"]


class Detecting(Defense):
    """Base of the defences that act on suspects and on trusted samples; ``further`` arguments are for other bases."""

    kept_as: ClassVar[dict[str, str]] = {"verdict": "external_verdict"}

    def __init__(
        self,
        *,
        verdict: Verdict | None,
        trusted: float,
        suspect: Literal["auto"] | float,
        detector: Literal["copy", "fresh"] | nn.Module,
        detector_steps: int,
        fct_metric: Literal["auto", "mse", "cosine"],
        num_transforms: int,
        transform: Callable[[Tensor], Tensor] | None,
        max_removed: float,
        options: ScanOptions,
        report_dir: str | Path | None,
        name: str | None,
        **further: Any,
    ) -> None:
        super().__init__(max_removed=max_removed, options=options, report_dir=report_dir, name=name, **further)
        self.external_verdict = verdict
        own = isinstance(detector, nn.Module)
        self.detector = detector if own else require_one_of("detector", detector, ("copy", "fresh"))
        self._initial: dict[str, Tensor] | None = None  # weights that a fresh detector starts from; None: as they are
        self.trusted = require_fraction("trusted", trusted)
        share = require_one_of("suspect", suspect, ("auto",)) if isinstance(suspect, str) else suspect
        self.suspect = share if share == "auto" else require_fraction("suspect", share)
        self.detector_steps = require_positive("detector_steps", detector_steps) or 1
        self.fct_metric = require_one_of("fct_metric", fct_metric, ("auto", "mse", "cosine"))
        self.num_transforms = require_positive("num_transforms", num_transforms) or 1
        self.transform = transform

    def _judge(self) -> Judge:
        detector = Detector(
            self.detector, self._initial, self.detector_steps, self.num_transforms, self.transform, self.options.seed,
            metric=self.fct_metric,
        )  # fmt: skip
        return Judge(self.external_verdict, detector, self.suspect, self.trusted, self.max_removed)

    def _known(self) -> tuple[Any, DatasetScanner, Verdict]:
        """Curation, training set and verdict, while a fit runs and the verdict is passed."""
        assert self._loader_filter is not None
        assert self._training_set is not None
        assert self.verdict is not None
        return self._loader_filter, self._training_set, self.verdict
