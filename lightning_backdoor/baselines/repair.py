"""What the repairs from the literature share: the arguments, with the defaults of a loop without bounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import Dataset

from lightning_backdoor.baselines.baseline import merged_signature
from lightning_backdoor.callbacks.repairing import RepairCallback
from lightning_backdoor.scanning.scanner import ScanOptions

__all__ = ["RepairBaseline"]


class RepairBaseline(RepairCallback):
    """Base of the repairs from the literature, which stand beside our defences as baselines.

    Every epoch of repair goes through the samples to unlearn first, if there are any, and through those to learn next,
    at a constant rate and **without any bound: what suffers is not put back**.

    Args:
        epochs: Epochs of repair, at most as many as are left of the plan and of ``extra_epochs``. The repair begins as
            late as that leaves time for it, and takes half of the plan at most.
        extra_epochs: Epochs that it may have beyond the plan (``max_epochs``, ``max_steps``, ``max_time``).
        lr: Learning rate of the repair. ``None``: 5 % of the largest so far.
        max_removed: Largest share of the training set that may be unlearned, in ``(0, 1)``.
        report_dir: Folder for the report; with a ``name``, a folder of that name in it. ``None``: beside the logger's
            files; without a logger there is no report.
        forward_fn: ``forward_fn(pl_module, batch)`` returns logits ``(B, K)``, for models that cannot be called with
            the images alone.
        batch_fn: ``batch_fn(batch)`` returns images and labels, for batches in which they cannot be found.
        feature_layer: Name of the classifier's input layer, where it cannot be found.
        eval_transform: Transform without augmentation. ``None``: that of the validation set, else the training
            transform without its random steps.
        eval_dataset: In place of ``eval_transform``, for augmentation inside the dataset: the same samples without it,
            as a dataset, or as a function from the training dataset to one.
        mean: Mean of the pixel normalisation, one number per channel in ``[0, 1]`` units; ``None`` finds it out.
            ``"per_image"``: every image was standardised by itself; its pixels span its smallest to largest value.
        std: Its standard deviation.
        batch_size: Images per forward pass of a look; ``None`` takes the loader's.
        num_workers: Worker processes of a look; ``None`` takes the loader's.
        seed: Seed of the order of the repair.
        name: Tells two instances apart in checkpoints and report folders.

    Raises:
        ArgumentError: If an argument is out of range.
        DataError: At the start of fit, if the training data cannot be read or put into batches anew.
        TrainerError: At the start of fit, if the module optimizes by hand, or the strategy shards the model.
    """

    def __init__(
        self,
        *,
        epochs: int = 20,
        extra_epochs: int = 0,
        lr: float | None = None,
        max_removed: float = 0.5,
        report_dir: str | Path | None = None,
        forward_fn: Callable[[Any, Any], Any] | None = None,
        batch_fn: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
        feature_layer: str | None = None,
        eval_transform: Callable[[Any], Any] | None = None,
        eval_dataset: Callable[[Any], Any] | Dataset[Any] | None = None,
        mean: Sequence[float] | Literal["per_image"] | None = None,
        std: Sequence[float] | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        options = ScanOptions(
            forward_fn, batch_fn, feature_layer, eval_transform, mean, std, batch_size, num_workers, seed,
            eval_dataset=eval_dataset,
        )  # fmt: skip
        super().__init__(
            epochs=epochs,
            extra_epochs=extra_epochs,
            lr=lr,
            paper_loop=True,
            max_removed=max_removed,
            options=options,
            report_dir=report_dir,
            name=name,
        )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the arguments that are handed on as ``**common`` in signature, help and representation."""
        super().__init_subclass__(**kwargs)
        cls.__signature__ = merged_signature(cls)  # type: ignore[attr-defined]
