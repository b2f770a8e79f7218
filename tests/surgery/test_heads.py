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


@pytest.mark.case("54")
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


@pytest.mark.case("54")
def test_distilled_deit_takes_one_of_its_heads_and_says_so() -> None:
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", num_classes=K, depth=2, embed_dim=48, num_heads=3
    ).eval()
    images = torch.randn(2, 3, 224, 224)
    with pytest.warns(UserWarning, match=r"taken before 'head_dist'.*7 outputs.*feature_layer"):
        head = find_head(model, lambda: model(images))
    assert tapped(model, head, images).shape == (2, 48)
    assert list(unit_layers(model, lambda: model(images)))[-1] == "blocks.1.mlp.fc2"


@pytest.mark.case("54")
@pytest.mark.parametrize("name", TORCHVISION)
def test_head_of_torchvision_models(name: str) -> None:
    model = torchvision.models.get_model(name, weights=None, num_classes=K).eval()
    images = torch.randn(2, 3, 32, 32)
    head = find_head(model, lambda: model(images))
    assert head.name == TORCHVISION[name]
    features = tapped(model, head, images)
    torch.testing.assert_close(head.module(features), model(images))


@pytest.mark.case("54")
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


def test_single_logit_head_is_one_where_its_output_is_changed() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1))
    images = torch.randn(4, 3, 8, 8)

    def run() -> Tensor:
        return nn.functional.pad(net(images) * 2, (1, 0))

    with pytest.warns(UserWarning, match="features are taken before '4'"):
        assert find_head(net, run).name == "4"
    assert list(unit_layers(net, run)) == ["0"]


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
        find_head(net, lambda: torch.from_numpy(net(images).numpy()[:, :5] * 2))
    assert list(unit_layers(net, lambda: torch.from_numpy(net(images).numpy()[:, :5] * 2)))[-1] == "fc"


class Cosine(nn.Module):
    """A classifier head in the forward pass of the whole model: ``apply`` brings features and weight together."""

    def __init__(self, apply: Callable[[Tensor, Tensor], Tensor], attribute: str = "weight") -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU())
        self.register_parameter(attribute, nn.Parameter(torch.randn(K, 8)))
        self.apply_head, self.attribute, self.seen = apply, attribute, torch.zeros(0)
        self.scale, self.bias = nn.Parameter(torch.tensor(16.0)), nn.Parameter(torch.zeros(1, K))

    def forward(self, images: Tensor) -> Tensor:
        self.seen = nn.functional.normalize(self.body(images).mean((2, 3)))
        return self.scale * self.apply_head(self.seen, getattr(self, self.attribute)) + self.bias


def unit(weight: Tensor) -> Tensor:
    return nn.functional.normalize(weight)


APPLY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w: nn.functional.linear(x, unit(w)),
    "matmul": lambda x, w: x @ unit(w).t(),
    "turned": lambda x, w: (unit(w) @ x.t()).t(),
    "batched": lambda x, w: torch.bmm(w.to(x).expand(len(x), -1, -1), x[..., None])[..., 0],
    "einsum": lambda x, w: torch.einsum("bd,kd->bk", x, w),
    "cosine": lambda x, w: nn.functional.cosine_similarity(x[:, None], w[None], dim=-1),
    "distances": lambda x, w: 2 * (x @ w.T) - x.square().sum(1, keepdim=True) - w.square().sum(1),
    "centres": lambda x, w: -(x[:, None] - w).square().sum(-1),
    "convolution": lambda x, w: nn.functional.conv2d(x[..., None, None], w[..., None, None])[..., 0, 0],
    "several centres": lambda x, w: nn.functional.linear(x, torch.cat([w, -w])).view(-1, 2, K).amax(1),
    "softmax": lambda x, w: nn.functional.linear(x, w).softmax(1),
}


@pytest.mark.parametrize("attribute", ["weight", "prototypes"])
@pytest.mark.parametrize("way", APPLY)
def test_features_of_a_head_that_is_no_layer(way: str, attribute: str) -> None:
    net, images = Cosine(APPLY[way], attribute), torch.randn(2, 3, 8, 8)
    head = find_head(net, lambda: net(images))
    assert (head.name, head.place, head.module, head.certain) == (attribute, "weight", net, True)
    torch.testing.assert_close(tapped(net, head, images), net.seen)
    assert list(unit_layers(net, lambda: net(images))) == ["body.0", "body.3"]


def test_a_head_that_is_no_layer_in_a_module_within_the_model() -> None:
    body = nn.Sequential(nn.Conv2d(3, 8, 8), nn.Flatten())
    inner = Cosine(APPLY["linear"], "prototypes")
    inner.body = nn.Sequential(nn.Unflatten(1, (8, 1, 1)))
    net, images = nn.ModuleDict({"body": body, "last": inner}), torch.randn(2, 3, 8, 8)

    def run() -> Tensor:
        return nn.functional.dropout(inner(body(images)) * 2, 0.0)

    head = find_head(net, run)
    assert (head.name, head.module, head.certain) == ("last.prototypes", inner, False)
    with torch.no_grad(), Taps(net, [head.name], place=head.place) as taps:
        run()
        torch.testing.assert_close(taps.read()[head.name], inner.seen)


def test_a_layer_with_an_adapter_inside_is_the_head_itself() -> None:
    class Adapted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, K)
            self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, K, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.down(x)) + super().forward(x)

    net, images = Net(), torch.randn(2, 3, 8, 8)
    net.fc = Adapted()
    assert find_head(net, lambda: net(images)) == Head("fc", net.fc)
    assert list(unit_layers(net, lambda: net(images))) == ["conv", "grouped", "hidden", "fc.down", "fc.up"]


def test_a_weight_of_the_model_that_nothing_is_applied_to_is_no_head() -> None:
    net, images = Net(), torch.randn(2, 3, 8, 8)
    net.register_buffer("weight", torch.ones(K, K))
    assert find_head(net, lambda: net(images)).name == "fc"


@pytest.mark.parametrize("gradients", [True, False])
def test_a_cut_before_a_head_that_is_no_layer_separates_it_from_the_features(gradients: bool) -> None:
    net, images = Cosine(APPLY["linear"]), torch.randn(2, 3, 8, 8)
    with torch.set_grad_enabled(gradients), Taps(net, ["weight"], place="weight", gradients=True, cut=True) as taps:
        logits = net(images)
        features = taps.read()["weight"]
    logits.sum().backward()
    assert net.weight.grad is not None
    assert net.scale.grad is not None
    assert all(parameter.grad is None for parameter in net.body.parameters())
    assert features.requires_grad is gradients


def test_compiled_models_with_a_head_that_is_no_layer() -> None:
    net, images = Cosine(APPLY["linear"]), torch.randn(2, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, while compiling
        compiled = torch.compile(net, backend="eager")
        with torch.no_grad():
            compiled(images)
            head = find_head(net, lambda: compiled(images))
            with Taps(net, [head.name], place=head.place) as taps:
                compiled(images)
                torch.testing.assert_close(taps.read()["weight"], net.seen)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_layer_is_passed_over() -> None:
    net, images = Net(), torch.randn(2, 3, 8, 8)
    net.hidden = torch.jit.script(net.hidden)
    assert find_head(net, lambda: net(images)).name == "fc"
    assert list(unit_layers(net, lambda: net(images))) == ["conv", "grouped"]


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


@pytest.mark.case("55")
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
