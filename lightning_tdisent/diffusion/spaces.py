"""Spaces: how an image is represented as a state. `Pixels`, or the components of an image in a `Haar` wavelet basis."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_tdisent.diffusion.spec import Part
from lightning_tdisent.errors import InputError


class Space(Part, ABC):
    """Base class of invertible linear maps of images (B, C, H, W) to as many coefficients, grouped in K components.

    Components are counted from coarse to fine. At level n the n finest ones have been dropped: the image is the
    `coarse` one, with sides divided by 2^n, and its coefficients form a tensor of that size.
    """

    K: int

    def coarse(self, x: Tensor, level: int) -> Tensor:
        """Return the image made of the coarser components alone, (B, C, H / 2^level, W / 2^level).

        Its values are 2^level times the means of 2^level x 2^level blocks.
        """
        return F.avg_pool2d(x, 2**level) * 2**level if level else x

    @abstractmethod
    def forward(self, x: Tensor, level: int = 0) -> Tensor:
        """Return the coefficients of images at this level."""

    @abstractmethod
    def inverse(self, z: Tensor, level: int = 0) -> Tensor:
        """Return the images at this level from their coefficients: the inverse of `forward`."""

    @property
    def isometry(self) -> "Space":
        """The orthonormal map: this space without scales."""
        return self

    @abstractmethod
    def columns(self, height: int, width: int) -> Tensor:
        """Return the component of each coefficient, int64 (H, W) or (1, 1).

        At a higher level the top left corner of that size holds.
        """

    def check(self, shape: Sequence[int]) -> None:
        """Raise InputError for images of shape (C, H, W) that this space cannot represent."""

    def encode(self, x0: Tensor, level: int = 0) -> Tensor:
        """Return state 0 of full-size images (B, C, H, W), without the ``level`` finest components."""
        return self.forward(self.coarse(x0, level), level)

    def decode(self, z: Tensor, level: int = 0) -> Tensor:
        """Return full-size images in [-1, 1] from states; lower resolutions are upsampled (nearest neighbour)."""
        image = self.inverse(z, level) / 2**level if level else self.inverse(z)
        return F.interpolate(image, scale_factor=float(2**level)) if level else image

    def clamp(self, z: Tensor, bound: float, level: int = 0) -> Tensor:
        """Return states whose images are clamped to [-bound, bound]."""
        bound *= 2**level
        return self.forward(self.inverse(z, level).clamp(-bound, bound), level)

    def to_network(self, z: Tensor, level: int) -> Tensor:
        """Return a state as an image of its resolution, by the orthonormal map: the input of a network."""
        return self.isometry.inverse(z, level)

    def from_network(self, x: Tensor, level: int) -> Tensor:
        """Return the output of a network as a state: the inverse of `to_network`."""
        return self.isometry.forward(x, level)


class Pixels(Space):
    """The image itself, as one component."""

    K = 1

    def forward(self, x: Tensor, level: int = 0) -> Tensor:
        """Return x."""
        return x

    def inverse(self, z: Tensor, level: int = 0) -> Tensor:
        """Return z."""
        return z

    def columns(self, height: int, width: int) -> Tensor:
        """Return 0, as (1, 1)."""
        return torch.zeros(1, 1, dtype=torch.int64)


class Haar(Space):
    """Haar wavelets over J levels: averages a_J and differences d_J .. d_1, K = J + 1 (2207.09786, section 3).

    For each 2x2 block (p q / r s) of a channel: LL = (p+q+r+s)/2, and the differences (p+q-r-s)/2, (p-q+r-s)/2 and
    (p-q-r+s)/2; the next level splits LL again. Coefficients are in Mallat's layout: LL in the top left corner of the
    tensor, top minus bottom below it, left minus right to its right. So a tensor without its finest component is its
    corner.

    levels: J, 1 to 16; sides must be divisible by 2^J.
    scales: positive divisors of the coefficients of a_J, d_J .. d_1, such as their standard deviations in the data
        (`deviations`); 1 if not given. The averages of an orthonormal map grow by a factor of 2 per level, and a
        schedule fits a component of deviation 1 best.
    """

    def __init__(self, levels: int, scales: list[float] | None = None) -> None:
        if not 1 <= levels <= 16:
            raise InputError(f"Haar: levels must lie in 1..16, got {levels}")
        self.levels, self.scales, self.K = levels, scales, levels + 1
        if scales is not None and (len(scales) != self.K or not all(0 < s < math.inf for s in scales)):
            raise InputError(
                f"Haar of {levels} levels has {self.K} components, scales: {scales} must be as many above 0"
            )

    @property
    def isometry(self) -> "Space":
        """This map without scales."""
        return self if self.scales is None else Haar(self.levels)

    def check(self, shape: Sequence[int]) -> None:
        """Raise InputError for sides that are not divisible by 2^levels."""
        _, height, width = shape
        if height % 2**self.levels or width % 2**self.levels:
            raise InputError(
                f"Haar of {self.levels} levels needs sides divisible by {2**self.levels}, the image has "
                f"{height}x{width}; use fewer levels, or data.size"
            )

    def forward(self, x: Tensor, level: int = 0) -> Tensor:
        """Return the coefficients of images at this level; see `Space.forward`."""
        return self._split(x, self.levels - level)

    def _split(self, x: Tensor, levels: int) -> Tensor:
        if not levels:
            return x if self.scales is None else x / self.scales[0]
        p, q, r, s = F.pixel_unshuffle(x, 2).unflatten(-3, (-1, 4)).unbind(-3)
        top, bottom, down, across = p + q, r + s, p - q, r - s
        scale = 0.5 if self.scales is None else 0.5 / self.scales[levels]
        low = self._split((top + bottom) * 0.5, levels - 1)
        upper = torch.cat([low, (down + across) * scale], -1)
        return torch.cat([upper, torch.cat([(top - bottom) * scale, (down - across) * scale], -1)], -2)

    def inverse(self, z: Tensor, level: int = 0) -> Tensor:
        """Return the images at this level from their coefficients; see `Space.inverse`."""
        return self._join(z, self.levels - level)

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
        """Return J for the finest differences, down to 0 for the averages in the corner."""
        out = torch.empty(height, width, dtype=torch.int64)
        for column in range(self.levels, -1, -1):
            deep = self.levels - column
            out[: height >> deep, : width >> deep] = column
        return out

    def deviations(self, images: Tensor) -> list[float]:
        """Return the root mean squares of the components a_J, d_J .. d_1 of images, to 3 significant digits.

        images: (B, C, H, W) in [-1, 1]. The coefficients are those without scales.
        """
        z, columns = self.isometry.forward(images), self.columns(*images.shape[-2:])
        return [float(f"{float(z[..., columns == k].square().mean().sqrt()):.3g}") for k in range(self.K)]
