"""Tables of any positive pairs (a, b): the same process under other scalings gives the same images."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from lightning_tdisent.diffusion.objectives import X0, Eps, V
from lightning_tdisent.diffusion.process import first_state, noise, posterior, step, transition
from lightning_tdisent.diffusion.schedules import FlowMatching, Geometric, Linear, VarianceExploding
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError
from lightning_tdisent.sampling.sampler import DDIM, Ancestral, DPMSolver

MEAN, DEVIATION = 0.3, 0.5  # of the data, N(m, d^2)
SIGMA = {"sigma_min": 0.01, "sigma_max": 80.0}


def scaled(states: LatentStates, factor: float = 3.0) -> LatentStates:
    """The same log-SNRs with states that are larger from row to row."""
    scale = torch.logspace(0, math.log10(factor), states.S + 1, dtype=torch.float64)[:, None]
    return LatentStates.from_table(states.log_snr, states.index, states.schedule, states.terminal_bound, scale)


PRESERVING = LatentStates(Geometric(**SIGMA), S=12, terminal_bound=0.02)
PAIRS = {
    "variance exploding": LatentStates(VarianceExploding(**SIGMA), S=12, terminal_bound=0.02),
    "any scale": scaled(PRESERVING),
}


class Gaussian:
    """The exact denoiser of the data N(m, d^2) on any table: E[x_0 | x_s]."""

    classes = None

    def __init__(self, states: LatentStates) -> None:
        self.states, self.shape = states, [1, 4, 4]

    def __call__(self, x, s, label=None):
        a, b = float(self.states.a[s, 0]), float(self.states.b[s, 0])
        gain = a * DEVIATION**2 / (a * a * DEVIATION**2 + b * b)
        return MEAN + gain * (x - a * MEAN)

    def at(self, s):
        return self

    def parameters(self):
        return iter([torch.zeros(1, dtype=torch.float64)])


def test_variance_exploding_and_flow_matching_by_hand():
    states = LatentStates(VarianceExploding(T=3, sigma_min=0.5, sigma_max=8.0), terminal_bound=0.2)
    torch.testing.assert_close(states.a[:, 0], torch.ones(4).double(), rtol=1e-14, atol=0)
    torch.testing.assert_close(states.b[:, 0], torch.tensor([0, 0.5, 2, 8]).double(), rtol=1e-14, atol=0)
    states = LatentStates(FlowMatching(T=4, shift=3.0))
    sigma = torch.tensor([3 * u / (1 + 2 * u) for u in (0, 0.25, 0.5, 0.75, 1)], dtype=torch.float64)
    torch.testing.assert_close(states.b[:, 0], sigma, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(states.a[:, 0], 1 - sigma, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(states.time, (1000 * sigma).float(), rtol=0, atol=0)
    assert states.index.tolist() == [0, 1, 2, 3, 4]
    assert not states.variance_preserving


def test_a_variance_preserving_table_is_as_it_was():
    states = LatentStates(Linear(), S=32)
    assert states.variance_preserving
    assert torch.equal(states.a, torch.sigmoid(states.log_snr).sqrt())
    assert torch.equal(states.b, torch.sigmoid(-states.log_snr).sqrt())
    assert torch.equal(states.time, states.index)


@pytest.mark.parametrize("name", PAIRS)
def test_equal_snr_is_one_state_up_to_a_factor(name):
    states, generator = PAIRS[name], torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 1, 4, 4, generator=generator, dtype=torch.float64)
    for s in states.rows:
        n = float(states.scale[s, 0])
        x, same = noise(states, x0, s, eps), noise(PRESERVING, x0, s, eps)
        torch.testing.assert_close(x / n, same, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(states.normalised(s, x)[0], same, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(Gaussian(states)(x, s), Gaussian(PRESERVING)(same, s), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("sampler", [DDIM(clip=None), DDIM(0.5, clip=None), Ancestral(clip=None), DPMSolver(clip=None)])
def test_chains_of_every_sampler_are_equal_under_two_scalings(name, sampler):
    states, seeds = PAIRS[name], range(3)
    for (s, x, _), (_, same, _) in zip(
        sampler.walk(Gaussian(states), seeds), sampler.walk(Gaussian(PRESERVING), seeds), strict=True
    ):
        torch.testing.assert_close(x / float(states.scale[s, 0]), same, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", [*PAIRS, "flow matching"])
def test_the_ancestral_step_keeps_the_marginals_of_any_table(name):
    """With the true x_0 and noise of variance 1, x_r has mean c x_0 and variance d^2: in closed form, no draws."""
    states = PAIRS.get(name) or LatentStates(FlowMatching(), S=10)
    for s in states.rows[1:]:
        for eta in (0.0, 0.4, 1.0):
            c = transition(states, s, s - 1, eta)
            a, b, c_r, d = (float(v) for v in (states.a[s], states.b[s], states.a[s - 1], states.b[s - 1]))
            assert float(c.x0) + float(c.x) * a == pytest.approx(c_r, rel=1e-12)
            assert (float(c.x) * b) ** 2 + float(c.z) ** 2 == pytest.approx(d * d, rel=1e-12)
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        assert posterior(states, one, one, s, s - 1)[1] == pytest.approx(
            float(transition(states, s, s - 1, 1.0).z) ** 2
        )


def test_ddim_on_a_flow_matching_table_is_its_euler_step():
    """Compared with diffusers' FlowMatchEulerDiscreteScheduler on its own sigmas, from noise to image."""
    S = 8
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    scheduler.set_timesteps(sigmas=[(S - k) / S for k in range(S)])
    states = LatentStates(FlowMatching(shift=3.0), S=S)
    torch.testing.assert_close(states.b.flip(0)[:, 0].float(), scheduler.sigmas, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(states.time.flip(0)[:-1].float(), scheduler.timesteps, rtol=1e-6, atol=1e-4)
    model = Gaussian(states)
    x = theirs = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for s in range(S, 0, -1):
        x0 = model(x, s)
        x = step(states, transition(states, s, s - 1, 0.0), x, x0)
        velocity = (theirs - model(theirs, s)) / float(states.b[s, 0])
        theirs = scheduler.step(velocity, scheduler.timesteps[S - s], theirs, return_dict=False)[0]
        torch.testing.assert_close(x.float(), theirs.float(), rtol=1e-5, atol=1e-6)


def test_samples_start_at_the_scale_of_the_table():
    z = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first_state(PRESERVING, z), z)
    exploding = LatentStates(VarianceExploding(**SIGMA), S=10, terminal_bound=0.02)
    torch.testing.assert_close(first_state(exploding, z), z * math.sqrt(1 + 80.0**2))
    assert torch.equal(first_state(LatentStates(FlowMatching(), S=4), z), z)


def test_objectives_are_told_the_variance_preserving_state(model):
    states = PAIRS["variance exploding"]
    x0, eps = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for objective in (Eps(), X0(), V()):
        denoiser = model(objective, seed=1)
        scaled_model = type(denoiser)(denoiser.network, objective, states)
        s = torch.tensor([1, 5, 12])
        x, a, b = states.normalised(s, noise(states, x0, s, eps))
        torch.testing.assert_close(objective.x0(objective.target(x0, eps, a, b), x, a, b), x0, rtol=0, atol=2e-3)
        assert bool(scaled_model.loss(x0, s, eps).isfinite().all())


def test_fingerprints_and_parts_of_tables_keep_the_scale():
    exploding = PAIRS["variance exploding"]
    assert exploding.fingerprint != PRESERVING.fingerprint
    few = exploding.restrict(exploding.index[[2, 5, 12]].tolist())
    assert torch.equal(few.b, exploding.b[[0, 2, 5, 12]])
    assert torch.equal(exploding.truncate(5).a, exploding.a[:6])
    flow = LatentStates(FlowMatching(), S=4)
    assert flow.truncate(2).time.tolist() == flow.time[:3].tolist()
    assert flow.fingerprint != LatentStates.from_table(flow.log_snr, flow.index, flow.schedule, 1.0).fingerprint


@pytest.mark.parametrize("shift", [0.0, -1.0, math.inf, "3"])
def test_shifts_that_make_no_path_are_refused(shift):
    with pytest.raises(InputError, match=r"FlowMatching\.shift"):
        FlowMatching(shift=shift)
