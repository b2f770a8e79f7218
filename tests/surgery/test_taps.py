"""A cut at a layer: features keep their graph, what follows gets a graph of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_backdoor.surgery.taps import Taps


@pytest.mark.parametrize(("name", "place"), [("2", "input"), ("1", "output")])
def test_a_loss_on_the_outputs_ends_at_the_cut_and_one_on_the_features_goes_on(name: str, place: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    x = torch.randn(6, 5)
    with Taps(net, [name], place=place, gradients=True, cut=True) as taps:
        logits = net(x)
        features = taps.read()[name]
    assert torch.equal(logits, net(x))
    logits.sum().backward()
    assert net[0].weight.grad is None
    assert net[2].weight.grad is not None
    features.sum().backward()
    assert net[0].weight.grad is not None


def test_with_gradients_off_the_graph_begins_at_the_cut() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    with torch.no_grad(), Taps(net, ["1"], place="input", cut=True):
        logits = net(torch.randn(2, 5))
    assert torch.is_grad_enabled()
    logits.sum().backward()
    assert net[0].weight.grad is None
    assert net[1].weight.grad is not None


def test_nested_values_are_cut_and_keep_their_kind() -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, object]:
            return {"both": (x * 2, [x * 3]), "word": "as it is"}

    net, x = nn.Sequential(Pair()), torch.ones(2, 2, requires_grad=True)
    with Taps(net, ["0"], cut=True):
        out = net(x)
    assert isinstance(out["both"], tuple)
    assert not out["both"][0].requires_grad
    assert not out["both"][1][0].requires_grad
    assert out["word"] == "as it is"
