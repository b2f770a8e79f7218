"""Labels and answers as people have them: columns, floats, one logit for two classes, positions beside the label."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_backdoor import BackdoorMonitor, NONECallback, UltraCleanCallback, attacks
from lightning_backdoor.errors import ArgumentError, ModelError
from tests.callbacks.helpers import Net, Pairs, make_trainer, same_state
from tests.contract.problem import BATCH, IMAGES, WARNS
from tests.contract.registry import Entry, every_kind_of_defense

pytestmark = WARNS


class Pictures(Pairs):
    """Two classes; items are what ``form`` makes of image, label and position."""

    def __init__(self, form: Any = lambda image, label, i: (image, label), n: int = IMAGES, classes: int = 2) -> None:
        super().__init__(n, classes=classes)
        self.form = form

    def __getitem__(self, i: int) -> Any:
        return self.form(*super().__getitem__(i), i)


class Two(Net):
    """Tells two classes apart by one number, and trains on the logits 0 and this number."""

    def __init__(self) -> None:
        super().__init__(classes=1)

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.pad(super().forward(images), (1, 0))


class Binary(Net):
    """The same by binary cross-entropy on the number itself, ``(B, 1)``."""

    def __init__(self) -> None:
        super().__init__(classes=1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        return nn.functional.binary_cross_entropy_with_logits(logits, batch[1].to(logits).reshape(logits.shape))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


class Flat(Binary):
    """The same, ``(B,)``."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).squeeze(1)


class Probable(Binary):
    """A sigmoid in the model."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).sigmoid()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.binary_cross_entropy(self(batch[0]), batch[1].reshape(-1, 1).float())


def fitted(callback: Any, module: type[Net], data: Dataset[Any], epochs: int = 2, **kwargs: Any) -> Net:
    torch.manual_seed(0)
    net, trainer = module(), make_trainer([callback], epochs, **kwargs)
    trainer.fit(net, DataLoader(data, batch_size=BATCH))
    return net


@every_kind_of_defense
def test_one_logit_and_a_column_of_floats_are_two_classes(entry: Entry) -> None:
    one, two = entry.make(), entry.make()
    answers = fitted(one, Binary, Pictures(lambda image, label, i: (image, label.float()[None], i)))
    twin = fitted(two, Two, Pictures())
    assert torch.equal(one.verdict.keep, two.verdict.keep)
    torch.testing.assert_close(one.verdict.scores, two.verdict.scores, rtol=1e-3, atol=1e-4)
    assert one.verdict.labels is None or torch.equal(one.verdict.labels, two.verdict.labels)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(answers.state_dict()[name], value, rtol=1e-3, atol=1e-4)


FORMS = {
    "column": lambda image, label, i: (image, label[None]),
    "float": lambda image, label, i: (image, float(label)),
    "bool column": lambda image, label, i: (image, label.bool()[None]),
    "index last": lambda image, label, i: (image, label, i),
    "index first": lambda image, label, i: {"pic": image, "nr": i, "kind": label},
}


class Whatever(Flat):
    """Takes all of these forms."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch["pic"], batch["kind"]) if isinstance(batch, dict) else batch, batch_idx)


@pytest.fixture(scope="module")
def plain() -> dict[type, tuple[Any, Net]]:
    """What is found where labels are integers."""
    callbacks = UltraCleanCallback(), NONECallback()
    return {type(callback): (callback, fitted(callback, Whatever, Pictures(), epochs=1)) for callback in callbacks}


@pytest.mark.parametrize("cls", [UltraCleanCallback, NONECallback])
@pytest.mark.parametrize("form", FORMS)
def test_all_forms_of_labels_give_the_same_verdict(form: str, cls: Any, plain: dict[type, tuple[Any, Net]]) -> None:
    callback = cls()
    net = fitted(callback, Whatever, Pictures(FORMS[form]), epochs=1)
    assert torch.equal(callback.verdict.scores, plain[cls][0].verdict.scores)
    assert torch.equal(callback.verdict.labels, torch.arange(IMAGES) % 2)
    assert same_state(net, plain[cls][1])


@pytest.mark.parametrize("cls", [UltraCleanCallback, NONECallback])
def test_a_subset_of_indexed_items_knows_its_positions(cls: Any) -> None:
    whole = Pictures(lambda image, label, i: (image, i, label), n=2 * IMAGES)
    chosen = torch.randperm(2 * IMAGES, generator=torch.Generator().manual_seed(0))[:IMAGES].tolist()

    class Second(Flat):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((batch[0], batch[2]), batch_idx)

    callback = cls()
    fitted(callback, Second, torch.utils.data.Subset(whole, chosen), epochs=1, limit_train_batches=1)
    assert callback.verdict.labels.tolist() == [i % 2 for i in chosen]


@pytest.mark.parametrize("cls", [UltraCleanCallback, NONECallback])
class TestRefusedAtTheStart:
    def test_two_columns_that_could_be_the_label(self, cls: Any) -> None:
        data = Pictures(lambda image, label, i: {"image": image, "patient": 7 * i, "sex": label})
        with pytest.raises(ArgumentError, match=r'patient.*96 different|patient"\]: int64 \(64,\).*\(64 different\)'):
            fitted(cls(), Flat, data)

    @pytest.mark.parametrize("size", [IMAGES, 64 * 10])
    def test_a_batch_fn_that_loses_the_labels(self, cls: Any, size: int) -> None:
        """Whatever the size: of 640 images, every tenth one has the same label."""
        data = Pictures(lambda image, label, i: (image, label[None]), n=size)
        words = rf"gives label 0 to all of {size} .* batch\[1\] holds 2 different labels"
        with pytest.raises(ArgumentError, match=words):
            fitted(cls(batch_fn=lambda batch: (batch[0], batch[1].argmax(1))), Flat, data)
        if size > IMAGES:
            return
        callback = cls()  # the remedy
        fitted(callback, Flat, data, epochs=1, limit_train_batches=1)
        assert callback.verdict.labels.tolist() == [i % 2 for i in range(IMAGES)]

    @pytest.mark.filterwarnings("ignore:No layer's output is the logits themselves")
    def test_a_sigmoid_in_the_model(self, cls: Any) -> None:
        data = Pictures(lambda image, label, i: (image, label.float()))
        with pytest.raises(ModelError, match=r"`Probable` returns a probability .*forward_fn=lambda") as error:
            fitted(cls(), Probable, data)
        line = str(error.value).split("forward_fn=")[1].split(", or let")[0]  # the remedy
        callback = cls(forward_fn=eval(line, {"torch": torch}))
        fitted(callback, Probable, data, epochs=1, limit_train_batches=1)
        assert callback.verdict is not None


@pytest.mark.parametrize("labels", ["sorted", "rare", "one class"])
def test_a_batch_fn_whose_first_labels_are_equal_is_not_refused_for_that(labels: str) -> None:
    """Sorted labels, a class of one image in a hundred, or one class in all of the dataset."""
    data = Pictures(lambda image, label, i: (image, label[None], i), n=200)
    places = torch.arange(200)
    data.targets = {"sorted": places // 100, "rare": (places == 77).long(), "one class": 0 * places}[labels]
    callback = NONECallback(batch_fn=lambda batch: (batch[0], batch[1].squeeze(1)))
    fitted(callback, Flat, data, epochs=1, limit_train_batches=1)


class Seen(torch.utils.data.TensorDataset):
    """A validation set with positions."""

    def __getitem__(self, i: int) -> Any:
        image, label = super().__getitem__(i)
        return image, label.float()[None], i


def test_the_monitor_reads_one_logit_and_columns() -> None:
    data = Pairs(32, classes=2)
    rates = []
    for module, val in ((Binary, Seen(data.images, data.targets)), (Two, data)):
        torch.manual_seed(0)
        monitor, net = BackdoorMonitor(trigger=attacks.BadNets()), module()
        trainer = make_trainer([monitor], 1)
        trainer.fit(net, DataLoader(Pairs(64, classes=2), batch_size=16), DataLoader(val, batch_size=16))
        rates.append({key: float(value) for key, value in trainer.callback_metrics.items() if "backdoor/" in key})
    assert rates[0] == rates[1]
    assert {"backdoor/clean_accuracy", "backdoor/attack_success_rate"} <= rates[0].keys()


def test_the_triggered_images_may_come_in_other_containers_than_the_clean_ones() -> None:
    data = Pairs(32, classes=2)

    class Dicts(Pairs):
        def __getitem__(self, i: int) -> Any:
            image, label = super().__getitem__(i)
            return {"label": label, "picture": image}

    class Takes(Two):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            return None

    monitor = BackdoorMonitor(triggered=attacks.triggered(data, attacks.BadNets()))
    trainer = make_trainer([monitor], 1)
    trainer.fit(Takes(), DataLoader(data, batch_size=16), DataLoader(Dicts(32, classes=2), batch_size=16))
    assert "backdoor/attack_success_rate" in trainer.callback_metrics
