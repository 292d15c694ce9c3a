"""Frechet distance of spatial features (2103.03841); in Inception's, sFID."""

from lightning_tdisent.metrics.accumulators import FeatureMoments
from lightning_tdisent.metrics.distances import Moments, frechet
from lightning_tdisent.metrics.metric import Column, SetMetric
from lightning_tdisent.metrics.reference import Reference


class SpatialFrechetDistance(SetMetric):
    """Fréchet distance (`frechet`) of the Gaussians of features that keep their places in the image."""

    name = "sfd"
    needs = "spatial"
    accumulator = FeatureMoments
    columns = (Column("sfd", "Frechet distance of spatial features", "lower", inception="sfid", distance=True),)

    def compute(self, real: Reference, fake: Moments) -> dict[str, float]:
        """Return the distance."""
        assert real.spatial is not None  # measured for every protocol that needs it
        return {"sfd": frechet(real.spatial, fake)}
