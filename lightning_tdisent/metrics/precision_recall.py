"""Improved precision and recall (1904.06991), density and coverage (2002.09797)."""

from typing import TYPE_CHECKING

from torch import Tensor

from lightning_tdisent.errors import InputError
from lightning_tdisent.metrics.accumulators import FeatureList
from lightning_tdisent.metrics.distances import precision_recall
from lightning_tdisent.metrics.metric import Column, SetMetric
from lightning_tdisent.metrics.reference import Reference

if TYPE_CHECKING:
    from lightning_tdisent.metrics.protocol import Protocol

BALLS = "closed for precision and recall, open for density and coverage"


class PrecisionRecall(SetMetric):
    """Precision, recall, density and coverage (`precision_recall`) of generated and of ``kept`` real features.

    neighbours: k of the balls, which reach the k-th nearest neighbour; balls: records which of them are closed.
    """

    name = "prdc"
    accumulator = FeatureList
    in_every_hash = True
    columns = (
        Column("precision", "precision", "higher"),
        Column("recall", "recall", "higher"),
        Column("density", "density", "higher"),
        Column("coverage", "coverage", "higher"),
    )

    def __init__(self, neighbours: int = 3, balls: str = BALLS) -> None:
        if balls != BALLS:
            raise InputError(f"balls: only {BALLS!r} is possible, got {balls!r}")
        self.neighbours, self.balls = neighbours, balls

    def check(self, protocol: "Protocol") -> None:
        """Refuse a k that is not below every number of images."""
        if not 1 <= self.neighbours < min(protocol.n, protocol.n_real or protocol.n, protocol.kept):
            raise InputError(f"neighbours: 1 to below the number of images, {protocol.n}, got {self.neighbours}")

    def least(self, width: int) -> int:
        """Return k + 1."""
        return self.neighbours + 1

    def compute(self, real: Reference, fake: Tensor) -> dict[str, float]:
        """Return the four shares."""
        return precision_recall(real.kept, fake, self.neighbours)
