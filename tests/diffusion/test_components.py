"""Tables of several columns against the reference values of 2207.09786 and its library (K = 4, eps = 0.001)."""

import math
from itertools import pairwise

import pytest
import torch

from lightning_tdisent.diffusion.components import ComponentStates, annealed
from lightning_tdisent.diffusion.objectives import X0, Constant, Eps, Likelihood, V
from lightning_tdisent.diffusion.observation import Observation
from lightning_tdisent.diffusion.operators import Edges, Grey, Inpainting, SuperResolution
from lightning_tdisent.diffusion.process import arrive, needs_noise, noise, posterior, transition
from lightning_tdisent.diffusion.schedules import Geometric, Linear, LogLinear
from lightning_tdisent.diffusion.spaces import Haar
from lightning_tdisent.diffusion.spec import build, spec
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError

SHAPE = [3, 16, 16]
INF = math.inf
ENDS = (1.0, 0.75, 0.5, 0.25)  # of a3, d3, d2, d1
# t: log-SNR, mean coefficient, deviation of d1, d2, d3, a3; finished ones are left out
BORN, DEAD = (10, 0.9999773, 0.0067378), (-10, 0.0067378, 0.9999773)
MARGINALS = {
    1: [BORN] * 4,
    50: [
        (6.06426, 0.9988398, 0.0481570),
        (8.03607, 0.9998383, 0.0179853),
        (8.69159, 0.9999160, 0.0129601),
        (9.01902, 0.9999395, 0.0110032),
    ],
    125: [
        (0.04016, 0.7141700, 0.6999723),
        (5.03006, 0.9967467, 0.0805974),
        (6.68892, 0.9993783, 0.0352574),
        (7.51752, 0.9997284, 0.0233063),
    ],
    250: [
        DEAD,
        (0.02004, 0.7106405, 0.7035554),
        (3.35113, 0.9829252, 0.1840055),
        (5.01502, 0.9966977, 0.0812020),
    ],
    375: [(-4.98998, 0.0822180, 0.9966144), (0.01335, 0.7094630, 0.7047427), (2.51251, 0.9617767, 0.2738351)],
    500: [DEAD, (-3.32443, 0.1863933, 0.9824752), (0.01001, 0.7088741, 0.7053350)],
    625: [(-6.66222, 0.0357306, 0.9993615), (-2.49249, 0.2763805, 0.9610483)],
    750: [DEAD, (-4.99499, 0.0820135, 0.9966312)],
    875: [(-7.49750, 0.0235407, 0.9997229)],
    1000: [DEAD],
}


def curve(t: torch.Tensor, end: float, eps: float = 1e-3) -> torch.Tensor:
    """Log-SNR at times t in continuous time, -inf where finished."""
    L = 10 - 20 * (t - eps) / (end - eps)
    return L.where(t <= end + 1e-12, -INF)


def at_times(t: list[float], ends=ENDS, space=None, shape=SHAPE, observation=None) -> ComponentStates:
    """States at times of the continuous curves, row 0 the data."""
    time = torch.tensor(t, dtype=torch.float64)
    table = torch.stack([curve(time, end) for end in ends], 1)
    table = torch.cat([torch.full((1, len(ends)), INF, dtype=torch.float64), table])
    schedule = LogLinear(T=len(t))
    return ComponentStates.of_table(
        table, torch.arange(len(t) + 1), schedule, shape, space or Haar(len(ends) - 1), observation, terminal_bound=1.0
    )


def test_marginals_of_all_scales():
    states = ComponentStates(SHAPE, space=Haar(3))
    assert (states.S, states.K) == (1000, 4)
    for t, known in MARGINALS.items():
        live = states.log_snr[t].isfinite()
        assert int(live.sum()) == len(known)
        columns = live.nonzero().flatten().flip(0).tolist()  # fine to coarse
        for k, (L, a, b) in zip(columns, known, strict=True):
            assert float(states.log_snr[t, k]) == pytest.approx(L, abs=6e-6)
            assert float(states.a[t, k]) == pytest.approx(a, abs=6e-8)
            assert float(states.b[t, k]) == pytest.approx(b, abs=6e-8)
    assert states.log_snr[251].tolist()[3] == -INF
    assert [block[-1] for block in states.blocks_of_rows] == [250, 500, 750, 1000]


def test_weights_are_the_limit_of_the_exact_ones():
    """2/dt times (SNR(s-1)/SNR(s) - 1)/2, by component, as the steps shrink; exact at the steps there are."""
    known = (20.02002, 26.70227, 40.08016, 80.32129)
    off = []
    for n in (249, 2490, 24900):
        dt = 0.249 / n
        times = [1e-3 + dt * k for k in range(n + 1)]
        states = at_times(times)
        weights = Eps(Likelihood()).weights(states)[2:] * 2 / dt
        for k, w in enumerate(known):
            exact = math.expm1(20 / (ENDS[k] - 1e-3) * dt) / dt
            assert float(weights[n // 2, k]) == pytest.approx(exact, rel=1e-8)
            off.append(abs(exact / w - 1))
    assert max(off[8:]) < 5e-4 < max(off[:4])
    x0, snr = X0(Likelihood()).weights(at_times([0.05, 0.1])), at_times([0.05, 0.1]).log_snr.exp()
    assert torch.allclose(x0[2], (snr[1] - snr[2]) / 2)


def test_weights_of_coarse_steps():
    """d1 from .05 to .10 and a3 likewise: exact, and not the continuous weight times the step."""
    weights = Eps(Likelihood()).weights(at_times([0.05, 0.10]))
    assert float(weights[2, 3]) == pytest.approx(27.24, abs=5e-3)
    assert float(weights[2, 0]) == pytest.approx(0.8605, abs=5e-5)


def test_deterministic_steps_take_a_gaussian_to_where_it_belongs():
    """Coefficients ~ N(0, 1/4), exact score: the factor from birth to eps, p steps an interval, hand-over included."""
    known = {
        8: (0.462438, 0.450544, 0.427804, 0.365346),
        32: (0.490364, 0.487181, 0.480912, 0.462471),
        64: (0.495180, 0.493570, 0.490384, 0.480890),
    }
    for p, factors in known.items():
        cuts = [1e-3, 0.25, 0.5, 0.75, 1.0]
        times = [1e-3]
        for lo, hi in pairwise(cuts):
            times += [lo + (hi - lo) * k / p for k in range(1, p + 1)]
        states = at_times(times)
        for k, factor in enumerate(factors):
            x = 1.0
            for s in range(states.S, 1, -1):
                if states.log_snr[s, k].isneginf():
                    continue  # not born yet
                a, b = float(states.a[s, k]), float(states.b[s, k])
                c0, cx, cz = (float(c[k]) for c in transition(states, s, s - 1, 0.0)[:3])
                assert cz == 0
                x = c0 * (a / 4 / (a * a / 4 + b * b)) * x + cx * x
            assert x == pytest.approx(factor, abs=6e-7), (p, k)


def test_rows_at_which_components_are_added_and_dropped():
    states = ComponentStates(SHAPE, space=Haar(3), S=8)
    assert states.index.tolist() == [0, 125, 250, 375, 500, 625, 750, 875, 1000]
    assert [states.shape_at(s, SHAPE) for s in (1, 2, 3, 5, 8)] == [[3, 16, 16]] * 2 + [[3, 8, 8], [3, 4, 4], [3, 2, 2]]
    assert [needs_noise(states, s, s - 1) for s in range(8, 0, -1)] == [False, True] * 3 + [False, False]
    z = torch.randn(1, 3, 4, 4)
    out = torch.randn(1, 3, 2, 2)
    born = arrive(states, out, z, 7, 6, out)
    assert torch.equal(born[..., :2, :2], out)
    assert torch.equal(born[..., 2:, :], z[..., 2:, :])
    assert torch.equal(born[..., :2, 2:], z[..., :2, 2:])


@pytest.mark.parametrize(
    ("options", "index"),
    [
        ({"intervals": [1, 2, 3, 4]}, [250, 375, 500, 583, 667, 750, 812, 875, 938, 1000]),
        ({"S": 6}, [125, 250, 375, 500, 750, 1000]),
        ({"indices": [10, 250, 300, 500, 750, 1000]}, [10, 250, 300, 500, 750, 1000]),
        ({"S": 4, "ends": [1.0, 0.5, 0.5, 0.1]}, [50, 100, 500, 1000]),
        ({"S": 3, "ends": [1.0, 1.0, 1.0, 1.0]}, [333, 667, 1000]),
    ],
)
def test_rows_are_chosen_within_intervals_that_end_at_a_row(options, index):
    states = ComponentStates(SHAPE, space=Haar(3), **options)
    assert states.index[1:].tolist() == index
    again = build(spec(states), LatentStates)
    assert again.fingerprint == states.fingerprint
    assert torch.equal(again.log_snr, states.log_snr)


def test_blocks_are_within_intervals():
    states = ComponentStates(SHAPE, space=Haar(1), intervals=[3, 4])
    assert states.blocks(2) == [[1, 2, 3], [4, 5, 6, 7]]
    assert states.blocks(4) == [[1, 2], [3], [4, 5], [6, 7]]
    assert states.blocks(7) == [[s] for s in range(1, 8)]
    with pytest.raises(InputError, match=r"3 owners cannot share the intervals of \[3, 4\] rows.*multiple of 2"):
        states.blocks(3)
    with pytest.raises(InputError, match=r"have states of \[3, 16, 16\] and \[3, 8, 8\].*experts: 2"):
        states.level([3, 4])


def test_one_column_is_uniform_diffusion():
    """Of pixels bit for bit, of any orthonormal basis with equal curves in its losses and moments."""
    one, plain = ComponentStates(SHAPE, Linear(), S=10), LatentStates(Linear(), S=10)
    for name in ("log_snr", "a", "b", "index"):
        assert torch.equal(getattr(one, name), getattr(plain, name))
    assert one.fingerprint == plain.fingerprint
    assert one.coefficients(3) == plain.coefficients(3)
    haar = ComponentStates(SHAPE, Linear(), Haar(2), ends=[1.0, 1.0, 1.0], S=10)
    x0, eps = torch.randn(2, 5, *SHAPE, dtype=torch.float64)
    for s in (1, 4, 10):
        z = noise(haar, haar.encode(x0, None), s, haar.space.forward(eps))
        assert torch.allclose(haar.space.inverse(z), noise(plain, x0, s, eps), atol=1e-12)
        c = transition(haar, s, s - 1, 0.5)
        assert all(
            torch.allclose(v, w.expand_as(v)) for v, w in zip(c[:3], transition(plain, s, s - 1, 0.5)[:3], strict=True)
        )
        if s > 1:
            mean, variance = posterior(haar, haar.encode(x0, None), z, s, s - 1)
            expected, v = posterior(plain, x0, haar.space.inverse(z), s, s - 1)
            assert torch.allclose(haar.space.inverse(mean), expected, atol=1e-12)
            assert torch.allclose(variance, torch.full_like(variance, v))


SIGMAS = {  # t in tenths: of x at 160, 128, 64 pixels, and of y
    277.128: (0.014905, 0.076718, 1.177132, 18.061465, 277.128),
    221.702: (0.014576, 0.072555, 1.052859, 15.278138, 221.702),
    110.851: (0.013600, 0.061012, 0.744484, 9.084435, 110.851),
    0.5: (0.007924, 0.015811, 0.05, 0.158114, 0.5),
    1.0: (0.008493, 0.018803, 0.070711, 0.265915, 1.0),
}


def test_exploding_variances_are_rescaled_preserving_ones():
    for largest, known in SIGMAS.items():
        L = Geometric(10001, sigma_max=largest).log_snr()
        for t, sigma in zip((0.1, 0.25, 0.5, 0.75, 1.0), known, strict=True):
            assert math.exp(-float(L[round(10000 * t) + 1]) / 2) == pytest.approx(sigma, rel=2e-6, abs=6e-7)
    L = Geometric(1000, sigma_max=221.702454).log_snr()
    sigmas = [math.exp(-float(L[i + 1]) / 2) for i in (0, 499, 999)]
    assert sigmas == [pytest.approx(v, rel=1e-6) for v in (0.005, 1.047236, 221.702454)]
    for largest, end in ((277.128, 1.302e-5), (221.702, 2.034e-5), (110.851, 8.137e-5), (0.5, 0.8), (1.0, 0.5)):
        found = float(Geometric(sigma_max=largest).log_alpha_bar()[-1].exp())
        assert found == pytest.approx(end, rel=5e-4)
    weights = {277.128: 21.845592, 221.702454: 21.399308, 110.851: 20.013014, 0.5: 9.210340, 1.0: 10.596635}
    for largest, w in weights.items():  # -dL/dt
        L = Geometric(100001, sigma_max=largest).log_snr()
        assert float(L[1] - L[2]) * 1e5 == pytest.approx(w, rel=2e-6)


def pair(**condition) -> ComponentStates:
    y = Observation(Inpainting(), **condition)
    return ComponentStates([1, 8, 8], Geometric(sigma_max=221.702454), observation=y, S=100)


def test_observations_have_a_curve_of_their_own():
    clean, same, slow = pair(), pair(schedule=Geometric(sigma_max=221.702454)), pair(schedule=Geometric(sigma_max=1.0))
    assert clean.log_snr[:, 1].isposinf().all()
    assert torch.equal(same.log_snr[:, 0], same.log_snr[:, 1])
    assert float(slow.a[-1, 1]) ** 2 == pytest.approx(0.5)
    assert (
        len({s.fingerprint for s in (clean, same, slow, pair(schedule=Geometric(sigma_max=1.0), draw="bridge"))}) == 4
    )
    for states in (clean, same, slow):
        assert build(spec(states), LatentStates).fingerprint == states.fingerprint
    assert slow.shape_at(1) == [2, 8, 8]
    x0 = torch.rand(3, 1, 8, 8) * 2 - 1
    z0 = slow.encode(x0, torch.arange(3))
    assert torch.equal(z0[:, :1], x0)
    assert torch.equal(z0[:, 1:], Inpainting().observe(x0, torch.arange(3)))


def test_annealed_observation():
    """VS-CMDE: largest sigma of y at n = 0, 1k, 10k, 50k, 100k, 250k, 500k steps (super-resolution, inpainting)."""
    steps = (0, 1000, 10_000, 50_000, 100_000, 250_000)
    for largest, goal, end, known in (
        (277.128, 0.5, 250_000, (277.128, 86.2515, 11.9812, 2.48209, 1.24663, 0.5)),
        (221.702454, 1.0, 500_000, (221.703, 153.81, 40.9495, 9.60989, 4.91139, 1.99102)),
    ):
        y = Observation(Inpainting(), Geometric(sigma_max=goal), anneal=end)
        states = ComponentStates([1, 8, 8], Geometric(sigma_max=largest), observation=y, S=10)
        before = states.log_snr.clone()
        for n, sigma in zip(steps, known, strict=True):
            now = annealed(states, n)
            assert math.exp(-float(now.log_snr[-1, 1]) / 2) == pytest.approx(sigma, rel=1e-5)
            assert torch.equal(now.log_snr[:, 0], states.log_snr[:, 0])
        assert annealed(states, end) is states
        assert annealed(states, 10 * end) is states  # it stays where it is
        assert torch.equal(states.log_snr, before)


def test_bridge_of_the_observation():
    """sigma .005..1, from t = .6 to .5, y_0 = 1, y_.6 = 2 in the exploding process: mean 1.3465724, std .0571589."""
    curve = Geometric(1001, sigma_max=1.0)
    states = LatentStates(curve, indices=[501, 601, 1001], terminal_bound=1.0)
    a, c = states.coefficients(2)[0], states.coefficients(1)[0]
    mean, variance = posterior(states, torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 2.0 * a), 2, 1)
    assert float(mean) / c == pytest.approx(1.3465724, abs=2e-6)
    assert float(variance) ** 0.5 / c == pytest.approx(0.0571589, abs=2e-7)


def test_weights_of_what_is_not_learned_are_zero():
    states = ComponentStates(SHAPE, space=Haar(1), observation=Observation(Grey()), S=4)
    for objective in (Eps(), X0(), V(), Eps(Likelihood()), X0(Likelihood())):
        weights = objective.weights(states)
        assert weights.isfinite().all()
        assert (weights[0] == 0).all()
        assert (weights[:, 2:] == 0).all()  # clean
        assert (weights[3:, 1] == 0).all()  # finished
        assert (weights[1:, 0] > 0).all()
    half = Observation(Grey(), LogLinear(low=0.0), weight=0.5)
    states = ComponentStates(SHAPE, observation=half, S=4)
    assert Eps(Constant()).weights(states)[1:].tolist() == [[1.0, 0.5]] * 4


def test_finished_and_clean_entries_pass_through_a_step():
    table = torch.tensor([[INF, INF], [3.0, INF], [0.0, INF], [-8.0, 2.0]], dtype=torch.float64)
    states = ComponentStates.of_table(table, torch.arange(4), LogLinear(3), [1, 4, 4], Haar(1), terminal_bound=1.0)
    for eta in (0.0, 1.0):
        c0, cx, cz, _ = transition(states, 2, 1, eta)
        assert (float(c0[1]), float(cx[1]), float(cz[1])) == (0.0, 1.0, 0.0)
        assert torch.stack([c0, cx, cz]).isfinite().all()


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ([[INF, INF], [5, 4], [-6, -INF], [-10, -9]], "happens once; component 1 has -inf at row 2 and -9 at row 3"),
        ([[INF, INF], [5, 4], [-6, 5], [-10, -9.5]], "must fall from row to row.*component 1 has 4 at row 1 and 5"),
        ([[INF, INF], [5, 4], [-6, -4], [-10, -INF]], r"component 1 of 2 .* reach pure noise: at its last row 2"),
        ([[INF, INF], [5, 4], [-6, -4], [-3.9, -10]], "must fall from row to row"),
        ([[INF, INF], [5, 4], [-10, -4], [-INF, -10]], "component 1 ends at row 3, the coarser component 0 at row 2"),
        ([[INF, 9], [5, 4], [-10, -11]], r"\+inf at row 0"),
        ([[INF, INF], [5, 4], [-10, -11], [-INF, -INF]], "no component is left at row 3"),
    ],
)  # fmt: skip
def test_invalid_tables_are_refused(table, why):
    table = torch.tensor(table, dtype=torch.float64)
    with pytest.raises(InputError, match=why):
        ComponentStates.of_table(table, torch.arange(len(table)), LogLinear(T=len(table) - 1), SHAPE, Haar(1))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"space": Haar(5)}, "divisible by 32, the image has 16x16"),
        ({"space": Haar(1), "ends": [1.0]}, r"2 fractions of T.*got \[1.0\]"),
        ({"space": Haar(1), "ends": [1.0, 1.5]}, r"in \(0, 1\], coarse to fine"),
        ({"space": Haar(1), "ends": [0.5, 1.0]}, r"components end at levels \[500, 1000\] of 1000"),
        ({"space": Haar(1), "indices": [100, 1000]}, r"components end at \[500\], which must be among the rows"),
        ({"space": Haar(1), "intervals": [1, 2, 3]}, r"\[1, 2, 3\] rows for the 2 intervals"),
        ({"space": Haar(1), "S": 1}, "rows for the 2 intervals"),
        ({"space": Haar(1), "S": 5, "intervals": [2, 2]}, "S=5 but the intervals"),
        ({"space": Haar(1), "curves": [LogLinear()]}, "1 for the 2 components"),
        (
            {"space": Haar(1), "curves": [LogLinear(), LogLinear(T=500, low=-3.0)]},
            "component 1 of 2.*reach pure noise",
        ),
        (
            {"schedule": LogLinear(low=-2.0)},
            "component 0 of 1.*reach pure noise.*0.3453, above terminal_bound 0.01",
        ),
        ({"observation": Observation(Inpainting(), Geometric(T=10))}, "has T=10 levels, that of the image has 1000"),
        ({"shape": [8, 8]}, r"must be \[channels, height, width\] of an image, got \[8, 8\]"),
        ({"shape": [1, 0, 8]}, r"got \[1, 0, 8\]"),
        ({"schedule": LogLinear(zero_terminal=True)}, "zero_terminal: false"),
        ({"observation": Observation(Grey(), LogLinear(zero_terminal=True))}, "zero_terminal: false"),
        ({"space": Haar(1), "indices": [100, 500]}, r"components end at \[1000\], which must be among the rows"),
        ({"observation": Observation(SuperResolution(3))}, "16x16 is not divisible by factor 3"),
    ],
)
def test_tables_that_cannot_be_made_are_refused(options, why):
    with pytest.raises(InputError, match=why):
        ComponentStates(**{"shape": SHAPE, **options})


def test_conditions_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="fresh or bridge"):
        Observation(Grey(), draw="clean")
    with pytest.raises(InputError, match="10 steps require observation"):
        Observation(Grey(), LogLinear(), anneal=10)
    for wrong in (0.0, math.inf, -1.0):
        with pytest.raises(InputError, match="anneal_from: must be a sigma above 0"):
            Observation(Grey(), Geometric(), anneal=10, anneal_from=wrong)
    with pytest.raises(InputError, match="a number of steps, at least 0, got -1"):
        Observation(Grey(), Geometric(), anneal=-1)
    with pytest.raises(InputError, match="images must have 3 channels, got 1"):
        ComponentStates([1, 8, 8], observation=Observation(Grey()))


def test_restricted_tables_keep_their_values():
    states = ComponentStates(SHAPE, space=Haar(1), S=8)
    some = states.restrict([250, 500, 1000])
    assert some.index.tolist() == [0, 250, 500, 1000]
    at = [states.index.tolist().index(t) for t in some.index.tolist()]
    assert torch.equal(some.log_snr, states.log_snr[at])
    with pytest.raises(InputError, match=r"\[500\], which must be among"):
        states.restrict([250, 1000])
    with pytest.raises(InputError, match="are not rows"):
        states.restrict([])
    with pytest.raises(InputError, match="depend on the shape of the state"):
        states.coefficients(1)
    with pytest.raises(InputError, match="for tables of one column"):
        states.truncate(2)
    assert ComponentStates(SHAPE, S=4).truncate(2).S == 2
    with pytest.raises(InputError, match=r"\[7\] are not rows"):
        states.restrict([7, 500, 1000])


def test_operators():
    x0, item = torch.rand(40, 3, 16, 16) * 2 - 1, torch.arange(40)
    hole = Inpainting(0.25, seed=3)
    mask = hole.kernel([3, 16, 16], item)
    assert mask.shape == (40, 1, 16, 16)
    assert (mask.flatten(1).sum(1) == 256 - 64).all()
    assert len({m.numpy().tobytes() for m in mask}) > 20
    assert torch.equal(hole.observe(x0, item), x0 * mask)
    assert torch.equal(hole.observe(x0[5:6], item[5:6]), hole.observe(x0, item)[5:6])  # of the item alone
    assert not torch.equal(mask, Inpainting(0.25, seed=4).kernel([3, 16, 16], item))
    tops = mask[:, 0].eq(0).any(2).float().argmax(1)
    assert {*tops.tolist()} <= {*range(9)}
    assert len({*tops.tolist()}) == 9  # the whole range
    low = SuperResolution(4).observe(x0, item)
    assert torch.allclose(
        low[:, :, :4, :4], x0[:, :, :4, :4].mean((2, 3), keepdim=True).expand(-1, -1, 4, 4), atol=1e-6
    )
    assert torch.allclose(Grey().observe(torch.ones(1, 3, 2, 2), item[:1]), torch.ones(1, 1, 2, 2))
    step = torch.cat([-torch.ones(1, 1, 8, 4), torch.ones(1, 1, 8, 4)], 3)
    edges = Edges().observe(step, item[:1])
    assert edges.shape == (1, 1, 8, 8)
    assert (edges[..., 3:5] == 1).all()
    assert (edges[..., :3] == -1).all()
    for operator in (hole, SuperResolution(4), Grey(), Edges()):
        y = operator.observe(x0, item)
        assert list(y.shape) == [40, operator.channels(3), 16, 16]
        assert -1 <= float(y.min()) <= float(y.max()) <= 1
        assert spec(build(spec(operator), type(operator))) == spec(operator)
