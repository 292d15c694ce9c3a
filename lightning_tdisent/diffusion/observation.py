"""The observation y of a conditional model: an extra column of the table (2207.09786, section 4)."""

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_tdisent.diffusion.operators import Operator
from lightning_tdisent.diffusion.schedules import Geometric, NoiseSchedule
from lightning_tdisent.diffusion.spec import Part, spec
from lightning_tdisent.errors import InputError


class Observation(Part):
    """An observation y of an image, which diffuses along its own curve.

    operator: computes y from an image.
    schedule: the curve of y over the same T levels. Without one y is free of noise (the estimator CDE); the image's own
        schedule makes CDiffE, a slower one CMDE (2207.09786, section 4).
    draw: how a sampler draws y at a row: ``fresh`` draws a y_0 + b eps at each row independently, ``bridge`` one path
        from q(y_r | y_s, y_0).
    weight: factor of the observation's part of the loss, at least 0. With 0 only the image is trained, and the mean is
        over the image alone.
    anneal: number of training steps over which the largest sigma of y falls to that of ``schedule`` (a `Geometric`),
        linearly in 1/sigma (VS-CMDE).
    anneal_from: sigma at which it starts, above 0; the image's largest sigma if not given.

    Raises InputError for values outside these ranges.
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
            raise InputError(f"observation.draw: choose fresh or bridge, got {draw!r}")
        if not 0 <= weight < math.inf:
            raise InputError(f"observation.weight: must be at least 0 and finite, got {weight}")
        if anneal < 0:
            raise InputError(f"observation.anneal: must be a number of steps, at least 0, got {anneal}")
        if anneal and not isinstance(schedule, Geometric):
            raise InputError(
                f"observation.anneal: {anneal} steps require observation.schedule: Geometric, it is {schedule!r}"
            )
        if anneal_from is not None and not 0 < anneal_from < math.inf:
            raise InputError(f"observation.anneal_from: must be a sigma above 0, got {anneal_from}")
        self.operator, self.schedule, self.draw, self.weight = operator, schedule, draw, weight
        self.anneal, self.anneal_from = anneal, anneal_from
        spec(operator)  # records the digests of the operator's files now, while they have the content that it read

    def channels(self, channels: int) -> int:
        """Return the number of channels of y for an image with ``channels`` channels."""
        return self.operator.channels(channels)

    def append(self, x0: Tensor, item: Tensor | None) -> Tensor:
        """Return images x_0 (B, C, H, W) followed by the channels of y.

        item: int64 (B,), item numbers of the images. Raises InputError if it is None.
        """
        if item is None:
            raise InputError("an observation depends on the item number of its image: pass item, one per image")
        return torch.cat([x0, self.operator.observe(x0, item.to(x0.device))], 1)

    def log_snr(self, table: Tensor, index: Tensor, T: int, sigma_max: float | None = None) -> Tensor:
        """Return the log-SNR of y as a column (S+1, 1); -inf where that of the image is.

        table: log-SNR of the image, (S+1, K).
        index: int64 (S+1,), positions of the rows in the chain.
        T: number of levels of the chain; raises InputError if that of the observation's schedule differs.
        sigma_max: overrides the largest sigma of a `Geometric` schedule.
        """
        curve = self.schedule
        if curve is None:
            y = torch.full((len(index),), math.inf, dtype=torch.float64)
        else:
            if curve.T != T:
                raise InputError(
                    f"observation.schedule has T={curve.T} levels, that of the image has {T}; make them equal"
                )
            if sigma_max is not None:
                assert isinstance(curve, Geometric)
                curve = Geometric(curve.T, curve.sigma_min, sigma_max)
            y = curve.log_snr().to(index.device)[index]
        return y[:, None].where(~table.isneginf(), -math.inf)

    def sigma_at(self, step: int, begin: float) -> float:
        """Return the largest sigma of y at training step ``step`` of `anneal`: linear in 1/sigma.

        begin: sigma at step 0 unless ``anneal_from`` was given.
        """
        assert isinstance(self.schedule, Geometric)
        begin = self.anneal_from if self.anneal_from is not None else begin
        return 1 / (1 / begin + step / self.anneal * (1 / self.schedule.sigma_max - 1 / begin))
