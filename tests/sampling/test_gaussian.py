import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lightning_tdisent.diffusion.process import transition
from lightning_tdisent.diffusion.schedules import Cosine, Linear
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.sampling.sampler import DDIM, Ancestral, DPMSolver

MU, STD = 0.3, 0.5
SCHEDULES = {"linear": Linear(), "cosine": Cosine()}


class Ideal:
    """E[x_0 | x_s] for images whose pixels are N(MU, STD^2)."""

    classes = None

    def __init__(self, states: LatentStates, shape: tuple[int, ...] = (1, 64, 64)) -> None:
        self.states, self.shape, self.weight = states, list(shape), torch.zeros(1)

    def __call__(self, x: Tensor, s: int, label: Tensor | None = None) -> Tensor:
        a, b = self.states.a[s].item(), self.states.b[s].item()
        return MU + STD**2 * a / (a * a * STD**2 + b * b) * (x - a * MU)

    def at(self, s: int) -> "Ideal":
        return self

    def parameters(self) -> list[Tensor]:
        return [self.weight]


def alpha_bars(name: str, rows: list[int]) -> list[float]:
    """Signal power at 1-based indices of a chain of 1000, by plain arithmetic, 1 put before."""
    table = [1.0]
    for t in range(1, 1001):
        if name == "linear":
            keep = 1 - (1e-4 + (0.02 - 1e-4) * (t - 1) / 999)
        else:
            f = [math.cos((u / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (t - 1, t)]
            keep = max(f[1] / f[0], 0.001)
        table.append(table[-1] * keep)
    return [table[t] for t in [0, *rows]]


def final_law(ab: list[float], eta: float) -> tuple[float, float]:
    """Mean and std at row 0 from N(0, 1) at the last row, in the words of DDPM and DDIM."""
    mean, var = 0.0, 1.0
    for now, then in zip(ab[:0:-1], ab[-2::-1], strict=True):
        # x0_hat = p + q x, eps_hat = (x - sqrt(now) x0_hat)/sqrt(1 - now)
        q = STD**2 * math.sqrt(now) / (now * STD**2 + 1 - now)
        p = MU - q * math.sqrt(now) * MU
        fresh = eta**2 * (1 - then) / (1 - now) * (1 - now / then)
        arrow = math.sqrt(max(0.0, 1 - then - fresh) / (1 - now))
        slope = math.sqrt(then) * q + arrow * (1 - math.sqrt(now) * q)
        mean = slope * mean + (math.sqrt(then) - arrow * math.sqrt(now)) * p
        var = slope**2 * var + fresh
    return mean, math.sqrt(var)


def law_of(states: LatentStates, eta: float) -> tuple[float, float]:
    """The same through the project's own coefficients."""
    mean, var = 0.0, 1.0
    for s in range(states.S, 0, -1):
        a, b = states.coefficients(s)
        c0, cx, cz, _ = transition(states, s, s - 1, eta)
        q = STD**2 * a / (a * a * STD**2 + b * b)
        mean, var = c0 * (MU + q * (mean - a * MU)) + cx * mean, (c0 * q + cx) ** 2 * var + cz**2
    return mean, math.sqrt(var)


def rows_of(S: int, spacing: str) -> list[int]:
    return [k * (1000 // S) if spacing == "even" else round(k * 1000 / S) for k in range(1, S + 1)]


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing", ["even", "trailing"])
@pytest.mark.parametrize("S", [1000, 128, 32, 16, 8, 1])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_recursion_of_the_sampler_is_the_exact_one(name, S, spacing, eta):
    states = LatentStates(SCHEDULES[name], S=S, spacing=spacing, terminal_bound=1.0)
    mean, std = law_of(states, eta)
    expected_mean, expected_std = final_law(alpha_bars(name, rows_of(S, spacing)), eta)
    assert std == pytest.approx(expected_std, abs=1e-9)
    assert mean == pytest.approx(expected_mean, abs=1e-9)


# rows at round(kT/S): S, linear with eta 0 and 1, cosine with eta 0 and 1
TRAILING = [
    (1000, 0.4985, 0.4961, 0.4992, 0.4980),
    (128, 0.4885, 0.4742, 0.4938, 0.4859),
    (32, 0.4561, 0.4216, 0.4760, 0.4532),
    (16, 0.4156, 0.3744, 0.4531, 0.4199),
    (8, 0.3412, 0.3105, 0.4100, 0.3711),
]
# rows at k floor(T/S), linear
EVEN = [(1000, 0.4985, 0.4961), (32, 0.4564, 0.4222), (16, 0.4161, 0.3753), (8, 0.3412, 0.3105)]


@pytest.mark.parametrize(("S", "linear_0", "linear_1", "cosine_0", "cosine_1"), TRAILING)
def test_known_stds_of_trailing_rows(S, linear_0, linear_1, cosine_0, cosine_1):
    for name, eta, value in (
        ("linear", 0.0, linear_0),
        ("linear", 1.0, linear_1),
        ("cosine", 0.0, cosine_0),
        ("cosine", 1.0, cosine_1),
    ):
        states = LatentStates(SCHEDULES[name], S=S, spacing="trailing")
        assert law_of(states, eta)[1] == pytest.approx(value, abs=0.6e-4), (name, eta)


@pytest.mark.parametrize(("S", "eta_0", "eta_1"), EVEN)
def test_known_stds_of_even_rows(S, eta_0, eta_1):
    states = LatentStates(Linear(), S=S)
    assert law_of(states, 0.0)[1] == pytest.approx(eta_0, abs=0.6e-4)
    assert law_of(states, 1.0)[1] == pytest.approx(eta_1, abs=0.6e-4)


def test_the_schedule_matters_at_few_states():
    linear = LatentStates(Linear(), S=32, spacing="trailing")
    cosine = LatentStates(Cosine(), S=32, spacing="trailing")
    assert STD - law_of(linear, 0.0)[1] > 1.7 * (STD - law_of(cosine, 0.0)[1])


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("name", "S"), [("linear", 8), ("linear", 32), ("cosine", 16)])
def test_samples_have_the_exact_law(name, S, eta):
    states = LatentStates(SCHEDULES[name], S=S, spacing="trailing")
    x = DDIM(eta=eta, clip=None)(Ideal(states), range(50)).double().flatten()
    mean, std = final_law(alpha_bars(name, rows_of(S, "trailing")), eta)
    n = len(x)
    assert abs(x.mean().item() - mean) / (std / math.sqrt(n)) < 4
    assert abs(x.std().item() / std - 1) * math.sqrt(2 * n) < 4


def test_ancestral_sampling_is_eta_one():
    states = LatentStates(Linear(), S=8)
    one, two = (sampler(Ideal(states), range(3)) for sampler in (Ancestral(clip=None), DDIM(eta=1.0, clip=None)))
    assert torch.equal(one, two)


@pytest.mark.parametrize("S", [8, 32])
def test_deterministic_samples_are_the_exact_map_of_their_noise(S):
    states = LatentStates(Linear(), S=S)
    steps = list(DDIM(clip=None).walk(Ideal(states), [3]))
    mean, std = final_law(alpha_bars("linear", rows_of(S, "even")), 0.0)
    torch.testing.assert_close(steps[-1][1], mean + std * steps[0][1], rtol=0, atol=2e-6)


def flow_error(sampler: DDIM | DPMSolver, S: int) -> float:
    """How far the sampler's linear map is from that of the probability flow, which takes std to std."""
    log_snr = torch.linspace(18, -8, S, dtype=torch.float64)
    table = torch.cat([torch.tensor([math.inf], dtype=torch.float64), log_snr])[:, None]
    states = LatentStates.from_table(table, torch.arange(S + 1), Linear(), terminal_bound=0.1)
    ideal = Ideal(states, (1, 1, 2))
    ideal.weight = ideal.weight.double()
    start = torch.tensor([0.0, 1.0], dtype=torch.float64).view(1, 1, 1, 2)
    *_, (_, x, _) = sampler.walk(ideal, [0], start=start)
    a, b = states.coefficients(S)
    return abs((x[..., 1] - x[..., 0]).item() - STD / math.sqrt(a * a * STD**2 + b * b))


# an error of order p shrinks by 2^p when the steps are halved
@pytest.mark.parametrize(("sampler", "order"), [(DDIM(clip=None), 1), (DPMSolver(clip=None), 2)], ids=["DDIM", "DPM"])
def test_order_of_convergence(sampler, order):
    errors = SimpleNamespace(**{f"S{S}": flow_error(sampler, S) for S in (100, 200, 400)})
    assert math.log2(errors.S100 / errors.S200) == pytest.approx(order, abs=0.2)
    assert math.log2(errors.S200 / errors.S400) == pytest.approx(order, abs=0.15)
    assert flow_error(DPMSolver(clip=None), 100) < 0.1 * flow_error(DDIM(clip=None), 100)
