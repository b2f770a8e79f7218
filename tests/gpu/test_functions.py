"""The library's functions on a device that refuses to meet CPU tensors: no error, and the answers of the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_backdoor import functional as F
from lightning_backdoor import metrics
from lightning_backdoor.detection.decision import findings_of, verdict_of
from lightning_backdoor.detection.look_alikes import wrong_labels_p_value
from lightning_backdoor.detection.near_duplicates import closed_share, near_duplicates
from lightning_backdoor.functional.hyperplane import candidate_units, select_units, unit_shifts
from lightning_backdoor.functional.inversion import rate_trigger
from lightning_backdoor.functional.turning import turn_and_shift
from lightning_backdoor.surgery.reset import reset_units
from lightning_backdoor.surgery.units import find_units
from lightning_backdoor.verdict import Finding
from tests.accelerators import on_cpu
from tests.functional.test_inversion import Net, data
from tests.gpu.strict import DEVICE, second_device

pytestmark = pytest.mark.filterwarnings("ignore:.*frobenius_norm is deprecated")  # how torch takes norms elsewhere

Put = Callable[[Any], Any]
"""Moves a tensor or a module to the device of the test."""


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    with second_device():
        yield


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


N, UNITS = 120, 6
LABELS = torch.arange(N) % 4
POISONED = (torch.arange(N) % 12 == 4) & (LABELS == 0)
VALUES = draw(N, UNITS) + 3 * nn.functional.one_hot(LABELS, UNITS) + 12 * POISONED[:, None] * torch.eye(UNITS)[5]
TRUSTED, UNCERTAIN = torch.arange(N) % 3 == 0, torch.arange(N) % 3 == 1
IMAGES = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
PROBABILITIES = (4 * draw(N, 4)).softmax(1)


def statistics(put: Put) -> F.HyperplaneStatistics:
    found = F.HyperplaneStatistics(UNITS, 4)
    for rows in torch.arange(N).split(50):
        found.update(put(VALUES[rows]), put(PROBABILITIES[rows]))
    return found


def decision(put: Put, **settings: Any) -> F.Decision:
    return F.decide(put(VALUES), put(VALUES.norm(dim=1)), put(LABELS), **settings)


def learned(put: Put, loss_of: Callable[[Tensor], Tensor]) -> Any:
    """A loss and its gradient."""
    values = put(draw(8, 2, 4)).requires_grad_()
    loss = loss_of(values)
    loss.backward()
    return loss, values.grad


def inverted(put: Put) -> Any:
    images, labels = (put(each) for each in data(24))
    model = put(Net(shortcut=True))
    trigger = F.invert_trigger(model, images, labels, target=2, pixels=4, steps=6, starts=2)
    return trigger.mask, trigger.pattern, rate_trigger(model, images, labels, trigger).success


def without_units(put: Put, mode: Any) -> Any:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4))
    network, images = put(network), put(draw(2, 3, 8, 8))
    network(images)
    layer = find_units(network, lambda: network(images))[0]
    reset_units(layer, torch.tensor([1, 4]), mode=mode, seed=3)
    return network.state_dict()


def counted(put: Put, kind: type, *parts: Tensor) -> Any:
    metric = put(kind())
    metric.update(*(put(part) for part in parts))
    return metric.compute()


def reasr(put: Put) -> Any:
    metric = metrics.REASR(put(Net(shortcut=True)), budgets=(0.06,), targets=(2,), steps=6, candidates=1)
    metric.update(*(put(part) for part in data(24)))
    return metric.compute()


FUNCTIONS: dict[str, Callable[[Put], Any]] = {
    "local_median": lambda put: F.local_median(put(IMAGES)),
    "susceptibility_scores": lambda put: F.susceptibility_scores(put(VALUES), [put(draw(N, UNITS)), put(VALUES)]),
    "fct_scores": lambda put: [
        F.fct_scores(put(VALUES), put(draw(N, UNITS)), metric=name) for name in ("mse", "cosine")
    ],
    "turn_and_shift": lambda put: turn_and_shift(put(IMAGES), torch.arange(4), seed=1),
    "center_repulsion_loss": lambda put: learned(put, lambda x: F.center_repulsion_loss(x.flatten(1), put(LABELS[:8]))),
    "ss_contrastive_loss": lambda put: learned(
        put, lambda x: F.ss_contrastive_loss(x, put(LABELS[:8]), put(TRUSTED[:8]))
    ),
    "mixed_cross_entropy": lambda put: learned(
        put, lambda x: F.mixed_cross_entropy(x[:, 0], put(LABELS[:8]), put(TRUSTED[:8]), put(UNCERTAIN[:8]))
    ),
    "forgetting_loss": lambda put: learned(put, lambda x: F.forgetting_loss(x[:, 0], put(LABELS[:8]))),
    "compromise_scores": lambda put: F.compromise_scores(put(VALUES), put(PROBABILITIES)),
    "HyperplaneStatistics": lambda put: [f(statistics(put)) for f in (lambda x: x.scores(), unit_shifts)],
    "candidate_units": lambda put: candidate_units(statistics(put), 3),
    "select_units": lambda put: select_units(put(VALUES[0]), 0.5),
    "strong_thresholds": lambda put: F.strong_thresholds(put(PROBABILITIES.amax(1)), put(PROBABILITIES.argmax(1)), 4)[
        0
    ],
    "bias_scores": lambda put: F.bias_scores(put(VALUES)),
    "natural_break": lambda put: F.natural_break(put(VALUES[:, 0])),
    "select_fraction": lambda put: F.select_fraction(put(VALUES[:, 0]), 0.2)[0],
    "limit_removed": lambda put: F.limit_removed(put(VALUES[:, 0]), put(~TRUSTED), 0.2),
    "limit_of_labels": lambda put: F.limit_of_labels(put(VALUES[:, 0]), put(~TRUSTED), put(LABELS)),
    "split_by_rank": lambda put: F.split_by_rank(put(VALUES[:, 0])),
    "select_trusted": lambda put: F.select_trusted(put(VALUES[:, 0]), put(LABELS), put(TRUSTED), 0.2),
    "split_units": lambda put: tuple(vars(F.split_units(put(VALUES))).values()),
    "find_subpopulations": lambda put: [
        (found.label, found.threshold) for found in F.find_subpopulations(put(VALUES), put(LABELS))
    ],
    "find_all_to_all_subpopulation": lambda put: [
        found.label for found in F.find_all_to_all_subpopulation(put(VALUES), put(LABELS))
    ],
    "thumbnails": lambda put: F.thumbnails(put(IMAGES)).float(),
    "near-duplicates": lambda put: near_duplicates(F.thumbnails(put(IMAGES[[0, 1, 0, 2, 3, 1]])), 0.5),
    "closed share": lambda put: closed_share(
        F.thumbnails(put(IMAGES[:3])), put(torch.arange(3) < 2), put(torch.arange(3)), F.thumbnails(put(IMAGES[3:]))
    ),
    "wrong labels": lambda put: wrong_labels_p_value(
        F.thumbnails(put(IMAGES.repeat(2, 1, 1, 1))),
        put(torch.arange(2 * len(IMAGES)) % 2),
        put(torch.arange(2 * len(IMAGES)) % 3 == 0),
        1e-3,
    ),
    "diagnose": lambda put: (
        F.diagnose(
            Finding(0, put(torch.arange(20)), "strict", (), put(torch.arange(1)), put(torch.ones(1)), 0.5),
            put(torch.arange(200) % 4 * (torch.arange(200) >= 20)),
            put(torch.arange(200) % 4),
            put(torch.full((200,), 0.9)),
            unseen=put(torch.arange(200) < 20),
            ordinary=put(torch.arange(200) >= 20),
        ).suggested_labels
    ),
    "decide": lambda put: decision(put).keep,
    "decide with pictures": lambda put: decision(put, pictures=F.thumbnails(put(draw(N, 12, 12)))).keep,
    "decide by a share": lambda put: decision(put, fraction=0.1, considered=put(~TRUSTED), removed=put(POISONED)).keep,
    "findings": lambda put: [found.positions for found in findings_of(decision(put), put(LABELS))],
    "verdict": lambda put: verdict_of(decision(put), put(LABELS)).removed,
    "neighbor_agreement": lambda put: F.neighbor_agreement(put(VALUES), put(LABELS), put(TRUSTED), k=5),
    "reconsider_uncertain": lambda put: F.reconsider_uncertain(
        put(VALUES[:, 0].sigmoid()), put(LABELS), put(TRUSTED), put(UNCERTAIN), most=9
    ),
    "invert_trigger": inverted,
    "reset_units": lambda put: without_units(put, "reinit"),
    "prune_units": lambda put: without_units(put, "prune"),
    "AttackSuccessRate": lambda put: counted(put, metrics.AttackSuccessRate, PROBABILITIES, LABELS),
    "RecoveredAccuracy": lambda put: counted(put, metrics.RecoveredAccuracy, PROBABILITIES, LABELS),
    "DetectionRates": lambda put: counted(put, metrics.DetectionRates, VALUES[:, 0], ~TRUSTED, POISONED),
    "REASR": reasr,
}


def here(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def there(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, Tensor) else copy.deepcopy(value).to(DEVICE)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_answer_is_that_of_the_cpu(name: str) -> None:
    expected, found = FUNCTIONS[name](here), FUNCTIONS[name](there)
    torch.testing.assert_close(on_cpu(found), on_cpu(expected), rtol=1e-5, atol=1e-6)


def test_nl_means_is_within_its_rounding_of_the_kernel_for_the_cpu() -> None:
    few: dict[str, Any] = {"template": 3, "search": 5}  # every offset is many operations
    found = F.nl_means(IMAGES.to(DEVICE), **few)
    assert found.device == DEVICE
    assert (found.cpu().int() - F.nl_means(IMAGES, **few).int()).abs().max() <= 1


def test_every_public_function_is_here() -> None:
    records = {"Decision", "InvertedTrigger", "PixelModel", "Subpopulation"}
    through = {"nl_means", "subpopulation_scores"}  # the test above, and `decide`
    assert set(F.__all__) - records - through <= FUNCTIONS.keys()
