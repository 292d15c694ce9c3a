"""Frechet distance (1706.08500); in Inception's features, FID."""

from lightning_tdisent.metrics.accumulators import FeatureMoments
from lightning_tdisent.metrics.distances import Moments, frechet, frechet_bias
from lightning_tdisent.metrics.metric import Column, SetMetric
from lightning_tdisent.metrics.reference import Reference


class FrechetDistance(SetMetric):
    """Fréchet distance of the Gaussians of generated and real features (`frechet`), with its bias for n images."""

    name = "fd"
    accumulator = FeatureMoments
    columns = (Column("fd", "Frechet distance", "lower", inception="fid", distance=True, parts=("bias",)),)

    def compute(self, real: Reference, fake: Moments) -> dict[str, float]:
        """Return the distance."""
        return {"fd": frechet(real.moments, fake)}

    def bias(self, real: Reference, n: int) -> float | None:
        """Return the distance that a perfect model would reach with n images."""
        return frechet_bias(real.moments.covariance, n, real.moments.n)
