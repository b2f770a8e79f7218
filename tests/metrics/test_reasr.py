"""REASR of a model with a planted shortcut and of its clean twin, and the promises of the metric."""

from __future__ import annotations

import copy
import doctest
import pickle

import pytest
import torch
from torch import Tensor, nn

from lightning_backdoor.errors import ArgumentError, ModelError
from lightning_backdoor.functional.inversion import PixelModel, rate_trigger
from lightning_backdoor.metrics import REASR, natural
from tests.functional.test_inversion import CLASSES, PLANTED, SIZE, TARGET, Net, data

BUDGETS = (0.03, 0.06)  # 4 and 8 of 144 pixels
QUICK = {"budgets": BUDGETS, "steps": 70, "candidates": 1}


def measured(model: nn.Module, **settings: object) -> REASR:
    metric = REASR(model, **{**QUICK, **settings})
    metric.update(*data(160))
    return metric


def test_docstring_runs():
    result = doctest.testmod(natural)
    assert result.attempted > 0
    assert result.failed == 0


def test_a_planted_shortcut_is_found_and_the_clean_twin_is_not_accused():
    metric = measured(Net(shortcut=True))
    rates = metric.compute()
    assert list(rates) == ["reasr", "reasr@3%", "reasr@6%"]
    assert rates["reasr@3%"] == 1.0
    assert all(trigger.target == TARGET for trigger in metric.triggers.values())
    assert metric.triggers[0.03].mask[..., PLANTED[0], PLANTED[1]].all()
    clean = measured(Net(shortcut=False)).compute()
    assert clean["reasr@6%"] < 0.1
    assert clean["reasr"] == clean["reasr@6%"]


def test_numbers_never_fall_as_the_budget_grows_and_masks_keep_to_it():
    budgets = (0.5, 0.02, 0.1, 0.3, 0.2, 0.4)  # any order
    metric = measured(Net(shortcut=False), budgets=budgets, targets=(0, 3), steps=30)
    rates = list(metric.compute().values())[1:]
    assert list(metric.triggers) == sorted(budgets)
    assert rates == sorted(rates)
    assert rates[0] < rates[-1]
    assert all(int(trigger.mask.sum()) <= budget * SIZE**2 for budget, trigger in metric.triggers.items())


def test_the_number_is_the_success_on_images_that_made_no_trigger(monkeypatch):
    made: list[Tensor] = []
    invert = natural.invert_trigger

    def recorded(model, images, labels, **settings):
        made.append(images)
        return invert(model, images, labels, **settings)

    monkeypatch.setattr(natural, "invert_trigger", recorded)
    metric = measured(Net(shortcut=False), budgets=(0.2,), targets=(1,), inversion_images=30)
    rate = metric.compute()["reasr"].item()
    images, labels = data(160)
    seen = {tuple(image.flatten()[:9].tolist()) for image in made[0]}
    assert len(seen) == 30
    fresh = torch.tensor([tuple(image.flatten()[:9].tolist()) not in seen for image in images])
    assert int(fresh.sum()) == 130
    trigger = metric.triggers[0.2]
    assert rate == rate_trigger(PixelModel(Net(shortcut=False)), images[fresh], labels[fresh], trigger).success
    assert rate == trigger.success


def test_at_most_half_of_the_images_make_triggers():
    metric = REASR(Net(shortcut=False), inversion_images=100)
    metric.update(*data(21))
    made, scoring = metric._halves()
    assert (len(made[0]), len(scoring[0])) == (10, 11)


def test_batches_dtypes_and_order_do_not_matter():
    images, labels = data(60)
    images = (images * 255).round().byte()
    whole, parts = (REASR(Net(shortcut=False), budgets=(0.2,), targets=(1,), steps=10) for _ in range(2))
    whole.update(images, labels)
    order = torch.randperm(60)
    for chosen in order.split(13):
        parts.update(images[chosen].float() / 255, labels[chosen])
    assert whole.compute() == parts.compute()
    assert torch.equal(whole.triggers[0.2].pattern, parts.triggers[0.2].pattern)


def test_normalization_belongs_to_the_model():
    class Normalized(Net):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images * torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1) + 0.5)

    metric = measured(Normalized(shortcut=True), mean=0.5, std=(0.2, 0.3, 0.4), budgets=(0.03,))
    assert metric.compute() == measured(Net(shortcut=True), budgets=(0.03,)).compute() == {
        "reasr": 1.0,
        "reasr@3%": 1.0,
    }  # fmt: skip


def test_the_model_and_the_random_streams_do_not_notice():
    model = Net(shortcut=True)
    flags = [module.training for module in model.modules()]
    stream = torch.get_rng_state()
    metric = measured(model, steps=3)
    metric.compute()
    assert torch.equal(torch.get_rng_state(), stream)
    assert [module.training for module in model.modules()] == flags
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not metric.state_dict()
    assert not list(metric.parameters())


def test_a_model_may_hold_the_metric_that_measures_it():
    model = Net(shortcut=False)
    model.reasr = REASR(model)
    assert len(list(model.modules())) == 4
    model.train()


def test_reset_clone_and_pickle():
    metric = measured(Net(shortcut=True), budgets=(0.03,), targets=(TARGET,), steps=20)
    twins = [pickle.loads(pickle.dumps(metric)), metric.clone(), copy.deepcopy(metric)]
    rates = metric.compute()
    assert all(twin.compute() == rates for twin in twins)
    metric.reset()
    assert metric.triggers == {}
    assert metric.images == []


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_switched_off(context):
    model = Net(shortcut=True)
    with context():
        assert measured(model, budgets=(0.03,)).compute()["reasr"] == 1.0


def test_gathered_images_are_what_one_process_would_have():
    images, labels = data(40)
    alone, gathered = (REASR(Net(shortcut=False), budgets=(0.2,), targets=(0,), steps=5) for _ in range(2))
    alone.update(images, labels)
    gathered.update(images[::2], labels[::2])
    gathered.update(images[1::2], labels[1::2])
    gathered.images, gathered.labels = torch.cat(gathered.images), torch.cat(gathered.labels)  # as after a sync
    assert alone.compute() == gathered.compute()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budgets": ()}, r"`budgets` must be shares of the pixels in \(0, 1\], got \(\)"),
        ({"budgets": (0.02, 0)}, r"`budgets` .* got \(0.02, 0\)"),
        ({"budgets": (2,)}, "`budgets` .* For two per cent, pass 0.02"),
        ({"targets": ()}, "`targets` must name at least one class"),
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"candidates": 0}, "`candidates` must be at least 1, got 0"),
        ({"std": 0.0}, "`std` must be positive"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ArgumentError, match=message):
        REASR(Net(shortcut=False), **settings)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, SIZE, SIZE), torch.zeros(2).long(), r"`images` must be pixels of shape \(N, C, H, W\)"),
        (torch.zeros(2, 3, SIZE, SIZE).int(), torch.zeros(2).long(), r"`images` must be pixels .* got torch.int32"),
        (torch.full((2, 3, SIZE, SIZE), 2.0), torch.zeros(2).long(), "`images` must be uint8 or floats .* 2 to 2"),
        (torch.full((2, 3, SIZE, SIZE), torch.nan), torch.zeros(2).long(), "`images` must be uint8 or floats .* nan"),
        (torch.zeros(2, 3, SIZE, SIZE), torch.zeros(2), r"`labels` must be whole numbers of shape \(2,\)"),
        (torch.zeros(2, 3, SIZE, SIZE), torch.zeros(3).long(), r"`labels` must be whole numbers of shape \(2,\)"),
        (torch.zeros(2, 3, SIZE, SIZE), torch.tensor([0, CLASSES]), "`labels` must be classes from 0 to 3, .* to 4"),
        (torch.zeros(2, 3, SIZE, SIZE), torch.tensor([-1, 0]), "`labels` must be classes from 0 to 3, .* from -1"),
    ],
)
def test_bad_images_and_labels(images, labels, message):
    metric = REASR(Net(shortcut=False))
    with pytest.raises(ArgumentError, match=message):
        metric.update(images, labels)
    assert metric.images == []


def test_targets_must_be_classes():
    with pytest.raises(ArgumentError, match="`targets` must be classes from 0 to 3, got values from 1 to 9"):
        measured(Net(shortcut=False), targets=(1, 9))


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_without_images_there_is_no_number():
    with pytest.raises(ArgumentError, match=r"REASR needs clean images .* got 0"):
        REASR(Net(shortcut=False)).compute()
    metric = REASR(Net(shortcut=False), targets=(1,))
    metric.update(torch.zeros(0, 3, SIZE, SIZE), torch.zeros(0).long())
    metric.update(torch.zeros(4, 3, SIZE, SIZE), torch.ones(4).long())
    with pytest.raises(ArgumentError, match="REASR needs images of other classes"):
        metric.compute()


def test_a_budget_below_one_pixel_is_refused():
    with pytest.raises(ArgumentError, match=r"one pixel of 144, got 0\.001\. Pass 0\.007 or more"):
        measured(Net(shortcut=False), budgets=(0.001, 0.5)).compute()


def test_a_model_without_logits_is_refused():
    with pytest.raises(ModelError, match="`model` must return logits"):
        measured(nn.Identity())
