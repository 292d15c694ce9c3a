import math

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tdisent.diffusion.schedules import Cosine, Linear, NoiseSchedule, ScaledLinear, Sigmoid
from lightning_tdisent.errors import InputError

SCHEDULES = {
    "linear": Linear(),
    "ldm": ScaledLinear(),
    "sd": ScaledLinear(beta_start=0.00085, beta_end=0.012),
    "cosine": Cosine(),
    "sigmoid": Sigmoid(),
}


def alpha_bar(schedule: NoiseSchedule) -> list[float]:
    return schedule.log_alpha_bar().exp().tolist()


# published betas, T = 1000, 1-based indices; as many digits as are known
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("linear", ["0.98771", "0.95706", "0.08181", "0.000047", "0.000040"]),
        ("ldm", ["0.95097", "0.89701", "0.11959", "0.000166", "0.000142"]),
        ("sd", ["0.97180", "0.93978", "0.28305", "0.005130", "0.004660"]),
        ("cosine", ["0.99647", "0.98830", "0.50008", "0.000155", "0.000000"]),
    ],
)
def test_alpha_bar_at_known_indices(name, values):
    found = alpha_bar(SCHEDULES[name])
    for t, value in zip([31, 62, 496, 992, 1000], values, strict=True):
        half_a_digit = 0.5 * 10.0 ** -len(value.partition(".")[2])
        assert abs(found[t] - float(value)) <= 1.001 * half_a_digit, (t, found[t], value)


def test_cosine_ends_at_the_clipped_beta():
    found = alpha_bar(Cosine())
    assert found[1000] == pytest.approx(found[999] * 0.001, rel=1e-9)
    assert found[1000] == pytest.approx(2.4287e-9, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("linear", {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
        ("ldm", {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}),
        ("sd", {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
        ("cosine", {"beta_schedule": "squaredcos_cap_v2"}),
    ],
)
def test_alpha_bar_equals_diffusers(name, config):
    theirs = DDPMScheduler(num_train_timesteps=1000, **config).alphas_cumprod.double()
    # float32: each of t factors 1 - beta is rounded to half an ulp, so errors add up to some 1e-5; the last cosine
    # factor is 1 - 0.999 in float32
    rtol = torch.full((1000,), 2e-5)
    rtol[-1] = 1e-4
    ours = SCHEDULES[name].log_alpha_bar().exp()[1:]
    assert ((ours - theirs).abs() <= rtol * theirs).all(), ((ours - theirs).abs() / theirs).max()


def test_linear_against_a_plain_product():
    product = 1.0
    found = alpha_bar(Linear(T=7, beta_start=0.01, beta_end=0.13))
    assert found[0] == 1.0
    for t in range(1, 8):
        product *= 1 - (0.01 + 0.02 * (t - 1))
        assert found[t] == pytest.approx(product, rel=1e-14)


def test_scaled_linear_against_a_plain_product():
    product = 1.0
    found = alpha_bar(ScaledLinear(T=4, beta_start=0.04, beta_end=0.25))
    for t, root in enumerate([0.2, 0.3, 0.4, 0.5], start=1):
        product *= 1 - root**2
        assert found[t] == pytest.approx(product, rel=1e-14)


def test_cosine_is_the_ratio_of_squared_cosines_before_the_clip():
    def f(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    found = alpha_bar(Cosine(T=50))
    for t in range(50):
        assert found[t] == pytest.approx(f(t / 50) / f(0), rel=1e-12)


@pytest.mark.parametrize("args", [{}, {"start": 0.0, "end": 3.0}, {"start": -2.0, "end": 5.0, "tau": 0.7}])
def test_sigmoid_against_its_formula(args):
    start, end, tau = args.get("start", -3.0), args.get("end", 3.0), args.get("tau", 1.0)

    def g(u):
        return 1 / (1 + math.exp(-(u * (end - start) + start) / tau))

    found = alpha_bar(Sigmoid(T=40, **args))
    assert found[0] == 1.0
    for t in range(40):
        assert found[t] == pytest.approx((g(1) - g(t / 40)) / (g(1) - g(0)), rel=1e-10)
    assert found[40] == pytest.approx(1e-9, rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("T", [1, 2, 3, 10, 32, 250, 1000, 4000])
def test_alpha_bar_falls_strictly(schedule, T):
    chain = schedule.recomputed(T)
    log_ab, log_snr = chain.log_alpha_bar(), chain.log_snr()
    assert len(log_ab) == len(log_snr) == T + 1
    assert log_ab.dtype == log_snr.dtype == torch.float64
    assert log_ab[0] == 0
    assert log_snr[0] == math.inf
    assert log_snr[1:].isfinite().all()
    assert (log_ab[1:] < log_ab[:-1]).all()
    assert (log_snr[1:] < log_snr[:-1]).all()


@settings(deadline=None)
@given(T=st.integers(2, 3000), start=st.floats(1e-6, 0.01), more=st.floats(1e-6, 0.3))
def test_any_chain_of_betas_falls_strictly(T, start, more):
    for cls in (Linear, ScaledLinear):
        log_snr = cls(T=T, beta_start=start, beta_end=start + more).log_snr()
        assert (log_snr[1:] < log_snr[:-1]).all()


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_log_snr_is_the_logit_of_alpha_bar(schedule):
    ab = alpha_bar(schedule)
    for t in (1, 2, 31, 500, 999):
        assert float(schedule.log_snr()[t]) == pytest.approx(math.log(ab[t]) - math.log1p(-ab[t]), rel=1e-10)


@pytest.mark.parametrize("name", ["linear", "ldm", "cosine", "sigmoid"])
def test_zero_terminal_shifts_and_scales_the_signal(name):
    cls = type(SCHEDULES[name])
    plain, zero = SCHEDULES[name], cls(zero_terminal=True)
    a = [math.sqrt(v) for v in alpha_bar(plain)]
    log_snr = zero.log_snr()
    found = torch.sigmoid(log_snr).sqrt().tolist()
    assert log_snr[0] == math.inf
    assert log_snr[-1] == -math.inf
    assert found[-1] == 0.0
    assert found[1] == pytest.approx(a[1], rel=1e-12)
    for t in (2, 31, 500, 992, 999):
        assert found[t] == pytest.approx((a[t] - a[1000]) * a[1] / (a[1] - a[1000]), rel=1e-10)
    assert (log_snr[1:] < log_snr[:-1]).all()


def test_zero_terminal_equals_diffusers():
    theirs = DDPMScheduler(num_train_timesteps=1000, rescale_betas_zero_snr=True).alphas_cumprod.double()
    ours = torch.sigmoid(Linear(zero_terminal=True).log_snr())[1:]
    # theirs replaces the last 0 by 2^-24, and its float32 betas lose digits where the signal is small
    assert torch.allclose(ours[:-1], theirs[:-1], rtol=5e-4, atol=1e-8)
    assert theirs[-1] <= 2.0**-24


def test_native_and_rescaled_chains_recompute_the_betas():
    native, rescaled = Linear().recomputed(32), Linear().recomputed(32, rescale=True)
    assert isinstance(native, Linear)
    assert isinstance(rescaled, Linear)
    torch.testing.assert_close(native.betas(), torch.linspace(1e-4, 0.02, 32, dtype=torch.float64))
    torch.testing.assert_close(rescaled.betas(), torch.linspace(1e-4, 0.02, 32, dtype=torch.float64) * 31.25)


def test_recomputing_leaves_the_schedule_alone():
    schedule = Linear()
    schedule.recomputed(32, rescale=True)
    assert (schedule.T, schedule.beta_start, schedule.beta_end) == (1000, 1e-4, 0.02)


def test_rescaling_is_void_for_functions_of_time():
    for schedule in (Cosine(), Sigmoid()):
        assert torch.equal(schedule.recomputed(32).log_snr(), schedule.recomputed(32, rescale=True).log_snr())


@pytest.mark.parametrize(
    ("S", "beta"),
    [(20, "1"), (16, "1.25"), (10, "2"), (1, "0.1")],
)
def test_rescaled_betas_outside_the_unit_interval_are_refused(S, beta):
    # 0.02 * 1000/S at the end of the chain; a single level has beta_start * 1000 only, which is fine
    chain = Linear().recomputed(S, rescale=True)
    if S == 1:
        assert alpha_bar(chain)[1] == pytest.approx(1 - float(beta))
        return
    with pytest.raises(InputError, match=r"outside \(0, 1\)") as refusal:
        chain.log_alpha_bar()
    first = next(t for t in range(1, S + 1) if chain.betas()[t - 1] >= 1)
    assert f"t={first} of {S}" in str(refusal.value)
    assert f"{float(chain.betas()[first - 1]):.4g}" in str(refusal.value)
    assert "mapped" in str(refusal.value)
    assert float(chain.betas()[-1]) == pytest.approx(float(beta))


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (lambda: Linear(T=0), "0"),
        (lambda: Linear(T=-3), "-3"),
        (lambda: Cosine(max_beta=1.0), "1.0"),
        (lambda: Cosine(max_beta=0.0), "0.0"),
        (lambda: Sigmoid(tau=0.0), "0.0"),
        (lambda: Sigmoid(start=3.0, end=2.5), "2.5"),
        (lambda: Sigmoid(floor=1.5), "1.5"),
        (lambda: Linear(beta_end=1.25).log_snr(), "1.25"),
        (lambda: Linear(beta_start=-0.25).log_snr(), "-0.25"),
    ],
)
def test_refused(make, value):
    with pytest.raises(InputError) as refusal:
        make()
    assert value in str(refusal.value)
