from __future__ import annotations

import warnings
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_backdoor.errors import ModelError
from lightning_backdoor.scanning.outputs import call_model

IMAGES = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
LOGITS = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))


@dataclass
class ModelOutput:
    loss: None
    logits: Tensor


Pair = namedtuple("Pair", ["scores", "features"])


class Returns(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, images: Tensor) -> Any:
        return self.output


@pytest.mark.case("53")
@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        LOGITS.double(),
        ModelOutput(None, LOGITS),
        {"loss": None, "logits": LOGITS},
        (LOGITS, torch.zeros(5, 3)),
        [LOGITS],
        Pair(LOGITS, None),
        ({"logits": LOGITS},),
        LOGITS[:, :, None, None],
    ],
    ids=["tensor", "double", "object", "dict", "tuple", "list", "namedtuple", "nested", "conv head"],
)
def test_unwraps_to_float32_logits(output: Any) -> None:
    logits = call_model(Returns(output), IMAGES)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, LOGITS)


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_single_logit_becomes_two_columns(shape: tuple[int, ...]) -> None:
    z = LOGITS[:, 0]
    logits = call_model(Returns(z.reshape(shape)), IMAGES)
    torch.testing.assert_close(logits, torch.stack([torch.zeros(5), z], dim=1))
    torch.testing.assert_close(logits.softmax(1)[:, 1], z.sigmoid())


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (LOGITS.argmax(1), "int64.*class indices"),
        (torch.zeros(4, 7), r"B = 5, got shape \(4, 7\)"),
        (torch.zeros(5, 7, 2, 2), r"got shape \(5, 7, 2, 2\)"),
        (torch.tensor(1.0), r"got shape \(\)"),
        (torch.zeros(5, 0), r"got shape \(5, 0\)"),
        ({"scores": LOGITS}, r"a mapping with \['scores'\]"),
        ((), "got tuple"),
        (None, "got NoneType"),
    ],
)
def test_what_is_not_logits_is_an_error_that_names_forward_fn(output: Any, words: str) -> None:
    with pytest.raises(ModelError, match=f"(?s){words}.*forward_fn"):
        call_model(Returns(output), IMAGES)


def test_forward_fn_gets_module_and_batch() -> None:
    module, batch = Returns(None), {"x": IMAGES}

    def forward_fn(given: nn.Module, batch: Any) -> Any:
        assert given is module
        return {"logits": batch["x"].flatten(1)[:, :7]}

    torch.testing.assert_close(call_model(module, IMAGES, forward_fn, batch), IMAGES.flatten(1)[:, :7])
    torch.testing.assert_close(
        call_model(module, IMAGES, lambda _, images: images.flatten(1)[:, :7]), IMAGES.flatten(1)[:, :7]
    )


@pytest.mark.case("53")
@pytest.mark.parametrize("base", [nn.Module, pl.LightningModule, lightning.pytorch.LightningModule])
@pytest.mark.parametrize("name", ["model", "net", "backbone", "network", "classifier"])
def test_module_without_forward_answers_through_its_only_child(base: type[nn.Module], name: str) -> None:
    module = base()
    module.add_module(name, Returns(LOGITS))
    module.add_module("criterion", nn.CrossEntropyLoss())
    torch.testing.assert_close(call_model(module, IMAGES), LOGITS)


@pytest.mark.parametrize("names", [(), ("model", "net"), ("encoder",)])
def test_module_without_forward_and_clear_child_is_an_error(names: tuple[str, ...]) -> None:
    module = pl.LightningModule()
    for name in names:
        module.add_module(name, Returns(LOGITS))
    with pytest.raises(ModelError, match=r"exactly one child named model, .*got (none|model, net).*forward_fn"):
        call_model(module, IMAGES)


def test_inherited_forward_counts() -> None:
    class Child(Returns):
        pass

    torch.testing.assert_close(call_model(Child(LOGITS), IMAGES), LOGITS)


def test_forward_that_wants_more_names_forward_fn() -> None:
    class Wants(nn.Module):
        def forward(self, images: Tensor, mask: Tensor) -> Tensor:
            return images

    with pytest.raises(ModelError, match=r"Wants.forward.*'mask'.*forward_fn"):
        call_model(Wants(), IMAGES)


def test_errors_of_the_model_itself_pass_through() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        call_model(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), IMAGES)


@pytest.mark.case("53")
def test_probabilities_warn_once_per_module() -> None:
    module = Returns(LOGITS.softmax(1))
    with pytest.warns(UserWarning, match=r"Returns.*look like probabilities.*forward_fn"):
        call_model(module, IMAGES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call_model(module, IMAGES)
        call_model(Returns(LOGITS.log_softmax(1)), IMAGES)


def test_runs_in_the_precision_of_the_trainer() -> None:
    class Linear(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(48, 7)

        def forward(self, images: Tensor) -> Tensor:
            out: Tensor = self.fc(images.flatten(1))
            self.dtype_seen = out.dtype
            return out

    module = Linear()
    module.trainer = pl.Trainer(accelerator="cpu", precision="bf16-mixed", logger=False, enable_checkpointing=False)
    assert call_model(module, IMAGES).dtype == torch.float32
    assert module.dtype_seen == torch.bfloat16
