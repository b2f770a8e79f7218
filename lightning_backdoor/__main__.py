"""``python -m lightning_backdoor audit|show``: look for a backdoor in a checkpoint, and print what was found.

``audit`` looks at a timm model with the weights of a checkpoint, and at the folder of images that it was trained on,
with one subfolder per class. Its exit code is 0 if nothing was found, 1 if something was, 2 if it could not look.
``show`` prints what a saved verdict holds; its exit code is 0, or 2 if it cannot be read. With ``--json`` standard
output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor, nn

from lightning_backdoor.audit import DETECTORS, VERDICT, audit
from lightning_backdoor.detection.majorities import MAX_REMOVED_OF_CLASS
from lightning_backdoor.detection.subpopulations import FALSE_ALARM_RATE
from lightning_backdoor.errors import ArgumentError, DataError
from lightning_backdoor.report.words import described
from lightning_backdoor.verdict import Finding, Verdict

__all__ = ["main"]

NOTHING, FOUND, FAILED = 0, 1, 2
HOLDERS = ("state_dict", "model_state_dict", "model")  # keys under which checkpoints of training scripts hold weights
SPLITS = {"train", "val", "valid", "validation", "test"}
NAMED = 5  # keys of a checkpoint in a message
MOST_WORKERS = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    run: Callable[[argparse.Namespace, list[str]], tuple[dict[str, Any], str, int]] = options.run
    try:
        with redirect_stdout(sys.stderr), _to_stderr() as warned:
            record, text, code = run(options, warned)
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        told = " ".join(_of_worker(str(error)).split()) or type(error).__name__
        print(f"{parser.prog} {options.command}: error: {told}", file=sys.stderr)
        return FAILED
    print(json.dumps(record, allow_nan=False) if options.json else text)
    return code


def _of_worker(text: str) -> str:
    """The message of an error, without the traceback that one of a worker process comes with."""
    if "Original Traceback" not in text:
        return text
    return text.rstrip().splitlines()[-1].partition(": ")[2] or text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-backdoor", description="Look for backdoors in image classifiers and their training data."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    common.add_argument("--debug", action="store_true", help="show where an error came from")

    looking = commands.add_parser(
        "audit",
        help="look for a backdoor in a checkpoint and a folder of images",
        description="Exit code 0: nothing found, 1: something found, 2: could not look.",
        parents=[common],
    )
    looking.set_defaults(run=_audit)
    add = looking.add_argument
    add("--model", required=True, metavar="NAME", help="name of the model in timm, such as resnet18")
    add("--checkpoint", required=True, metavar="FILE", type=Path, help="state dict, or checkpoint of Lightning")
    add("--data", required=True, metavar="FOLDER", type=Path, help="training images, one subfolder per class")
    add(
        "--detectors",
        nargs="+",
        choices=list(DETECTORS),
        default=["features", "units"],
        help="what looks; features and units if not given",
    )
    add(
        "--false-alarm-rate",
        metavar="RATE",
        type=float,
        default=FALSE_ALARM_RATE,
        help="chance of a false alarm by one detector (%(default)s)",
    )
    add(
        "--max-removed",
        metavar="SHARE",
        type=float,
        default=0.3,
        help="largest share that may be flagged (%(default)s)",
    )
    add(
        "--max-removed-of-class",
        metavar="SHARE",
        type=float,
        default=MAX_REMOVED_OF_CLASS,
        help="largest share of a class that is flagged without further evidence (%(default)s)",
    )
    add(
        "--no-diagnosis",
        action="store_true",
        help="do not train a second model that tells whether the labels of found images are right",
    )
    add("--approved", metavar="FILE", help="reviewed table (.csv) or verdict (.pt): these images are fine")
    add("--report-dir", metavar="DIR", type=Path, help="folder for the report and the verdict")
    add(
        "--num-classes",
        metavar="N",
        type=int,
        help="outputs of the model; as many as there are subfolders if not given",
    )
    add("--image-size", metavar="PIXELS", type=int, help="height and width; if not given, as timm has it for the model")
    add(
        "--crop-pct",
        metavar="SHARE",
        type=float,
        help="share of the side that the center crop keeps; if not given, as timm has it",
    )
    add(
        "--mean",
        metavar="X",
        nargs="+",
        type=float,
        help="mean of the normalization, in 0..1, per channel; if not given, as timm has it",
    )
    add(
        "--std",
        metavar="X",
        nargs="+",
        type=float,
        help="its standard deviation, per channel; if not given, as timm has it",
    )
    add("--feature-layer", metavar="NAME", help="layer whose output are the features; found if not given")
    add("--batch-size", metavar="N", type=int, default=128, help="images per forward pass (%(default)s)")
    add(
        "--num-workers",
        metavar="N",
        type=int,
        default=min(MOST_WORKERS, os.cpu_count() or 1),
        help="processes that read images (%(default)s)",
    )
    add(
        "--accelerator",
        metavar="NAME",
        default="auto",
        help="where the model runs: auto, cpu, gpu or mps (%(default)s)",
    )
    add("--seed", metavar="N", type=int, default=0, help="seed of random draws (%(default)s)")
    add("--quiet", action="store_true", help="show no progress")

    showing = commands.add_parser("show", help="print the findings of a saved verdict", parents=[common])
    showing.set_defaults(run=_show)
    showing.add_argument("verdict", type=Path, help="file that Verdict.save wrote, such as verdict.pt of an audit")
    return parser


@contextmanager
def _to_stderr() -> Iterator[list[str]]:
    """Print warnings as lines on standard error, and keep them; keep Lightning from telling about the machine."""
    told: list[str] = []
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.pytorch")]
    levels = [logger.level for logger in loggers]

    def show(message: Warning | str, *where: Any, **others: Any) -> None:
        told.append(" ".join(str(message).split()))
        print(f"warning: {told[-1]}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield told
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _audit(options: argparse.Namespace, warned: list[str]) -> tuple[dict[str, Any], str, int]:
    """Look at a checkpoint and its images."""
    dataset = _folder(options.data)
    model = _model(options, len(dataset.classes) if options.num_classes is None else options.num_classes)
    dataset.transform = _transform(model, options)
    verdict = audit(
        model,
        dataset,
        detectors=options.detectors,
        false_alarm_rate=options.false_alarm_rate,
        max_removed=options.max_removed,
        max_removed_of_class=options.max_removed_of_class,
        diagnose=not options.no_diagnosis,
        approved=options.approved,
        report_dir=options.report_dir,
        feature_layer=options.feature_layer,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        seed=options.seed,
        accelerator=options.accelerator,
        progress=not options.quiet,
    )
    record, text = _record(verdict, dataset.classes), described(verdict, dataset.classes)
    record |= {"warnings": warned, "report": None if options.report_dir is None else str(options.report_dir)}
    if options.report_dir is not None:
        text += f"\n\nThe report is {options.report_dir / 'report.html'}, the verdict {options.report_dir / VERDICT}."
    return record, text, FOUND if verdict.findings else NOTHING


def _show(options: argparse.Namespace, warned: list[str]) -> tuple[dict[str, Any], str, int]:
    """Print a saved verdict."""
    verdict = Verdict.load(_there(options.verdict, "verdict"))
    classes = _folders(verdict)
    return _record(verdict, classes), described(verdict, classes), NOTHING


def _there(path: Path, argument: str) -> Path:
    """The path of a file that exists."""
    if not path.is_file():
        raise ArgumentError(f"`{argument}` must be a file, got {str(path)!r}, which is none.")
    return path


def _folder(path: Path) -> Any:
    """The images of a folder with one subfolder per class."""
    from torchvision.datasets import ImageFolder  # noqa: PLC0415  (takes a second to import)

    if not path.is_dir():
        raise ArgumentError(f"`--data` must be a folder, got {str(path)!r}, which is none.")
    names = {child.name for child in path.iterdir() if child.is_dir()}
    if "train" in names and names <= SPLITS:
        raise ArgumentError(
            f"`--data` must have one subfolder per class, got {', '.join(sorted(names))}. Pass {path / 'train'}."
        )
    return ImageFolder(path, loader=_image)


def _image(path: str) -> Any:
    """The image in a file."""
    from torchvision.datasets.folder import default_loader  # noqa: PLC0415  (takes a second to import)

    try:
        return default_loader(path)
    except OSError as error:
        raise DataError(f"`--data` must hold images alone, but {path} cannot be read as one; is it cut off?") from error


def _model(options: argparse.Namespace, classes: int) -> nn.Module:
    """The model with the weights of the checkpoint."""
    import timm  # noqa: PLC0415  (takes a second to import)

    if not timm.is_model(options.model):
        near = ", ".join(timm.list_models(f"*{options.model}*")[:NAMED]) or "none; `timm.list_models()` has all names"
        raise ArgumentError(
            f"`--model` must be the name of a model in timm, got {options.model!r}. Names that hold it: {near}."
        )
    model: nn.Module = timm.create_model(options.model, num_classes=classes)
    resize = getattr(model, "set_input_size", None)  # of transformers, whose weights depend on the size
    if options.image_size is not None and callable(resize):
        resize((options.image_size, options.image_size))
    _load(model, weights_in(_there(options.checkpoint, "--checkpoint"), model), options.checkpoint)
    return model.eval()


def weights_in(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """The weights in a checkpoint, under the names that they have in the model.

    Args:
        path: A state dict, or a checkpoint that holds one, in which the names of the weights of a model that is a part
            of another module begin with a prefix, such as ``model.``.
        model: Its names tell the prefix.

    Raises:
        ArgumentError: The file holds no weights, or more than tensors and plain values.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file  # noqa: PLC0415  (comes with timm)

        try:
            held: Any = load_file(path)
        except Exception as error:
            raise ArgumentError(f"`--checkpoint` must be a file of safetensors, but {path} is not: {error}.") from error
    else:
        try:
            held = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            why = "holds other objects" if is_zipfile(path) else "is empty, cut off, or of another kind"
            raise ArgumentError(
                f"`--checkpoint` must be a file of torch.save that holds tensors and plain values alone, but {path} "
                f"{why}. Save the weights alone: torch.save(model.state_dict(), path)."
            ) from error
    for holder in HOLDERS:
        if isinstance(held, Mapping) and isinstance(held.get(holder), Mapping):
            held = held[holder]
    if not isinstance(held, Mapping) or not any(isinstance(value, Tensor) for value in held.values()):
        raise ArgumentError(
            f"`--checkpoint` must hold a state dict, or one as 'state_dict', got {type(held).__name__}."
        )
    weights: Mapping[str, Tensor] = held
    names = model.state_dict().keys()
    prefixes = {key[: -len(name)] for name in names for key in weights if key == name or key.endswith(f".{name}")}
    prefix = max(sorted(prefixes, key=len), key=lambda each: sum(each + name in weights for name in names), default="")
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def _load(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Put weights into a model; every one must be there and fit."""
    own = model.state_dict()
    missing, unexpected = own.keys() - weights.keys(), weights.keys() - own.keys()
    other = [
        f"{key} {tuple(weights[key].shape)} in place of {tuple(own[key].shape)}"
        for key in own.keys() & weights.keys()
        if weights[key].shape != own[key].shape
    ]
    told = [
        f"{what} {', '.join(sorted(keys)[:NAMED])}{f' and {len(keys) - NAMED} more' if len(keys) > NAMED else ''}"
        for what, keys in (("it lacks", missing), ("it has also", unexpected), ("it has", other))
        if keys
    ]
    if told:
        raise ArgumentError(
            f"`--checkpoint` must hold the weights of {type(model).__name__} as timm makes it with these classes, but "
            f"in {path} {'; '.join(told)}. Is it another `--model`, or are there other classes (`--num-classes`)?"
        )
    model.load_state_dict(weights)


def _transform(model: nn.Module, options: argparse.Namespace) -> Any:
    """The evaluation transform that timm names for the model, with what the user has said in its place."""
    import timm.data  # noqa: PLC0415  (takes a second to import)

    functions: Any = timm.data
    given: dict[str, Any] = {"mean": options.mean, "std": options.std, "crop_pct": options.crop_pct}
    if options.image_size is not None:
        given["input_size"] = (3, options.image_size, options.image_size)
    config = functions.resolve_data_config(
        {name: value for name, value in given.items() if value is not None}, model=model
    )
    return functions.create_transform(**config, is_training=False)


def _folders(verdict: Verdict) -> list[str] | None:
    """Names of the classes, as the folders that hold all images of a label are called; ``None`` if they are not."""
    if verdict.paths is None or verdict.labels is None:
        return None
    names: dict[int, set[str]] = {}
    for label, path in zip(verdict.labels.tolist(), verdict.paths, strict=True):
        names.setdefault(label, set()).add(Path(path).parent.name)
    if any(len(found) > 1 for found in names.values()):
        return None
    return [names[label].pop() if label in names else f"class {label}" for label in range(max(names) + 1)]


def _record(verdict: Verdict, classes: Sequence[str] | None) -> dict[str, Any]:
    """The verdict in values that JSON has."""
    return {
        "images": len(verdict),
        "flagged": len(verdict.removed),
        "approved": 0 if verdict.approved is None else int(verdict.approved.sum()),
        "rule": verdict.rule,
        "findings": [_finding(finding, verdict, classes) for finding in verdict.findings],
    }


def _finding(finding: Finding, verdict: Verdict, classes: Sequence[str] | None) -> dict[str, Any]:
    positions = finding.positions.tolist()
    suggested = finding.suggested_labels
    return {
        "label": finding.label,
        "class": None if classes is None or finding.label >= len(classes) else classes[finding.label],
        "images": len(finding),
        "detectors": list(finding.detectors),
        "gate": finding.gate,
        "figures": {
            each.name: {"value": _finite(each.value), "relation": each.relation, "bound": _finite(each.bound)}
            for each in finding.figures
        },
        "diagnosis": finding.diagnosis,
        "estimated_asr": _finite(finding.estimated_asr),
        "control_asr": _finite(finding.control_asr),
        "positions": positions,
        "paths": None if verdict.paths is None else [verdict.paths[position] for position in positions],
        "flagged": (~verdict.keep[finding.positions]).tolist(),
        "suggested_labels": None if suggested is None else suggested.tolist(),
    }


def _finite(value: float | None) -> float | None:
    """A number that JSON has; ``None`` for infinity and NaN."""
    return None if value is None or not math.isfinite(value) else float(value)


if __name__ == "__main__":
    sys.exit(main())
