"""Mixtures of Gaussians on principal components, optionally with a Dirichlet process that drops unused components."""

import math
import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_tdisent.diffusion.rng import seed_noise
from lightning_tdisent.errors import InputError, Unavailable
from lightning_tdisent.priors.gaussian import FLOOR, LARGEST, Gaussian
from lightning_tdisent.priors.prior import LOG_2PI, refuse_numbers, refuse_shape

CHOICE = 1 << 21  # offset of the random streams that draw a sample's component, apart from those of its noise
DROPPED = 1e-4  # components of at most this weight are dropped


class Mixture(Gaussian):
    """A mixture of Gaussians along the first principal components of the data, a Gaussian along the others.

    Fitted to noisy samples by scikit-learn: EM, or its variational form with a Dirichlet process over the weights
    (`BayesianGaussianMixture`), the auxiliary of 2206.05173 for MNIST.

    components: maximum number of components, or the number fitted without ``dirichlet``; dimension: number of
    principal components that the mixture models, all others are independent Gaussians; dirichlet: use the variational
    form; covariance: ``full`` or ``diag``; iterations: maximum; draws: noisy samples per image; seed: seed of the
    initial guess and of the further noisy samples.
    """

    wants_noise = True
    weights: Tensor
    means: Tensor
    factors: Tensor  # Cholesky factors of the covariances

    def __init__(
        self,
        shape: Sequence[int] | None = None,
        components: int = 20,
        dimension: int = 32,
        dirichlet: bool = True,
        covariance: Literal["full", "diag"] = "full",
        iterations: int = 200,
        draws: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.components, self.dimension, self.dirichlet, self.covariance = components, dimension, dirichlet, covariance
        self.iterations, self.draws, self.seed = iterations, draws, seed
        refuse_numbers("Mixture", components=components, dimension=dimension, iterations=iterations, draws=draws)
        if covariance not in ("full", "diag") or not isinstance(seed, int) or seed < 0:
            raise InputError(
                f"prior Mixture: covariance {covariance!r} must be full or diag, seed {seed!r} an integer >= 0"
            )
        for name in ("weights", "means", "factors"):
            self.register_buffer(name, torch.empty(0, dtype=torch.float64))

    def fit(self, x0: Tensor, a: float, b: float, eps: Tensor | None = None) -> list[str]:
        """See the class.

        Raises InputError for too few images: at least ``components`` (p + 1) are needed with full covariances, where p
        is the lesser of ``dimension`` and D, and 2 ``components`` with diagonal ones. Raises Unavailable without
        scikit-learn.
        """
        try:
            from sklearn import exceptions
            from sklearn.mixture import BayesianGaussianMixture, GaussianMixture
        except ImportError:
            raise Unavailable("prior Mixture needs scikit-learn: pip install 'lightning_tdisent[prior]'") from None
        D = math.prod(x0.shape[1:])
        p = min(self.dimension, D)
        least = self.components * (p + 1 if self.covariance == "full" else 2)
        refuse_shape(x0, least, f"prior Mixture of {self.components} components in {p} dimensions")
        self.rank = None if D <= LARGEST else p
        notes = super().fit(x0, a, b)
        generator = torch.Generator().manual_seed(self.seed)
        noises = [eps] if eps is not None else []
        noises += [torch.randn(x0.shape, generator=generator) for _ in range(self.draws - len(noises))]
        points = torch.cat([self._split(a * x0 + b * e)[0][:, :p] for e in noises])
        common = {
            "n_components": self.components, "covariance_type": self.covariance, "max_iter": self.iterations,
            "random_state": self.seed, "reg_covar": 1e-6,
        }  # fmt: skip
        mixture = (
            BayesianGaussianMixture(weight_concentration_prior_type="dirichlet_process", **common)
            if self.dirichlet
            else GaussianMixture(**common)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", exceptions.ConvergenceWarning)
            mixture.fit(points.numpy())
        if not mixture.converged_:
            notes.append(f"the mixture has not converged in {self.iterations} iterations")
        weights = torch.as_tensor(mixture.weights_, dtype=torch.float64)
        kept = weights > DROPPED
        self.weights = weights[kept] / weights[kept].sum()
        self.means = torch.as_tensor(mixture.means_, dtype=torch.float64)[kept]
        found = torch.as_tensor(mixture.covariances_, dtype=torch.float64)[kept]
        values, vectors = torch.linalg.eigh(found if self.covariance == "full" else torch.diag_embed(found))
        floor = max(0.5 * b * b, FLOOR)  # the noise alone has variance b^2; a single component may be narrower
        if narrow := int((values.min(1).values < floor).sum()):
            notes.append(f"{narrow} components collapsed to few samples; variances were raised to half the noise's")
        wide = vectors * values.clamp_min(floor)[:, None] @ vectors.mT
        self.factors = torch.linalg.cholesky(wide)
        notes.append(f"{int(kept.sum())} of {self.components} components have weights above {DROPPED:g}")
        return notes

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log sum_k w_k N(c; m_k, C_k) of the first components c, plus the log-density of the others."""
        inside, outside = self._split(x)
        p = self.means.shape[1]
        c = inside[:, :p] - self.means[:, None]  # (k, B, p)
        z = torch.linalg.solve_triangular(self.factors, c.mT, upper=False)
        log_det = self.factors.diagonal(dim1=1, dim2=2).log().sum(1)
        each = self.weights.log()[:, None] - 0.5 * z.square().sum(1) - log_det[:, None] - 0.5 * p * LOG_2PI
        others, v = inside[:, p:], self.variances[p:]
        total: Tensor = each.logsumexp(0) - 0.5 * (others.square() / v + v.log() + LOG_2PI).sum(1) + outside
        return total

    def _from_normal(self, z: Tensor, seeds: Sequence[int], stream: int) -> Tensor:
        p = self.means.shape[1]
        u = torch.special.ndtr(seed_noise(seeds, CHOICE + stream, [1])[:, 0].double())
        k = torch.searchsorted(self.weights.cumsum(0), u).clamp_max(len(self.weights) - 1)
        chosen = self.means[k] + (self.factors[k] @ z[:, :p, None])[..., 0]
        return torch.cat([chosen, z[:, p:] * self.variances[p:].sqrt()], 1)
