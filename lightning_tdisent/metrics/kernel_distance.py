"""Kernel distance (1801.01401); in Inception's features, KID."""

from torch import Tensor

from lightning_tdisent.metrics.accumulators import FeatureList
from lightning_tdisent.metrics.distances import kernel_distance
from lightning_tdisent.metrics.metric import Column, SetMetric
from lightning_tdisent.metrics.reference import Reference


class KernelDistance(SetMetric):
    """Kernel distance (KID) of generated features and the ``kept`` ones of the real images, see `kernel_distance`."""

    name = "kid"
    accumulator = FeatureList
    columns = (Column("kid", "kernel distance", "lower", distance=True),)

    def compute(self, real: Reference, fake: Tensor) -> dict[str, float]:
        """Return the distance."""
        return {"kid": kernel_distance(real.kept, fake)}
