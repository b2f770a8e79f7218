"""Whatever a message tells the user to pass can be passed to the callback that says it, and helps."""

from __future__ import annotations

import ast
import inspect
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_backdoor
from lightning_backdoor import DBRCallback, DSTCallback, NONECallback, UltraCleanCallback, Verdict
from lightning_backdoor.callbacks.base import Defense
from lightning_backdoor.errors import ModelError
from lightning_backdoor.events import Event
from lightning_backdoor.responses import Detection, ResetUnits, Response, Restart, Session, Unlearn
from tests.callbacks.helpers import make_trainer
from tests.contract.problem import EPOCHS, WARNS, Net, assert_settled, fit
from tests.contract.registry import Entry, every, every_kind_of_defense

pytestmark = WARNS

PACKAGE = "lightning_backdoor"
ROOT = Path(lightning_backdoor.__file__).parent
ADVICE = re.compile(r"\b(?:pass|raise|lower|smaller|larger|by|or name|choose)\b(?P<rest>[^.:(]*)", re.IGNORECASE)
NAMED = re.compile(r"`([a-z_]+)(?:=[^`]*)?`")
OTHERS = {
    "max_epochs", "max_steps", "max_time", "ckpt_path", "fit", "drop_last", "collate_fn", "requires_grad",
    "on_before_batch_transfer", "transform", "target_transform",
}  # fmt: skip
"""Settings of the Trainer, of loaders and of the user's own code, which messages may name as well."""


def advised(text: str) -> set[str]:
    """Arguments that a message tells the user to pass or to change."""
    return {name for advice in ADVICE.finditer(text) for name in NAMED.findall(advice["rest"])} - OTHERS


def literals(tree: ast.AST) -> Iterator[str]:
    """The texts in a piece of code that are no documentation; what is computed in them is left out."""
    nodes = list(ast.walk(tree))
    apart = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    apart |= {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in nodes:
        if id(node) not in apart and isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        if id(node) not in apart and isinstance(node, ast.JoinedStr):
            yield "".join(part.value for part in node.values if isinstance(part, ast.Constant))


@dataclass(frozen=True)
class Piece:
    """A class, a function or a constant of a module.

    Attributes:
        uses: Modules and names of the pieces that it mentions.
        arguments: What may be passed to it.
        advises: Arguments that its messages name.
    """

    uses: frozenset[tuple[str, str]]
    arguments: frozenset[str]
    advises: frozenset[str]


@cache
def pieces(module: str) -> dict[str, Piece]:
    """The pieces of a module of the package, by name."""
    path = ROOT.parent / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    body = ast.parse(path.read_text()).body
    tops: dict[str, ast.stmt] = {}
    known: dict[str, tuple[str, str]] = {}
    for node in body:
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lightning_backdoor"):
            known.update({alias.asname or alias.name: (str(node.module), alias.name) for alias in node.names})
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            tops[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            tops.update({target.id: node for target in targets if isinstance(target, ast.Name)})
    known.update({name: (module, name) for name in tops})
    found = {name: piece_of(node, known) for name, node in tops.items()}
    handed_on = {name: Piece(frozenset({place}), frozenset(), frozenset()) for name, place in known.items()}
    return {**handed_on, **found}


def piece_of(node: ast.stmt, known: dict[str, tuple[str, str]]) -> Piece:
    nodes = list(ast.walk(node))
    signatures = [part.args for part in nodes if isinstance(part, ast.FunctionDef)]
    fields = {part.target.id for part in nodes if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)}
    return Piece(
        frozenset(known[part.id] for part in nodes if isinstance(part, ast.Name) and part.id in known),
        frozenset(fields | {arg.arg for args in signatures for arg in [*args.args, *args.kwonlyargs]}),
        frozenset().union(*map(advised, literals(node))),
    )


def reached(cls: type) -> set[tuple[str, str]]:
    """All pieces of the package that a class may use."""
    own = [(base.__module__, base.__name__) for base in cls.__mro__ if base.__module__.startswith(PACKAGE)]
    waiting = [place for place in own if place[1] in pieces(place[0])]
    found = set(waiting)
    while waiting:
        module, name = waiting.pop()
        new = {place for place in pieces(module)[name].uses if place[1] in pieces(place[0])} - found
        found |= new
        waiting += new
    return found


def test_messages_are_read() -> None:
    assert advised("Pass `mean` and `std`, or `a=1`. `b` is wrong") == {"mean", "std", "a"}
    assert pieces("lightning_backdoor.loading.loader_filter")["require_enough"].advises == {"max_removed"}


@every
def test_what_a_message_advises_can_be_passed(entry: Entry) -> None:
    assert inspect.isclass(entry.cls)
    known = set(inspect.signature(entry.cls).parameters)
    if not getattr(getattr(entry.make(), "reading", None), "features", True):
        known.add("feature_layer")  # it never looks for what this would name: see the test of a hidden head
    own = {(base.__module__, base.__name__) for base in entry.cls.__mro__}
    unknown = {}
    for place in reached(entry.cls):
        piece = pieces(place[0])[place[1]]
        wrong = piece.advises - known - (set() if place in own else piece.arguments)
        if wrong:
            unknown[place] = wrong
    assert not unknown


@every_kind_of_defense
def test_a_misspelled_argument_is_an_error(entry: Entry) -> None:
    """Of `approved`, such a slip would remove images that the user has declared to be fine."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'aproved'"):
        entry.cls(aproved=[1])  # type: ignore[call-arg]


@pytest.mark.parametrize("cls", [UltraCleanCallback, NONECallback, DBRCallback, DSTCallback])
@pytest.mark.parametrize("response", [Restart(last_detection=True), ResetUnits(), Unlearn()], ids=lambda r: r.name)
def test_what_a_response_advises_can_be_passed_to_the_defense(cls: type[Defense], response: Response) -> None:
    """The name of the argument is chosen where the message is made, since a response serves several defenses."""
    callback: Any = cls()
    keep = torch.arange(8) % 2 > 0
    callback._procedure.verdict = Verdict((~keep).float(), keep, 0.5, "known", labels=torch.arange(8) % 2)
    session = Session(*([None] * 4), callback._procedure, 0.0)  # type: ignore[arg-type]
    told = [response.why_not(session)]
    if isinstance(response, Unlearn):
        with pytest.warns(
            UserWarning, match=r"no image of the classes \[0\] can be trusted\. (Raise|Lower) `"
        ) as record:
            response.respond(session, Detection(callback.verdict, 4), Event(1, 4, 4))
        told += [str(warning.message) for warning in record]
    names = {name for text in told for name in NAMED.findall(text)}
    assert names <= set(inspect.signature(cls).parameters)
    assert names or cls is DSTCallback


class Hidden(torch.autograd.Function):
    """A classifier in an operation that nobody can look into."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(features, weight)
        return torch.from_numpy(features.numpy(force=True) @ weight.numpy(force=True).T).to(features.device)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        features, weight = ctx.saved_tensors
        return gradients[0] @ weight, gradients[0].T @ features


class Deep(Net):
    """Two layers before the head, so that the first one has units that can be reset whatever the head is."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *self.body)
        self.body[3] = nn.Conv2d(8, 8, 3, padding=1)


class HiddenHead(Deep):
    """No layer and no weight can be followed to its logits."""

    def forward(self, images: Tensor) -> Tensor:
        return Hidden.apply(self.body(images.float() / 255).flatten(1), self.head.weight)


@every_kind_of_defense
def test_the_remedy_for_a_head_that_cannot_be_found_works(entry: Entry) -> None:
    torch.manual_seed(0)
    callback = entry.make()
    with pytest.raises(ModelError) as info:
        fit([], module=HiddenHead(), trainer=make_trainer([callback], EPOCHS))
    if not callback.options.features:  # it asks units, which cannot be followed either
        assert re.search(r"No unit of HiddenHead can be reset .* \(UltraCleanCallback\)", str(info.value))
        assert not advised(str(info.value))
        return
    assert "No layer with 4 outputs" in str(info.value)
    assert advised(str(info.value)) == {"feature_layer"}
    callback = entry.make(feature_layer="body")
    run = fit([callback], module=HiddenHead())
    assert entry.acted(callback, run.trainer)
    assert_settled(run.trainer, run.module)


class Cosine(Deep):
    """A head that is no layer: features and weight of one length each."""

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images.float() / 255).flatten(1)
        return 16 * F.linear(F.normalize(features), F.normalize(self.head.weight))


@every_kind_of_defense
def test_a_head_that_is_no_layer_is_found(entry: Entry) -> None:
    torch.manual_seed(0)
    callback = entry.make()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="No layer's output")
        run = fit([callback], module=Cosine())
    assert entry.acted(callback, run.trainer)
    assert_settled(run.trainer, run.module)
