import torch
from torch import Tensor

from lightning_backdoor.functional import decide, find_all_to_all_subpopulation, find_subpopulations

CLASSES, EACH, UNITS = 5, 200, 30


def responses(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Units that tell classes, under noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(CLASSES).repeat_interleave(EACH)
    centers = 2 * torch.randn(CLASSES, UNITS, generator=generator)
    return centers[labels] + torch.randn(len(labels), UNITS, generator=generator), labels


def planted(share: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    values, labels = responses()
    marked = torch.arange(len(labels)) % EACH < share * EACH
    values[marked, 3:6] += 12
    return values, labels, marked


def test_one_mode_in_every_label_is_found() -> None:
    values, labels, marked = planted()
    assert find_subpopulations(values, labels) == [], "it is no label's own"
    modes = find_all_to_all_subpopulation(values, labels)
    assert sorted(mode.label for mode in modes) == list(range(CLASSES))
    assert all(torch.equal(mode.weights, modes[0].weights) for mode in modes)
    decision = decide(values, torch.zeros(len(labels)), labels, shared=True)
    assert torch.equal(~decision.keep, marked)
    assert decision.shared
    assert decision.rule.startswith("shared_mode")


def test_its_clean_twin_is_quiet() -> None:
    for seed in range(10):
        values, labels = responses(seed)
        assert find_all_to_all_subpopulation(values, labels) == []
    decision = decide(values, torch.zeros(len(labels)), labels, shared=True)
    assert decision.keep.all()
    assert not decision.shared


def test_not_asked_for_it_is_not_looked_for() -> None:
    values, labels, _ = planted()
    assert decide(values, torch.zeros(len(labels)), labels).keep.all()


def test_a_mode_of_one_label_or_of_a_majority_is_no_shared_mode() -> None:
    values, labels, _ = planted()
    alone, marked = responses()[0], (torch.arange(len(labels)) < 20)
    alone[marked, 3:6] += 12
    assert find_all_to_all_subpopulation(alone, labels) == []
    assert [mode.label for mode in find_subpopulations(alone, labels)] == [0]
    values, labels, _ = planted(share=0.8)
    assert find_all_to_all_subpopulation(values, labels) == []


def test_two_labels_are_too_few_to_share() -> None:
    values, labels, _ = planted()
    few = labels < 2
    assert find_all_to_all_subpopulation(values[few], labels[few]) == []
