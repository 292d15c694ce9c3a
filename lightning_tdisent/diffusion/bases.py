"""Orthonormal maps between an image and its components, the columns of a table."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_tdisent.diffusion.spec import Part
from lightning_tdisent.errors import InputError


class Basis(Part, ABC):
    """An orthonormal map of images (B, C, H, W) to as many coefficients, each of one of K components.

    Components are counted from coarse to fine, and the finest ones may leave: without ``finished`` of them an image is
    its `coarse` one, and its coefficients are a tensor of that size.
    """

    K: int

    def coarse(self, x: Tensor, finished: int) -> Tensor:
        """The image of the coarser components alone, (B, C, H / 2^finished, W / ..), 2^finished times means."""
        return F.avg_pool2d(x, 2**finished) * 2**finished if finished else x

    @abstractmethod
    def forward(self, x: Tensor, finished: int = 0) -> Tensor:
        """Coefficients of images without their finest ``finished`` components."""

    @abstractmethod
    def inverse(self, z: Tensor, finished: int = 0) -> Tensor:
        """Images of coefficients, the inverse of `forward`."""

    @property
    def isometry(self) -> "Basis":
        """The same map without scales."""
        return self

    @abstractmethod
    def columns(self, height: int, width: int) -> Tensor:
        """Component of every coefficient of an image, int64 (H, W) or (1, 1); a coarse image has the corner of it."""

    def check(self, shape: Sequence[int]) -> None:
        """Refuse images of (C, H, W) that cannot be taken apart."""


class Pixels(Basis):
    """The image itself: one component."""

    K = 1

    def forward(self, x: Tensor, finished: int = 0) -> Tensor:
        """Return x."""
        return x

    def inverse(self, z: Tensor, finished: int = 0) -> Tensor:
        """Return z."""
        return z

    def columns(self, height: int, width: int) -> Tensor:
        """0."""
        return torch.zeros(1, 1, dtype=torch.int64)


class Haar(Basis):
    """Haar's wavelets over some levels: averages a_J and differences d_J .. d_1, K = J + 1 (2207.09786, section 3).

    Of each 2x2 block (p q / r s) of a channel: LL = (p+q+r+s)/2, and the differences (p+q-r-s)/2, (p-q+r-s)/2 and
    (p-q-r+s)/2; the next level takes LL apart. Coefficients lie as in Mallat's layout: LL in the corner of the tensor,
    top to bottom below it, left to right beside it, so that a tensor without its finest component is its corner.

    levels: J, sides must be divisible by 2^J. scales: what the coefficients of a_J, d_J .. d_1 are divided by, such as
    their deviations in the data (`deviations`): an orthonormal map has averages that grow by 2 a level, and a schedule
    ends a component of deviation 1 best. 1 if not given.
    """

    def __init__(self, levels: int, scales: list[float] | None = None) -> None:
        if not 1 <= levels <= 16:
            raise InputError(f"Haar: at least one level, and at most 16, got {levels}")
        self.levels, self.scales, self.K = levels, scales, levels + 1
        if scales is not None and (len(scales) != self.K or not all(0 < s < math.inf for s in scales)):
            raise InputError(
                f"Haar of {levels} levels has {self.K} components, scales: {scales} must be as many above 0"
            )

    @property
    def isometry(self) -> "Basis":
        """The same map without scales."""
        return self if self.scales is None else Haar(self.levels)

    def check(self, shape: Sequence[int]) -> None:
        """Refuse sides that are not divisible by 2^levels."""
        _, height, width = shape
        if height % 2**self.levels or width % 2**self.levels:
            raise InputError(
                f"Haar of {self.levels} levels needs sides divisible by {2**self.levels}, the image has "
                f"{height}x{width}; use fewer levels, or data.size"
            )

    def forward(self, x: Tensor, finished: int = 0) -> Tensor:
        """See `Basis`."""
        return self._split(x, self.levels - finished)

    def _split(self, x: Tensor, levels: int) -> Tensor:
        if not levels:
            return x if self.scales is None else x / self.scales[0]
        p, q, r, s = F.pixel_unshuffle(x, 2).unflatten(-3, (-1, 4)).unbind(-3)
        top, bottom, down, across = p + q, r + s, p - q, r - s
        scale = 0.5 if self.scales is None else 0.5 / self.scales[levels]
        low = self._split((top + bottom) * 0.5, levels - 1)
        upper = torch.cat([low, (down + across) * scale], -1)
        return torch.cat([upper, torch.cat([(top - bottom) * scale, (down - across) * scale], -1)], -2)

    def inverse(self, z: Tensor, finished: int = 0) -> Tensor:
        """See `Basis`."""
        return self._join(z, self.levels - finished)

    def _join(self, z: Tensor, levels: int) -> Tensor:
        if not levels:
            return z if self.scales is None else z * self.scales[0]
        h, w = z.shape[-2] // 2, z.shape[-1] // 2
        scale = 0.5 if self.scales is None else 0.5 * self.scales[levels]
        low = self._join(z[..., :h, :w], levels - 1) * 0.5
        down, side, cross = z[..., h:, :w] * scale, z[..., :h, w:] * scale, z[..., h:, w:] * scale
        top, bottom, left, right = low + down, low - down, side + cross, side - cross
        block = torch.stack([top + left, top - left, bottom + right, bottom - right], -3)
        return F.pixel_shuffle(block.flatten(-4, -3), 2)

    def columns(self, height: int, width: int) -> Tensor:
        """J at the finest differences, down to 0 in the corner of the averages."""
        out = torch.empty(height, width, dtype=torch.int64)
        for column in range(self.levels, -1, -1):
            deep = self.levels - column
            out[: height >> deep, : width >> deep] = column
        return out

    def deviations(self, images: Tensor) -> list[float]:
        """Root mean squares of the components a_J, d_J .. d_1 of images (B, C, H, W) in [-1, 1], to 3 digits."""
        z, columns = self.isometry.forward(images), self.columns(*images.shape[-2:])
        return [float(f"{float(z[..., columns == k].square().mean().sqrt()):.3g}") for k in range(self.K)]
