"""Noise schedules: the log-SNR of a full T-chain. One class, one formula, one citation.

All numbers are float64. A state is x_t = a_t x_0 + b_t eps at index t = 0..T. ``log_snr = 2 log(a / b)`` is +inf at t =
0. ``alpha_bar = a^2 / (a^2 + b^2)`` is the fraction of signal, which is a^2 where a^2 + b^2 = 1. Variance-exploding and
flow-matching processes have the same log-SNR with another ``scale`` sqrt(a^2 + b^2).
"""

import copy
import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_tdisent.diffusion.spec import Part
from lightning_tdisent.errors import InputError, check_number

LONGEST = 200_000  # largest number of levels of a chain


class NoiseSchedule(Part, ABC):
    """Base class of schedules: the log-SNR of a chain of T noise levels.

    T: number of levels of the full chain, 1 to `LONGEST`.
    zero_terminal: rescale so that the signal at T is exactly zero (2305.08891, Algorithm 1); the last log-SNR is then
        -inf, at which x0 cannot be computed from an eps prediction.
    """

    def __init__(self, T: int = 1000, zero_terminal: bool = False) -> None:
        check_number("T", T, 1, LONGEST, whole=True)
        self.T, self.zero_terminal = T, zero_terminal

    @abstractmethod
    def log_alpha_bar(self) -> Tensor:
        """Return the natural logarithm of alpha-bar at t = 0..T, shape (T+1,), float64, 0 at t = 0."""

    def log_snr(self) -> Tensor:
        """Return the log-SNR at t = 0..T, shape (T+1,), float64, +inf at t = 0."""
        log_ab = self.log_alpha_bar()
        if self.zero_terminal:
            a = (log_ab / 2).exp()
            a = torch.cat([a[:1], (a[1:] - a[-1]) * (a[1] / (a[1] - a[-1]))])
            log_ab = 2 * a.log()
        return log_ab - (-torch.expm1(log_ab)).log()

    def scale(self) -> Tensor:
        """Return sqrt(a_t^2 + b_t^2) at t = 0..T, shape (T+1,), float64; 1 for variance-preserving processes."""
        return torch.ones(self.T + 1, dtype=torch.float64)

    def times(self) -> Tensor | None:
        """Return the time input of a network at t = 0..T, float32 (T+1,); None for t itself."""
        return None

    def recomputed(self, S: int, rescale: bool = False) -> "NoiseSchedule":
        """Return the same formula evaluated for a chain of S levels (instead of selecting S of its rows).

        rescale: multiply the range of betas by T/S; schedules that are functions of t/T ignore it.
        """
        other = copy.copy(self)
        other.T = S
        return other

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in vars(self).items())})"


class _Betas(NoiseSchedule):
    """A chain given by its betas, alpha_bar_t = prod_{i<=t} (1 - beta_i)."""

    def __init__(self, T: int, beta_start: float, beta_end: float, zero_terminal: bool) -> None:
        super().__init__(T, zero_terminal)
        self.beta_start, self.beta_end = beta_start, beta_end

    @abstractmethod
    def betas(self) -> Tensor:
        """Return the betas at t = 1..T, shape (T,), float64."""

    def log_alpha_bar(self) -> Tensor:
        beta = self.betas()
        bad = ((beta <= 0) | (beta >= 1)).nonzero()
        if len(bad):
            t = int(bad[0])
            start, end = f"beta_start (now {self.beta_start:g})", f"beta_end (now {self.beta_end:g})"
            cure = f"a larger {start}" if beta[t] <= 0 else f"a larger T, or a smaller {end}"
            raise InputError(
                f"beta at t={t + 1} of {self.T} is {float(beta[t]):.4g}, outside (0, 1). Use {cure}; of a table that "
                "is not kind: mapped, T is its number of states"
            )
        return torch.cat([beta.new_zeros(1), torch.log1p(-beta).cumsum(0)])

    def recomputed(self, S: int, rescale: bool = False) -> NoiseSchedule:
        other = super().recomputed(S, rescale)
        if rescale:
            assert isinstance(other, _Betas)
            other.beta_start, other.beta_end = self.beta_start * self.T / S, self.beta_end * self.T / S
        return other


class Linear(_Betas):
    """Betas linear in t: beta_1 = beta_start .. beta_T = beta_end (DDPM, 2006.11239, section 4).

    beta_start: variance added at t = 1, above 0. beta_end: variance added at t = T, below 1.
    """

    def __init__(
        self, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, zero_terminal: bool = False
    ) -> None:
        super().__init__(T, beta_start, beta_end, zero_terminal)

    def betas(self) -> Tensor:
        """Return beta_t = beta_start + (beta_end - beta_start) (t-1)/(T-1)."""
        return torch.linspace(self.beta_start, self.beta_end, self.T, dtype=torch.float64)


class ScaledLinear(_Betas):
    """Square roots of the betas linear in t; the defaults are those of class-conditional latent diffusion (2112.10752).

    Stable Diffusion 1 and 2 use beta_start 0.00085, beta_end 0.012; the signal at T is then 0.068, above the default
    ``terminal_bound`` of `LatentStates`.

    beta_start: variance added at t = 1, above 0. beta_end: variance added at t = T, below 1.
    """

    def __init__(
        self, T: int = 1000, beta_start: float = 0.0015, beta_end: float = 0.0195, zero_terminal: bool = False
    ) -> None:
        super().__init__(T, beta_start, beta_end, zero_terminal)

    def betas(self) -> Tensor:
        """Return betas whose sqrt(beta_t) is linear from sqrt(beta_start) to sqrt(beta_end)."""
        start, end = math.sqrt(self.beta_start), math.sqrt(self.beta_end)
        return torch.linspace(start, end, self.T, dtype=torch.float64).square()


class Cosine(NoiseSchedule):
    """alpha_bar(u) = cos^2((u + offset)/(1 + offset) pi/2) / alpha_bar(0), betas clipped (2102.09672, eq. 17).

    offset: keeps the first betas from vanishing.
    max_beta: upper bound of the betas, in (0, 1).
    """

    def __init__(
        self, T: int = 1000, offset: float = 0.008, max_beta: float = 0.999, zero_terminal: bool = False
    ) -> None:
        super().__init__(T, zero_terminal)
        if not 0 < max_beta < 1:
            raise InputError(f"max_beta must lie in (0, 1), got {max_beta}")
        self.offset, self.max_beta = offset, max_beta

    def log_alpha_bar(self) -> Tensor:
        """Return log prod (1 - min(1 - f(t)/f(t-1), max_beta)), f(t) = cos^2(...)."""
        u = torch.linspace(0, 1, self.T + 1, dtype=torch.float64)
        f = torch.cos((u + self.offset) / (1 + self.offset) * math.pi / 2).square()
        keep = (f[1:] / f[:-1]).clamp_min(1 - self.max_beta)
        return torch.cat([f.new_zeros(1), keep.log().cumsum(0)])


class Sigmoid(NoiseSchedule):
    """alpha_bar(u) = (g(1) - g(u)) / (g(1) - g(0)), g(u) = sigmoid((u (end - start) + start)/tau) (2301.10972, Alg. 1).

    start, end: range of the argument, start < end.
    tau: temperature, above 0.
    floor: smallest alpha-bar, in (0, 1), since the formula ends at zero.
    """

    def __init__(
        self,
        T: int = 1000,
        start: float = -3.0,
        end: float = 3.0,
        tau: float = 1.0,
        floor: float = 1e-9,
        zero_terminal: bool = False,
    ) -> None:
        super().__init__(T, zero_terminal)
        if tau <= 0 or end <= start or not 0 < floor < 1:
            raise InputError(
                f"Sigmoid needs start < end, tau > 0 and 0 < floor < 1, got {start}, {end}, {tau}, {floor}"
            )
        self.start, self.end, self.tau, self.floor = start, end, tau, floor

    def log_alpha_bar(self) -> Tensor:
        """Return the logarithm of the formula, clamped at ``floor``."""
        u = torch.linspace(0, 1, self.T + 1, dtype=torch.float64)
        g = torch.sigmoid((u * (self.end - self.start) + self.start) / self.tau)
        return ((g[-1] - g) / (g[-1] - g[0])).clamp_min(self.floor).log()


class LogLinear(NoiseSchedule):
    """log-SNR linear in t, from ``high`` at t = 1 to ``low`` at t = T: the curves of 2207.09786, with eps = 1/T.

    high: log-SNR at t = 1. low: log-SNR at t = T, below ``high``.
    """

    def __init__(self, T: int = 1000, high: float = 10.0, low: float = -10.0, zero_terminal: bool = False) -> None:
        super().__init__(T, zero_terminal)
        if not -math.inf < low < high < math.inf:
            raise InputError(f"{type(self).__name__}: log-SNR must fall from t = 1 to T, got {high:g} to {low:g}")
        self.high, self.low = high, low

    def log_alpha_bar(self) -> Tensor:
        """Return log sigmoid(high - (high - low) (t-1)/(T-1))."""
        L = torch.linspace(self.high, self.low, self.T, dtype=torch.float64)
        return torch.cat([L.new_zeros(1), torch.nn.functional.logsigmoid(L)])


class Geometric(LogLinear):
    """Deviations growing geometrically, sigma_t = min (max/min)^((t-1)/(T-1)) (VE, 2011.13456, eq. 9).

    This is the variance-preserving process x / sqrt(1 + sigma^2) of equal SNR, alpha_bar = 1/(1 + sigma^2).

    sigma_min: deviation of the noise at t = 1, above 0. sigma_max: deviation at t = T, above ``sigma_min``.
    """

    def __init__(
        self, T: int = 1000, sigma_min: float = 0.005, sigma_max: float = 110.0, zero_terminal: bool = False
    ) -> None:
        if not 0 < sigma_min < sigma_max:
            raise InputError(f"Geometric needs 0 < sigma_min < sigma_max, got {sigma_min:g} and {sigma_max:g}")
        super().__init__(T, -2 * math.log(sigma_min), -2 * math.log(sigma_max), zero_terminal)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max


class VarianceExploding(Geometric):
    """x_t = x_0 + sigma_t eps with the deviations of `Geometric` (VE, 2011.13456, eq. 9): a = 1, b = sigma.

    sigma_min: deviation of the noise at t = 1, above 0. sigma_max: deviation at t = T, above ``sigma_min``.
    """

    def __init__(self, T: int = 1000, sigma_min: float = 0.005, sigma_max: float = 110.0) -> None:
        super().__init__(T, sigma_min, sigma_max)

    def scale(self) -> Tensor:
        """Return sqrt(1 + sigma_t^2)."""
        return (-self.log_alpha_bar() / 2).exp()


class FlowMatching(NoiseSchedule):
    """x_t = (1 - sigma) x_0 + sigma eps, sigma_t = shift u / (1 + (shift - 1) u), u = t/T (2403.03206, section 5.3.2).

    a = 1 - sigma, b = sigma: the straight path of rectified flow (2209.03003). The last level is pure noise. The time
    input of a network is 1000 sigma.

    shift: above 0; values above 1 give more noise at the same u, as used for images of many pixels.
    """

    def __init__(self, T: int = 1000, shift: float = 1.0) -> None:
        super().__init__(T)
        check_number("FlowMatching.shift", shift, 0, above=True)
        self.shift = shift

    def _sigma(self) -> Tensor:
        u = torch.linspace(0, 1, self.T + 1, dtype=torch.float64)
        return self.shift * u / (1 + (self.shift - 1) * u)

    def log_alpha_bar(self) -> Tensor:
        """Return log (1 - sigma)^2 / ((1 - sigma)^2 + sigma^2)."""
        return 2 * torch.log1p(-self._sigma()) - 2 * self.scale().log()

    def log_snr(self) -> Tensor:
        """Return 2 log((1 - sigma) / sigma), -inf at T."""
        sigma = self._sigma()
        return 2 * (torch.log1p(-sigma) - sigma.log())

    def scale(self) -> Tensor:
        """Return sqrt((1 - sigma)^2 + sigma^2)."""
        sigma = self._sigma()
        return ((1 - sigma).square() + sigma.square()).sqrt()

    def times(self) -> Tensor:
        """Return 1000 sigma."""
        return (1000 * self._sigma()).float()
