"""Fine-tuning as people do it: rates by layer, weighted and smoothed losses, mixed inputs, frozen and thawed layers."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import BackboneFinetuning
from torch import Tensor, nn

from lightning_backdoor import DBRCallback, NONECallback, UltraCleanCallback
from lightning_backdoor.errors import TrainerError
from tests.callbacks.helpers import same_state, state_of
from tests.contract.problem import WARNS, Net, assert_settled, clean, fit, net_of, planted
from tests.contract.registry import DETECTOR, Entry, every_kind_of_defense

pytestmark = [
    *WARNS,
    pytest.mark.filterwarnings("ignore:The provided params to be frozen"),
    pytest.mark.filterwarnings("ignore:D-ST. .*"),
    pytest.mark.filterwarnings("ignore:NONE. the removed images drive units of .*which do not learn"),
    pytest.mark.filterwarnings("ignore:NONE could not repair the model"),
]


class Recipe(Net):
    """A tenth of the rate for the backbone, MixUp within the step, class weights and smoothed labels."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.drawn.append((self.current_epoch, batch_idx, batch["index"].tolist()))
        images, labels = batch["image"].float(), F.one_hot(batch["label"], 4).float()
        mixed, soft = (0.9 * one + 0.1 * one.flip(0) for one in (images, labels))
        weight = torch.tensor([0.5, 1.0, 2.0, 1.0], device=self.device)
        return F.cross_entropy(self(mixed), soft, weight=weight, label_smoothing=0.1)

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.body.parameters(), "lr": 0.1 * self.lr}, {"params": self.head.parameters()}]
        optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]


class LowRank(nn.Module):
    """A frozen linear layer, and beside it two that learn and are of low rank together: LoRA."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def adapted(by: str) -> Net:
    """A frozen backbone with a hidden layer that learns by LoRA, and a head that learns."""
    module = net_of()
    module.body.requires_grad_(False)
    hidden = nn.Linear(32, 32).requires_grad_(False)
    module.body = nn.Sequential(*module.body, nn.Flatten(), hidden if by == "peft" else LowRank(hidden), nn.ReLU())
    if by == "peft":
        peft = pytest.importorskip("peft")
        module.body = peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["5"]), module.body)
    return module


def frozen() -> Net:
    """A frozen backbone, and a head that learns."""
    module = net_of()
    module.body.requires_grad_(False)
    return module


@every_kind_of_defense
def test_a_recipe_of_fine_tuning_and_rates_of_layers_that_stay_the_users(entry: Entry) -> None:
    torch.manual_seed(0)
    callback = entry.make()
    run = fit([callback], module=Recipe())
    assert entry.acted(callback, run.trainer)
    assert_settled(run.trainer, run.module, run.loader, run.before)
    if entry.kind == "own":  # its stages have an optimizer of their own
        return
    backbone, head = (group["lr"] for group in run.trainer.optimizers[0].param_groups)
    assert head == pytest.approx(0.05 * 0.7**3)
    assert backbone == pytest.approx(0.1 * head)


def test_a_head_on_a_frozen_backbone_is_trained_anew_or_repaired_and_the_backbone_stays() -> None:
    defenses = [
        UltraCleanCallback(warmup_epochs=2, rule="fraction", fraction=0.25),
        DBRCallback(**DETECTOR, epochs=1, extra_epochs=1),
    ]
    for defense in defenses:
        module = frozen()
        before = state_of(module.body[0])
        run = fit([defense], module=module)
        assert not bool(defense.verdict.keep.all())
        assert same_state(before, run.module.body[0])
        assert not same_state(state_of(net_of().head), run.module.head)


def test_layers_that_thaw_on_the_way_rule_a_restart_out_and_a_repair_goes_on() -> None:
    class Backbone(Net):
        @property
        def backbone(self) -> Any:
            return self.body

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)

    def thaw() -> pl.Callback:
        return BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)

    with pytest.raises(TrainerError, match=r"BackboneFinetuning.*vary `requires_grad`.*response=\"continue\""):
        fit([thaw(), UltraCleanCallback()], module=Backbone())
    callback = UltraCleanCallback(warmup_epochs=2, rule="fraction", fraction=0.25, response="continue")
    run = fit([thaw(), callback], module=Backbone())
    assert not bool(callback.verdict.keep.all())
    assert len(run.trainer.optimizers[0].param_groups) > 1
    repair = NONECallback(rule="paper", finetune_epochs=1, extra_epochs=1)
    run = fit([thaw(), repair], module=Backbone())
    assert repair.history[0].units


LORA = {
    "UltraClean": lambda: UltraCleanCallback(warmup_epochs=2, rule="fraction", fraction=0.25),
    "NONE": lambda: NONECallback(warmup_epochs=2),
    "NONE, by quota": lambda: NONECallback(rule="paper", finetune_epochs=1, extra_epochs=1),
    "D-BR": lambda: DBRCallback(**DETECTOR, epochs=1, extra_epochs=1),
}


@pytest.mark.parametrize("by", ["hand", "peft"])
@pytest.mark.parametrize("name", LORA)
def test_low_rank_adapters_learn_under_every_defense_and_what_they_adapt_stays(name: str, by: str) -> None:
    defense, module = LORA[name](), adapted(by)
    learns = {key for key, parameter in module.named_parameters() if parameter.requires_grad}
    before = state_of(module)
    run = fit([defense], module=module)
    assert not bool(defense.verdict.keep.all())
    after = run.module.state_dict()
    changed = {key for key in after if not torch.equal(before[key], after[key])}
    assert changed >= learns
    assert all("running" in key or "num_batches" in key for key in changed - learns)
    if name == "NONE, by quota":  # units of what learns alone: those of the base cannot learn again
        assert {unit[0] for unit in defense.history[0].units} <= {key.removesuffix(".weight") for key in learns}


def test_a_backdoor_in_low_rank_adapters_is_found_and_trained_away_and_clean_data_change_nothing() -> None:
    defense, data = NONECallback(warmup_epochs=2), planted()
    fit([defense], data=data, module=adapted("hand"))
    assert torch.equal(~defense.verdict.keep, data.poisoned)
    assert defense.history[0].units
    assert defense.repaired
    quiet = NONECallback(warmup_epochs=2)
    run, alone = (fit(callbacks, data=clean(), module=adapted("hand")) for callbacks in ([quiet], []))
    assert bool(quiet.verdict.keep.all())
    assert same_state(state_of(alone.module), run.module)
