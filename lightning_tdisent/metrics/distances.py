"""Distances between two sets of features, as plain functions of tensors in float64.

docs/evaluation.md says for each why no library's implementation is used.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_tdisent.errors import InputError

CHUNK = 2048  # rows of a kernel or distance matrix in memory at a time
TIE = 1e-10  # relative to squared norms: squared distances that differ by less count as equal


class Moments(NamedTuple):
    """Sample count n, mean (d,) and covariance (d, d) with the divisor n - 1, float64."""

    n: int
    mean: Tensor
    covariance: Tensor

    def to(self, device: torch.device | str) -> "Moments":
        """Return the same on a device."""
        return Moments(self.n, self.mean.to(device), self.covariance.to(device))

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Return the moments of features (n, d); see `of_sums`."""
        f = features.double()
        shift = f[:1].sum(0)
        centred = f - shift
        return cls.of_sums(*(part[None] for part in (f.new_tensor(len(f)), shift, centred.sum(0), centred.T @ centred)))

    @classmethod
    def of_sums(cls, counts: Tensor, shifts: Tensor, totals: Tensor, outers: Tensor) -> "Moments":
        """Return the moments of all R parts (Chan et al. 1979): part r has n_r features and a shift z_r near them.

        counts: n_r (R,); shifts: z_r (R, d); totals: sums of f - z_r (R, d); outers: sums of (f - z_r)(f - z_r)^T
        (R, d, d). Raw sums would lose digits by cancellation if means are large compared with deviations. Raises
        InputError for fewer than two features, features that are not finite, and features that are all equal.
        """
        n, total = int(counts.sum()), totals.sum(0)
        if n < 2:
            raise InputError(f"at least two images are required, got {n}")
        if not (total.isfinite().all() and outers.isfinite().all()):
            bad = int((~total.isfinite()).sum())
            raise InputError(f"{bad} of {len(total)} features are NaN or infinite in at least one of {n} images")
        origin = shifts[int(counts.argmax())]  # the shift of a part that has features
        centres = totals / counts.clamp_min(1)[:, None]  # mean of each part, relative to its shift
        off = torch.where(counts[:, None] > 0, shifts - origin + centres, 0.0)
        centre = counts @ off / n
        between = (counts[:, None] * (off - centre)).T @ (off - centre)
        within = outers.sum(0) - (counts[:, None] * centres).T @ centres
        mean, covariance = origin + centre, (within + between) / (n - 1)
        # float32 leaves relative errors of up to 3e-7 in features of equal images
        if bool((covariance.diagonal() <= 1e-13 * mean.square()).all()):
            raise InputError(f"all {n} images are the same to the feature network: images or network are constant")
        return cls(n, mean, covariance)


def frechet(one: Moments, two: Moments) -> float:
    """Return |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^{1/2} (1706.08500, eq. 6), without a matrix square root.

    tr (C1 C2)^{1/2} is the sum of the square roots of the eigenvalues of L^T C2 L, which is symmetric, C1 = L L^T. If a
    covariance does not have full rank, it is computed as the sum of singular values of F2^T F1, C = F F^T: squaring
    would leave an error of 1e-8 in each direction without variance.
    """
    d = len(one.mean)
    squared = (one.mean - two.mean).square().sum() + one.covariance.trace() + two.covariance.trace()
    trace = _trace_by_cholesky(one.covariance, two.covariance) if min(one.n, two.n) > d else None
    if trace is None:
        trace = torch.linalg.svdvals(_factor(two.covariance).T @ _factor(one.covariance)).sum()
    return float(squared - 2 * trace)


def _trace_by_cholesky(one: Tensor, two: Tensor) -> Tensor | None:
    lower, info = torch.linalg.cholesky_ex(one)
    if int(info):
        return None
    eigenvalues = torch.linalg.eigvalsh(_sandwich(lower, two))
    low, high = float(eigenvalues[0]), float(eigenvalues[-1])
    return eigenvalues.sqrt().sum() if low > 1e-13 * high else None


def _sandwich(lower: Tensor, c: Tensor) -> Tensor:
    """Return L^T C L, lower triangle only (the rest is not filled in), by 10 of 16 products of halves."""
    h = len(c) // 2
    a, b, d = lower[:h, :h], lower[h:, :h], lower[h:, h:]
    left, right = c @ lower[:, :h], c[:, h:] @ d
    out = torch.zeros_like(c)
    out[:h, :h] = a.T @ left[:h] + b.T @ left[h:]
    out[h:, :h] = d.T @ left[h:]
    out[h:, h:] = d.T @ right[h:]
    return out


def _factor(c: Tensor) -> Tensor:
    """Return F (d, rank) with F F^T = C."""
    values, vectors = torch.linalg.eigh(c)
    kept = values > len(c) * torch.finfo(c.dtype).eps * values[-1]
    root: Tensor = vectors[:, kept] * values[kept].sqrt()
    return root


HALVES = 2020  # seed of the permutation into halves, by RandomState, whose numbers numpy promises never to change


def frechet_infinity(real: Moments, features: Tensor) -> tuple[float, float]:
    """Return the Frechet distance extrapolated to infinitely many images, and its standard error (1911.07023).

    The bias for n images is close to b/n: the estimate is the value at 1/n = 0 of the line through the distance of all
    images and the mean distance of their halves. The halves are made by a fixed permutation, since images may be sorted
    by class. The error is that of the distance itself to first order: the standard deviation of its influence function
    over sqrt(n). features: (n, d); raises InputError for n < 10 d, where the bias is not yet b/n. The bias of a finite
    reference remains.
    """
    n, d = features.shape
    if n < 10 * d:
        raise InputError(f"fd_infinity: {d} features need {10 * d:,} images at least, got {n:,}")
    f = features.double()
    order = torch.from_numpy(np.random.RandomState(HALVES).permutation(n)).to(f.device)
    fake, halves = Moments.of(f), [Moments.of(f[order[i::2]]) for i in range(2)]
    whole, half = frechet(real, fake), sum(frechet(real, part) for part in halves) / 2
    x, x_half = 1 / n, sum(1 / part.n for part in halves) / 2
    # d F / d C = 1 - A, A the optimal map of the one Gaussian to the other: A C A = C_real
    values, vectors = torch.linalg.eigh(fake.covariance)
    root = values.clamp_min(values[-1] * d * torch.finfo(values.dtype).eps).sqrt()
    inner = (vectors * root).T @ real.covariance @ (vectors * root)
    squares, axes = torch.linalg.eigh(inner)
    middle = (axes * squares.clamp_min(0).sqrt()) @ axes.T
    gradient = torch.eye(d).to(f) - (vectors / root) @ middle @ (vectors / root).T
    centred = f - fake.mean
    influence = 2 * centred @ (fake.mean - real.mean) + (centred @ gradient * centred).sum(1)
    return whole - x * (half - whole) / (x_half - x), float(influence.std() / n**0.5)


def frechet_bias(covariance: Tensor, n: int, n_real: int, seed: int = 0) -> float:
    """Return the mean of `frechet` over n and n_real draws of one Gaussian with this covariance, by simulation.

    A perfect model would reach this value. It is an estimate of the bias, since features are not Gaussian.
    """
    values = torch.linalg.eigvalsh(covariance).clamp_min(0)
    scale = values[values > len(values) * torch.finfo(values.dtype).eps * values[-1]].sqrt().cpu()
    rng = np.random.default_rng(seed)
    runs = max(1, 256 // len(scale))

    def draw(n: int) -> Moments:
        mean = torch.from_numpy(rng.standard_normal(len(scale))) * scale / n**0.5
        return Moments(n, mean, _wishart(n - 1, scale, rng))

    return max(0.0, sum(frechet(draw(n_real), draw(n)) for _ in range(runs)) / runs)


def _wishart(freedom: int, scale: Tensor, rng: np.random.Generator) -> Tensor:
    """Draw the covariance of freedom + 1 samples of N(0, diag(scale^2)), by Bartlett's triangle with rank columns."""
    rank = min(freedom, len(scale))
    lower = torch.from_numpy(rng.standard_normal((len(scale), rank))).tril(-1)
    lower[range(rank), range(rank)] = torch.from_numpy(rng.chisquare(np.arange(freedom, freedom - rank, -1))).sqrt()
    lower *= scale[:, None]
    return lower @ lower.T / freedom


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """Return the unbiased squared MMD with the kernel (x.y/d + 1)^3 over all pairs (1801.01401, section 4).

    It may be negative. It is the expectation of the usual mean over random subsets of 1,000, without random numbers.
    """

    def total(x: Tensor, y: Tensor) -> float:
        return sum((float(_kernel(rows, y).sum()) for rows in x.split(CHUNK)), 0.0)

    def within(x: Tensor) -> float:
        own = (x.square().sum(1) / x.shape[1] + 1).pow(3).sum()
        return (total(x, x) - float(own)) / (len(x) * (len(x) - 1))

    real, fake = _checked(real), _checked(fake)
    return within(real) + within(fake) - 2 * total(real, fake) / (len(real) * len(fake))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1).pow_(3)


def _checked(features: Tensor) -> Tensor:
    if len(features) < 2:
        raise InputError(f"at least two images are required, got {len(features)}")
    bad = int((~features.isfinite().all(1)).sum())
    if bad:
        raise InputError(f"features of {bad} of {len(features)} images are NaN or infinite")
    return features.double()


def neighbourhoods(features: Tensor, k: int) -> Tensor:
    """Return the distance of each of (n, d) features to its k-th nearest neighbour among the others, float64 (n,)."""
    if len(features) <= k:
        raise InputError(f"{k} neighbours: more than {k} images are needed, got {len(features)}")
    f = _checked(features)
    f = f - f.mean(0)  # large means would cost digits by cancellation
    return torch.cat([_squares(rows, f)[0].kthvalue(k + 1, dim=1).values for rows in f.split(CHUNK)]).sqrt()


def _squares(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return squared distances (n, m) of float64 features, and the differences up to which two of them are equal."""
    scale = x.square().sum(1)[:, None] + y.square().sum(1)
    return (scale - 2 * x @ y.T).clamp_min(0), TIE * scale


def precision_recall(real: Tensor, fake: Tensor, k: int) -> dict[str, float]:
    """Return improved precision and recall (1904.06991, eq. 1), density and coverage (2002.09797, eq. 5 and 6).

    real: (n, d); fake: (m, d). The ball around an image has the distance to its k-th neighbour in the same set as its
    radius. precision: share of fakes in the ball of a real image; recall: share of reals in the ball of a fake one;
    density: mean number of balls of reals that a fake lies in, over k; coverage: share of reals whose ball contains a
    fake. As in the authors' code, the balls of precision and recall are closed (distance <= radius) and those of
    density and coverage are open (distance < radius). A distance equals a radius if their squares differ by less than
    `TIE` times the squared norms (about the mean of the reals): the features of an image vary by about as much with its
    position in a batch.
    """
    reach, reach_fake = neighbourhoods(real, k).square(), neighbourhoods(fake, k).square()
    centre = real.double().mean(0)
    real, fake = real.double() - centre, fake.double() - centre
    inside, recalled = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    covered, precise = recalled.clone(), 0
    for rows, limits in zip(fake.split(CHUNK), reach_fake.split(CHUNK), strict=True):
        square, tie = _squares(rows, real)
        held = square < reach - tie
        precise += int((square <= reach + tie).any(1).sum())
        inside += int(held.sum())
        covered |= held.any(0)
        recalled |= (square <= limits[:, None] + tie).any(0)
    return {
        "precision": precise / len(fake),
        "recall": float(recalled.double().mean()),
        "density": inside / (k * len(fake)),
        "coverage": float(covered.double().mean()),
    }
