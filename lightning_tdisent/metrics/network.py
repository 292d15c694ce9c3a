"""Base class of feature networks; each is named after the data it was trained on.

Distances in the features of different networks are never comparable: the name of the number contains that of the
network, and the protocol holds the SHA-256 of its weights. Only the network of the literature's FID has the name
Inception.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_tdisent.diffusion.spec import Part
from lightning_tdisent.errors import InputError

BLOCK = 16  # batch size on a CPU, where kernels round differently for other batch sizes


class Extracted(NamedTuple):
    """Outputs of a feature network: features (B, d), float32; logits (B, classes) and spatial (B, e), None if absent.

    spatial: features of an inner layer at all its places, flattened.
    """

    features: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None


class FeatureNetwork(Part, nn.Module, ABC):
    """Map uint8 images (B, C, H, W) to `Extracted`; frozen, in eval mode.

    name: name of the data it was trained on; shape: (C, H, W) of the images it takes, any if None; num_features: d;
    classes, num_spatial: widths of logits and spatial features, None if it has none; resize: how images are brought to
    the size of its input; dtype: of its arithmetic; weights_sha256: SHA-256 of the file of its weights, or of the
    weights; packages: packages whose code it uses.
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
        """Return the outputs for uint8 images (B, C, H, W) on the device of the network."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> Extracted:
        """Return `extract` of the images; raises InputError for another dtype, range or shape, with what was found.

        On a CPU the network always gets `BLOCK` images, so that the outputs of an image do not depend on its batch.
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
    """Pad images to a block of `BLOCK` with copies of the last one."""
    missing = BLOCK - len(images)
    return torch.cat([images, images[-1:].expand(missing, *images.shape[1:])]) if missing and len(images) else images
