"""Map images of 8 bits to the range of the models and back, and tile them."""

import torch
from torch import Tensor

GREY_LEVELS = 127.5  # in a unit of [-1, 1]
LEVEL = 1 / GREY_LEVELS  # between two grey levels


def to_uint8(x: Tensor) -> Tensor:
    """Return images in [-1, 1], clamped, as uint8 0..255: round(127.5 (x + 1)), computed in float32 at least."""
    x = x if x.dtype == torch.float64 else x.float()
    return ((x.clamp(-1, 1) + 1) * GREY_LEVELS).round().to(torch.uint8)


def from_uint8(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return images uint8 0..255 in [-1, 1]: the inverse of `to_uint8`."""
    return images.to(dtype) / GREY_LEVELS - 1


def unit_range(images: Tensor) -> Tensor:
    """Return images as floats in [-1, 1]: uint8 by `from_uint8`, floats (latents, or images in it) as they are."""
    return images.float() if images.is_floating_point() else from_uint8(images)


def grid(images: Tensor, columns: int = 16, gap: int = 1) -> Tensor:
    """Tile uint8 images (B, C, H, W) into one (C, rows (H+gap) + gap, columns (W+gap) + gap) on mid-grey."""
    n, c, h, w = images.shape
    columns = min(columns, n)
    out = torch.full((c, -(-n // columns) * (h + gap) + gap, columns * (w + gap) + gap), 128, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        out[:, top : top + h, left : left + w] = image
    return out


def spaced(n: int, total: int) -> Tensor:
    """Return n numbers below total, int64, evenly spaced: the images to take of a set that may be sorted by class."""
    return torch.arange(n) * total // n
