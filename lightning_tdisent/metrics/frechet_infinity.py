"""Frechet distance extrapolated to infinitely many generated images (1911.07023)."""

from torch import Tensor

from lightning_tdisent.errors import InputError
from lightning_tdisent.metrics.accumulators import FeatureList
from lightning_tdisent.metrics.distances import frechet_infinity
from lightning_tdisent.metrics.metric import Column, SetMetric
from lightning_tdisent.metrics.reference import Reference

HALVES = "of a permutation"


class FrechetInfinity(SetMetric):
    """Fréchet distance at infinitely many images (`frechet_infinity`), with the ends of its 95 % interval.

    halves: records how the images are halved.
    """

    name = "fd_infinity"
    accumulator = FeatureList
    columns = (
        Column(
            "fd_infinity", "Frechet distance of infinitely many images", "lower", inception="fid_infinity",
            distance=True, parts=("low", "high"),
        ),
    )  # fmt: skip

    def __init__(self, halves: str = HALVES) -> None:
        if halves != HALVES:
            raise InputError(f"halves: only {HALVES!r} is possible, got {halves!r}")
        self.halves = halves

    def least(self, width: int) -> int:
        """Return ten images per feature: with fewer, the bias is not yet inverse to n."""
        return 10 * width

    def compute(self, real: Reference, fake: Tensor) -> dict[str, float]:
        """Return the extrapolated distance and its interval."""
        value, error = frechet_infinity(real.moments, fake)
        low, high = value - 1.96 * error, value + 1.96 * error
        return {"fd_infinity": value, "fd_infinity_low": low, "fd_infinity_high": high}
