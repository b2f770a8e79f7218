"""Watch a known attack while a model trains: for evidence and examples, where the ground truth is at hand."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_backdoor._lightning import CallbackBase, callbacks_of
from lightning_backdoor.attacks import poisoned_mask
from lightning_backdoor.attacks import triggered as make_triggered
from lightning_backdoor.attacks.poisoning import carried
from lightning_backdoor.callbacks.fabric import guard_inherited_hooks
from lightning_backdoor.callbacks.validation_set import batch_size, first_loader, loaders_in, positions_used
from lightning_backdoor.data.batches import BatchLayout, find_layout
from lightning_backdoor.data.nesting import leaves_of, positions_in
from lightning_backdoor.data.pixels import space_of
from lightning_backdoor.data.random_state import isolated_rng
from lightning_backdoor.data.views import finish_of, scan_loader, unwrapped
from lightning_backdoor.errors import ArgumentError, DataError
from lightning_backdoor.metrics import AttackSuccessRate, DetectionRates, RecoveredAccuracy
from lightning_backdoor.scanning.isolation import prepare_batch, require_unsharded
from lightning_backdoor.scanning.outputs import call_model
from lightning_backdoor.scanning.scan import scan_read, shard
from lightning_backdoor.scanning.scanner import require_replaceable
from lightning_backdoor.verdict import Verdict

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["BackdoorMonitor"]


@guard_inherited_hooks
class BackdoorMonitor(CallbackBase):
    """Log how well the model resists a known attack, at every validation.

    At the end of each validation epoch (not of the sanity check) it logs

    * ``backdoor/clean_accuracy``, on the first validation loader,
    * ``backdoor/attack_success_rate`` and ``backdoor/recovered_accuracy``, on the triggered images,
    * ``backdoor/tpr``, ``fpr``, ``precision`` and ``auroc``, when the training dataset carries ``poisoned`` (see
      :func:`lightning_backdoor.attacks.poison`) and a defence has a verdict; ``backdoor/<method>/tpr`` and so on with
      several defences. A verdict of this epoch's end is seen by the next validation.

    Values that are undefined, such as the TPR on clean data, are left out. Training stays bit-identical.

    With ``per_class`` each value is logged for every class as well, with the class after its name: ``clean_accuracy_3``
    and ``recovered_accuracy_3`` of the images of class 3; ``attack_success_rate_3`` of those that the attacker wants to
    have label 3 and, where true labels are known, ``attack_success_rate_source_3`` of those of class 3; ``tpr_3`` and
    so on of the training images with label 3, ``tpr_source_3`` of those whose true label is 3.

    Costs two evaluation passes over the validation set. ``limit_val_batches`` and ``fast_dev_run`` shorten them to a
    random part, the same each time.

    Args:
        triggered: Dataset of (triggered image, attack label) whose items look like those of the validation set. The
            recovered accuracy needs its ``true_labels``, which :func:`lightning_backdoor.attacks.triggered` provides.
        trigger: Or a trigger, painted on the raw images of the validation set, before their transform.
        target: Attacked class, with ``trigger``; its own images are left out.
        labels: Kind of attack, with ``trigger``: ``"all_to_all"`` aims at ``(y + 1) mod K`` and uses all images.
        batch_size: Images per forward pass; ``None`` takes the validation loader's.
        num_workers: Worker processes of the two passes.
        forward_fn: ``forward_fn(pl_module, batch)`` returns logits ``(B, K)``, for models that cannot be called with
            the images alone.
        batch_fn: ``batch_fn(batch)`` returns images and labels, for batches in which they cannot be found.
        mean: With ``std``, one number per channel: the validation images are already normalised, pixel =
            255 (image * std + mean), and the trigger is painted on the batches. ``"per_image"`` alone: each by itself.
        std: See ``mean``.
        per_class: Log every value for every class, too.
        name: Inserted into the logged names (``backdoor/<name>/...``), to tell two monitors apart.

    Raises:
        ArgumentError: If the arguments contradict each other.
        DataError: At the first validation, if the validation set cannot be read.
        TrainerError: If the strategy shards the model.
    """

    def __init__(
        self,
        *,
        triggered: Dataset[Any] | None = None,
        trigger: Callable[..., Any] | None = None,
        target: int = 0,
        labels: Literal["dirty", "clean", "all_to_all"] = "dirty",
        batch_size: int | None = None,
        num_workers: int = 0,
        forward_fn: Callable[..., Any] | None = None,
        batch_fn: Callable[..., Any] | None = None,
        mean: Sequence[float] | Literal["per_image"] | None = None,
        std: Sequence[float] | None = None,
        per_class: bool = False,
        name: str | None = None,
    ) -> None:
        if (triggered is None) == (trigger is None):
            raise ArgumentError(
                "Pass either `triggered`, a dataset of triggered test images, or `trigger`, to paint the validation "
                f"images, got {'neither' if trigger is None else 'both'}."
            )
        half = (mean is None) != (std is None) and not isinstance(mean, str)
        if half or (mean is not None and trigger is None):
            raise ArgumentError("`mean`, `std` and `trigger` go together: pass all three, or neither `mean` nor `std`.")
        if labels not in ("dirty", "clean", "all_to_all"):
            raise ArgumentError(f"`labels` must be 'dirty', 'clean' or 'all_to_all', got {labels!r}.")
        self.triggered = triggered
        self.trigger = trigger
        self.target = target
        self.labels = labels
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.forward_fn = forward_fn
        self.batch_fn = batch_fn
        self.space = space_of(mean, std)
        self.name, self.per_class = name, per_class
        self._built: tuple[Any, Any] = (None, None)  # a validation set and its triggered twin
        self._has_logged = False

    @property
    def state_key(self) -> str:
        """Tell monitors of different names apart."""
        return ".".join(filter(None, ("lightning_backdoor", "monitor", self.name)))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a model that is in pieces."""
        require_unsharded(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the triggered test set: what cannot be read is reported by the sanity check."""
        dataset = first_loader(trainer.val_dataloaders).dataset
        if self.trigger is not None and self.space is None and self._built[0] is not dataset:
            try:
                with isolated_rng():
                    self._built = dataset, make_triggered(dataset, self.trigger, self.target, self.labels)
            except DataError as error:
                raise DataError(
                    f"BackdoorMonitor cannot paint the validation set. {error} Or pass `mean` and `std`, and the "
                    "monitor paints the batches, or a `triggered` dataset."
                ) from error

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log."""
        if trainer.sanity_checking:
            return
        prefix = "backdoor" if self.name is None else f"backdoor/{self.name}"
        values = {**self._attack(trainer, pl_module), **_detection(trainer, per_class=self.per_class)}
        defined = {f"{prefix}/{key}": value for key, value in values.items() if not math.isnan(value)}
        pl_module.log_dict(defined, batch_size=1, sync_dist=True)
        self._has_logged = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so when there was nothing to do."""
        if not self._has_logged and trainer.is_global_zero:
            warnings.warn(
                "BackdoorMonitor logged nothing, because no validation ran. Give the Trainer a validation loader, and "
                "check `limit_val_batches` and `check_val_every_n_epoch`.",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """Remember that there was something to do: a finished run that is resumed validates no more."""
        return {"has_logged": self._has_logged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue an interrupted run."""
        self._has_logged = state_dict["has_logged"]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the validation set."""
        self._built = (None, None)

    def _attack(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Return clean accuracy, attack success rate and recovered accuracy."""
        val_loader = first_loader(trainer.val_dataloaders)
        inner = unwrapped(val_loader)
        how: dict[str, Any] = {"finish": finish_of(val_loader), "layouts": {}}
        clean, _ = self._scan(trainer, pl_module, inner, "clean accuracy", painted=self.space is not None, **how)
        true_labels: Tensor | None
        if self.space is None:
            predictions, aims, true_labels = self._on_triggered(trainer, pl_module, inner, how)
        else:
            used = (clean["label"] != self.target) | (self.labels == "all_to_all")
            predictions, aims, true_labels = (clean[key][used] for key in ("triggered", "aim", "label"))
        values = {"clean_accuracy": (clean["prediction"] == clean["label"]).double().mean().item()}
        success = AttackSuccessRate(sync_on_compute=False)  # every process has all samples
        success.update(predictions, aims)
        values["attack_success_rate"] = success.compute().item()
        if true_labels is not None:
            recovered = RecoveredAccuracy(sync_on_compute=False)
            recovered.update(predictions, true_labels)
            values["recovered_accuracy"] = recovered.compute().item()
        if self.per_class:
            accuracy = _share_per_class(clean["prediction"], clean["label"])
            values |= _named("clean_accuracy", accuracy)
            values |= _named("attack_success_rate", _share_per_class(predictions, aims))
            if true_labels is not None:
                values |= _named("attack_success_rate_source", _share_per_class(predictions, aims, true_labels))
                values |= _named("recovered_accuracy", _share_per_class(predictions, true_labels))
        return values

    def _on_triggered(
        self, trainer: Trainer, pl_module: LightningModule, val_loader: Any, how: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return predictions, attack labels and, if known, true labels of the triggered dataset."""
        dataset = self._built[1] if self.triggered is None else self.triggered
        loader = DataLoader(dataset, batch_size=batch_size(val_loader), collate_fn=val_loader.collate_fn)
        result, positions = self._scan(trainer, pl_module, loader, "attack success rate", **how)
        truth = getattr(dataset, "true_labels", None)
        return result["prediction"], result["label"], None if truth is None else torch.as_tensor(truth)[positions]

    def _scan(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        loader: Any,
        description: str,
        *,
        finish: Callable[[Any], Any] | None,
        layouts: dict[Any, BatchLayout],
        painted: bool = False,
    ) -> tuple[dict[str, Tensor], list[int]]:
        """Return predictions and labels in the order of the dataset, and the positions that they belong to.

        Batches of one structure share a layout, kept in ``layouts``: triggered images are read as clean ones are.
        """

        def logits_of(batch: Any, layout: BatchLayout) -> Tensor:
            prepared = prepare_batch(trainer, pl_module, batch)
            images = layout.given_images(prepared if self.forward_fn is None else batch)
            return call_model(pl_module, images, self.forward_fn, prepared)

        def step(indices: Tensor, batch: Any) -> dict[str, Tensor]:
            structure = tuple(leaf.path for leaf in leaves_of(batch))
            if structure not in layouts:
                layout = find_layout(batch, self.batch_fn, positions_in(loader.dataset, indices))
                if painted:
                    layout = layout.traced(batch)
                    require_replaceable(trainer, pl_module, layout, batch, alone=self.forward_fn is None)
                layouts[structure] = layout
            layout = layouts[structure]
            labels = layout.labels(batch).clone()
            with_trigger = layout.with_images(batch, self._paint(layout.images(batch))) if painted else None
            logits = logits_of(batch, layout)
            columns = {"prediction": logits.argmax(1), "label": labels}
            if painted:
                aims = (labels + 1) % logits.shape[1] if self.labels == "all_to_all" else self.target
                columns["triggered"] = logits_of(with_trigger, layout).argmax(1)
                columns["aim"] = torch.zeros_like(labels) + aims
            return columns

        positions = positions_used(trainer, loader)
        mine = [positions[index] for index in shard(len(positions), trainer)]
        settings: dict[str, Any] = {"batch_size": self.batch_size, "num_workers": self.num_workers}
        own = scan_loader(loader, mine, seed=0, finish=finish, **settings)
        read, columns, _ = scan_read(trainer, pl_module, own, step, description=description)
        return columns, read.tolist()

    def _paint(self, images: Tensor) -> Tensor:
        assert self.space is not None
        assert self.trigger is not None
        trigger = self.trigger.at_test() if hasattr(self.trigger, "at_test") else self.trigger
        return self.space.to_model(trigger(self.space.to_pixels(images)), images)


def _named(name: str, values: Tensor) -> dict[str, float]:
    """The values of all classes, with the class after the name."""
    return {f"{name}_{label}": value for label, value in enumerate(values.reshape(-1).tolist())}


def _share_per_class(predictions: Tensor, wanted: Tensor, classes: Tensor | None = None) -> Tensor:
    """Share of the predictions that are as wanted, for every class; by default the wanted one."""
    count = 1 + max(int(part.max()) if len(part) else 0 for part in (wanted, wanted if classes is None else classes))
    metric = AttackSuccessRate(average=None, num_classes=count, sync_on_compute=False)
    metric.update(predictions, wanted, classes)
    return metric.compute()


def _detection_per_class(verdict: Verdict, poisoned: Tensor, classes: Tensor, suffix: str = "") -> dict[str, float]:
    """The detection rates of every class."""
    rates = DetectionRates(average=None, num_classes=1 + int(classes.max()), sync_on_compute=False)
    rates.update(verdict.scores, verdict.keep, poisoned, classes)
    return {name: one for key, of_all in rates.compute().items() for name, one in _named(key + suffix, of_all).items()}


def _detection(trainer: Trainer, *, per_class: bool) -> dict[str, float]:
    """Return the detection rates of every defence that has a verdict, against the ground truth if there is one."""
    truths = [carried(loader.dataset, "true_labels") for loader in loaders_in(trainer.train_dataloader)]
    masks = [poisoned_mask(loader.dataset) for loader in loaders_in(trainer.train_dataloader)]
    judges: list[Any] = [each for each in callbacks_of(trainer) if isinstance(getattr(each, "verdict", None), Verdict)]
    values: dict[str, float] = {}
    for judge in judges:
        verdict: Verdict = judge.verdict
        poisoned = next((mask for mask in masks if mask is not None and len(mask) == len(verdict)), None)
        if poisoned is None:
            continue
        rates = DetectionRates(sync_on_compute=False)
        rates.update(verdict.scores, verdict.keep, poisoned)
        parts = (getattr(judge, "method", type(judge).__name__), getattr(judge, "name", None))
        prefix = "/".join([part for part in parts if part] + [""]) if len(judges) > 1 else ""
        values.update({prefix + key: value.item() for key, value in rates.compute().items()})
        true_labels = next((truth for truth in truths if truth is not None and len(truth) == len(verdict)), None)
        if per_class:
            found = {} if verdict.labels is None else _detection_per_class(verdict, poisoned, verdict.labels)
            if true_labels is not None:
                found |= _detection_per_class(verdict, poisoned, true_labels, "_source")
            values.update({prefix + key: value for key, value in found.items()})
    return values
