"""`Prior`: the density that the reverse chain starts from, at the last row of its table."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_tdisent.diffusion.rng import seed_noise
from lightning_tdisent.diffusion.spec import Part
from lightning_tdisent.errors import InputError, check_shape

LOG_2PI = math.log(2 * math.pi)


class Prior(Part, nn.Module, ABC):
    """A density of x = a x_0 + b eps at one row, and samples of it that are functions of seeds.

    shape: (C, H, W) of x, known once it is fitted. What a fit finds is kept in buffers or parameters.
    """

    learned = False  # by gradients, in a training of its own; else `fit` finds all of it at once
    has_density = True
    wants_noise = False  # to be fitted to noisy samples

    def __init__(self, shape: Sequence[int] | None = None) -> None:
        super().__init__()
        if shape is not None:
            check_shape("prior.shape", shape)
        self.shape = None if shape is None else list(shape)

    def fit(self, x0: Tensor, a: float, b: float, eps: Tensor | None = None) -> list[str]:
        """Fit to the states a x_0 + b eps of clean data x0 (N, C, H, W); returns what a user must know of it.

        eps: noise of x0's shape, for those that are fitted to noisy samples; the others need none, they add b^2.
        """
        shape = list(x0.shape[1:])
        if self.shape not in (None, shape):
            raise InputError(f"the prior's shape is {self.shape}, the data has {shape}; leave it out")
        self.shape = shape
        return []

    def build(self, shape: Sequence[int]) -> None:
        """Make the parameters of a learned prior for x of (C, H, W)."""
        self.shape = list(shape)

    def initialise(self, x: Tensor) -> None:
        """Begin a training of a learned prior from some samples x (B, C, H, W)."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats of x (B, C, H, W), float64 (B,)."""

    @abstractmethod
    def sample(self, seeds: Sequence[int], stream: int) -> Tensor:
        """x (B, C, H, W), float32 on the CPU; image i is a function of (seeds[i], stream) alone.

        stream: the original index of the row. Where the prior is N(0, I) this is `rng.seed_noise`.
        """

    @property
    def size(self) -> int:
        """Number of values of x."""
        if self.shape is None:
            raise InputError(f"{type(self).__name__} is not fitted yet")
        return math.prod(self.shape)


class StandardNormal(Prior):
    """N(0, I): exact at a row without signal; at any other the plain cut, for comparison."""

    def log_prob(self, x: Tensor) -> Tensor:
        """-|x|^2/2 - D/2 log 2 pi."""
        flat = x.flatten(1).double()
        return -0.5 * flat.square().sum(1) - 0.5 * LOG_2PI * flat.shape[1]

    def sample(self, seeds: Sequence[int], stream: int) -> Tensor:
        """The noise that the whole chain would start from."""
        assert self.shape is not None
        return seed_noise(seeds, stream, self.shape)


def normal_log_prob(values: Tensor, variances: Tensor) -> Tensor:
    """Of independent N(0, v_i), summed: values (B, m), variances (m,) -> (B,)."""
    return -0.5 * (values.square() / variances + variances.log() + LOG_2PI).sum(1)


def refuse_numbers(what: str, **numbers: Any) -> None:
    """Refuse what is no whole number from 1 on."""
    if odd := [f"{k} {v!r}" for k, v in numbers.items() if not isinstance(v, int) or isinstance(v, bool) or v < 1]:
        raise InputError(f"prior {what}: {', '.join(odd)}: whole numbers from 1 on are wanted")


def refuse_shape(x0: Tensor, least: int, what: str) -> None:
    """Refuse data that no distribution can be told from."""
    if len(x0) < least:
        raise InputError(f"{what} wants {least:,} images at least, there are {len(x0):,}")
    if not x0.isfinite().all():
        raise InputError(f"{what}: the data holds values that are not finite")
