"""`Prior`: the density from which the reverse chain starts, at the last row of its table."""

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
    """Base class of densities of x = a x_0 + b eps at one row, whose samples are functions of seeds.

    shape: (C, H, W) of x; if not given, `fit` or `build` sets it. Fitted values are kept in buffers or parameters.
    """

    learned = False  # True: trained by gradients in a training of its own; False: `fit` determines everything
    has_density = True  # whether `log_prob` returns a density
    wants_noise = False  # True: `fit` uses noisy samples, made with ``eps``

    def __init__(self, shape: Sequence[int] | None = None) -> None:
        super().__init__()
        if shape is not None:
            check_shape("prior.shape", shape)
        self.shape = None if shape is None else list(shape)

    def fit(self, x0: Tensor, a: float, b: float, eps: Tensor | None = None) -> list[str]:
        """Fit to the states a x_0 + b eps of clean data x0 (N, C, H, W), and return notes for the user.

        eps: noise of the shape of x0, for priors fitted to noisy samples; the others do not need it and add b^2 to the
        variance. Raises InputError if the data has another shape than the prior.
        """
        shape = list(x0.shape[1:])
        if self.shape not in (None, shape):
            raise InputError(f"the prior's shape is {self.shape}, the data has {shape}; do not set shape")
        self.shape = shape
        return []

    def build(self, shape: Sequence[int]) -> None:
        """Create the parameters of a learned prior for x of shape (C, H, W)."""
        self.shape = list(shape)

    def initialise(self, x: Tensor) -> None:
        """Initialise a learned prior from samples x (B, C, H, W), before its training."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log-density in nats of x (B, C, H, W), float64 (B,)."""

    @abstractmethod
    def sample(self, seeds: Sequence[int], stream: int) -> Tensor:
        """Return x (B, C, H, W), float32 on the CPU; image i is a function of (seeds[i], stream) alone.

        stream: the original index of the row. For N(0, I) the samples are `rng.seed_noise`.
        """

    @property
    def size(self) -> int:
        """Number of values of x: C H W. Raises InputError if there is no shape yet."""
        if self.shape is None:
            raise InputError(f"{type(self).__name__} is not fitted yet")
        return math.prod(self.shape)


class StandardNormal(Prior):
    """N(0, I): exact at a row without signal; at other rows a truncation without a fitted prior, for comparison."""

    def log_prob(self, x: Tensor) -> Tensor:
        """Return -|x|^2/2 - D/2 log 2 pi."""
        flat = x.flatten(1).double()
        return -0.5 * flat.square().sum(1) - 0.5 * LOG_2PI * flat.shape[1]

    def sample(self, seeds: Sequence[int], stream: int) -> Tensor:
        """Return the noise from which the full chain would start."""
        assert self.shape is not None
        return seed_noise(seeds, stream, self.shape)


def normal_log_prob(values: Tensor, variances: Tensor) -> Tensor:
    """Return the summed log-density of independent N(0, v_i): values (B, m), variances (m,) -> (B,)."""
    return -0.5 * (values.square() / variances + variances.log() + LOG_2PI).sum(1)


def refuse_numbers(what: str, **numbers: Any) -> None:
    """Raise InputError for values that are not integers >= 1; what: name of the prior."""
    if wrong := [f"{k} {v!r}" for k, v in numbers.items() if not isinstance(v, int) or isinstance(v, bool) or v < 1]:
        raise InputError(f"prior {what}: {', '.join(wrong)}: expected integers >= 1")


def refuse_shape(x0: Tensor, least: int, what: str) -> None:
    """Raise InputError for fewer than ``least`` images and for non-finite values; what: name of the prior."""
    if len(x0) < least:
        raise InputError(f"{what} wants {least:,} images at least, there are {len(x0):,}")
    if not x0.isfinite().all():
        raise InputError(f"{what}: the data contains values that are not finite")
