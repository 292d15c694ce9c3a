import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from lightning_tdisent.diffusion.objectives import X0, Eps, V
from lightning_tdisent.diffusion.process import Terms, step
from lightning_tdisent.diffusion.rng import seed_noise
from lightning_tdisent.diffusion.schedules import Cosine, Linear
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError
from lightning_tdisent.images import from_uint8, to_uint8
from lightning_tdisent.models.composite import CompositeDenoiser
from lightning_tdisent.sampling import sample as sample_module
from lightning_tdisent.sampling.denoiser import Denoiser
from lightning_tdisent.sampling.guidance import Guided
from lightning_tdisent.sampling.sample import sample
from lightning_tdisent.sampling.sampler import DDIM, Ancestral, DPMSolver, Sampler, probe_rows

PREDICTION = {"epsilon": Eps, "sample": X0, "v_prediction": V}
SAMPLERS = {
    "ddim": DDIM(),
    "eta": DDIM(eta=0.5),
    "ancestral": Ancestral(),
    "dpm": DPMSolver(),
    "fewer": DDIM(steps=2, clip=None),
}
ALL = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
SEEDS, SHAPE = [3, 1, 400], [1, 4, 4]


def reduced(cls: type, S: int, **config: object) -> DDIMScheduler | DDPMScheduler | DPMSolverMultistepScheduler:
    """diffusers' scheduler whose chain is S rows k floor(1000/S) of the linear one, by plain arithmetic."""
    full = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    ab = full[np.arange(1, S + 1) * (1000 // S) - 1]
    betas = (1 - ab / np.concatenate([[1.0], ab[:-1]])).tolist()
    scheduler = cls(num_train_timesteps=S, trained_betas=betas, **config)
    scheduler.alphas_cumprod = torch.from_numpy(ab)  # the same table without the rounding of their float32 product
    scheduler.set_timesteps(S)
    assert scheduler.timesteps.tolist() == list(range(S - 1, -1, -1))
    return scheduler


def raw(denoise: Denoiser, x: Tensor, s: int) -> Tensor:
    return denoise.network(x, denoise.states.index[s].repeat(len(x)))


def toy_model(toy: type, objective: type, S: int = 32) -> Denoiser:
    return Denoiser(toy(SHAPE).double(), objective(), LatentStates(Linear(), S=S))


def noise(s: int, S: int) -> Tensor:
    # keyed by the original index, here of evenly spaced rows of T = 1000
    return seed_noise(SEEDS, (1000 // S) * s, SHAPE).double()


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("prediction", PREDICTION)
def test_ddim_is_that_of_diffusers(toy, prediction, eta, clip):
    config = {"clip_sample": clip is not None, "prediction_type": prediction}
    scheduler, denoise = reduced(DDIMScheduler, 32, **config), toy_model(toy, PREDICTION[prediction])
    x = noise(32, 32)
    for t in scheduler.timesteps.tolist():
        with torch.no_grad():
            out = raw(denoise, x, t + 1)
        # they keep the unclipped eps_hat unless told otherwise, and ask for noise at the last step, to multiply by 0
        x = scheduler.step(out, t, x, eta=eta, use_clipped_model_output=True, variance_noise=noise(t, 32)).prev_sample
    found = DDIM(eta=eta, clip=clip)(denoise, SEEDS)
    assert found.abs().max() > 0.1
    assert torch.allclose(found, x, rtol=1e-5, atol=1e-5), (found - x).abs().max()


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("prediction", PREDICTION)
def test_ancestral_is_ddpm_of_diffusers(toy, prediction, clip, monkeypatch):
    config = {"clip_sample": clip is not None, "prediction_type": prediction, "variance_type": "fixed_small"}
    scheduler, denoise = reduced(DDPMScheduler, 32, **config), toy_model(toy, PREDICTION[prediction])
    x = noise(32, 32)
    for t in scheduler.timesteps.tolist():
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, t=t, **__: noise(t, 32))
        with torch.no_grad():
            out = raw(denoise, x, t + 1)
        x = scheduler.step(out, t, x).prev_sample
    found = Ancestral(clip=clip)(denoise, SEEDS)
    assert torch.allclose(found, x, rtol=1e-5, atol=1e-5), (found - x).abs().max()


@pytest.mark.parametrize("S", [32, 10])
@pytest.mark.parametrize("prediction", PREDICTION)
def test_dpm_solver_is_that_of_diffusers(toy, prediction, S):
    config = {"prediction_type": prediction, "final_sigmas_type": "zero", "timestep_spacing": "trailing"}
    scheduler = reduced(DPMSolverMultistepScheduler, S, algorithm_type="dpmsolver++", solver_order=2, **config)
    denoise, x = toy_model(toy, PREDICTION[prediction], S), noise(S, S)
    for t in scheduler.timesteps.tolist():
        with torch.no_grad():
            out = raw(denoise, x, t + 1)
        x = scheduler.step(out, t, x).prev_sample
    found = DPMSolver(clip=None)(denoise, SEEDS)
    # their sigmas are float32, and eps is divided by a signal of 0.007 at the last row
    bound = 3e-4 if prediction == "epsilon" else 1e-5
    assert torch.allclose(found, x, rtol=bound, atol=bound), (found - x).abs().max()
    assert not torch.allclose(found, DDIM(clip=None)(denoise, SEEDS), rtol=5 * bound, atol=5 * bound)


def test_dpm_solver_by_hand(toy):
    denoise = toy_model(toy, V, S=4)
    x = noise(4, 4)
    lam = (denoise.states.log_snr[:, 0] / 2).tolist()
    a, b = denoise.states.a[:, 0].tolist(), denoise.states.b[:, 0].tolist()
    before, h_before = None, None
    with torch.no_grad():
        for s in (4, 3, 2):
            h, x0 = lam[s - 1] - lam[s], denoise(x, s)
            d = x0 if before is None else x0 + h / (2 * h_before) * (x0 - before)
            x = b[s - 1] / b[s] * x + a[s - 1] * (1 - math.exp(-h)) * d
            before, h_before = x0, h
        x = denoise(x, 1)
    torch.testing.assert_close(DPMSolver(clip=None)(denoise, SEEDS), x, rtol=0, atol=1e-12)


@ALL
@pytest.mark.parametrize("owners", [4, 2, 3])
def test_copies_of_one_network_compose_to_that_network(model, sampler, owners):
    one = model(classes=3)
    experts = [Denoiser(copy.deepcopy(one.network), V(), one.states, rows) for rows in one.states.blocks(owners)]
    label = torch.tensor([0, 3, 2])
    expected = sampler(one, SEEDS, label)
    assert expected.std() > 0.05
    composite = CompositeDenoiser(experts[::-1])
    assert torch.equal(sampler(composite, SEEDS, label), expected)
    assert torch.equal(sampler(composite, SEEDS), sampler(one, SEEDS))


@ALL
def test_each_row_is_answered_by_its_owner(model, sampler):
    one = model()
    experts = [model(rows=[s], seed=s) for s in (1, 2, 3, 4)]
    composite, asked = CompositeDenoiser(experts), []
    for expert in experts:
        expert.network.register_forward_pre_hook(lambda _, args, e=expert: asked.append((e.rows[0], int(args[1][0]))))
    out = sampler(composite, SEEDS)
    rows = sampler.rows(one.states)
    assert asked == [(s, 250 * s) for s in rows]
    assert not torch.equal(out, sampler(one, SEEDS))


@ALL
def test_an_image_depends_on_its_seed_alone(model, sampler):
    denoise, seeds = model(), list(range(100, 164))
    whole = sampler(denoise, seeds)
    starts = next(iter(sampler.walk(denoise, seeds)))[1]
    assert (whole[0] - whole[1]).abs().max() > 0.1
    for size in (1, 7):
        parts = [seeds[i : i + size] for i in range(0, 64, size)]
        noises = torch.cat([next(iter(sampler.walk(denoise, part)))[1] for part in parts])
        assert torch.equal(noises, starts)
        images = torch.cat([sampler(denoise, part) for part in parts])
        # convolutions sum in another order for another batch size: float32, 4 steps
        assert (images - whole).abs().max() < 1e-5
    shuffled = sampler(denoise, seeds[::-1])
    assert (shuffled.flip(0) - whole).abs().max() < 1e-5
    assert torch.equal(sampler(denoise, seeds), whole)


def test_fresh_noise_is_that_of_the_index_it_enters(toy, states):
    class Nothing:
        classes, shape = None, SHAPE

        def __init__(self) -> None:
            self.states = states

        def __call__(self, x: Tensor, s: int, label: Tensor | None = None) -> Tensor:
            return torch.zeros_like(x)

        def parameters(self) -> list[Tensor]:
            return [torch.zeros(1, dtype=torch.float64)]

    path = list(Ancestral().walk(Nothing(), SEEDS))
    ab = states.a[:, 0].square().tolist()
    for (s, x, _), (r, then, _) in pairwise(path):
        alpha = ab[s] / ab[r]
        on_x = math.sqrt(alpha) * (1 - ab[r]) / (1 - ab[s])
        std = math.sqrt((1 - ab[r]) / (1 - ab[s]) * (1 - alpha))
        torch.testing.assert_close(then, on_x * x + std * noise(r, 4), rtol=0, atol=1e-12)
    assert torch.equal(path[0][1], noise(4, 4))


@pytest.mark.parametrize(
    ("S", "steps", "expected"),
    [
        (32, 8, [32, 28, 24, 20, 16, 12, 8, 4]),
        (32, 1, [32]),
        (32, None, list(range(32, 0, -1))),
        (32, 32, list(range(32, 0, -1))),
        (10, 4, [10, 8, 5, 3]),
        (10, 3, [10, 7, 4]),
        (10, 7, [10, 9, 8, 6, 5, 3, 2]),
    ],
)
def test_steps_visit_evenly_spaced_rows(toy, S, steps, expected):
    table = LatentStates(Linear(), S=S)
    net = toy(SHAPE)
    for sampler in (DDIM(steps=steps), Ancestral(steps=steps), DPMSolver(steps=steps)):
        assert sampler.rows(table) == expected
        net.seen.clear()
        walked = [s for s, _, _ in sampler.walk(Denoiser(net, V(), table), [5])]
        assert walked == expected + [0]
        assert [int(t[0]) for t in net.seen] == [(1000 // S) * s for s in expected]


@pytest.mark.parametrize("sampler", [DDIM(steps=8, clip=None), DPMSolver(steps=8)], ids=["ddim", "dpm"])
def test_fewer_steps_are_the_smaller_table(toy, sampler):
    big = toy_model(toy, V, S=32)
    small = big.restrict(big.states.restrict(range(124, 993, 124)))
    full = type(sampler)(clip=sampler.clip)
    *_, (_, one, _) = sampler.walk(big, SEEDS, start=noise(9, 9))
    *_, (_, two, _) = full.walk(small, SEEDS, start=noise(9, 9))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cls", [DDIM, Ancestral, DPMSolver])
def test_more_steps_than_rows_are_refused(toy, states, cls):
    with pytest.raises(InputError, match=r"5 steps .* 4 rows"):
        cls(steps=5)(Denoiser(toy(SHAPE), V(), states), [1])
    with pytest.raises(InputError, match=r"at least 1, got 0"):
        cls(steps=0)


def test_probe_rows():
    assert probe_rows([1, 2, 3, 4, 5], 2) == [3, 5]
    assert probe_rows([7], 8) == [7]
    assert probe_rows(range(1, 1001), 4) == [250, 500, 750, 1000]
    assert probe_rows([3, 9, 27], 3) == [3, 9, 27]


@pytest.mark.parametrize("eta", [-0.1, 1.5])
def test_eta_outside_the_unit_interval_is_refused(eta):
    with pytest.raises(InputError, match=str(eta)):
        DDIM(eta=eta)


class Ideal:
    """x0_hat of data N(m, v) at every row, in float64."""

    def __init__(self, states: LatentStates, m: float, v: float) -> None:
        self.states, self.shape, self.classes, self.m, self.v = states, SHAPE, None, m, v

    def __call__(self, x: Tensor, s: int, label: Tensor | None = None) -> Tensor:
        a, b = self.states.coefficients(s)
        return self.m + a * self.v / (a * a * self.v + b * b) * (x - a * self.m)

    def parameters(self) -> list[Tensor]:
        return [torch.zeros(1, dtype=torch.float64)]


@pytest.mark.parametrize("S", [1, 2, 3, 40])
def test_dpm_solver_from_a_row_without_signal(S):
    """Against the formulas of 2211.01095 by hand, whose first step from a = 0 is c x0_hat + d x."""
    states = LatentStates(Linear(zero_terminal=True), S=S, spacing="trailing")
    assert float(states.a[-1]) == 0
    ideal, x = Ideal(states, 0.3, 0.2), torch.linspace(-2, 2, 16, dtype=torch.float64).view(1, *SHAPE)
    for _, found, _ in DPMSolver(clip=None).walk(ideal, [0], start=x):  # noqa: B007
        pass
    a, b = np.sqrt(states.a.numpy()[:, 0] ** 2), states.b.numpy()[:, 0]
    y, before = x.numpy(), None
    for s in range(S, 0, -1):
        estimate = 0.3 + a[s] * 0.2 / (a[s] ** 2 * 0.2 + b[s] ** 2) * (y - a[s] * 0.3)
        d = estimate
        if s < S - 1 and s > 1:  # second order, from the third step on: the first one's h is infinite
            h = [math.log(a[k] / b[k]) for k in (s - 1, s, s + 1)]
            d = estimate + (estimate - before) * (h[0] - h[1]) / (h[1] - h[2]) / 2
        ratio = 0.0 if s == 1 else a[s] * b[s - 1] / b[s] / a[s - 1]  # e^-h
        y, before = b[s - 1] / b[s] * y + a[s - 1] * (1 - ratio) * d, estimate
    assert np.abs(found.numpy() - y).max() < 1e-12
    first = DPMSolver(clip=None).plan(states, [S, S - 1])[0]
    assert (first.x0, first.before) == (pytest.approx(a[S - 1], abs=1e-15), 0.0)
    assert (first.x, first.z) == (pytest.approx(b[S - 1], abs=1e-15), 0.0)


def test_dpm_solver_from_a_row_without_signal_ends_where_the_ode_does():
    """Of data N(m, v) the ODE takes noise x to m + sqrt(v) x; twice the steps leave a quarter of the error, or less."""
    x, off = torch.linspace(-2, 2, 16, dtype=torch.float64).view(1, *SHAPE), []
    for S in (50, 100, 200):
        states = LatentStates(Cosine(zero_terminal=True), S=S, spacing="trailing")
        *_, (_, end, _) = DPMSolver(clip=None).walk(Ideal(states, 0.3, 0.2), [0], start=x)
        off.append(float((end - 0.3 - 0.2**0.5 * x).abs().max()))
    assert off[2] < 2e-3, off
    assert off[0] / off[1] > 2.5, off


def test_the_first_step_from_no_signal_is_nearly_that_of_diffusers():
    """diffusers puts alpha-bar 2^-24 in the place of 0, which is 2^-12 of signal."""
    theirs = DPMSolverMultistepScheduler(
        rescale_betas_zero_snr=True, beta_schedule="linear", prediction_type="sample", timestep_spacing="trailing"
    )
    theirs.set_timesteps(10)
    states = LatentStates(Linear(zero_terminal=True), S=10, spacing="trailing")
    x, x0 = torch.randn(2, 1, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = step(states, DPMSolver().plan(states, [10, 9])[0], x, x0)
    assert torch.allclose(found, theirs.step(x0, theirs.timesteps[0], x).prev_sample, atol=2e-3)


def test_the_estimate_is_clipped(toy, states):
    denoise = Denoiser(toy(SHAPE, gain=9.0), Eps(), states)
    free = [x0.abs().max().item() for _, _, x0 in DDIM(clip=None).walk(denoise, SEEDS) if x0 is not None]
    assert max(free) > 5
    for bound in (1.0, 0.25):
        for sampler in (DDIM(clip=bound), Ancestral(clip=bound), DPMSolver(clip=bound)):
            walked = list(sampler.walk(denoise, SEEDS))
            assert max(x0.abs().max().item() for _, _, x0 in walked[1:]) == bound
            assert torch.equal(walked[-1][1], walked[-1][2])


@pytest.mark.parametrize(
    "sampler",
    [DDIM(clip=None), DDIM(eta=0.6), Ancestral(clip=None), DPMSolver(clip=None), DPMSolver(steps=3)],
    ids=["ddim", "eta", "ancestral", "dpm", "fewer"],
)
def test_two_columns_are_two_tables_side_by_side(toy, states, sampler):
    shift = torch.tensor([0.0, 2.0, 1.5, 1.0, 0.5], dtype=torch.float64)[:, None]
    tables = [LatentStates.from_table(states.log_snr - k * shift, states.index, Linear(), 0.1) for k in (0, 1)]
    both = LatentStates.from_table(torch.cat([t.log_snr for t in tables], 1), states.index, Linear())
    wide = sampler(Denoiser(toy([2, 4, 4]).double(), V(), both), SEEDS)

    # the network is elementwise: a channel comes out as if both had its table
    found = []
    for k in (0, 1):
        net = Denoiser(toy([2, 4, 4]).double(), V(), tables[k])
        found.append(sampler(net, SEEDS)[:, k : k + 1])
    torch.testing.assert_close(wide, torch.cat(found, 1), rtol=0, atol=1e-10)
    assert (wide - sampler(Denoiser(toy([2, 4, 4]).double(), V(), tables[0]), SEEDS))[:, 1].abs().max() > 1e-3


@ALL
def test_guidance_of_one_and_zero(model, sampler):
    denoise, label = model(classes=3), torch.tensor([2, 0, 1])
    given, free = sampler(denoise, SEEDS, label), sampler(denoise, SEEDS)
    assert (given - free).abs().max() > 1e-3
    assert torch.allclose(sampler(Guided(denoise, 1.0), SEEDS, label), given, atol=1e-5)
    assert torch.allclose(sampler(Guided(denoise, 0.0), SEEDS, label), free, atol=1e-5)
    assert (sampler(Guided(denoise, 4.0), SEEDS, label) - given).abs().max() > 1e-3


@ALL
def test_a_sampler_modifies_neither_its_inputs_nor_global_state(model, sampler):
    denoise, seeds, label = model(classes=3), [5, 6], torch.tensor([1, 3])
    start = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    tensors = [start, label, *denoise.parameters(), *denoise.buffers()]
    before = [t.clone() for t in tensors]
    generator, settings = torch.get_rng_state(), dict(vars(sampler))
    one = [x for _, x, _ in sampler.walk(denoise, seeds, label, start)][-1]
    two = sampler(denoise, seeds, label)
    assert all(torch.equal(t, c) for t, c in zip(tensors, before, strict=True))
    assert seeds == [5, 6]
    assert vars(sampler) == settings
    assert torch.equal(torch.get_rng_state(), generator)
    assert not torch.equal(one, two)
    assert not two.requires_grad
    assert torch.equal(sampler(denoise, seeds, label), two)


def test_uint8_and_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    x = from_uint8(pixels)
    assert x.dtype == torch.float32
    assert x[0] == -1
    assert x[255] == 1
    assert x[51].item() == pytest.approx(-0.6, abs=1e-7)
    assert torch.equal(to_uint8(x), pixels)
    for shift in (-0.0039, 0.0039):  # just within half a step of 2/255
        assert torch.equal(to_uint8(x + shift), pixels)
    assert to_uint8(torch.tensor([-3.0, -1.0, 0.3, 1.0, 7.0])).tolist() == [0, 0, 166, 255, 255]
    assert to_uint8(x.double()).dtype == torch.uint8


@ALL
@pytest.mark.parametrize("size", [1, 4, 250])
def test_sample_yields_bytes_in_the_order_of_the_seeds(model, sampler, size, monkeypatch):
    monkeypatch.setattr(sample_module, "MOST", 16)
    denoise, seeds = model(classes=3), range(20, 60)
    label = torch.arange(40) % 4
    batches = list(sample(denoise, sampler, seeds, size, label))
    assert [len(b) for b in batches] == [16, 16, 8]  # on a CPU, whatever was asked for
    images = torch.cat(batches)
    assert images.dtype == torch.uint8
    assert images.device.type == "cpu"
    expected = (sampler(denoise, list(seeds), label).clamp(-1, 1) + 1) * 127.5
    assert (images.float() - expected).abs().max() <= 0.502
    assert images.float().std() > 10


def test_a_user_defined_solver_uses_the_same_loop(toy, states):
    class Jump(Sampler):
        def plan(self, states: LatentStates, rows: list[int]) -> list[Terms]:
            return [Terms(x0=1.0, x=0.0)] * (len(rows) - 1)

    denoise = toy_model(toy, X0, S=4)
    x = noise(4, 4)
    with torch.no_grad():
        for s in (4, 3, 2, 1):
            x = denoise(x, s).clamp(-1, 1)
    torch.testing.assert_close(Jump()(denoise, SEEDS), x)


@pytest.mark.parametrize("classes", [None, 3])
def test_seeds_of_numpy_draw_the_same_images(model, classes):
    denoiser = model(classes=classes)
    plain = torch.cat(list(sample(denoiser, Ancestral(), range(4))))
    assert torch.equal(torch.cat(list(sample(denoiser, Ancestral(), np.arange(4)))), plain)
    assert torch.equal(torch.cat(list(sample(denoiser, Ancestral(), torch.arange(4)))), plain)
    assert torch.equal(Ancestral()(denoiser, np.arange(4), label=torch.arange(4) % 3 if classes else None),
                       Ancestral()(denoiser, range(4), label=torch.arange(4) % 3 if classes else None))  # fmt: skip
