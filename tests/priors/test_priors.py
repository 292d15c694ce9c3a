import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal

from lightning_tdisent.diffusion.rng import seed_noise
from lightning_tdisent.errors import InputError
from lightning_tdisent.priors.gaussian import FLOOR, Gaussian
from lightning_tdisent.priors.mixture import Mixture
from lightning_tdisent.priors.prior import StandardNormal

A, B = 0.6, 0.8


def correlated(n, shape=(2, 3, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    D = math.prod(shape)
    mix = torch.randn(D, D, generator=generator) / D**0.5
    mean = torch.randn(D, generator=generator)
    return (torch.randn(n, D, generator=generator) @ mix.T + mean).unflatten(1, shape)


def of_noisy(x0):
    """Return the Gaussian with the moments of a x_0 + b eps, computed independently."""
    flat = x0.flatten(1).double()
    return MultivariateNormal(
        A * flat.mean(0), A * A * torch.cov(flat.T, correction=0) + B * B * torch.eye(flat.shape[1])
    )


def two(prior, x0, n=241, span=6.0):
    """Return the integral of a density of two values over a grid."""
    grid = torch.linspace(-span, span, n, dtype=torch.float64)
    x = torch.cartesian_prod(grid, grid)[:, None, None]
    return float(prior.log_prob(x).exp().sum() * (grid[1] - grid[0]) ** 2)


def test_the_standard_normal_is_the_noise_of_the_chain():
    prior = StandardNormal([1, 2, 2])
    x = prior.sample(range(5), 700)
    assert torch.equal(x, seed_noise(range(5), 700, [1, 2, 2]))
    normal = MultivariateNormal(torch.zeros(4), torch.eye(4))
    assert torch.allclose(prior.log_prob(x), normal.log_prob(x.flatten(1)).double())


@pytest.mark.parametrize("options", [{}, {"rank": 18}, {"low": 3}])
def test_the_full_covariance_is_that_of_the_data_and_the_noise(options):
    x0 = correlated(400)
    prior = Gaussian(**options)
    assert prior.fit(x0, A, B) == []
    x = correlated(50, seed=1)
    assert torch.allclose(prior.log_prob(x), of_noisy(x0).log_prob(x.flatten(1).double()), atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"rank": 4}, {"low": 2}])
def test_samples_have_the_moments_of_the_density_and_are_functions_of_seeds(options):
    prior = Gaussian(**options)
    prior.fit(correlated(400), A, B)
    x = prior.sample(range(40_000), 5).flatten(1).double()
    assert torch.equal(prior.sample([7, 3], 5), prior.sample(range(8), 5)[[7, 3]])
    assert not torch.equal(prior.sample([7], 5), prior.sample([7], 6))
    # the entropy, from the log-density and from the covariance of the samples
    said = -prior.log_prob(x.unflatten(1, (2, 3, 3))).mean()
    variances = torch.linalg.eigvalsh(torch.cov(x.T))
    assert float(said) == pytest.approx(float(0.5 * (variances.log() + 1 + math.log(2 * math.pi)).sum()), abs=0.05)
    assert torch.allclose(x.mean(0), prior.mean, atol=0.03)


def test_low_rank_keeps_the_largest_components_and_the_trace():
    x0 = correlated(400)
    prior = Gaussian(rank=5)
    prior.fit(x0, A, B)
    whole = torch.linalg.eigvalsh(of_noisy(x0).covariance_matrix)
    assert torch.allclose(prior.variances, whole.flip(0)[:5])
    assert float(prior.rest) == pytest.approx(float(whole[:13].mean()))


def test_low_frequencies_vary_together_and_the_others_alone():
    generator = torch.Generator().manual_seed(0)
    brightness = torch.randn(500, 1, 1, 1, generator=generator)
    x0 = (brightness + 0.1 * torch.randn(500, 3, 4, 4, generator=generator)).contiguous()
    prior = Gaussian(low=1)
    prior.fit(x0, A, B)
    assert prior.basis.shape == (48, 3)  # the mean of each channel
    assert float(prior.variances.max()) == pytest.approx(A * A * 48 * float(brightness.var()) + B * B, rel=0.05)
    full = Gaussian()
    full.fit(x0, A, B)
    test = (torch.randn(200, 1, 1, 1, generator=generator) + 0.1 * torch.randn(200, 3, 4, 4, generator=generator)) * A
    test = test + B * torch.randn(test.shape, generator=generator)
    assert float(prior.log_prob(test).mean()) > float(full.log_prob(test).mean())  # which has overfitted to noise


def test_large_images_need_fewer_numbers():
    x0 = torch.randn(6, 3, 40, 40)
    with pytest.raises(InputError, match=r"4,800 values has 23,040,000 numbers; set rank .* or low"):
        Gaussian().fit(x0, A, B)
    prior = Gaussian(rank=100)
    prior.fit(x0, A, B)
    assert prior.basis.shape == (4800, 5)  # the number of directions that six images span
    assert torch.allclose(prior.basis.T @ prior.basis, torch.eye(5, dtype=torch.float64), atol=1e-8)


def test_a_singular_covariance_is_raised_and_named():
    x0 = torch.zeros(10, 1, 2, 2)
    x0[:, 0, 0, 0] = torch.linspace(-1, 1, 10)
    prior = Gaussian()
    assert prior.fit(x0, 1.0, 0.0) == [f"singular covariance: 3 variances below {FLOOR:g} were raised to it"]
    assert prior.log_prob(x0).isfinite().all()
    assert prior.fit(x0, A, B) == []


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000), st.booleans(), st.sampled_from(["full", "diag"]))
def test_mixtures_integrate_to_one(seed, dirichlet, covariance):
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(3, 1, 1, 2, generator=generator)
    x0 = centres[torch.arange(90) % 3] + 0.3 * torch.randn(90, 1, 1, 2, generator=generator)
    prior = Mixture(components=5, dimension=2, dirichlet=dirichlet, covariance=covariance)
    prior.fit(x0, A, B)
    assert two(prior, x0, span=9) == pytest.approx(1, abs=1e-3)


def test_a_mixture_is_what_it_was_made_of():
    centres = torch.tensor([[-2.0, 0.0], [2.0, 1.0]])
    generator = torch.Generator().manual_seed(0)
    which = torch.arange(4000) % 4 == 0
    x0 = centres[which.long()][:, None, None] + 0.1 * torch.randn(4000, 1, 1, 2, generator=generator)
    prior = Mixture(components=6, dimension=2, iterations=500)
    noise = torch.randn(x0.shape, generator=generator)
    prior.fit(x0, A, B, noise)
    held = x0 * A + B * torch.randn(x0.shape, generator=generator)
    parts = [MultivariateNormal(A * c, (A * A * 0.01 + B * B) * torch.eye(2)) for c in centres]
    each = [p.log_prob(held[:, 0, 0]) + math.log(w) for p, w in zip(parts, (0.75, 0.25), strict=True)]
    truth = torch.stack(each).logsumexp(0).double()
    assert float((truth - prior.log_prob(held)).mean()) == pytest.approx(0, abs=0.01)
    gaussian = Gaussian()
    gaussian.fit(x0, A, B)
    assert float((truth - gaussian.log_prob(held)).mean()) > 0.05
    drawn = prior.sample(range(20_000), 3)
    assert torch.equal(drawn[[5, 9]], prior.sample([5, 9], 3))
    assert torch.allclose(drawn.mean(0), held.mean(0), atol=0.05)
    assert float((drawn[:, 0, 0, 0] > 0).double().mean()) == pytest.approx(
        float((held[:, 0, 0, 0] > 0).double().mean()), abs=0.02
    )
    assert float(-prior.log_prob(drawn).mean()) == pytest.approx(float(-prior.log_prob(held).mean()), abs=0.03)


def test_a_mixture_of_one_is_the_gaussian_of_its_samples():
    x0 = correlated(4000, (1, 2, 2))
    one, gaussian = Mixture(components=1, dimension=2, dirichlet=False, draws=4), Gaussian()
    one.fit(x0, A, B)
    gaussian.fit(x0, A, B)
    x = correlated(200, (1, 2, 2), seed=2)
    assert torch.allclose(one.log_prob(x), gaussian.log_prob(x), atol=0.15)


@pytest.mark.parametrize(
    ("make", "n", "message"),
    [
        (lambda: Mixture(components=20, dimension=4), 50, "20 components in 4 dimensions wants 100 images .* are 50"),
        (lambda: Mixture(components=0), 50, "components 0"),
        (lambda: Mixture(covariance="tied"), 50, "covariance 'tied' must be full or diag"),
        (lambda: Mixture(components=2.5), 50, r"components 2\.5: expected integers >= 1"),
        (lambda: Mixture(seed=-1), 50, "seed -1 an integer >= 0"),
        (lambda: Gaussian(shape=[1, 2, 2]), 50, r"shape is \[1, 2, 2\], the data has \[2, 3, 3\]"),
        (lambda: Gaussian(rank=2, low=2), 50, "give only one"),
        (lambda: Gaussian(rank=0), 50, "rank 0: expected integers >= 1"),
        (Gaussian, 1, "wants 2 images at least, there are 1"),
    ],
)
def test_what_cannot_be_fitted_is_refused(make, n, message):
    with pytest.raises(InputError, match=message):
        make().fit(correlated(n), A, B)


def test_data_that_is_not_finite_is_refused():
    x0 = correlated(50)
    x0[3, 0, 0, 0] = math.nan
    with pytest.raises(InputError, match="not finite"):
        Gaussian().fit(x0, A, B)
