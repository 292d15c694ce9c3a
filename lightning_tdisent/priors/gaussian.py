"""Gaussians fitted in closed form: the variance of the noise is added analytically, no noise is sampled."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_tdisent.diffusion.rng import seed_noise
from lightning_tdisent.errors import InputError
from lightning_tdisent.priors.prior import LOG_2PI, Prior, normal_log_prob, refuse_numbers, refuse_shape

LARGEST = 4096  # maximum number of values of x whose full covariance is diagonalised
FLOOR = 1e-6  # minimum variance; for data in [-1, 1] the square of an eighth of a grey level


class Gaussian(Prior):
    """N(a m, a^2 C + b^2 I), m and C of the clean data: the maximum of the likelihood among Gaussians (2206.05173).

    rank: number of principal components with individual variances; all others share one variance, their mean. low:
    only the lowest low x low frequencies (DCT-II) of all channels are correlated; every other frequency is independent
    with an individual variance. With neither, the full covariance is used, for up to 4096 values; larger images need
    one of the two.
    """

    mean: Tensor
    basis: Tensor  # (D, m) orthonormal columns, with variances (m,)
    variances: Tensor
    rest: Tensor  # variance outside the basis: one value, or one per frequency

    def __init__(self, shape: Sequence[int] | None = None, rank: int | None = None, low: int | None = None) -> None:
        super().__init__(shape)
        if rank is not None and low is not None:
            raise InputError("prior Gaussian: rank and low both reduce the number of parameters; give only one")
        refuse_numbers(type(self).__name__, **{k: v for k, v in (("rank", rank), ("low", low)) if v is not None})
        self.rank, self.low = rank, low
        for name in ("mean", "basis", "variances", "rest"):
            self.register_buffer(name, torch.empty(0, dtype=torch.float64))

    def fit(self, x0: Tensor, a: float, b: float, eps: Tensor | None = None) -> list[str]:
        """See the class.

        Variances below 1e-6 (a singular covariance) are raised to 1e-6; a note in the result says how many.
        """
        super().fit(x0, a, b, eps)
        refuse_shape(x0, 2, "prior Gaussian")
        flat = x0.flatten(1).double()
        mean = flat.mean(0)
        clean = self._to_coordinates(flat - mean)
        chosen = self._correlated(clean.shape[1])
        wanted = min(self.rank or len(chosen), len(chosen))
        basis, found = _principal(clean[:, chosen], wanted)
        if self.low is not None:
            rest = clean.square().mean(0)
            none_left = chosen
        else:
            left = self.size - basis.shape[1]
            rest = (clean.square().mean(0).sum() - found.sum()).clamp_min(0)[None] / max(1, left)
            none_left = torch.arange(int(left == 0))
        self.mean = a * mean
        self.basis = torch.zeros(self.size, basis.shape[1], dtype=torch.float64)
        self.basis[chosen] = basis
        self.variances, self.rest = a * a * found + b * b, a * a * rest + b * b
        self.rest[none_left] = 1.0  # used by no coordinate
        low = int((self.variances < FLOOR).sum()) + int((self.rest < FLOOR).sum())
        self.variances.clamp_(min=FLOOR)
        self.rest.clamp_(min=FLOOR)
        notes = [f"singular covariance: {low} variances below {FLOOR:g} were raised to it"] if low else []
        if len(flat) - 1 < wanted:
            notes.append(
                f"{len(flat):,} images for {wanted:,} directions: their covariance has rank {len(flat) - 1:,} at most, "
                "and no information on the other directions; use more images, or a smaller rank or low"
            )
        return notes

    def _correlated(self, size: int) -> Tensor:
        """Return the indices of the coordinates that are modelled as correlated."""
        if self.low is None:
            if self.rank is None and size > LARGEST:
                raise InputError(
                    f"prior Gaussian: the covariance of {size:,} values has {size * size:,} numbers; set rank (e.g. "
                    "256), or low, the number of correlated frequencies per side (e.g. 8)"
                )
            return torch.arange(size)
        C, H, W = self.shape or (0, 0, 0)
        low = torch.zeros(C, H, W, dtype=torch.bool)
        low[:, : self.low, : self.low] = True
        if int(low.sum()) > LARGEST:
            raise InputError(f"prior Gaussian: low {self.low} has {int(low.sum()):,} frequencies, at most {LARGEST:,}")
        return low.flatten().nonzero()[:, 0]

    def _to_coordinates(self, x: Tensor) -> Tensor:
        """Transform flat x (B, D) to the coordinates in which it is modelled (orthonormal)."""
        return x if self.low is None else self._dct(x, inverse=False)

    def _from_coordinates(self, y: Tensor) -> Tensor:
        return y if self.low is None else self._dct(y, inverse=True)

    def _dct(self, x: Tensor, inverse: bool) -> Tensor:
        assert self.shape is not None
        rows, columns = (_dct_matrix(side) for side in self.shape[1:])
        if inverse:
            rows, columns = rows.T, columns.T
        images: Tensor = x.unflatten(1, self.shape)
        return (rows @ images @ columns.T).flatten(1)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coordinates (B, m) in the basis, and the log-density (B,) of the part outside the basis."""
        y = self._to_coordinates(x.flatten(1).double() - self.mean)
        inside = y @ self.basis
        if self.low is not None:
            outside = torch.ones(self.size, dtype=torch.bool)
            outside[self._correlated(self.size)] = False
            return inside, normal_log_prob(y[:, outside], self.rest[outside])
        left = self.size - self.basis.shape[1]
        square = (y.square().sum(1) - inside.square().sum(1)).clamp_min(0)
        return inside, -0.5 * (square / self.rest + left * (self.rest.log() + LOG_2PI))

    def log_prob(self, x: Tensor) -> Tensor:
        """See the class."""
        inside, outside = self._split(x)
        return normal_log_prob(inside, self.variances) + outside

    def sample(self, seeds: Sequence[int], stream: int) -> Tensor:
        """Return mean + C^(1/2) z with the noise z of the full chain.

        So a seed selects the same noise, and a corresponding image, with every prior.
        """
        assert self.shape is not None
        z = self._to_coordinates(seed_noise(seeds, stream, self.shape).flatten(1).double())
        inside = z @ self.basis
        outside = (z - inside @ self.basis.T) * self.rest.sqrt()
        return self._to_image(self._from_normal(inside, seeds, stream), outside)

    def _from_normal(self, z: Tensor, seeds: Sequence[int], stream: int) -> Tensor:
        return z * self.variances.sqrt()

    def _to_image(self, inside: Tensor, outside: Tensor) -> Tensor:
        x = self._from_coordinates(outside + inside @ self.basis.T) + self.mean
        images: Tensor = x.unflatten(1, self.shape or ())
        return images.float()


def _principal(x: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return orthonormal principal directions (d, m) of centred x (N, d) and their variances, largest first."""
    n, d = x.shape
    most = min(most, d)
    if d <= max(LARGEST, n):
        values, vectors = torch.linalg.eigh(x.T @ x / n)
        return vectors.flip(1)[:, :most].contiguous(), values.flip(0)[:most].clamp_min(0)
    gram, left = torch.linalg.eigh(x @ x.T / n)  # at most as many directions as samples
    keep = min(most, int((gram > 1e-10 * gram[-1]).sum()))
    gram, left = gram.flip(0)[:keep], left.flip(1)[:, :keep]
    return x.T @ left / (gram * n).sqrt(), gram


def _dct_matrix(n: int) -> Tensor:
    """Return the orthonormal DCT-II matrix (n, n): row k is sqrt((2 - [k=0])/n) cos(pi k (2 i + 1)/(2 n))."""
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    out = (math.pi * k * (2 * i + 1) / (2 * n)).cos() * math.sqrt(2 / n)
    out[0] /= math.sqrt(2)
    return out
