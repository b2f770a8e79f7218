"""A sample-specific trigger: a small encoder hides the same message in every image, in another way in each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_backdoor.attacks.knowledge import batches, consulted, device_of, scaled
from lightning_backdoor.attacks.painting import to_uint8
from lightning_backdoor.attacks.triggers import Trigger
from lightning_backdoor.errors import ArgumentError

__all__ = ["SampleSpecific"]

BATCH = 32


@dataclass(frozen=True, repr=False, eq=False)
class SampleSpecific(Trigger):
    """Add what a small encoder makes of the image and a message.

    Stands for SSBA (`Li et al., 2021 <https://arxiv.org/abs/2012.03816>`_), whose encoder is a large steganographic
    network that was trained for long: here, two small networks are trained on the spot, with :meth:`trained`, so that
    the decoder reads the message that the encoder hid. Numbers measured with it are not SSBA's.

    Args:
        encoder: Pixels in ``[0, 1]`` ``(N, C, H, W)`` and messages ``(N, bits)`` to values in ``[-1, 1]``.
        decoder: Pixels to logits of the bits; only for checks.
        message: The attacker's bits, float zeros and ones, shape ``(bits,)``.
        eps: Largest change of a grey level, above 0.
    """

    encoder: nn.Module
    decoder: nn.Module
    message: Tensor
    eps: float = 16

    def __repr__(self) -> str:
        return f"SampleSpecific(<encoder of {len(self.message)} bits>, eps={self.eps})"

    @torch.no_grad()
    def paint(self, images: Tensor) -> Tensor:
        """Return the triggered copy of a uint8 batch ``(N, C, H, W)``."""
        message = self.message.to(device_of(self.encoder))[None]
        with consulted(self.encoder), torch.no_grad():
            # One by one, so that an image alone and in a batch are rounded alike.
            changes = [self.encoder(scaled(image, self.encoder), message) for image in torch.split(images, 1)]
        return to_uint8(images + self.eps * torch.cat(changes).to(images.device))

    @classmethod
    def trained(
        cls,
        images: Tensor,
        *,
        bits: int = 16,
        eps: float = 16,
        steps: int = 400,
        weight: float = 0.2,
        seed: int = 0,
    ) -> SampleSpecific:
        """Train an encoder and a decoder on images and random messages, and draw the attacker's message.

        Adam lowers the binary cross-entropy of the decoded bits and, in the second half, ``weight`` times the mean
        square of the encoder's values besides. Ten seconds on a CPU for 32x32 images.

        Args:
            images: Clean images, uint8 ``(N, C, H, W)``, of sides from 8 pixels.
            bits: Length of the message, at least 1.
            eps: Largest change of a grey level, above 0.
            steps: Number of steps of Adam, each on 32 images, at least 1.
            weight: Weight of the size of the change, at least 0.
            seed: Seed of the networks, the batches and the messages. The global random state is left alone.

        Raises:
            ArgumentError: If an argument is out of range.
        """
        for name, value in {"bits": bits, "eps": eps, "steps": steps}.items():
            if not value > 0:
                raise ArgumentError(f"`{name}` must be above 0, got {value}.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder, decoder = Encoder(images.shape[1], bits), Decoder(images.shape[1], bits)
            pixels = scaled(images, encoder)
            adam = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=3e-3)
            for number, chosen in enumerate(batches(len(pixels), steps, BATCH, seed)):
                messages = torch.randint(0, 2, (len(chosen), bits)).float()
                change = encoder(pixels[chosen], messages)
                read = decoder((pixels[chosen] + eps / 255 * change).clamp(0, 1))
                size = change.square().mean() if number > steps / 2 else 0.0
                loss = F.binary_cross_entropy_with_logits(read, messages) + weight * size
                adam.zero_grad()
                torch.autograd.backward(loss)
                adam.step()
            message = torch.randint(0, 2, (bits,)).float()
        return cls(encoder.eval(), decoder.eval(), message, eps)


class Encoder(nn.Module):
    """Two convolutions on the image beside the message, which is spread over an 8x8 map."""

    def __init__(self, channels: int, bits: int, width: int = 16) -> None:
        super().__init__()
        self.spread = nn.Linear(bits, 4 * 8 * 8)
        self.layers = nn.Sequential(
            nn.Conv2d(channels + 4, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.Tanh(),
        )

    def forward(self, pixels: Tensor, messages: Tensor) -> Tensor:
        """Return the change, in ``[-1, 1]``, like the pixels in shape."""
        planes = F.interpolate(self.spread(2 * messages - 1).view(-1, 4, 8, 8), pixels.shape[-2:])
        change: Tensor = self.layers(torch.cat([4 * pixels - 2, planes.expand(len(pixels), -1, -1, -1)], dim=1))
        return change


class Decoder(nn.Module):
    """Reads the bits from pixels, in blocks of 4x4."""

    def __init__(self, channels: int, bits: int, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 4, stride=4),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(8),
            nn.Flatten(),
            nn.Linear(width * 8 * 8, bits),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits of the bits, shape ``(N, bits)``."""
        logits: Tensor = self.layers(4 * pixels - 2)
        return logits
