"""Averages of weights over any length, from snapshots: against quadrature, exact fractions and closed forms.

Long, as every formula has an oracle of its own.
"""

import dataclasses
import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tdisent.cli import main
from lightning_tdisent.diffusion.objectives import Eps, V
from lightning_tdisent.diffusion.schedules import Cosine, Linear
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError
from lightning_tdisent.lit.callbacks.weights import EMA
from lightning_tdisent.models.averages import LONGEST, coefficients, gamma, overlap, reconstruct
from lightning_tdisent.models.card import read_card
from lightning_tdisent.models.expert import load_expert, save_expert
from lightning_tdisent.networks.network import Network
from lightning_tdisent.runs import AVERAGES
from lightning_tdisent.sampling.denoiser import Denoiser

GAUSS, GAUSS_WEIGHTS = np.polynomial.legendre.leggauss(250)
ROOTS = (GAUSS + 1) / 2
# quadrature on [0, 1] in the fourth root of tau, which makes tau^g smooth at 0 for any g >= 0
NODES, WEIGHTS = ROOTS**4, 2 * ROOTS**3 * GAUSS_WEIGHTS


def profile(tau, t, g):
    return np.where(tau <= t, (g + 1) / t * np.minimum(tau / t, 1) ** g, 0.0)


def grid(ends):
    """Nodes and weights of [0, max(ends)], a rule of its own between any two ends, where profiles jump to 0."""
    edges = [0, *sorted(set(ends))]
    spans = [(a, b - a) for a, b in pairwise(edges)]
    return np.concatenate([a + n * NODES for a, n in spans]), np.concatenate([n * WEIGHTS for _, n in spans])


def sampled(snapshots, step, exponent):
    """Profiles of the snapshots and of the goal on a grid, so that plain dot products are inner products."""
    tau, weight = grid([t for t, _ in snapshots] + [step])
    columns = [np.sqrt(weight) * profile(tau, t, g) for t, g in [*snapshots, (step, exponent)]]
    return np.stack(columns[:-1], 1), columns[-1]


def plan(steps, every, lengths=(0.05, 0.1)):
    return [(n, gamma(length)) for n in range(every, steps + 1, every) for length in lengths]


# the exponent


def test_gamma_has_the_published_values():
    assert f"{gamma(0.05):.2f}" == "16.97"
    assert f"{gamma(0.10):.2f}" == "6.94"


@settings(deadline=None)
@given(st.floats(1e-3, LONGEST))
def test_gamma_inverts_the_published_formula(sigma_rel):
    g = gamma(sigma_rel)
    assert ((g + 1) / ((g + 2) ** 2 * (g + 3))) ** 0.5 == pytest.approx(sigma_rel, rel=1e-9)


@settings(deadline=None)
@given(st.floats(0, 500))
def test_the_formula_of_an_exponent_inverts_gamma(g):
    sigma_rel = min(LONGEST, ((g + 1) / ((g + 2) ** 2 * (g + 3))) ** 0.5)
    assert gamma(sigma_rel) == pytest.approx(g, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, LONGEST])
def test_the_profile_has_the_deviation_that_was_asked_for(sigma_rel):
    t = 700.0
    tau, weight = grid([t])
    p = weight * profile(tau, t, gamma(sigma_rel))
    mean = (p * tau).sum()
    assert p.sum() == pytest.approx(1, rel=1e-12)
    assert ((p * (tau - mean) ** 2).sum()) ** 0.5 / t == pytest.approx(sigma_rel, rel=1e-9)


def test_the_longest_average_is_the_plain_mean():
    assert gamma(LONGEST) == pytest.approx(0, abs=1e-14)  # 12^-1/2 is rounded
    (beta,) = EMA(lengths=[LONGEST]).betas(8)
    assert beta == pytest.approx(7 / 8, rel=1e-14)


@pytest.mark.parametrize("sigma_rel", [0, -0.1, math.nextafter(LONGEST, 1), 0.5, math.inf, math.nan])
def test_a_length_that_no_profile_has_is_refused(sigma_rel):
    with pytest.raises(InputError, match=rf"sigma_rel must lie in \(0, 0.2887\], the plain mean, got {sigma_rel}"):
        gamma(sigma_rel)


# inner products


@settings(deadline=None)
@given(st.integers(1, 10**6), st.floats(0, 200), st.integers(1, 10**6), st.floats(0, 200))
def test_overlap_is_the_integral_of_the_product(t, g, u, h):
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        found = overlap(np.array(float(t)), np.array(g), np.array(float(u)), np.array(h))
    m = min(t, u)
    integral = (m * WEIGHTS * profile(m * NODES, t, g) * profile(m * NODES, u, h)).sum()
    assert float(found) == pytest.approx(integral, rel=1e-9, abs=1e-290)


@settings(deadline=None)
@given(st.floats(1, 1e6), st.floats(0, 200), st.floats(1, 1e6), st.floats(0, 200))
def test_overlap_is_symmetric(t, g, u, h):
    t, g, u, h = map(np.array, (t, g, u, h))
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        assert float(overlap(t, g, u, h)) == pytest.approx(float(overlap(u, h, t, g)), rel=1e-12)


def test_overlap_of_long_runs_and_short_averages_does_not_overflow():
    t, g = (a.flatten() for a in np.meshgrid([1.0, 1e3, 1e6], [0.0, 17.0, 200.0]))
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        a = overlap(t[:, None], g[:, None], t[None], g[None])
    for i in range(9):
        for j in range(9):
            low = min(t[i], t[j])
            log = math.log((g[i] + 1) * (g[j] + 1) / (g[i] + g[j] + 1) / low)
            log += g[i] * math.log(low / t[i]) + g[j] * math.log(low / t[j]) - math.log(max(t[i], t[j]) / low)
            assert a[i, j] == pytest.approx(math.exp(log), rel=1e-9, abs=1e-300)
    values = np.linalg.eigvalsh(a)
    assert values.min() >= -1e-13 * values.max()  # a Gram matrix


# coefficients


@pytest.mark.parametrize("length", [0.05, 0.1])
@pytest.mark.parametrize("step", [100, 600, 1000])
def test_a_stored_profile_is_returned_as_it_is(step, length):
    snapshots = plan(1000, 100)
    x, error = coefficients(snapshots, step, gamma(length))
    unit = np.zeros(len(snapshots))
    unit[snapshots.index((step, gamma(length)))] = 1
    np.testing.assert_allclose(x, unit, atol=1e-7)
    assert error < 1e-6  # a difference of ones, each rounded to 1e-16, under a square root


@pytest.mark.parametrize("every", [50, 100, 500])
@pytest.mark.parametrize("sigma_rel", [0.03, 0.05, 0.07, 0.12, 0.2, LONGEST])
def test_the_error_reported_is_that_of_the_best_profile_on_a_fine_grid(sigma_rel, every):
    snapshots = plan(1000, every)
    x, error = coefficients(snapshots, 1000, gamma(sigma_rel))
    columns, goal = sampled(snapshots, 1000, gamma(sigma_rel))
    # the last one takes what is left to a sum of 1
    rest = columns[:, :-1] - columns[:, -1:]
    best = np.linalg.lstsq(rest, goal - columns[:, -1], rcond=None)[0]
    best = np.append(best, 1 - best.sum())
    assert x.sum() == pytest.approx(1, abs=1e-9)
    norm = np.linalg.norm(goal)
    assert norm**2 == pytest.approx(float(overlap(*map(np.array, (1000.0, gamma(sigma_rel)) * 2))), rel=1e-9)
    assert np.linalg.norm(columns @ x - goal) / norm == pytest.approx(error, abs=1e-6)
    assert np.linalg.norm(columns @ best - goal) / norm == pytest.approx(error, abs=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.075, 0.15, 0.2, LONGEST])
@pytest.mark.parametrize("snapshots", [plan(1000, 125), [(1000, gamma(0.05)), (1000, gamma(0.1))]])
def test_the_average_of_constant_weights_is_these_weights(snapshots, sigma_rel):
    x, _ = coefficients(snapshots, 1000, gamma(sigma_rel))
    assert x @ np.full(len(x), 3.7) == pytest.approx(3.7, abs=1e-9)


@settings(deadline=None)
@given(st.sets(st.integers(1, 40), min_size=2, max_size=8), st.floats(0.02, LONGEST), st.data())
def test_another_snapshot_never_makes_the_profile_worse(ends, sigma_rel, data):
    snapshots = [(50 * n, gamma(length)) for n in sorted(ends) for length in (0.05, 0.1)]
    left_out = data.draw(st.integers(0, len(snapshots) - 1))
    fewer = snapshots[:left_out] + snapshots[left_out + 1 :]
    goal = (max(50 * n for n in ends), gamma(sigma_rel))
    assert coefficients(snapshots, *goal)[1] <= coefficients(fewer, *goal)[1] + 1e-6


@settings(deadline=None)
@given(st.integers(2, 1000), st.floats(0.03, LONGEST))
def test_the_unit_of_time_does_not_matter(factor, sigma_rel):
    snapshots = plan(1000, 250)
    x, error = coefficients(snapshots, 1000, gamma(sigma_rel))
    y, other = coefficients([(factor * t, g) for t, g in snapshots], factor * 1000, gamma(sigma_rel))
    np.testing.assert_allclose(x, y, atol=1e-8)
    assert error == pytest.approx(other, abs=1e-6)


# the recursion that is stored, and the continuous profile


@pytest.mark.parametrize("g", [0, 1, 6, 17])
def test_the_product_of_the_betas_telescopes_to_differences_of_powers(g):
    # beta_n = ((n - 1)/n)^(g + 1), so what follows tau multiplies to (tau/t)^(g + 1)
    t = 30
    betas = [Fraction(n - 1, n) ** (g + 1) for n in range(1, t + 1)]
    for tau in range(1, t + 1):
        weight = (1 - betas[tau - 1]) * math.prod(betas[tau:])
        assert weight == Fraction(tau ** (g + 1) - (tau - 1) ** (g + 1), t ** (g + 1))


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2, LONGEST])
def test_the_recursion_of_the_training_weighs_each_step_by_the_integral_of_the_profile_over_it(sigma_rel):
    t, g = 60, gamma(sigma_rel)
    weights = np.zeros(t)
    for n in range(1, t + 1):
        (beta,) = EMA(lengths=[sigma_rel]).betas(n)
        weights *= beta
        weights[n - 1] = 1 - beta
    steps = np.arange(1, t + 1)
    integrals = [(WEIGHTS * profile(n - 1 + NODES, t, g)).sum() for n in steps]
    np.testing.assert_allclose(weights, integrals, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(weights, (steps / t) ** (g + 1) - ((steps - 1) / t) ** (g + 1), rtol=1e-9, atol=1e-15)


# averages of a known training


def trajectory(steps=2000):
    """Weights of every step: drifting, oscillating, decaying, and random walks."""
    n, rng = np.arange(1, steps + 1)[:, None] / steps, np.random.default_rng(0)
    smooth = [3 * n, np.sin(2 * np.pi * n * np.arange(1, 9)), np.exp(-n * np.arange(1, 9)), np.ones_like(n)]
    walks = np.cumsum(rng.normal(size=(steps, 16)), 0) / steps**0.5
    return np.concatenate([*smooth, walks], 1)


def averaged(weights, sigma_rel):
    """Return the average after each step, by the recursion in float64."""
    out = np.empty_like(weights)
    for n, w in enumerate(weights, 1):
        beta = (1 - 1 / n) ** (gamma(sigma_rel) + 1)
        out[n - 1] = w if n == 1 else beta * out[n - 2] + (1 - beta) * w
    return out


def rebuilt(weights, stored, every, sigma_rel, step):
    """Return the average of another length from averages stored every few steps, and its reported error."""
    kept = [(n, length) for n in range(every, step + 1, every) for length in stored]
    x, error = coefficients([(n, gamma(length)) for n, length in kept], step, gamma(sigma_rel))
    return sum(c * stored[length][n - 1] for c, (n, length) in zip(x, kept, strict=True)), error


def bound(weights, error, step, sigma_rel):
    """Most that each weight can be off, given the error of the profile.

    An average is the integral of profile times the weights, constant within a step. So two averages differ by the
    integral of (difference of the profiles) times the weights: at most the product of their norms (Cauchy-Schwarz),
    |difference| = error |p|, |p|^2 = <p, p> = (g + 1)^2 / (2 g + 1) / step. The error is known to 1e-7.
    """
    g = gamma(sigma_rel)
    norm = ((g + 1) ** 2 / (2 * g + 1) / step) ** 0.5
    return (error + 1e-6) * norm * np.sqrt((weights[:step] ** 2).sum(0))


@pytest.mark.parametrize("step", [800, 2000])
@pytest.mark.parametrize("sigma_rel", [0.05, 0.06, 0.075, 0.09, 0.1, 0.12])
def test_any_length_is_rebuilt_from_snapshots_of_two(sigma_rel, step):
    weights = trajectory()
    stored = {length: averaged(weights, length) for length in (0.05, 0.1)}
    direct = averaged(weights, sigma_rel)[step - 1]
    worst = []
    for every in (400, 200, 100, 50):
        found, error = rebuilt(weights, stored, every, sigma_rel, step)
        assert (np.abs(found - direct) <= bound(weights, error, step, sigma_rel)).all()
        worst.append((error, np.linalg.norm(found - direct)))
    errors, distances = map(np.array, zip(*worst, strict=True))
    if sigma_rel in stored:
        assert (errors < 1e-6).all()
        assert (distances < 1e-6).all()
        return
    assert (np.diff(errors) < 0).all()  # more snapshots, a better profile, and better weights
    assert (np.diff(distances) < 0).all()
    nearest = min(np.linalg.norm(average[step - 1] - direct) for average in stored.values())
    assert distances[-1] < nearest / 20  # far better than taking one that is there
    assert errors[-1] < 0.02


# real files

STEPS, EVERY, LENGTHS = 40, 8, (0.05, 0.1)


@pytest.fixture
def run(tmp_path, model, card_of):
    """A run folder with snapshots of a tiny denoiser, its weights at every step (float64), and where they lie."""

    def make(folder="run", steps=STEPS, every=EVERY, dtype=torch.float32):
        one = model(rows=[2, 3])
        names = [name for name, _ in one.named_parameters()]
        start = torch.cat([p.detach().flatten() for p in one.parameters()]).double()
        rng = torch.Generator().manual_seed(0)
        walk = torch.randn(steps, len(start), generator=rng, dtype=torch.float64).cumsum(0) * 0.05
        weights = (start + walk).numpy()
        for length in LENGTHS:
            averages = averaged(weights, length)
            for n in range(every, steps + 1, every):
                parts = torch.from_numpy(averages[n - 1]).split([p.numel() for p in one.parameters()])
                state = {
                    k: part.view(p.shape).to(dtype) for k, part, p in zip(names, parts, one.parameters(), strict=True)
                }
                facts = {"average": {"sigma_rel": length, "steps": n}, "steps": n, "images_seen": 32 * n}
                path = tmp_path / folder / AVERAGES / f"step-{n:09d}_{length:g}.safetensors"
                save_expert(path, one, card_of(one, **facts), {**one.state_dict(), **state})
        return tmp_path / folder, weights

    return make


def flat(denoiser):
    return torch.cat([p.detach().flatten() for p in denoiser.parameters()]).double().numpy()


@pytest.mark.parametrize("sigma_rel", [0.05, 0.075, 0.12])
def test_a_file_of_any_length_is_made_from_the_files_of_a_run(run, tmp_path, sigma_rel):
    folder, weights = run()
    out = tmp_path / "deep" / "other.safetensors"
    error = reconstruct(folder, sigma_rel, out)
    denoiser, card = load_expert(out)
    direct = averaged(weights, sigma_rel)[-1]
    snapshots = [(n, gamma(s)) for s in LENGTHS for n in range(EVERY, STEPS + 1, EVERY)]
    x, expected = coefficients(snapshots, STEPS, gamma(sigma_rel))
    assert error == pytest.approx(expected, abs=1e-6)
    # each snapshot and the result are rounded to float32, relative to the largest weight of all
    rounding = (np.abs(x).sum() + 1) * 2**-24 * np.abs(weights).max()
    assert (np.abs(flat(denoiser) - direct) <= bound(weights, error, STEPS, sigma_rel) + rounding).all()
    # it says what it is, and otherwise what the last snapshot says
    last = read_card(folder / AVERAGES / f"step-{STEPS:09d}_0.05.safetensors")
    average = {"sigma_rel": sigma_rel, "steps": STEPS, "error": round(error, 6)}
    assert card == dataclasses.replace(last, average=average)
    assert (card.steps, card.images_seen, card.rows) == (STEPS, 32 * STEPS, [2, 3])
    if sigma_rel in LENGTHS:
        stored, _ = load_expert(folder / AVERAGES / f"step-{STEPS:09d}_{sigma_rel:g}.safetensors")
        np.testing.assert_allclose(flat(denoiser), flat(stored), rtol=0, atol=rounding)


def test_an_average_ended_at_a_step_sees_nothing_after_it(run, tmp_path):
    folder, weights = run()
    error = reconstruct(folder, 0.08, tmp_path / "whole", 24)
    direct = averaged(weights, 0.08)[23]
    rounding = 20 * 2**-24 * np.abs(weights).max()
    found, card = load_expert(tmp_path / "whole")
    assert (np.abs(flat(found) - direct) <= bound(weights, error, 24, 0.08) + rounding).all()
    assert card.average == {"sigma_rel": 0.08, "steps": 24, "error": round(error, 6)}
    assert card.images_seen == 32 * 24
    for file in (folder / AVERAGES).iterdir():
        if int(file.name[5:14]) > 24:
            file.unlink()
    assert reconstruct(folder, 0.08, tmp_path / "cut") == error
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "cut").read_bytes()


def test_weights_keep_their_dtype(run, tmp_path):
    folder, weights = run(dtype=torch.bfloat16)
    error = reconstruct(folder, 0.08, tmp_path / "out")
    denoiser, _ = load_expert(tmp_path / "out")
    assert {p.dtype for p in denoiser.parameters()} == {torch.bfloat16}
    x, _ = coefficients([(n, gamma(s)) for s in LENGTHS for n in range(EVERY, STEPS + 1, EVERY)], STEPS, gamma(0.08))
    rounding = (np.abs(x).sum() + 1) * 2**-8 * np.abs(weights).max()
    gap = np.abs(flat(denoiser) - averaged(weights, 0.08)[-1])
    assert (gap <= bound(weights, error, STEPS, 0.08) + rounding).all()


def test_a_folder_without_snapshots_is_refused_with_what_writes_them(tmp_path):
    with pytest.raises(InputError, match=r"averages holds no snapshots: .*--ema\.lengths '\[0\.05, 0\.1\]'"):
        reconstruct(tmp_path, 0.1, tmp_path / "out")
    (tmp_path / AVERAGES).mkdir()
    with pytest.raises(InputError, match=r"averages holds no snapshots"):
        reconstruct(tmp_path, 0.1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_step_without_a_snapshot_is_refused_with_those_that_have_one(run, tmp_path):
    folder, _ = run()
    for step in (0, 7, 41):
        with pytest.raises(InputError, match=rf"--step {step}: snapshots were taken at 8, 16, 24, 32, 40$"):
            reconstruct(folder, 0.1, tmp_path / "out", step)
    assert not (tmp_path / "out").exists()


def test_a_length_that_no_profile_has_is_refused_before_anything_is_written(run, tmp_path):
    folder, _ = run()
    with pytest.raises(InputError, match="sigma_rel must lie in"):
        reconstruct(folder, 0.3, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("average", [None, {"decay": 0.99, "steps": 3}, {"sigma_rel": 0.05}, {"steps": 3}])
def test_a_file_that_is_no_snapshot_is_refused_by_name(run, tmp_path, model, card_of, average):
    folder, _ = run()
    one = model(rows=[2, 3])
    path = folder / AVERAGES / "step-000000009_1.safetensors"
    save_expert(path, one, card_of(one, average=average))
    with pytest.raises(InputError, match=rf"{path.name}: not a snapshot of a power-function average: it holds ema"):
        reconstruct(folder, 0.1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_expert_at_all_is_refused_by_name(run, tmp_path):
    folder, _ = run()
    (folder / AVERAGES / "step-000000009_1.safetensors").write_bytes(b"these are no weights")
    with pytest.raises(InputError, match=r"step-000000009_1\.safetensors: not an expert"):
        reconstruct(folder, 0.1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("at", [1, 20, 40])
@pytest.mark.parametrize(
    ("other", "values"),
    [
        (lambda model, unet, states: model(rows=[2, 4]), ["[2, 3]", "[2, 4]"]),
        (lambda model, unet, states: model(rows=[2, 3], dropout=0.5), ["'dropout': 0.0", "'dropout': 0.5"]),
        (
            lambda model, unet, states: Denoiser(unet(), V(), LatentStates(Cosine(), S=4), [2, 3]),
            [LatentStates(Linear(), S=4).fingerprint, LatentStates(Cosine(), S=4).fingerprint],
        ),
        (lambda model, unet, states: model(Eps(), rows=[2, 3]), ["objectives.V", "objectives.Eps"]),
    ],
    ids=["rows", "network", "table", "objective"],
)
def test_snapshots_of_several_runs_are_refused_with_both_values(
    run, tmp_path, model, unet, states, card_of, other, values, at
):
    folder, _ = run()
    odd = other(model, unet, states)
    card = card_of(odd, average={"sigma_rel": 0.2, "steps": at})
    save_expert(folder / AVERAGES / f"step-{at:09d}_0.2.safetensors", odd, card)
    with pytest.raises(InputError, match=r"averages mixes snapshots of several runs") as refusal:
        reconstruct(folder, 0.1, tmp_path / "out")
    assert [value for value in values if value not in str(refusal.value)] == []
    assert not (tmp_path / "out").exists()


def test_snapshots_of_runs_on_other_data_are_refused(run, tmp_path, model, card_of):
    folder, _ = run()
    one = model(rows=[2, 3])
    card = card_of(one, average={"sigma_rel": 0.2, "steps": 40}, data="0ther1mages")
    save_expert(folder / AVERAGES / "step-000000040_0.2.safetensors", one, card)
    with pytest.raises(InputError, match=r"averages mixes snapshots of several runs: .*0ther1mages"):
        reconstruct(folder, 0.1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Buffered(Network):
    """A weight with a constant, a count and a table beside it, all kept in its file."""

    def __init__(self) -> None:
        super().__init__([1, 2, 2], None, None)
        self.weight = torch.nn.Parameter(torch.zeros(4))
        self.register_buffer("scale", torch.tensor([0.25, -3.0, 1e4]))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.tensor([True, False]))

    def forward(self, x, index=None, label=None):
        return x * self.weight.mean() * self.scale[0]


def test_buffers_are_taken_from_the_last_step_and_not_averaged(tmp_path, states, card_of):
    one = Denoiser(Buffered(), V(), states)
    for length in (0.05, 0.1):
        for n in (10, 20, 30):
            one.network.seen.fill_(n)
            with torch.no_grad():
                one.network.weight.fill_(n)
            card = card_of(one, average={"sigma_rel": length, "steps": n})
            save_expert(tmp_path / AVERAGES / f"step-{n:09d}_{length:g}.safetensors", one, card)
    x, _ = coefficients([(n, gamma(s)) for s in (0.05, 0.1) for n in (10, 20, 30)], 30, gamma(0.15))
    reconstruct(tmp_path, 0.15, tmp_path / "out")
    found = load_expert(tmp_path / "out")[0].network
    np.testing.assert_allclose(found.weight.detach(), x @ [10, 20, 30, 10, 20, 30], rtol=1e-6)
    assert int(found.seen) == 30
    assert found.mask.tolist() == [True, False]
    assert torch.equal(found.scale, torch.tensor([0.25, -3.0, 1e4]))


@pytest.mark.parametrize("name", ["average", "average.ckpt", "average.pt"])
def test_an_output_name_without_the_suffix_of_weights_is_refused(run, tmp_path, capsys, name):
    argv = ["average", str(run), "--sigma-rel", "0.1", "--out", str(tmp_path / name)]
    assert main(argv) == 2
    assert f"{name}: files of weights must end with .safetensors" in capsys.readouterr().err
    assert not (tmp_path / name).exists()
