"""Inception Score (1606.03498), in the classes of any feature network that has some."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_tdisent.errors import InputError
from lightning_tdisent.metrics.accumulators import Accumulator
from lightning_tdisent.metrics.metric import Column, SetMetric
from lightning_tdisent.metrics.reference import Reference

if TYPE_CHECKING:
    from lightning_tdisent.metrics.protocol import Protocol


class Scores(Accumulator):
    """The score of each part of the images, from float64 sums: the order of images makes no difference.

    width: number of classes; expected: n, number of images; parts: number of parts; seed: of the permutation of image
    numbers that makes the parts, as in torch-fidelity; None takes the numbers in order.
    """

    count: Tensor
    p: Tensor
    plogp: Tensor
    part: Tensor

    def __init__(self, width: int, expected: int, parts: int = 1, seed: int | None = 2020) -> None:
        super().__init__(width, expected)
        n = expected
        order = np.arange(n) if seed is None else np.random.RandomState(seed).permutation(n)
        part = np.empty(n, np.int64)
        for k in range(parts):
            part[order[k * n // parts : (k + 1) * n // parts]] = k
        self.register_buffer("part", torch.from_numpy(part), persistent=False)
        self.add_state("count", torch.zeros(parts, dtype=torch.float64), "sum")
        self.add_state("p", torch.zeros(parts, width, dtype=torch.float64), "sum")
        self.add_state("plogp", torch.zeros(parts, dtype=torch.float64), "sum")

    def update(self, values: Tensor, numbers: Tensor) -> None:
        """Add logits (B, classes) of the images with these numbers, int64 (B,) in 0..n-1."""
        part = self.part[numbers]
        log_p = values.double().log_softmax(1)
        p = log_p.exp()
        self.count.index_add_(0, part, torch.ones_like(p[:, 0]))
        self.p.index_add_(0, part, p)
        self.plogp.index_add_(0, part, (p * log_p).sum(1))

    def compute(self) -> Tensor:
        """Return the score of each part, float64 (parts,); raises InputError if a logit is NaN or infinite."""
        self.check_count(n := int(self.count.sum()))
        if not self.plogp.isfinite().all():
            raise InputError(f"the logits of some of {n} images are NaN or infinite")
        mean = self.p / self.count[:, None]
        return (self.plogp / self.count - torch.xlogy(mean, mean).sum(1)).exp()


class InceptionScore(SetMetric):
    """Inception Score: exp E KL(p(y|x) || p(y)), mean and standard deviation over parts of the images.

    score_splits: number of parts, made by a permutation of the image numbers; score_seed: seed of the permutation;
    score_part: number of images of a part instead, in the order of their numbers.
    """

    name = "is"
    needs = "logits"
    accumulator = Scores
    in_every_hash = True
    columns = (Column("is", "Inception Score", "higher", parts=("std",)),)

    def __init__(self, score_splits: int = 1, score_part: int | None = None, score_seed: int = 2020) -> None:
        self.score_splits, self.score_part, self.score_seed = score_splits, score_part, score_seed

    def check(self, protocol: "Protocol") -> None:
        """Refuse more parts than images."""
        if not 1 <= self.score_splits <= protocol.n:
            raise InputError(f"score_splits: 1 to n = {protocol.n}, got {self.score_splits}")

    def fitted(self, n: int) -> "InceptionScore":
        """Return the score with one part if one of several would have fewer than ten images."""
        return InceptionScore(self.score_splits if n >= 10 * self.score_splits else 1, self.score_part, self.score_seed)

    def options(self, n: int) -> dict[str, Any]:
        """Return the number of parts, and the seed that makes them."""
        if self.score_part:
            return {"parts": -(-n // self.score_part), "seed": None}
        return {"parts": self.score_splits, "seed": self.score_seed}

    def compute(self, real: Reference, fake: Tensor) -> dict[str, float]:
        """Return the mean of the parts' scores, and, for several parts, their standard deviation."""
        scores = fake.view(-1)  # torchmetrics returns a single one as a scalar
        out = {"is": float(scores.mean()), "is_std": float(scores.std(correction=0))}
        return out if len(scores) > 1 else {"is": out["is"]}
