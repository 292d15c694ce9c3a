import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tdisent.diffusion.objectives import P2, X0, Constant, Eps, Likelihood, MinSNR, Objective, V
from lightning_tdisent.diffusion.process import posterior
from lightning_tdisent.diffusion.schedules import Cosine, Linear, Sigmoid
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError

STATES = LatentStates(Linear(), S=10)
KINDS = {"eps": Eps, "x0": X0, "v": V}


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def snr(states: LatentStates = STATES) -> list[float]:
    return [math.inf] + [ab / (1 - ab) for ab in states.a[1:, 0].square().tolist()]


def found(objective: Objective, states: LatentStates = STATES) -> list[float]:
    table = objective.weights(states)
    assert table.dtype == torch.float64
    assert table.shape == (states.S + 1, 1)
    assert table[0] == 0
    return table[:, 0].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_constant_is_one_on_the_raw_output(kind):
    assert found(KINDS[kind]())[1:] == [1.0] * 10
    assert found(KINDS[kind](Constant()))[1:] == [1.0] * 10


# 2303.09556, eq. 7 and section 3.4
@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize(
    ("kind", "published"),
    [
        ("eps", lambda r, g: min(r, g) / r),
        ("x0", lambda r, g: min(r, g)),
        ("v", lambda r, g: min(r, g) / (r + 1)),
    ],
)
def test_min_snr(kind, published, gamma):
    expected = [published(r, gamma) for r in snr()[1:]]
    assert found(KINDS[kind](MinSNR(gamma)))[1:] == pytest.approx(expected, rel=1e-12)
    assert min(snr()[1:]) < gamma < max(snr()[1:])


# 2204.00227, eq. 8: the eps loss times 1/(k + SNR)^gamma
@pytest.mark.parametrize(("k", "gamma"), [(1.0, 1.0), (1.0, 0.5), (2.5, 1.5)])
def test_p2(k, gamma):
    on_eps = [1 / (k + r) ** gamma for r in snr()[1:]]
    unit = {"eps": [1.0] * 10, "x0": snr()[1:], "v": [r / (r + 1) for r in snr()[1:]]}
    for kind, cls in KINDS.items():
        expected = [w * u for w, u in zip(on_eps, unit[kind], strict=True)]
        assert found(cls(P2(k, gamma)))[1:] == pytest.approx(expected, rel=1e-12)


def test_likelihood_terms_are_divergences_of_gaussians():
    weight = found(X0(Likelihood()))
    x0, x0_hat, x = f64(0.3), f64(-0.5), f64(0.1)
    for s in range(2, 11):
        true, variance = posterior(STATES, x0, x, s, s - 1)
        guess, _ = posterior(STATES, x0_hat, x, s, s - 1)
        divergence = (true - guess).square().item() / (2 * variance)
        assert weight[s] * 0.8**2 == pytest.approx(divergence, rel=1e-10)
    # the decoder: -log N(x0; x0_hat, b_1^2) without its constant
    assert weight[1] == pytest.approx(1 / (2 * STATES.b[1].item() ** 2), rel=1e-12)


def test_likelihood_telescopes():
    for states in (STATES, LatentStates(Cosine(), S=16, terminal_bound=0.1), LatentStates(Sigmoid(), S=10)):
        r = snr(states)
        expected = (r[1] + 1) / 2 + (r[1] - r[-1]) / 2
        assert sum(found(X0(Likelihood()), states)) == pytest.approx(expected, rel=1e-12)
    r = snr()
    assert found(X0(Likelihood()))[4] == pytest.approx((r[3] - r[4]) / 2, rel=1e-12)


@pytest.mark.parametrize("weight", [Constant(), MinSNR(), P2(), Likelihood()], ids=lambda w: type(w).__name__)
@pytest.mark.parametrize(
    "states",
    [
        LatentStates(Linear()),
        LatentStates(Cosine()),
        LatentStates(Sigmoid(), S=10),
        LatentStates(Linear(), S=1),
        LatentStates(Linear(zero_terminal=True), S=10),
    ],
    ids=["linear", "cosine", "sigmoid", "one", "zero"],
)
def test_weights_are_finite_and_count_one_error_alike(weight, states):
    r = f64(*snr(states)[1:])
    on_x0 = f64(*found(X0(weight), states))[1:]
    assert on_x0.isfinite().all()
    assert (on_x0 >= 0).all()
    assert (on_x0[:-1] > 0).all()
    v = f64(*found(V(weight), states))[1:]
    if isinstance(weight, Constant):
        return
    torch.testing.assert_close(v, on_x0 / (1 + r), rtol=1e-9, atol=0)
    if not states.schedule.zero_terminal:
        eps = f64(*found(Eps(weight), states))[1:]
        torch.testing.assert_close(eps, on_x0 / r, rtol=1e-9, atol=0)


def test_targets_and_estimates_by_hand():
    x0, eps, a, b = f64(2.0), f64(-1.0), f64(0.6), f64(0.8)
    x = 0.6 * x0 + 0.8 * eps
    assert Eps().target(x0, eps, a, b).item() == -1.0
    assert X0().target(x0, eps, a, b).item() == 2.0
    assert V().target(x0, eps, a, b).item() == pytest.approx(0.6 * -1.0 - 0.8 * 2.0)
    for cls in KINDS.values():
        objective = cls()
        assert objective.x0(objective.target(x0, eps, a, b), x, a, b).item() == pytest.approx(2.0, abs=1e-14)


def test_unit_turns_a_raw_error_into_an_x0_error():
    x, ab = f64(0.4), 0.36
    for cls in KINDS.values():
        raw, wrong = f64(0.1), f64(0.35)
        objective = cls()
        error = (objective.x0(raw, x, 0.6, 0.8) - objective.x0(wrong, x, 0.6, 0.8)).square().item()
        unit = objective.unit(f64(ab / (1 - ab))).item()
        assert error == pytest.approx(unit * 0.25**2, rel=1e-12)


def test_two_columns_have_the_weights_of_two_tables(columns, both):
    for weight in (Constant(), MinSNR(), P2(), Likelihood()):
        for cls in KINDS.values():
            table = cls(weight).weights(both)
            expected = torch.cat([cls(weight).weights(c) for c in columns], 1)
            torch.testing.assert_close(table, expected, rtol=1e-12, atol=0)


def test_zero_terminal_with_eps_is_refused():
    states = LatentStates(Linear(zero_terminal=True), S=10)
    with pytest.raises(InputError, match=r"Eps .*zero terminal .*row 10 .*V or X0"):
        Eps().check(states)
    Eps().check(STATES)
    V().check(states)
    X0().check(states)


def test_a_weight_that_is_not_finite_is_refused():
    states = LatentStates(Linear(zero_terminal=True), S=10)
    with pytest.raises(InputError, match=r"MinSNR weight of Eps .*row 10 .*0\.0"):
        Eps(MinSNR()).weights(states)


@pytest.mark.parametrize("make", [lambda: MinSNR(-1.5), lambda: P2(k=-1.5), lambda: MinSNR(0), lambda: P2(k=0)])
def test_arguments_that_make_no_weight_are_refused(make):
    with pytest.raises(InputError, match=r"must be positive, got (-1\.5|0)"):
        make()


@settings(deadline=None)
@given(ab=st.floats(1e-4, 0.9999), x0=st.floats(-5, 5), eps=st.floats(-5, 5))
def test_the_estimate_inverts_the_target(ab, x0, eps):
    a, b = (torch.tensor([ab], dtype=torch.float64).sqrt(), torch.tensor([1 - ab], dtype=torch.float64).sqrt())
    image, noise = torch.tensor([x0], dtype=torch.float64), torch.tensor([eps], dtype=torch.float64)
    x = a * image + b * noise
    for objective in (Eps(), X0(), V()):
        raw = objective.target(image, noise, a, b)
        for ca, cb in ((a, b), (float(a), float(b))):
            assert objective.x0(raw, x, ca, cb).item() == pytest.approx(x0, rel=1e-9, abs=1e-9)


def test_estimates_by_hand():
    x, raw = torch.tensor([2.0]), torch.tensor([0.5])
    assert Eps().x0(raw, x, 0.6, 0.8).item() == pytest.approx(1.6 / 0.6)
    assert V().x0(raw, x, 0.6, 0.8).item() == pytest.approx(0.8)
    assert X0().x0(raw, x, 0.6, 0.8).item() == 0.5
