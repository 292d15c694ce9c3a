"""Convert 8-bit images to the models' range [-1, 1] and back, and tile images into a grid."""

import torch
from torch import Tensor

GREY_LEVELS = 127.5  # grey levels per unit of the range [-1, 1]
LEVEL = 1 / GREY_LEVELS  # distance of two adjacent grey levels in [-1, 1]


def to_uint8(x: Tensor) -> Tensor:
    """Clamp images to [-1, 1] and return them as uint8 0..255: round(127.5 (x + 1)), in float32 or float64."""
    x = x if x.dtype == torch.float64 else x.float()
    return ((x.clamp(-1, 1) + 1) * GREY_LEVELS).round().to(torch.uint8)


def from_uint8(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Map uint8 images 0..255 to [-1, 1]: the inverse of `to_uint8`."""
    return images.to(dtype) / GREY_LEVELS - 1


def unit_range(images: Tensor) -> Tensor:
    """Return float32: uint8 images mapped by `from_uint8`, float input (latents, or images in [-1, 1]) unscaled."""
    return images.float() if images.is_floating_point() else from_uint8(images)


def grid(images: Tensor, columns: int = 16, gap: int = 1) -> Tensor:
    """Tile uint8 images (B, C, H, W) on mid-grey into one image (C, rows (H+gap) + gap, columns (W+gap) + gap)."""
    n, c, h, w = images.shape
    columns = min(columns, n)
    out = torch.full((c, -(-n // columns) * (h + gap) + gap, columns * (w + gap) + gap), 128, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        out[:, top : top + h, left : left + w] = image
    return out


def zoomed(images: Tensor, least: int = 48) -> Tensor:
    """Enlarge small images (.., H, W) by the smallest whole factor that gives each side ``least`` pixels."""
    factor = -(-least // min(images.shape[-2:]))
    return images.repeat_interleave(factor, -1).repeat_interleave(factor, -2) if factor > 1 else images


def spaced(n: int, total: int) -> Tensor:
    """Return n evenly spaced int64 numbers below ``total``.

    Used to choose images from a set that may be sorted by class.
    """
    return torch.arange(n) * total // n
