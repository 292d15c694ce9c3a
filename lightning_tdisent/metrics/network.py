"""What a feature network is; each is named after the data it was trained on.

Distances in the features of different networks are never comparable: the metric's name says which was used, and the
protocol holds the SHA-256 of its weights. Only the network of the literature's FID is called Inception.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_tdisent.diffusion.spec import Part
from lightning_tdisent.errors import InputError

BLOCK = 16  # images at a time on a CPU, whose kernels round otherwise for other numbers of them; also the fastest


class Extracted(NamedTuple):
    """What a network says of images: features (B, d), float32; where it has them logits (B, classes), and spatial,
    features of an inner layer with their places, (B, e)."""

    features: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None


class FeatureNetwork(Part, nn.Module, ABC):
    """uint8 images (B, C, H, W) -> `Extracted`; frozen, in eval mode.

    name: after the data it was trained on; shape: (C, H, W) of the images it takes, None for any; num_features: d;
    classes, num_spatial: widths of logits and spatial features, None where it has none; resize: how images come to
    the size of its input; dtype: of its arithmetic; weights_sha256: of the file,
    or of the numbers, that make it what it is; packages: those
    whose code it is.
    """

    name = "features"
    shape: list[int] | None = None
    num_features: int
    classes: int | None = None
    num_spatial: int | None = None
    resize = "none"
    dtype = "float32"
    weights_sha256 = ""
    packages: tuple[str, ...] = ()

    @abstractmethod
    def extract(self, images: Tensor) -> Extracted:
        """uint8 (B, C, H, W), on the network's device, to what it says of them."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> Extracted:
        """As `extract`; refuses images of another dtype, range or shape and says what was found.

        On a CPU the network always sees `BLOCK` images, so that those of one image do not depend on its company.
        """
        if images.dtype != torch.uint8:
            found = f"{images.dtype}"
            if images.numel() and not images.is_complex():
                found += f" from {float(images.min()):g} to {float(images.max()):g}"
            raise InputError(f"features {self.name}: images must be uint8, 0 to 255, got {found}; see to_uint8")
        if images.ndim != 4 or (self.shape is not None and list(images.shape[1:]) != self.shape):
            wanted = self.shape or "[C, H, W]"
            raise InputError(f"features {self.name}: takes images of {wanted}, got {list(images.shape[1:])}")
        if images.device.type != "cpu":
            with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):  # float32 is float32
                return self.extract(images)
        blocks = [self.extract(filled(block)) for block in images.split(BLOCK)]
        parts = ([p for p in part if p is not None] for part in zip(*blocks, strict=True))
        features, logits, spatial = (torch.cat(part)[: len(images)] if part else None for part in parts)
        assert features is not None
        return Extracted(features, logits, spatial)


def filled(images: Tensor) -> Tensor:
    """A block of `BLOCK` images, the missing ones copies of the last."""
    missing = BLOCK - len(images)
    return torch.cat([images, images[-1:].expand(missing, *images.shape[1:])]) if missing and len(images) else images
