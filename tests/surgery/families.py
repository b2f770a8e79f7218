"""Small models of many families, and by hand: where in each of them a unit must be zero when it is off."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vgg import VGG
from torch import Tensor, nn

from lightning_backdoor.surgery import UnitLayer, find_units

K = 5


@dataclass(frozen=True)
class Family:
    """A model and its truth.

    Attributes:
        make: Builds it.
        off: Regular expression of a layer's name, and the modules whose output channel is zero when its unit is off.
        branch: The layers that enter residual sums.
        refused: Layers with units that are not offered.
        axis: Where the channels are.
        every: Take only each so many layers for the slow checks.
    """

    make: Callable[[], nn.Module]
    off: dict[str, Any]
    branch: str = r"$^"
    refused: str = r"$^"
    axis: int = 1
    every: int = 1
    size: int = 32
    shift: dict[tuple[str, str], int] = field(default_factory=dict)


def created(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, pretrained=False, num_classes=K, **options)


def vgg(norm: type[nn.Module] | None) -> nn.Module:
    return VGG([6, "M", 8, 8, "M", 4], K, norm_layer=norm, mlp_ratio=0.01)  # type: ignore[list-item]


RESNET = {
    r"(layer.*\.)conv1": r"\1act1",
    r"(layer[124].*\.)conv2": r"\1bn2",
    r"(layer3.*\.)conv2": r"\1act2",
    r"(layer.*\.)conv3": r"\1bn3",
    r"(layer.*\.downsample)\.1": r"\1.2",
    r"conv1\.0": "conv1.2",
    r"conv1\.3": "conv1.5",
    r"conv1\.6": "act1",
}
BOTTLENECK = {
    "conv1": "act1",
    r"(layer.*\.)conv([12])": r"\1act\2",
    r"(layer.*\.)conv3": r"\1bn3",
    r"(layer.*\.downsample)\.0": r"\1.1",
}
MBCONV = {
    r"(blocks.*\.)conv_exp": r"\1bn1",
    r"(blocks\.[^.]*\.[^.]*\.)conv_pw": r"\1bn2",
    r"(blocks.*\.)se.conv_reduce": r"\1se.act1",
}
FAMILIES = {
    "resnet": Family(created("test_resnet"), RESNET, branch=r"conv1\.6|layer[124].*conv2|conv3|downsample"),
    "basic resnet": Family(
        lambda: ResNet(BasicBlock, [1, 2, 1, 1], K, channels=(64, 8, 8, 6)),
        {"conv1": "act1", r"(.*\.)conv1": r"\1act1", r"(.*\.)conv2": r"\1bn2", r"(.*downsample)\.0": r"\1.1"},
        branch=r"^conv1|conv2|downsample",
    ),
    "bottleneck": Family(
        lambda: ResNet(Bottleneck, [2, 1, 1, 1], K, channels=(16, 4, 4, 4)),
        BOTTLENECK,
        branch="^conv1|conv3|downsample",
    ),
    "resnext": Family(
        lambda: ResNet(Bottleneck, [1, 2, 1, 1], K, cardinality=4, base_width=32, channels=(8, 8, 8, 8)),
        BOTTLENECK,
        branch="conv3|downsample",
    ),
    "senet": Family(
        created("test_byobnet"),
        {r"(.*conv1_(kxk|1x1)|stages.3.0.conv2_kxk|stem)\.conv": r"\1.bn", r"(.*attn.*)fc1": r"\1act",
         r"(.*(shortcut.conv|conv3_1x1|conv2_kxk|conv2_1x1))\.conv": r"\1.bn"},
        branch=r"shortcut|conv3|stages\.[12].*conv2|conv2_1x1",
        refused=r"attn.*fc2",
    ),
    "vgg": Family(lambda: vgg(None), {r"features\.0": "features.1", r"features\.3": "features.4",
        r"features\.5": "features.6", r"features\.8": "features.9", r"(pre_logits\.)fc(.)": r"\1act\2"}),
    "vgg with batch norm": Family(lambda: vgg(nn.BatchNorm2d), {r"features\.0": "features.2",
        r"features\.4": "features.6", r"features\.7": "features.9", r"features\.11": "features.13",
        r"(pre_logits\.)fc(.)": r"\1act\2"}),
    "efficientnet": Family(
        created("test_efficientnet"),
        {**MBCONV, "conv_stem": "bn1", r"blocks.0.0.conv": "blocks.0.0.bn1", r"(blocks\.[12].*)conv_pwl": r"\1bn2",
         r"(blocks.*)conv_pwl": r"\1bn3", "conv_head": "bn2"},
        refused=r"conv_expand",
    ),
    "mobilenet": Family(
        created("mobilenetv3_small_050"),
        {r"blocks\.0\.0\.conv_pw": "blocks.0.0.bn2", **MBCONV, "conv_stem": "blocks.0.0.bn1",
         r"(blocks.*)conv_pwl": r"\1bn3", r"blocks.5.0.conv": "blocks.5.0.bn1", "conv_head": "act2"},
        branch=r"blocks.[1234].*conv_pwl",
        refused=r"conv_expand",
        every=7,
    ),
    "convnext": Family(
        created("test_convnext"), {r"(.*mlp\.)fc1": r"\1act", r"(.*mlp\.)fc2": r"\1fc2"},
        branch="fc2", refused=r"stem|conv_dw|downsample", axis=-1, every=7,
    ),
    "vit": Family(
        created("test_vit", img_size=32, depth=2),
        {r"(.*mlp\.)fc1": r"\1act", r"(.*mlp\.)fc2": r"\1fc2", r"(.*)proj": r"\1proj"},
        branch="fc2|proj", refused=r"patch_embed|qkv", axis=-1,
    ),
    "deit": Family(
        created("deit_tiny_distilled_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2),
        {r"(.*mlp\.)fc1": r"\1act", r"(.*mlp\.)fc2": r"\1fc2", r"(.*)proj": r"\1proj"},
        branch="fc2|proj", refused=r"patch_embed|qkv", axis=-1,
    ),
    "regnet": Family(
        created("regnety_002"), {r"(.*)\.conv": r"\1.bn", r"(.*se)\.fc1": r"\1.act"},
        branch=r"conv3|downsample", refused=r"se\.fc2", every=13,
    ),
    "densenet": Family(
        created("densenet121", growth_rate=4, block_config=(2,)),
        {
            r"features.conv0": ["denselayer1.norm1", "denselayer2.norm1", "norm5"],
            r".*denselayer(.)\.conv1": r"denselayer\1.norm2",
            r".*denselayer1\.conv2": ["denselayer2.norm1", "norm5"],
            r".*denselayer2\.conv2": ["norm5"],
        },
        shift={("denselayer1.conv2", "denselayer2.norm1"): 8, ("denselayer1.conv2", "norm5"): 8,
               ("denselayer2.conv2", "norm5"): 12},
    ),
}  # fmt: skip


def built(name: str) -> tuple[nn.Module, Tensor]:
    """A model with weights and statistics that are nowhere 0 or 1, in double precision, and images."""
    model = FAMILIES[name].make().double().eval()
    scrambled(model)
    return model, torch.randn(3, 3, FAMILIES[name].size, FAMILIES[name].size, dtype=torch.float64)


def scrambled(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1 or parameter.abs().max() < 0.5:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                buffer.normal_(0, 0.3)
            elif key.endswith("running_var"):
                buffer.uniform_(0.5, 2)


def units_of(model: nn.Module, images: Tensor, **options: Any) -> list[UnitLayer]:
    return find_units(model, lambda: model(images), **options)


def places(family: Family, name: str) -> list[tuple[str, int]]:
    """Where the units of a layer are when they are off: names (or their ends) of modules, first channel there."""
    for pattern, target in family.off.items():
        found = re.fullmatch(pattern, name)
        if found:
            targets = [found.expand(t) for t in (target if isinstance(target, list) else [target])]
            return [
                (t, next((n for (p, q), n in family.shift.items() if name.endswith(p) and q == t), 0)) for t in targets
            ]
    raise AssertionError(f"the table has no place for {name}")


@contextmanager
def masked(model: nn.Module, where: list[tuple[str, int]], units: Tensor, axis: int) -> Iterator[None]:
    """Zero channels of what some modules put out."""
    with ExitStack() as stack:
        for end, shift in where:
            names = [key for key, _ in model.named_modules() if f".{key}".endswith(f".{end}")]
            part = model.get_submodule(end if end in names else names[0])

            def zero(_: nn.Module, __: Any, output: Tensor, shift: int = shift) -> Tensor:
                return output.index_fill(axis, units + shift, 0.0)

            stack.callback(part.register_forward_hook(zero).remove)
        yield
