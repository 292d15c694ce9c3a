"""Consistency of generated images with their observations."""

from torch import Tensor

from lightning_tdisent.images import GREY_LEVELS
from lightning_tdisent.metrics.metric import Column, Pair, PairedMetric


class Consistency(PairedMetric):
    """Root of the mean of (A(x) - y)^2 over images, channels and pixels, in grey levels.

    y is as stored: if rounded to uint8, even originals have about 0.3, and the mid-grey of a hole counts 0.5.
    """

    name = "consistency"
    asked_by = "computed for every conditional model"
    columns = (Column("consistency", "root mean square of A(x) - y, grey levels", "lower", with_features=False),)

    def of_images(self, pair: Pair) -> Tensor:
        """Return the mean square of each image, float64 (B,)."""
        return (GREY_LEVELS * (pair.observed - pair.observations)).square().flatten(1).mean(1)

    def finish(self, mean: float) -> float:
        """Return the root."""
        return float(mean**0.5)
