from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from lightning_backdoor.errors import ModelError
from lightning_backdoor.surgery.heads import Head, find_head, head_features, unit_layers
from lightning_backdoor.surgery.taps import Taps, pool

K = 7
TINY = {
    "test_resnet": "fc",
    "test_vit": "head",
    "test_vit3": "head",
    "test_vit_relpos": "head",
    "test_convnext": "head.fc",
    "test_efficientnet": "classifier",
    "test_byobnet": "head.fc",
    "test_nfnet": "head.fc",
    "test_mambaout": "head.fc",
    "test_coatnet": "head.fc",
}
FAMILIES = {
    "mobilenetv3_small_050": (32, "classifier"),
    "vgg11": (32, "head.fc"),
    "regnetx_002": (32, "head.fc"),
    "densenet121": (32, "classifier"),
    "resmlp_12_224": (224, "head"),
    "mixer_s32_224": (224, "head"),
    "deit_tiny_patch16_224": (224, "head"),
}
TORCHVISION = {
    "resnet18": "fc",
    "vgg11": "classifier.6",
    "mobilenet_v3_small": "classifier.3",
    "densenet121": "classifier",
    "shufflenet_v2_x0_5": "fc",
}


def timm_model(name: str, size: int) -> tuple[nn.Module, Tensor]:
    options = {"img_size": size} if name.startswith("test_vit") and size != 160 else {}
    return timm.create_model(name, pretrained=False, num_classes=K, **options).eval(), torch.randn(2, 3, size, size)


def tapped(model: nn.Module, head: Head, images: Tensor) -> Tensor:
    with torch.no_grad(), Taps(model, [head.name], place=head.place) as taps:
        model(images)
        return taps.read()[head.name]


@pytest.mark.parametrize("name", TINY)
def test_head_and_features_of_timm_models(name: str) -> None:
    check_timm(name, 160, TINY[name])


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n == "vgg11" else ()) for n in FAMILIES])
def test_head_and_features_of_more_families(name: str) -> None:
    check_timm(name, *FAMILIES[name])


def check_timm(name: str, size: int, expected: str) -> None:
    model, images = timm_model(name, size)
    head = find_head(model, lambda: model(images))
    assert head.name == expected
    assert head.module is model.get_submodule(expected)
    with torch.no_grad():
        features = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(tapped(model, head, images), features)


def test_distilled_deit_takes_one_of_its_heads_and_says_so() -> None:
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", num_classes=K, depth=2, embed_dim=48, num_heads=3
    ).eval()
    images = torch.randn(2, 3, 224, 224)
    with pytest.warns(UserWarning, match=r"taken before 'head_dist'.*7 outputs.*feature_layer"):
        head = find_head(model, lambda: model(images))
    assert tapped(model, head, images).shape == (2, 48)
    assert list(unit_layers(model, lambda: model(images)))[-1] == "blocks.1.mlp.fc2"


@pytest.mark.parametrize("name", TORCHVISION)
def test_head_of_torchvision_models(name: str) -> None:
    model = torchvision.models.get_model(name, weights=None, num_classes=K).eval()
    images = torch.randn(2, 3, 32, 32)
    head = find_head(model, lambda: model(images))
    assert head.name == TORCHVISION[name]
    features = tapped(model, head, images)
    torch.testing.assert_close(head.module(features), model(images))


def test_convolutional_head_is_pooled_and_told() -> None:
    model = torchvision.models.squeezenet1_1(weights=None, num_classes=K).eval()
    images = torch.randn(2, 3, 64, 64)
    with pytest.warns(UserWarning, match=r"'classifier.1'"):
        head = find_head(model, lambda: model(images))
    with torch.no_grad():
        maps = model.features(images)
    assert maps.shape[2] > 1
    torch.testing.assert_close(tapped(model, head, images), maps.mean((2, 3)))
    assert "classifier.1" not in unit_layers(model, lambda: model(images))


class Net(nn.Module):
    """A small network; ``finish`` turns its last output into what it returns."""

    def __init__(self, outputs: int = K, finish: Callable[[Tensor], Tensor] = lambda logits: logits) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.grouped = nn.Conv2d(6, 8, 1, groups=2)
        self.unused = nn.Linear(8, outputs)
        self.hidden = nn.Linear(8, 8)
        self.fc = nn.Linear(8, outputs)
        self.finish = finish

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.grouped(self.depthwise(self.conv(images)).relu_()).relu_()
        return self.finish(self.fc(self.hidden(hidden.mean((2, 3))).relu()))


@pytest.mark.parametrize("finish", [lambda z: z, lambda z: z.view(-1, K), Tensor.clone])
def test_head_behind_views_and_copies_is_certain(finish: Callable[[Tensor], Tensor]) -> None:
    net, images = Net(finish=finish), torch.randn(2, 3, 8, 8)
    assert find_head(net, lambda: net(images)).name == "fc"


def test_head_behind_a_cast_to_float32_is_certain() -> None:
    net, images = Net(), torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert find_head(net, lambda: net(images).float()).name == "fc"


def test_softmax_at_the_end_warns() -> None:
    net, images = Net(finish=lambda z: z.softmax(1)), torch.randn(2, 3, 8, 8)
    with pytest.warns(UserWarning, match=r"taken before 'fc', the last layer with 7 outputs"):
        assert find_head(net, lambda: net(images)).name == "fc"


def test_single_logit_head_behind_two_columns() -> None:
    net, images = Net(outputs=1), torch.randn(2, 3, 8, 8)
    assert find_head(net, lambda: nn.functional.pad(net(images), (1, 0))).name == "fc"


def test_weight_normed_head_is_found() -> None:
    net, images = Net(), torch.randn(2, 3, 8, 8)
    nn.utils.parametrizations.weight_norm(net.fc)
    assert find_head(net, lambda: net(images)).name == "fc"


def test_named_feature_layer_is_taken_at_its_output() -> None:
    net, images = Net(), torch.randn(2, 3, 8, 8)
    head = find_head(net, lambda: pytest.fail("nothing to search"), feature_layer="hidden")
    assert (head.name, head.place) == ("hidden", "output")
    assert tapped(net, head, images).shape == (2, 8)
    with pytest.raises(ModelError, match=r"`feature_layer`.*Net.*'hiden'.*Similar: hidden"):
        find_head(net, lambda: net(images), feature_layer="hiden")


def test_no_layer_of_the_right_width_is_an_error() -> None:
    net, images = Net(), torch.randn(2, 3, 8, 8)
    with pytest.raises(ModelError, match=r"No layer with 5 outputs.*Net.*feature_layer"):
        find_head(net, lambda: net(images)[:, :5] * 2)


def test_hooks_are_removed_even_after_an_error() -> None:
    net, images = Net(), torch.randn(2, 3, 8, 8)
    find_head(net, lambda: net(images))
    with pytest.raises(RuntimeError):
        find_head(net, lambda: net(images[:, :1]))
    with pytest.raises(RuntimeError), Taps(net, ["conv"]):
        net(images[:, :1])
    assert not any(layer._forward_hooks for layer in net.modules())


def test_unit_layers_in_order_without_depthwise_unused_and_head() -> None:
    net, images = Net(), torch.randn(2, 3, 8, 8)
    layers = unit_layers(net, lambda: net(images))
    assert list(layers) == ["conv", "grouped", "hidden"]
    assert layers["conv"] is net.conv


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_unit_layers_can_be_tapped(name: str) -> None:
    model, images = timm_model(name, 160)
    layers = unit_layers(model, lambda: model(images))
    with torch.no_grad(), Taps(model, layers, pooling="max") as taps:
        model(images)
        values = taps.read()
    assert list(values) == list(layers)
    for key, layer in layers.items():
        assert values[key].shape == (2, layer.weight.shape[0]), key


def test_taps_pool_as_the_loop_would() -> None:
    net, images = Net(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        conv = net.conv(images)
        with Taps(net, ["hidden", "conv"], pooling="max") as largest, Taps(net, ["conv"], place="input") as mean:
            net(images)
            values, inputs = largest.read(), mean.read()
    assert list(values) == ["hidden", "conv"]
    for b in range(2):
        for c in range(6):
            assert values["conv"][b, c] == max(conv[b, c].flatten().tolist())
    torch.testing.assert_close(inputs["conv"], images.mean((2, 3)))


@pytest.mark.parametrize(
    ("shape", "axis"), [((2, 5), 1), ((2, 5, 3), 1), ((2, 3, 5), -1), ((2, 5, 3, 3), 1), ((2, 3, 3, 5), -1)]
)
def test_pool_reduces_all_positions(shape: tuple[int, ...], axis: int) -> None:
    values = torch.randn(shape, dtype=torch.bfloat16)
    flat = values.float().movedim(axis, -1).reshape(2, -1, 5)
    torch.testing.assert_close(pool(values, axis, "mean"), flat.mean(1))
    torch.testing.assert_close(pool(values, axis, "max"), flat.amax(1))


def test_head_features_know_channels_last() -> None:
    maps = torch.randn(2, 3, 4, 8)
    torch.testing.assert_close(head_features(maps, nn.Linear(8, K)), maps.mean((1, 2)))
    torch.testing.assert_close(head_features(maps), maps.mean((2, 3)))
    torch.testing.assert_close(head_features(maps[:, 0]), maps[:, 0].mean(1))


def test_taps_name_the_layers_that_did_not_run() -> None:
    net, images = Net(), torch.randn(2, 3, 8, 8)
    with Taps(net, ["unused", "conv"]) as taps:
        net(images)
        with pytest.raises(ModelError, match=r"\['unused'\] did not run.*feature_layer"):
            taps.read()
    with Taps(net, ["conv"]) as taps:
        net(images)
        taps.read()
        with pytest.raises(ModelError, match="did not run"):
            taps.read()  # nothing is read twice


def test_compiled_models_can_be_searched_and_tapped() -> None:
    net, images = Net(), torch.randn(2, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, while compiling
        compiled = torch.compile(net, backend="eager")
        with torch.no_grad():
            expected = tapped(net, Head("fc", net.fc), images)
            compiled(images)
            head = find_head(net, lambda: compiled(images))
            with Taps(net, [head.name], place=head.place) as taps:
                compiled(images)
                torch.testing.assert_close(taps.read()["fc"], expected)
    assert head.name == "fc"
