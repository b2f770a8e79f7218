"""The networks of the benchmark: small ones for two CPU cores, and the usual ones of timm and torchvision."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
import torchvision
from torch import Tensor, nn

NAME = "resnet9-relu-0.26M"
PRETRAINED = "efficientnet-lite0-imagenet"
WIDTHS = (16, 32, 64, 96)


def _conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Residual(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(_conv(width, width), _conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def resnet9(widths: tuple[int, int, int, int] = WIDTHS, classes: int = 10) -> nn.Sequential:
    """Six plain and two residual stages with max pooling, 265 thousand parameters."""
    a, b, c, d = widths
    pool = nn.MaxPool2d(2)
    return nn.Sequential(
        _conv(3, a), _conv(a, b), pool, Residual(b), _conv(b, c), pool, _conv(c, d), pool, Residual(d),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(d, classes),
    )  # fmt: skip


class PreActivation(nn.Module):
    """Batch norm and GELU before each of two convolutions, beside the identity or a projection."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.BatchNorm2d(inputs), nn.GELU(), nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs), nn.GELU(), nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        )  # fmt: skip
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.branch(x)


def preact_gelu(widths: tuple[int, int, int, int] = WIDTHS, classes: int = 10) -> nn.Sequential:
    """Four pre-activation stages whose sum is pooled as it is, so that features have signs; 223 thousand parameters."""
    a, b, c, d = widths
    return nn.Sequential(
        nn.Conv2d(3, a, 3, padding=1, bias=False), PreActivation(a, a, 1), PreActivation(a, b, 2),
        PreActivation(b, c, 2), PreActivation(c, d, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(d, classes),
    )  # fmt: skip


def small_vit(classes: int = 10) -> nn.Module:
    """A vision transformer of timm with patches of 4 x 4 pixels, 0.46 million parameters."""
    return timm.models.VisionTransformer(
        img_size=32, patch_size=4, embed_dim=96, depth=4, num_heads=3, num_classes=classes
    )


def small_convnext(classes: int = 10) -> nn.Module:
    """A ConvNeXt of timm with patches of 2 x 2 pixels, 0.89 million parameters."""
    return timm.models.ConvNeXt(
        num_classes=classes,
        depths=(2, 2, 4, 2),
        dims=(24, 48, 96, 160),
        patch_size=2,
        ls_init_value=None,  # scales of 1e-6 would take more epochs than these to grow
    )


def resnet18(classes: int = 10) -> nn.Module:
    """ResNet-18 of timm with a stem for small images: one 3 x 3 convolution and no pooling; 11.2 million parameters."""
    network = timm.create_model("resnet18", num_classes=classes)
    network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return network


def preact_resnet18(classes: int = 10) -> nn.Module:
    """The same with batch norm and ReLU before each convolution, 11.2 million parameters."""
    network = timm.create_model("resnetv2_18", num_classes=classes)
    network.stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    return network


def vgg_bn(depth: int, classes: int = 10) -> nn.Module:
    """Convolutions and batch norms of torchvision's VGG (14.7 or 20.0 million parameters), pooled to one layer."""
    features = getattr(torchvision.models, f"vgg{depth}_bn")().features
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


def efficientnet_lite0(weights: Path | None, classes: int = 10) -> nn.Module:
    """EfficientNet-Lite0 of timm on images enlarged to 64 x 64, 3.4 million parameters; a new head on a state dict."""
    network = timm.create_model("tf_efficientnet_lite0")
    if weights is not None:
        network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    network.reset_classifier(classes)
    return nn.Sequential(nn.Upsample(size=64, mode="bilinear"), network)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    NAME: resnet9,
    "preact-gelu": preact_gelu,
    "vit": small_vit,
    "convnext": small_convnext,
    "resnet18": resnet18,
    "preact-resnet18": preact_resnet18,
    "vgg16-bn": partial(vgg_bn, 16),
    "vgg19-bn": partial(vgg_bn, 19),
    "convnext-atto": lambda classes=10: timm.create_model("convnext_atto", num_classes=classes, patch_size=2),
    "vit-tiny": lambda classes=10: timm.create_model(
        "vit_tiny_patch16_224", num_classes=classes, img_size=32, patch_size=4
    ),
}
"""Networks for images of 32 x 32 pixels by name, built from random weights for a number of classes."""
