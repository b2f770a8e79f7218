"""D-BR's and D-ST's measurement: how far a transformation of an image moves the features of a separate detector."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_backdoor.data.nesting import copied
from lightning_backdoor.data.random_state import isolated_rng, seed_all
from lightning_backdoor.errors import ArgumentError, DataError, ModelError
from lightning_backdoor.functional.consistency import center_repulsion_loss, fct_scores
from lightning_backdoor.functional.turning import turn_and_shift
from lightning_backdoor.scanning.isolation import evaluation_mode, isolated_eval, quiet
from lightning_backdoor.scanning.measure_units import Measured, UnitScan
from lightning_backdoor.scanning.scan import raise_on_all_ranks
from lightning_backdoor.scanning.scanner import DatasetScanner
from lightning_backdoor.surgery.heads import find_head
from lightning_backdoor.surgery.units import find_units

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = [
    "Detector",
    "Distinguished",
    "distinguish",
    "eps_of",
    "order_of_samples",
    "order_of_steps",
    "require_detector",
    "thaw",
    "trained_copy",
    "turn_and_shift",
]

LR, LR_OF_COPY = 1e-3, 1e-4  # of AdamW, which trains convolutional networks and transformers alike
HOSTED = "backdoor_detector"  # name of the user's own detector within a copy of the model
LEAST_OF_CLASS = 2  # samples of a class in a batch, on average, for its centre to be more than a sample of it
DRAWN_OF_CLASS = 4  # of some classes, where there are too many for that

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Detector:
    """How the detector is trained and how samples are scored by it.

    Attributes:
        start: ``"copy"`` starts from the weights under repair, ``"fresh"`` from ``initial``; a module of the user's own
            takes the images that the model takes, and returns as many logits.
        initial: State of the module before training; only for ``"fresh"``.
        steps: Steps of ordinary training without augmentation.
        num_transforms: Transformations per sample, whose scores are averaged.
        transform: ``transform(pixels)`` takes and returns uint8 ``(1, C, H, W)``; ``None``: :func:`turn_and_shift`.
        seed: Seed of the order of the samples and of the transformations.
        repulsion_steps: Steps of centre repulsion after these; ``None``: as many.
        metric: Of the movement of features; ``"auto"``: cosine where some are negative, else mean square.
    """

    start: Literal["copy", "fresh"] | nn.Module
    initial: dict[str, Tensor] | None
    steps: int
    num_transforms: int
    transform: Transform | None
    seed: int
    repulsion_steps: int | None = None
    metric: Literal["auto", "mse", "cosine"] = "auto"

    @property
    def all_steps(self) -> int:
        """Steps of both kinds."""
        return self.steps + (self.steps if self.repulsion_steps is None else self.repulsion_steps)


@dataclass(frozen=True)
class Distinguished:
    """Scores of N training samples.

    Attributes:
        labels: Labels as given, long ``(N,)``.
        fct: Feature consistency towards transformations, float ``(N,)``; larger is more suspicious.
        units: Measurement of the detector's units; ``None`` if it was not wanted.
    """

    labels: Tensor
    fct: Tensor
    units: Measured | None


def require_detector(
    trainer: Trainer, pl_module: LightningModule, data: DatasetScanner, detector: Detector, *, units: bool
) -> None:
    """Check at the start of a fit what can be checked then.

    Raises:
        ArgumentError: The detector is the user's own and cannot take the place of the model; or it cannot be shown
            transformed images, because ``batch_fn`` computes them.
        ModelError: It has no units, but they are to be measured; or they are not, and no feature can learn.
    """
    own = isinstance(detector.start, nn.Module)
    data.require_replaceable(trainer, pl_module, alone=True if own else None)
    with isolated_eval(trainer, pl_module), raise_on_all_ranks(trainer, "check of the detector"):
        module, data = _twin(trainer, pl_module, data, detector) if own else (pl_module, data)
        if units:
            find_units(module, data.few(trainer, module))
        elif not _can_learn(trainer, module, data):
            raise ModelError(
                "Suspects are to be told by how far features move, but no gradient reaches what makes the features "
                '(torch.no_grad or detach in `forward`), so a detector cannot learn any. Pass suspect="auto", a '
                "`detector` of your own, or the `verdict` of another defence."
            )


def distinguish(
    trainer: Trainer, pl_module: LightningModule, data: DatasetScanner, detector: Detector, *, units: bool
) -> Distinguished:
    """Train a detector on the training set and score every sample by it; the model and its training stay as they are.

    The detector is a deep copy of the module, or of one of the user's own. It learns the labels without augmentation,
    so that it relies on a trigger wherever there is one, then turns the centres of the classes away from each other.
    Where no parameter before the head of the model can learn, all of the copy does: fixed features cannot respond
    to a trigger. Every process trains the same detector on the same batches, so their number makes no difference.

    Args:
        trainer: The running Trainer.
        pl_module: The LightningModule under training; left as it is.
        data: The training set.
        detector: The settings.
        units: Measure the units of the detector, too; one more pass, or two where their responses take over 256 MiB.

    Raises:
        ModelError: The module cannot be copied, or nothing of it can be trained.
        DataError: There is one class only.
    """
    with isolated_eval(trainer, pl_module):
        data.load(trainer)
        order = order_of_steps(
            trainer, pl_module, data, steps=detector.steps, all_steps=detector.all_steps, seed=detector.seed
        )
        twin, data = trained_copy(trainer, lambda: _twin(trainer, pl_module, data, detector), detector, order)
        found = _look(trainer, twin, data, detector)
        if len(torch.unique(found["labels"])) < 2:
            raise DataError(
                "The training set must hold at least two classes to tell a poisoned one from the others, got "
                f"{len(data)} samples of class {int(found['labels'][0])}. Train without this callback."
            )
        measured = None
        if units:
            with isolated_eval(trainer, twin), raise_on_all_ranks(trainer, "search for units"):
                layers = find_units(twin, data.few(trainer, twin))
            measured = UnitScan(data, layers).measure(trainer, twin)
    automatic = "mse" if float(found["smallest"].min()) >= 0 else "cosine"
    metric = automatic if detector.metric == "auto" else detector.metric
    return Distinguished(found["labels"], found[metric], measured)


def trained_copy(
    trainer: Trainer,
    make: Callable[[], tuple[LightningModule, DatasetScanner]],
    detector: Detector,
    order: Tensor,
) -> tuple[LightningModule, DatasetScanner]:
    """Train a copy of the model on samples in order; call within ``isolated_eval``.

    Args:
        trainer: The running Trainer.
        make: Returns the copy, and how the training set goes through it.
        detector: The settings.
        order: Positions of the samples of all steps.

    Returns:
        The copy, the same in all processes, and how the training set goes through it.
    """
    with raise_on_all_ranks(trainer, "training of the detector"):
        twin, data = make()
        with quiet(trainer, twin), torch.enable_grad(), isolated_rng(detector.seed):
            _train(trainer, twin, data, detector, order)  # batch norms keep what they learn: not `isolated_eval`
    _agree(trainer, twin)
    return twin, data


def _twin(
    trainer: Trainer, pl_module: LightningModule, data: DatasetScanner, detector: Detector
) -> tuple[LightningModule, DatasetScanner]:
    """The module that holds the detector, and how the training set goes through it."""
    try:
        twin, own = copy.deepcopy(pl_module), copy.deepcopy(detector.start)
    except Exception as error:
        raise ModelError(
            f"`{type(pl_module).__name__}` must be copied to train a detector, but `copy.deepcopy` failed: {error}. "
            "Pass the `verdict` of another defence instead."
        ) from error
    if isinstance(own, nn.Module):
        return _host(trainer, twin, data, own)
    twin.trainer = trainer
    if own == "fresh" and detector.initial is not None:
        twin.load_state_dict(detector.initial)
    return twin, data


def _host(
    trainer: Trainer, twin: LightningModule, data: DatasetScanner, own: nn.Module
) -> tuple[LightningModule, DatasetScanner]:
    """A copy of the user's module whose logits come from another network; its transfer hooks prepare the batches."""
    if not any(parameter.requires_grad for parameter in own.parameters()):
        raise ArgumentError("`detector` must have parameters that can learn (requires_grad=True), got none.")
    twin.requires_grad_(False)
    twin.add_module(HOSTED, trainer.precision_plugin.convert_module(own.to(twin.device).eval()))
    twin.trainer = trainer  # after that, since the setter reaches a detector that is a LightningModule as well
    options = replace(data.options, feature_layer=None, forward_fn=lambda _, batch: own(data.layout.images(batch)))
    hosted = replace(data, options=options)
    run = hosted.few(trainer, twin)
    try:
        classes, head = run().shape[1], find_head(twin, run)
    except Exception as error:
        raise ArgumentError(
            "`detector` must take the images of a batch after the transfer hooks and return logits (B, K), "
            f'but failed: {error} Wrap it, or pass "copy".'
        ) from error
    if classes != data.num_classes:
        raise ArgumentError(
            f"`detector` must return logits of the {data.num_classes} classes of the model, got {classes}. Change its "
            'last layer, or pass "copy".'
        )
    return twin, replace(hosted, head_or_none=head)


def _train(trainer: Trainer, twin: LightningModule, data: DatasetScanner, detector: Detector, order: Tensor) -> None:
    """Ordinary training without augmentation, then centre repulsion, with the same optimizer, on samples in order.

    Features that no gradient reaches, although everything may learn, are left as they are. Where centers are not
    turned away, features make no difference: frozen ones stay so.
    """
    repels = detector.all_steps > detector.steps
    if not any(parameter.requires_grad for parameter in twin.parameters()):
        raise ModelError("The module has no parameter that can learn (requires_grad=False). Unfreeze some layers.")
    if repels and not _features_learn(trainer, twin, data):
        thaw(twin)
    parameters = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    for part in twin.modules():
        part.training = True  # not `train()`, which a module may override
    lr = LR_OF_COPY if detector.start == "copy" else LR
    optimizer = torch.optim.AdamW(parameters, lr=lr, eps=eps_of(parameters))
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    scaler = torch.amp.GradScaler(twin.device.type, enabled=scaled)
    with data.read(order) as loader:
        for step, (_, batch) in enumerate(loader):
            labels = data.labels(batch).clone().to(twin.device)  # transfer hooks may change a batch in place
            if step < detector.steps:
                loss = F.cross_entropy(data.logits(trainer, twin, batch), labels)
            else:
                features = data.outputs(trainer, twin, batch, gradients=True)[1]
                if not features.requires_grad:
                    return
                loss = center_repulsion_loss(features, labels)
            optimizer.zero_grad()
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()


def eps_of(parameters: Iterable[nn.Parameter]) -> float:
    """The ``eps`` of an AdamW: its default, except for float16, where that is 0 and the first step would give NaN."""
    return 1e-4 if any(parameter.dtype == torch.float16 for parameter in parameters) else 1e-8


def order_of_steps(
    trainer: Trainer, pl_module: LightningModule, data: DatasetScanner, *, steps: int, all_steps: int, seed: int
) -> Tensor:
    """Positions of the samples of all steps: one shuffle after the other.

    Where a batch holds fewer than two samples of a class on average, most centres would be single samples, and the loss
    would turn every image away from every other. The batches of centre repulsion then are of some classes each. That
    takes one more pass over the data, for the labels.

    Args:
        trainer: The running Trainer.
        pl_module: The LightningModule under training.
        data: The training set.
        steps: Steps of ordinary training.
        all_steps: These, and those of centre repulsion after them.
        seed: Seed of the order.
    """
    size, generator = _batch_size(trainer, data, len(data)), torch.Generator().manual_seed(seed)
    order = _shuffles(len(data), all_steps * size, generator)
    repelling = all_steps - steps
    if size < 2 or not repelling or LEAST_OF_CLASS * data.num_classes <= size:
        return order
    labels = data.read_labels(trainer, pl_module)
    if LEAST_OF_CLASS * len(torch.unique(labels)) <= size:  # a head may have more outputs than there are classes
        return order
    read = (~data.unread).nonzero().squeeze(1)
    return torch.cat([order[: steps * size], read[_by_classes(labels[read], size, repelling, generator)]])


def order_of_samples(trainer: Trainer, data: DatasetScanner, count: int, *, steps: int, seed: int) -> Tensor:
    """Numbers below ``count`` for the batches of so many steps, one shuffle after the other."""
    size = _batch_size(trainer, data, count)
    return _shuffles(count, steps * size, torch.Generator().manual_seed(seed))


def _batch_size(trainer: Trainer, data: DatasetScanner, count: int) -> int:
    with raise_on_all_ranks(trainer, "training of the detector"), data.read([]) as loader:
        return min(int(loader.batch_size or 1), count)


def _shuffles(count: int, needed: int, generator: torch.Generator) -> Tensor:
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(math.ceil(needed / count))])[:needed]


def _by_classes(labels: Tensor, size: int, batches: int, generator: torch.Generator) -> Tensor:
    """Positions of batches of some random classes each, with about four samples of each (repeated if it has fewer)."""
    _, counts = torch.unique(labels, return_counts=True)
    classes = torch.split(labels.argsort(stable=True), counts.tolist())
    shares = [len(part) for part in torch.tensor_split(torch.arange(size), max(size // DRAWN_OF_CLASS, 2))]
    drawn = []
    for _ in range(batches):
        chosen = torch.randperm(len(classes), generator=generator)[: len(shares)].tolist()
        for place, share in zip(chosen, shares, strict=True):
            members = classes[place]
            shuffled = members[torch.randperm(len(members), generator=generator)]
            drawn.append(shuffled.repeat(math.ceil(share / len(members)))[:share])
    return torch.cat(drawn)


def _features_learn(trainer: Trainer, module: LightningModule, data: DatasetScanner) -> bool:
    """Whether a loss on the features has a gradient."""
    with quiet(trainer, module), evaluation_mode(module), isolated_rng(), torch.enable_grad():
        _, features = data.outputs(trainer, module, copied(data.some), gradients=True)
    return features.requires_grad


def _can_learn(trainer: Trainer, module: LightningModule, data: DatasetScanner) -> bool:
    """The same of a copy, all of which may learn."""
    if _features_learn(trainer, module, data):
        return True
    frozen = thaw(module)
    try:
        return _features_learn(trainer, module, data)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def thaw(module: LightningModule) -> list[nn.Parameter]:
    """Unfreeze all parameters of a module, or of the user's own detector in it; return those that were frozen."""
    part = dict(module.named_children()).get(HOSTED, module)
    frozen = [p for p in part.parameters() if p.is_floating_point() and not (p.requires_grad or p.is_inference())]
    for parameter in frozen:
        parameter.requires_grad_(True)
    return frozen


def _agree(trainer: Trainer, twin: nn.Module) -> None:
    """Load the detector of rank 0 in all processes: rounding may differ between devices."""
    if trainer.world_size > 1:
        state = {name: value.cpu() for name, value in twin.state_dict().items()}
        twin.load_state_dict(trainer.strategy.broadcast(state, src=0))


def _look(trainer: Trainer, twin: LightningModule, data: DatasetScanner, detector: Detector) -> dict[str, Tensor]:
    def step(indices: Tensor, batch: Any) -> dict[str, Tensor]:
        images = data.layout.images(batch)
        pixels = data.pixels.to_pixels(images).to(twin.device)
        versions = [
            data.layout.with_images(batch, data.pixels.to_model(_moved(pixels, indices, draw, detector), like=images))
            for draw in range(detector.num_transforms)
        ]
        labels = data.labels(batch).clone()
        _, features = data.outputs(trainer, twin, batch)
        moved = [data.outputs(trainer, twin, version)[1] for version in versions]
        return {
            "labels": labels,
            "smallest": features.amin(dim=1),
            "mse": torch.stack([fct_scores(features, other) for other in moved]).mean(dim=0),
            "cosine": torch.stack([fct_scores(features, other, "cosine") for other in moved]).mean(dim=0),
        }

    return data.scan(trainer, twin, step, description="FCT scan", finite=True)


def _moved(pixels: Tensor, indices: Tensor, draw: int, detector: Detector) -> Tensor:
    seed = detector.seed * detector.num_transforms + draw
    if detector.transform is None:
        return turn_and_shift(pixels, indices, seed=seed)
    moved = []
    with isolated_rng():
        for image, index in zip(torch.split(pixels, 1), indices.tolist(), strict=True):
            seed_all(seed * 1_000_003 + index)  # the same for an image in whatever batch and process it is
            moved.append(detector.transform(image))
    return torch.cat(moved)
