"""The observation y of a conditional model: a column of the table beside those of the image (2207.09786, section 4)."""

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_tdisent.diffusion.operators import Operator
from lightning_tdisent.diffusion.schedules import Geometric, NoiseSchedule
from lightning_tdisent.diffusion.spec import Part, spec
from lightning_tdisent.errors import InputError


class Observation(Part):
    """An observation y of an image, which diffuses along a curve of its own.

    operator: computes y from an image. schedule: the curve of y over the same T levels; without one y is free of noise
    (the estimator CDE); the image's own schedule makes CDiffE, a slower one CMDE (2207.09786, section 4). draw: how a
    sampler draws y at a row: ``fresh``, a y_0 + b eps at each, or ``bridge``, one path of q(y_r | y_s, y_0). weight:
    factor of its part of the loss; 0 trains the image alone, with the mean over the image alone. anneal: number of
    training steps over which the largest sigma of y falls from ``anneal_from`` (the image's if not given) to that of
    ``schedule``, linearly in 1/sigma (VS-CMDE).
    """

    def __init__(
        self,
        operator: Operator,
        schedule: NoiseSchedule | None = None,
        draw: Literal["fresh", "bridge"] = "fresh",
        weight: float = 1.0,
        anneal: int = 0,
        anneal_from: float | None = None,
    ) -> None:
        if draw not in ("fresh", "bridge"):
            raise InputError(f"observation.draw: fresh or bridge, got {draw!r}")
        if not 0 <= weight < math.inf:
            raise InputError(f"observation.weight: 0 or above, got {weight}")
        if anneal < 0:
            raise InputError(f"observation.anneal: a number of steps, got {anneal}")
        if anneal and not isinstance(schedule, Geometric):
            raise InputError(
                f"observation.anneal: {anneal} steps require observation.schedule: Geometric, it is {schedule!r}"
            )
        if anneal_from is not None and not 0 < anneal_from < math.inf:
            raise InputError(f"observation.anneal_from: a sigma above 0, got {anneal_from}")
        self.operator, self.schedule, self.draw, self.weight = operator, schedule, draw, weight
        self.anneal, self.anneal_from = anneal, anneal_from
        spec(operator)  # takes the digests of its files while they are what it has read

    def channels(self, channels: int) -> int:
        """Return the number of channels of y for an image of so many."""
        return self.operator.channels(channels)

    def beside(self, x0: Tensor, item: Tensor | None) -> Tensor:
        """Return images x_0 (B, C, H, W) followed by the channels of y; item: int64 (B,), numbers of the images."""
        if item is None:
            raise InputError("what is observed of an image depends on its item number: give one for each")
        return torch.cat([x0, self.operator.observe(x0, item.to(x0.device))], 1)

    def log_snr(self, table: Tensor, index: Tensor, T: int, sigma_max: float | None = None) -> Tensor:
        """Return the column (S+1, 1) of y next to the image's (S+1, K), -inf where the image's component is.

        index: int64 (S+1,), rows of the chain of T levels; sigma_max: another largest sigma of a `Geometric` schedule.
        """
        curve = self.schedule
        if curve is None:
            y = torch.full((len(index),), math.inf, dtype=torch.float64)
        else:
            if curve.T != T:
                raise InputError(f"observation.schedule has T={curve.T} levels, the image's {T}; one clock")
            if sigma_max is not None:
                assert isinstance(curve, Geometric)
                curve = Geometric(curve.T, curve.sigma_min, sigma_max)
            y = curve.log_snr().to(index.device)[index]
        return y[:, None].where(~table.isneginf(), -math.inf)

    def sigma_at(self, step: int, begin: float) -> float:
        """Return the largest sigma of y at a training step of `anneal`: linear in 1/sigma from ``begin``."""
        assert isinstance(self.schedule, Geometric)
        begin = self.anneal_from if self.anneal_from is not None else begin
        return 1 / (1 / begin + step / self.anneal * (1 / self.schedule.sigma_max - 1 / begin))
