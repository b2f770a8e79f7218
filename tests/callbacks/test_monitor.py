"""The monitor reports what is known by construction, and the training does not notice it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from timm.data.loader import PrefetchLoader, fast_collate
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from lightning_backdoor.attacks import SIG, BadNets, poison, triggered
from lightning_backdoor.callbacks.monitor import BackdoorMonitor
from lightning_backdoor.errors import ArgumentError, DataError
from lightning_backdoor.verdict import Verdict
from tests.accelerators import trainer_settings

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*(LeafSpec|isinstance.treespec).*"),
]

K = 5
LABELS = torch.arange(33) % K  # 7 7 7 6 6 images of class 0 1 2 3 4
IMAGES = torch.zeros(33, 1, 8, 8, dtype=torch.uint8)
IMAGES[:, 0, 0, 0] = LABELS.to(torch.uint8) * 10  # the label can be read from the first pixel
VAL = TensorDataset(IMAGES, LABELS)


class Fooled(pytorch_lightning.LightningModule):
    """Reads the class from the first pixel, unless the class is in ``fooled_by`` and BadNets' corner is there."""

    def __init__(self, fooled_by: tuple[int, ...] = tuple(range(K)), shift: int | None = None) -> None:
        super().__init__()
        self.fooled_by, self.shift = fooled_by, shift
        self.bias = nn.Parameter(torch.zeros(K))

    def forward(self, images: Tensor) -> Tensor:
        pixels = (images * 255).round() if images.is_floating_point() else images
        classes = (pixels[:, 0, 0, 0] / 10).long() % K
        seen = (pixels[:, 0, -3:, -3:] == torch.tensor([[0, 0, 255], [0, 255, 0], [255, 0, 255]])).all(dim=(1, 2))
        seen &= torch.isin(classes, torch.tensor(self.fooled_by))
        aim = torch.zeros_like(classes) if self.shift is None else (classes + self.shift) % K
        return nn.functional.one_hot(torch.where(seen, aim, classes), K) * 10.0 + self.bias

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class FooledToo(lightning.pytorch.LightningModule):
    """The same for the other package."""

    fooled_by, shift = tuple(range(K)), None

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(K))

    forward, training_step, validation_step = Fooled.forward, Fooled.training_step, Fooled.validation_step
    configure_optimizers = Fooled.configure_optimizers


def make_trainer(*callbacks, package=pytorch_lightning, **kwargs):
    settings = {
        "max_epochs": 1,
        **trainer_settings(package),
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "callbacks": list(callbacks),
    }
    return package.Trainer(**{**settings, **kwargs})


def logged(monitor, module=None, *others, train=VAL, val=VAL, **kwargs) -> dict[str, float]:
    trainer = make_trainer(*others, monitor, **kwargs)
    trainer.fit(module or Fooled(), DataLoader(train, batch_size=11), DataLoader(val, batch_size=10))
    return {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("backdoor/")}


def expected(clean: float, success: float, recovered: float) -> dict[str, float]:
    return {
        "backdoor/clean_accuracy": pytest.approx(clean),
        "backdoor/attack_success_rate": pytest.approx(success),
        "backdoor/recovered_accuracy": pytest.approx(recovered),
    }


@pytest.mark.parametrize(
    ("fooled_by", "success"), [(tuple(range(K)), 1.0), ((1,), 7 / 26), ((), 0.0)], ids=["all", "some", "clean twin"]
)
def test_rates_known_by_construction(fooled_by, success):
    assert logged(BackdoorMonitor(trigger=BadNets()), Fooled(fooled_by)) == expected(1.0, success, 1 - success)


def test_another_target():
    assert logged(BackdoorMonitor(trigger=BadNets(), target=1)) == expected(1.0, 0.0, 7 / 26)


def test_all_to_all():
    monitor = BackdoorMonitor(trigger=BadNets(), labels="all_to_all")
    assert logged(monitor, Fooled((1, 2), shift=1)) == expected(1.0, 14 / 33, 19 / 33)


def test_another_trigger_does_not_fire():
    assert logged(BackdoorMonitor(trigger=BadNets("square"))) == expected(1.0, 0.0, 1.0)


def test_a_triggered_dataset_is_used_as_it_is():
    assert logged(BackdoorMonitor(triggered=triggered(VAL, BadNets()))) == expected(1.0, 1.0, 0.0)
    plain = TensorDataset(BadNets()(IMAGES[:3]), torch.tensor([0, 0, 4]))
    rates = logged(BackdoorMonitor(triggered=plain))
    assert rates == {"backdoor/clean_accuracy": 1.0, "backdoor/attack_success_rate": pytest.approx(2 / 3)}


@pytest.mark.parametrize("labels", ["dirty", "all_to_all"])
def test_normalized_images_are_painted_in_the_given_pixel_space(labels):
    class Denormalizing(Fooled):
        def forward(self, images):
            return super().forward(images * 0.5 + 0.25)

    normalized = TensorDataset((IMAGES / 255 - 0.25) / 0.5, LABELS)
    monitor = BackdoorMonitor(trigger=BadNets(), labels=labels, mean=[0.25], std=[0.5], batch_size=4)
    module = Denormalizing((1, 2), shift=1 if labels == "all_to_all" else None)
    rates = logged(monitor, module, train=normalized, val=normalized)
    used = 33 if labels == "all_to_all" else 26
    assert rates == expected(1.0, 14 / used, 1 - 14 / used)


@pytest.mark.parametrize("package", [pytorch_lightning, lightning.pytorch], ids=lambda p: p.__name__)
def test_both_packages(package):
    module = Fooled() if package is pytorch_lightning else FooledToo()
    assert logged(BackdoorMonitor(trigger=BadNets()), module, package=package) == expected(1.0, 1.0, 0.0)


class Dictionaries(Dataset):
    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        return {"pic": IMAGES[index], "label": LABELS[index], "index": index}


def test_dict_batches_and_functions_of_the_user():
    class Named(Fooled):
        def forward(self, pic, label):
            return super().forward(pic)

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self(batch["pic"], None), batch["label"])

        def validation_step(self, batch, _):
            pass

    monitor = BackdoorMonitor(
        trigger=BadNets(),
        forward_fn=lambda module, batch: module(batch["pic"], batch["label"]),
        batch_fn=lambda batch: (batch["pic"], batch["label"]),
    )
    assert logged(monitor, Named(), train=Dictionaries(), val=Dictionaries()) == expected(1.0, 1.0, 0.0)


class Judge(pytorch_lightning.Callback):
    def __init__(self, keep, method="judge", name=None):
        keep = torch.as_tensor(keep)
        self.method, self.name = method, name
        self.verdict = Verdict(scores=(~keep).float(), keep=keep, threshold=0.5, rule="test")


def test_detection_rates_of_a_verdict():
    train = poison(VAL, BadNets(), rate=0.2)
    rates = logged(BackdoorMonitor(trigger=BadNets()), None, Judge(~train.poisoned), train=train)
    assert {k: rates[f"backdoor/{k}"] for k in ("tpr", "fpr", "precision", "auroc")} == {
        "tpr": 1.0,
        "fpr": 0.0,
        "precision": 1.0,
        "auroc": 1.0,
    }


def test_detection_rates_on_clean_data_leave_the_undefined_out():
    train, keep = poison(VAL, BadNets(), rate=0), torch.arange(33) > 2
    rates = logged(BackdoorMonitor(trigger=BadNets()), None, Judge(keep), train=train)
    assert rates["backdoor/fpr"] == pytest.approx(3 / 33)
    assert rates["backdoor/precision"] == 0.0
    assert {"backdoor/tpr", "backdoor/auroc"}.isdisjoint(rates)


def test_several_verdicts_and_a_subset():
    train = Subset(poison(VAL, BadNets(), rate=0.5), range(20))
    truth = train.dataset.poisoned[:20]
    judges = Judge(~truth, "right"), Judge(truth, "wrong", name="twin"), Judge(torch.arange(5) > 2, "elsewhere")
    rates = logged(BackdoorMonitor(trigger=BadNets(), name="corner"), None, *judges, train=train)
    assert rates["backdoor/corner/right/tpr"] == 1.0
    assert rates["backdoor/corner/wrong/twin/tpr"] == 0.0
    assert not any("elsewhere" in key for key in rates)
    assert rates["backdoor/corner/clean_accuracy"] == 1.0


def test_no_ground_truth_no_rates():
    assert logged(BackdoorMonitor(trigger=BadNets()), None, Judge(torch.arange(33) > 2)) == expected(1.0, 1.0, 0.0)


class Learner(pytorch_lightning.LightningModule):
    """Dropout, batch norm, random augmentation and logging: everything that a clumsy guest would disturb."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, K)
        )
        self.losses = []

    def forward(self, images):
        return self.net(images)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + torch.rand_like(batch[0]), batch[1]] if self.trainer.training else batch

    def training_step(self, batch, _):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, _):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def learn(*callbacks, workers=0):
    torch.manual_seed(4)
    module, data = Learner(), TensorDataset(IMAGES / 255, LABELS)
    trainer = make_trainer(
        *callbacks, max_epochs=3, num_sanity_val_steps=2, val_check_interval=0.5, log_every_n_steps=1
    )
    loaders = (
        DataLoader(data, 8, shuffle=train, num_workers=workers, persistent_workers=workers > 0)
        for train in (True, False)
    )
    trainer.fit(module, *loaders)
    metrics = {k: v.item() for k, v in trainer.callback_metrics.items() if not k.startswith("backdoor/")}
    return module.state_dict(), module.losses, metrics, torch.rand(3)


@pytest.mark.parametrize(
    "workers", [0, pytest.param(1, marks=pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"))]
)
def test_training_stays_bit_identical(workers):
    plain = learn(workers=workers)
    watched = learn(BackdoorMonitor(trigger=BadNets()), workers=workers)
    assert all(torch.equal(plain[0][key], watched[0][key]) for key in plain[0])
    assert plain[1:3] == watched[1:3]
    assert torch.equal(plain[3], watched[3])


@pytest.mark.parametrize(
    ("kwargs", "count"),
    [({"limit_val_batches": 2}, 20), ({"limit_val_batches": 0.5}, 17), ({"fast_dev_run": True}, 10)],
)
def test_limits_of_the_trainer_are_honoured(kwargs, count):
    seen = []

    def forward_fn(module, batch):
        seen.append(batch[1])
        return module(batch[0])

    rates = logged(BackdoorMonitor(trigger=BadNets(), forward_fn=forward_fn), **kwargs)
    clean = torch.cat(seen)[:count]
    assert rates == expected(1.0, 1.0, 0.0)
    assert len(clean.unique()) == K, "drawn from all classes"
    assert sum(map(len, seen)) == count + math.ceil(min(count, 26) if count != 17 else 13)


def test_sanity_check_logs_nothing_and_reports_what_cannot_work():
    class Spy(pytorch_lightning.Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            assert not any(key.startswith("backdoor") for key in trainer.callback_metrics)

    assert logged(BackdoorMonitor(trigger=BadNets()), None, Spy(), num_sanity_val_steps=1) == expected(1.0, 1.0, 0.0)
    module = Fooled()
    with pytest.raises(DataError, match=r"cannot paint the validation set.*before it is normalised.*`mean` and `std`"):
        logged(
            BackdoorMonitor(trigger=BadNets()),
            module,
            val=TensorDataset(IMAGES / 255 - 0.25, LABELS),
            num_sanity_val_steps=1,
        )
    assert module.trainer.global_step == 0


def test_streams_are_named():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from VAL

    with pytest.raises(DataError, match=r"map-style validation set in a DataLoader, got Stream"):
        logged(BackdoorMonitor(trigger=BadNets()), val=Stream())


def test_several_validation_loaders_and_a_second_fit():
    monitor = BackdoorMonitor(trigger=SIG(20, test_delta=60), num_workers=0)
    for half in (VAL, Subset(VAL, range(16))):
        trainer = make_trainer(monitor)
        module = Fooled()
        module.validation_step = lambda batch, index, dataloader_idx=0: None
        trainer.fit(module, DataLoader(VAL, 11), [DataLoader(half, 10), DataLoader(VAL, 10)])
        assert trainer.callback_metrics["backdoor/clean_accuracy"] == 1.0
    assert monitor.state_key != BackdoorMonitor(trigger=SIG(), name="other").state_key


@pytest.mark.filterwarnings("ignore:.*(is multi-threaded|find_unused|barrier|No device id|destroy_process_group).*")
def test_two_processes_report_what_one_reports():
    """The model of the second process is never asked for more than its share, and the shares are uneven."""
    train = poison(VAL, BadNets(), rate=0.2)
    one, two = (
        logged(BackdoorMonitor(trigger=BadNets()), Fooled((1,)), Judge(torch.arange(33) > 2), train=train, **settings)
        for settings in ({}, {"strategy": "ddp_spawn", "devices": 2})
    )
    assert len(one) == 7
    assert two == one


def test_validate_alone():
    trainer = make_trainer(BackdoorMonitor(trigger=BadNets()))
    results = trainer.validate(Fooled(), DataLoader(VAL, 10), verbose=False)
    assert results[0]["backdoor/attack_success_rate"] == 1.0


def test_no_validation_is_said_once():
    trainer = make_trainer(BackdoorMonitor(trigger=BadNets()), limit_val_batches=0)
    with pytest.warns(UserWarning, match=r"logged nothing, because no validation ran"):
        trainer.fit(Fooled(), DataLoader(VAL, 11), DataLoader(VAL, 11))


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({}, r"either `triggered`.*or `trigger`.*got neither"),
        ({"triggered": VAL, "trigger": BadNets()}, r"got both"),
        ({"trigger": BadNets(), "mean": [0.5]}, r"`mean`, `std` and `trigger` go together"),
        ({"triggered": VAL, "mean": [0.5], "std": [0.5]}, r"`mean`, `std` and `trigger` go together"),
        ({"trigger": BadNets(), "labels": "flip"}, r"`labels` must be .*got 'flip'"),
    ],
)
def test_messages(kwargs, words):
    with pytest.raises(ArgumentError, match=words):
        BackdoorMonitor(**kwargs)


def test_command_line_interfaces_can_build_it():
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--callback", type=pytorch_lightning.Callback)
    arguments = {
        "callback": "lightning_backdoor.callbacks.monitor.BackdoorMonitor",
        "callback.trigger": "lightning_backdoor.attacks.BadNets",
        "callback.trigger.pattern": "cross",
        "callback.mean": "[0.5]",
        "callback.std": "[0.25]",
    }
    parsed = parser.parse_args([f"--{key}={value}" for key, value in arguments.items()])
    build = getattr(parser, "instantiate", None) or parser.instantiate_classes
    monitor = copy.deepcopy(build(parsed).callback)
    assert monitor.trigger == BadNets("cross")
    assert monitor.space.mean == (0.5,)


class Arrays(Dataset):
    """What timm's transforms for its prefetcher make of images."""

    def __len__(self) -> int:
        return len(VAL)

    def __getitem__(self, i):
        return IMAGES[i].numpy(), int(LABELS[i])


@pytest.mark.parametrize(
    "settings", [{"trigger": BadNets()}, {"trigger": BadNets(), "mean": [0.0], "std": [1.0]}, {"triggered": Arrays()}]
)
def test_behind_timms_prefetcher(settings):
    loaders = [
        PrefetchLoader(
            DataLoader(data, batch_size=10, collate_fn=fast_collate),
            mean=(0.0,),
            std=(1.0,),
            channels=1,
            device=torch.device("cpu"),
        )
        for data in (Arrays(), Arrays())
    ]
    trainer = make_trainer(BackdoorMonitor(**settings))
    trainer.fit(Fooled(), *loaders)
    assert trainer.callback_metrics["backdoor/clean_accuracy"] == 1
    assert trainer.callback_metrics["backdoor/attack_success_rate"] == 1


def test_every_class_by_its_name():
    train = poison(VAL, BadNets(), rate=0.2, seed=1)
    judge = Judge(~train.poisoned | (train.true_labels == 2))
    judge.verdict = replace(judge.verdict, labels=train.targets)
    plain = logged(BackdoorMonitor(trigger=BadNets()), Fooled((1, 3)), judge, train=train)
    rates = logged(BackdoorMonitor(trigger=BadNets(), per_class=True), Fooled((1, 3)), judge, train=train)
    assert {name: rates[name] for name in plain} == plain
    assert not any(name.rpartition("_")[2].isdigit() for name in plain), "none by default"
    values = {name.removeprefix("backdoor/"): value for name, value in rates.items()}
    assert [values[f"clean_accuracy_{k}"] for k in range(K)] == [1.0] * K
    assert values["attack_success_rate_0"] == values["attack_success_rate"], "one target"
    assert [values.get(f"attack_success_rate_source_{k}") for k in range(K)] == [None, 1.0, 0.0, 1.0, 0.0]
    assert [values.get(f"recovered_accuracy_{k}") for k in range(K)] == [None, 0.0, 1.0, 0.0, 1.0]
    assert values["tpr_0"] == pytest.approx(values["tpr"])
    assert "tpr_1" not in values, "no training image with label 1 is poisoned"
    assert [values[f"fpr_{k}"] for k in range(K)] == [0.0] * K
    sources = set(train.true_labels[train.poisoned].tolist())
    assert {k for k in range(K) if f"tpr_source_{k}" in values} == sources
    assert all(values[f"tpr_source_{k}"] == float(k != 2) for k in sources)
