import math
from itertools import combinations

import pytest
import torch

from lightning_tdisent.diffusion.objectives import X0, Eps, V
from lightning_tdisent.diffusion.process import noise, posterior, step, transition
from lightning_tdisent.diffusion.schedules import Cosine, Linear, ScaledLinear
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError

TABLES = {
    "linear": LatentStates(Linear(), S=10),
    "ldm": LatentStates(ScaledLinear(), S=8, terminal_bound=0.1),
    "cosine": LatentStates(Cosine(), S=5),
    "zero": LatentStates(Linear(zero_terminal=True), S=4),
}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ddpm(ab_s: float, ab_r: float) -> tuple[float, float, float]:
    """Coefficients of x0 and x_s in the posterior mean, and its standard deviation (2006.11239, eq. 7)."""
    alpha = ab_s / ab_r
    on_x0 = math.sqrt(ab_r) * (1 - alpha) / (1 - ab_s)
    on_x = math.sqrt(alpha) * (1 - ab_r) / (1 - ab_s)
    return on_x0, on_x, math.sqrt((1 - ab_r) / (1 - ab_s) * (1 - alpha))


def test_noise_at_two_known_rows():
    states = LatentStates(Linear(), indices=[496, 1000])
    x0, eps = draw(2, 1, 2, 2, seed=1), draw(2, 1, 2, 2, seed=2)
    signal = math.prod(1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(496))
    expected = math.sqrt(signal) * x0 + math.sqrt(1 - signal) * eps
    torch.testing.assert_close(noise(states, x0, 1, eps), expected, rtol=0, atol=1e-13)
    assert torch.equal(noise(states, x0, 0, eps), x0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_noise_of_many_rows_is_noise_of_each(dtype):
    states, rows = TABLES["linear"], torch.tensor([3, 0, 10, 3])
    x0, eps = draw(4, 2, 3, 3, seed=1).to(dtype), draw(4, 2, 3, 3, seed=2).to(dtype)
    found = noise(states, x0, rows, eps)
    assert found.dtype == dtype
    for i, s in enumerate(rows.tolist()):
        torch.testing.assert_close(found[i : i + 1], noise(states, x0[i : i + 1], s, eps[i : i + 1]))


def ddim(states, x, x0, s, r, eta=0.0, z=None):
    """A step of DDIM, as a sampler takes it."""
    return step(states, transition(states, s, r, eta), x, x0, z=z)


@pytest.mark.parametrize("name", TABLES)
def test_the_ancestral_step_is_the_ddpm_posterior(name):
    states = TABLES[name]
    x, x0, z = (draw(3, 2, 4, 4, seed=k) for k in range(3))
    ab = states.a[:, 0].square().tolist()
    for r, s in combinations(range(states.S + 1), 2):
        on_x0, on_x, std = ddpm(ab[s], ab[r])
        c0, cx, cz, _ = transition(states, s, r, 1.0)
        assert c0 == pytest.approx(on_x0, abs=1e-12)
        assert cx == pytest.approx(on_x, abs=1e-12)
        assert cz == pytest.approx(std, abs=1e-12)
        found = ddim(states, x, x0, s, r, 1.0, z)
        torch.testing.assert_close(found, on_x0 * x0 + on_x * x + std * z, rtol=0, atol=1e-12)
        mean, variance = posterior(states, x0, x, s, r)
        torch.testing.assert_close(mean, on_x0 * x0 + on_x * x, rtol=0, atol=1e-12)
        assert variance == pytest.approx(std**2, abs=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_the_step_is_the_ddim_formula(eta):
    states = TABLES["linear"]
    x, x0, z = (draw(3, 2, 4, 4, seed=k) for k in range(3))
    ab = states.a[:, 0].square().tolist()
    for r, s in combinations(range(states.S + 1), 2):
        eps = (x - math.sqrt(ab[s]) * x0) / math.sqrt(1 - ab[s])
        std = eta * math.sqrt((1 - ab[r]) / (1 - ab[s])) * math.sqrt(1 - ab[s] / ab[r])
        expected = math.sqrt(ab[r]) * x0 + math.sqrt(1 - ab[r] - std**2) * eps + std * z
        torch.testing.assert_close(ddim(states, x, x0, s, r, eta, z), expected, rtol=0, atol=1e-11)


def test_a_deterministic_step_with_the_true_image_stays_on_its_path():
    states = TABLES["cosine"]
    x0, eps = draw(2, 1, 3, 3, seed=1), draw(2, 1, 3, 3, seed=2)
    for r, s in combinations(range(states.S + 1), 2):
        found = ddim(states, noise(states, x0, s, eps), x0, s, r)
        torch.testing.assert_close(found, noise(states, x0, r, eps), rtol=0, atol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_step_to_the_data_returns_the_estimate(eta):
    states = TABLES["linear"]
    x, x0 = draw(2, 1, 3, 3, seed=1), draw(2, 1, 3, 3, seed=2)
    torch.testing.assert_close(ddim(states, x, x0, 4, 0, eta), x0, rtol=0, atol=1e-13)


# N2: with the true x0 one reverse step draws from q(x_r | x_s, x_0)
def test_one_step_lands_on_the_posterior():
    states, s, r, n = TABLES["linear"], 4, 2, 200_000
    x0, x = 0.7, -0.4
    z = draw(n, seed=5)
    found = ddim(states, torch.full((n,), x).double(), torch.full((n,), x0).double(), s, r, 1.0, z)
    ab = states.a[:, 0].square().tolist()
    on_x0, on_x, std = ddpm(ab[s], ab[r])
    mean_error = (found.mean().item() - (on_x0 * x0 + on_x * x)) / (std / math.sqrt(n))
    variance_error = (found.var().item() / std**2 - 1) / math.sqrt(2 / n)
    assert abs(mean_error) < 4
    assert abs(variance_error) < 4


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_steps_keep_the_forward_marginals(eta):
    states, n, x0 = TABLES["linear"], 200_000, 0.7
    image = torch.full((n,), x0).double()
    x = noise(states, image, 7, draw(n, seed=1))
    for seed, (s, r) in enumerate([(7, 5), (5, 4), (4, 1)], start=2):
        x = ddim(states, x, image, s, r, eta, draw(n, seed=seed))
        ab = states.a[r, 0].item() ** 2
        assert abs(x.mean().item() - math.sqrt(ab) * x0) / math.sqrt((1 - ab) / n) < 4
        assert abs(x.var().item() / (1 - ab) - 1) / math.sqrt(2 / n) < 4


def test_two_columns_are_two_tables_side_by_side(columns, both):
    x, x0, z = (draw(3, 2, 4, 4, seed=k) for k in range(3))
    rows = torch.tensor([1, 5, 2])

    def halves(f):
        return torch.cat([f(t, slice(k, k + 1)) for k, t in enumerate(columns)], 1)

    torch.testing.assert_close(
        noise(both, x0, rows, z), halves(lambda t, k: noise(t, x0[:, k], rows, z[:, k])), rtol=0, atol=1e-14
    )
    for r, s in combinations(range(6), 2):
        torch.testing.assert_close(
            noise(both, x0, s, z), halves(lambda t, k, s=s: noise(t, x0[:, k], s, z[:, k])), rtol=0, atol=1e-14
        )
        for eta in (0.0, 0.5, 1.0):
            expected = halves(lambda t, k, s=s, r=r, eta=eta: ddim(t, x[:, k], x0[:, k], s, r, eta, z[:, k]))
            torch.testing.assert_close(ddim(both, x, x0, s, r, eta, z), expected, rtol=0, atol=1e-11)
        mean, variance = posterior(both, x0, x, s, r)
        expected = halves(lambda t, k, s=s, r=r: posterior(t, x0[:, k], x[:, k], s, r)[0])
        torch.testing.assert_close(mean, expected, rtol=0, atol=1e-12)
        assert variance.flatten().tolist() == [
            pytest.approx(posterior(t, x0[:, :1], x[:, :1], s, r)[1]) for t in columns
        ]


def test_the_columns_of_a_step_differ(both):
    x, x0 = torch.ones(1, 2, 1, 1).double(), torch.zeros(1, 2, 1, 1).double()
    out = ddim(both, x, x0, 4, 2, 0.0, torch.zeros_like(x)).flatten()
    assert abs(out[0] - out[1]) > 0.01


def test_two_columns_need_no_noise_where_none_is_added(both):
    x, x0 = draw(2, 2, 3, 3, seed=1), draw(2, 2, 3, 3, seed=2)
    torch.testing.assert_close(ddim(both, x, x0, 3, 1, 0.0), ddim(both, x, x0, 3, 1, 0.0, torch.full_like(x, 7.0)))
    torch.testing.assert_close(ddim(both, x, x0, 3, 0, 1.0), x0)


def test_inputs_are_not_modified(both):
    for states, channels in ((TABLES["linear"], 1), (both, 2)):
        tensors = [draw(2, channels, 3, 3, seed=k) for k in range(3)]
        copies = [t.clone() for t in tensors]
        x, x0, z = tensors
        noise(states, x0, 2, z)
        ddim(states, x, x0, 3, 2, 1.0, z)
        posterior(states, x0, x, 3, 2)
        for objective in (Eps(), X0(), V()):
            objective.x0(x0, x, 0.6, 0.8)
        assert all(torch.equal(t, c) for t, c in zip(tensors, copies, strict=True))


@pytest.mark.parametrize(("s", "r"), [(3, 3), (3, 4), (11, 2), (3, -1), (0, 0)])
def test_a_step_to_the_same_or_a_higher_row_is_refused(s, r):
    with pytest.raises(InputError, match=rf"s={s}, r={r}"):
        transition(TABLES["linear"], s, r, 0.0)


def test_fresh_noise_must_be_given():
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(InputError, match="adds fresh noise: pass z"):
        ddim(TABLES["linear"], x, x, 5, 3, 0.5)
