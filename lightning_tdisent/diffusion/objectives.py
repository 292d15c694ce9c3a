"""Objectives: the target of a network's raw output, and the loss weight of every state.

A weight is defined on the error of x0_hat, w(s) |x_0 - x0_hat|^2. The objective converts it to a weight on the raw
output: |x_0 - x0_hat|^2 = unit(s) |target - raw|^2 with unit = b^2/a^2 (eps), 1 (x0), b^2 (v). For an expert of one
state every weight is one constant, which Adam cancels. Objectives are given the variance-preserving state of a row, x /
sqrt(a^2 + b^2), and its coefficients: a^2 + b^2 = 1.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_tdisent.diffusion.spec import Part
from lightning_tdisent.diffusion.table import Coefficient, Table
from lightning_tdisent.errors import InputError


class Weight(Part, ABC):
    """Base class of weights on the x0 error, one per state."""

    @abstractmethod
    def on_raw(self, snr: Tensor, snr_below: Tensor, unit: Tensor) -> Tensor:
        """Return the weight on the raw output, in the shape of snr.

        snr: SNR of the rows. snr_below: SNR one row nearer to the data, same shape. unit: see `Objective.unit`, same
            shape.
        """


class Constant(Weight):
    """Weight 1 on the raw output of any objective; with eps the paper's loss ("simple", 2006.11239, eq. 14)."""

    def on_raw(self, snr: Tensor, snr_below: Tensor, unit: Tensor) -> Tensor:
        """Return 1."""
        return torch.ones_like(snr)


class MinSNR(Weight):
    """Weight min(SNR, gamma) on the x0 error (2303.09556, eq. 7).

    gamma: largest weight, above 0; raises InputError otherwise.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        if gamma <= 0:
            raise InputError(f"gamma must be positive, got {gamma}")
        self.gamma = gamma

    def on_raw(self, snr: Tensor, snr_below: Tensor, unit: Tensor) -> Tensor:
        """Return min(SNR, gamma) unit."""
        return snr.clamp_max(self.gamma) * unit


class P2(Weight):
    """Weight 1/(k + SNR)^gamma on the eps error, so SNR/(k + SNR)^gamma on x0 (2204.00227, eq. 8).

    k: offset of the SNR, above 0; raises InputError otherwise. gamma: exponent; 0 weights the eps error alike.
    """

    def __init__(self, k: float = 1.0, gamma: float = 1.0) -> None:
        if k <= 0:
            raise InputError(f"k must be positive, got {k}")
        self.k, self.gamma = k, gamma

    def on_raw(self, snr: Tensor, snr_below: Tensor, unit: Tensor) -> Tensor:
        """Return SNR/(k + SNR)^gamma unit."""
        return snr / (self.k + snr) ** self.gamma * unit


class Likelihood(Weight):
    """Weight (SNR(s-1) - SNR(s))/2 on the summed x0 error: the terms of the variational bound (2107.00630, eq. 13).

    Row 1 follows the data, whose SNR is infinite: a Gaussian decoder of variance b_1^2 gives (SNR(1) + 1)/2 there.
    """

    def on_raw(self, snr: Tensor, snr_below: Tensor, unit: Tensor) -> Tensor:
        """Return (SNR(s-1) - SNR(s))/2 unit."""
        return torch.where(snr_below.isinf(), snr + 1, snr_below - snr) / 2 * unit


class Objective(Part, ABC):
    """Base class of objectives: what the raw output predicts; ``prediction`` is eps, x0 or v.

    weight: weight of every state; `Constant` if not given.
    """

    prediction: str

    def __init__(self, weight: Weight | None = None) -> None:
        self.weight = weight or Constant()

    @abstractmethod
    def target(self, x0: Tensor, eps: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return the target of the raw output, in the shape of x0."""

    @abstractmethod
    def unit(self, snr: Tensor) -> Tensor:
        """Return |x0 error|^2 / |raw error|^2 per state."""

    @abstractmethod
    def x0(self, raw: Tensor, x: Tensor, a: Coefficient, b: Coefficient) -> Tensor:
        """Return x0_hat from the raw output at x: the inverse of `target`."""

    def weights(self, states: Table) -> Tensor:
        """Return the weights of rows 0..S on the raw output, (S+1, K) float64.

        The weight is 0 in row 0 and for entries that are not learned. Raises InputError for a weight that is not
        finite.
        """
        snr = states.log_snr.exp()
        table = self.weight.on_raw(snr[1:], snr[:-1], self.unit(snr[1:]))
        table = table.where(states.learned[1:], 0.0)
        if not table.isfinite().all():
            s = int((~table.isfinite()).any(1).nonzero()[0]) + 1
            raise InputError(
                f"{type(self.weight).__name__} weight of {type(self).__name__} is not finite at row {s} "
                f"(SNR {snr[s].tolist()}); use the Constant weight or another schedule"
            )
        if states.observation is not None:
            table[:, states.image_columns :] *= states.observation.weight
        return torch.cat([torch.zeros_like(table[:1]), table])

    def check(self, states: Table) -> None:
        """Raise InputError for a table with rows at which x0 cannot be computed from this prediction."""


class Eps(Objective):
    """Predict the noise eps (the paper's choice)."""

    prediction = "eps"

    def target(self, x0: Tensor, eps: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return eps."""
        return eps

    def x0(self, raw: Tensor, x: Tensor, a: Coefficient, b: Coefficient) -> Tensor:
        """Return (x - b eps) / a."""
        return (x - b * raw) / a

    def unit(self, snr: Tensor) -> Tensor:
        """Return b^2/a^2."""
        return 1 / snr

    def check(self, states: Table) -> None:
        """Raise InputError for zero terminal SNR: x0 = (x - b eps)/a divides by a = 0."""
        if bool((states.log_snr.isneginf() & states.learned).any()):
            raise InputError(
                f"objective Eps cannot be used with zero terminal SNR ({states.schedule!r}): at row {states.S} the "
                "signal is 0 and x0 cannot be recovered from eps. Use objective V or X0, or a table that ends with "
                "some signal"
            )


class X0(Objective):
    """Predict the clean image x_0."""

    prediction = "x0"

    def target(self, x0: Tensor, eps: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return x0."""
        return x0

    def x0(self, raw: Tensor, x: Tensor, a: Coefficient, b: Coefficient) -> Tensor:
        """Return the raw output."""
        return raw

    def unit(self, snr: Tensor) -> Tensor:
        """Return 1."""
        return torch.ones_like(snr)


class V(Objective):
    """Predict v = a eps - b x_0 (2202.00512, app. D): well scaled at every state, hence the default."""

    prediction = "v"

    def target(self, x0: Tensor, eps: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return a eps - b x0."""
        return a.to(x0.dtype) * eps - b.to(x0.dtype) * x0

    def x0(self, raw: Tensor, x: Tensor, a: Coefficient, b: Coefficient) -> Tensor:
        """Return a x - b v."""
        return a * x - b * raw

    def unit(self, snr: Tensor) -> Tensor:
        """Return b^2."""
        return 1 / (1 + snr)
