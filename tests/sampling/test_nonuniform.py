"""Multi-scale and conditional chains against closed forms: Gaussian data, exact denoisers, no training."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from lightning_tdisent.diffusion.components import ComponentStates
from lightning_tdisent.diffusion.objectives import X0, Eps, Likelihood, V
from lightning_tdisent.diffusion.observation import Observation
from lightning_tdisent.diffusion.operators import Edges, Inpainting
from lightning_tdisent.diffusion.process import transition
from lightning_tdisent.diffusion.schedules import Geometric, LogLinear
from lightning_tdisent.diffusion.spaces import Haar
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError
from lightning_tdisent.evaluation.pictures import estimate_strip, forward_strip, reverse_strip
from lightning_tdisent.models.composite import CompositeDenoiser
from lightning_tdisent.networks.network import Network
from lightning_tdisent.networks.unet import UNet
from lightning_tdisent.sampling.denoiser import Denoiser
from lightning_tdisent.sampling.errors_by_row import state_errors
from lightning_tdisent.sampling.sample import sample
from lightning_tdisent.sampling.sampler import DDIM, Ancestral, DPMSolver

SHAPE = [1, 16, 16]
VARIANCES = (3.0, 0.5, 0.25)  # of a2, d2, d1


class Exact(nn.Module):
    """E[x_0 | x_s] of data whose components are independent and Gaussian, at any scale."""

    def __init__(self, states: ComponentStates, variances: tuple[float, ...]) -> None:
        super().__init__()
        self.states, self.shape, self.classes = states, states.shape, None
        self.variances = nn.Parameter(torch.tensor(variances, dtype=torch.float64), requires_grad=False)
        self.asked: list[tuple[int, list[int]]] = []

    def forward(self, x: Tensor, s: int, label: Tensor | None = None) -> Tensor:
        self.asked.append((s, list(x.shape[1:])))
        a, b = self.states.coefficients(s, x)
        v = self.states.spread(self.variances, x.shape)
        return a * v / (a * a * v + b * b) * x

    def at(self, s):
        raise AssertionError


def drawn(states: ComponentStates, k: int, v: float, eta: float) -> float:
    """Variance of component k at row 0 of the chain with the exact denoiser, step by step from its birth."""
    out = 1.0
    for s in range(states.S, 0, -1):
        if states.log_snr[s, k].isneginf():
            continue
        a, b = float(states.a[s, k]), float(states.b[s, k])
        c0, cx, cz = (float(c[k]) for c in transition(states, s, s - 1, eta)[:3])
        out = (c0 * a * v / (a * a * v + b * b) + cx) ** 2 * out + cz * cz
    return out


@pytest.mark.parametrize(
    ("sampler", "eta"),
    [(DDIM(clip=None), 0.0), (Ancestral(clip=None), 1.0), (DDIM(0.3, clip=None), 0.3), (DPMSolver(clip=None), None)],
)
def test_multi_scale_chains_draw_the_data(sampler, eta):
    """Variances of the components of the image that comes out are those of the data; each network sees its scale."""
    states = ComponentStates(SHAPE, space=Haar(2), S=300)
    model = Exact(states, VARIANCES)
    x = sampler(model, range(400))
    assert list(x.shape) == [400, *SHAPE]
    z, column = Haar(2).forward(x), Haar(2).columns(16, 16)
    for k, v in enumerate(VARIANCES):
        values = z[..., column == k]
        expected, second = (v, 0.01) if eta is None else (drawn(states, k, v, eta), 0.0)
        assert expected == pytest.approx(v, rel=0.1)
        found = float(values.square().mean())
        assert found == pytest.approx(expected, rel=4 * math.sqrt(2 / values.numel()) + second)
    asked = [shape for s, shape in model.asked if s in (100, 101, 200, 201, 300)]
    assert asked == [[1, 4, 4]] * 2 + [[1, 8, 8]] * 2 + [[1, 16, 16]]


def test_ddim_by_the_sampler_has_the_known_factors():
    """The same numbers as step by step: 4.3 of the reference values, with births among them."""
    p, cuts = 8, [1e-3, 0.25, 0.5, 0.75, 1.0]
    times = [1e-3]
    for lo, hi in pairwise(cuts):
        times += [lo + (hi - lo) * k / p for k in range(1, p + 1)]
    t = torch.tensor(times, dtype=torch.float64)
    table = torch.stack(
        [(10 - 20 * (t - 1e-3) / (end - 1e-3)).where(t <= end + 1e-9, -math.inf) for end in (1, 0.75, 0.5, 0.25)], 1
    )
    table = torch.cat([torch.full((1, 4), math.inf, dtype=torch.float64), table])
    states = ComponentStates.of_table(table, torch.arange(len(table)), LogLinear(T=len(times)), [1, 8, 8], Haar(3))
    model = Exact(states, (0.25,) * 4)
    walk = {s: x for s, x, _ in DDIM(clip=None).walk(model, [7])}
    column = Haar(3).columns(8, 8)
    born = {0: walk[33], 1: walk[25], 2: walk[17], 3: walk[9]}
    for k, factor in enumerate((0.462438, 0.450544, 0.427804, 0.365346)):
        h = born[k].shape[-1]
        there = column[:h, :h] == k
        first, last = born[k][..., there], walk[1][..., column == k]
        assert torch.allclose(last, factor * first, rtol=2e-6, atol=0)


def test_one_column_draws_as_uniform_diffusion():
    """A Haar table of equal curves has the moments of the uniform chain on the same data."""
    shape = [1, 8, 8]
    plain = LatentStates(LogLinear(), S=50)
    haar = ComponentStates(shape, LogLinear(), Haar(2), ends=[1.0] * 3, S=50)
    uniform = Exact(ComponentStates(shape, LogLinear(), S=50), (0.3,))
    assert uniform.states.fingerprint == plain.fingerprint
    x, y = (DDIM(clip=None)(m, range(300)) for m in (Exact(haar, (0.3,) * 3), uniform))
    z = DDIM(clip=None).walk(uniform, [3])
    first = next(z)[1]
    rotated = DDIM(clip=None).walk(Exact(haar, (0.3,) * 3), [3], start=Haar(2).forward(first))
    *_, (_, out, _) = z
    *_, (_, other, _) = rotated
    assert torch.allclose(haar.decode(other), out, atol=1e-12)
    assert float(x.var()) == pytest.approx(float(y.var()), rel=0.03)


@pytest.mark.parametrize(
    ("steps", "rows"), [(3, [300, 200, 100]), (4, [300, 200, 100, 50]), (6, [300, 250, 200, 150, 100, 50])]
)
def test_fewer_steps_keep_a_step_per_scale(steps, rows):
    states = ComponentStates(SHAPE, space=Haar(2), S=300)
    assert DDIM(steps=steps).rows(states) == rows
    with pytest.raises(InputError, match="must be at least 1 for each of 3 scales, got 2"):
        DDIM(steps=2).rows(states)


class Pair(nn.Module):
    """E[x, y | x_s, y_s] of x ~ N(0, 1), y = x + n/2, pixel by pixel."""

    def __init__(self, states: ComponentStates) -> None:
        super().__init__()
        self.states, self.shape, self.classes = states, states.shape, None
        self.one = nn.Parameter(torch.ones(1, dtype=torch.float64), requires_grad=False)

    def gains(self, s: int) -> Tensor:
        a, b = self.states.a[s], self.states.b[s]
        joint = torch.tensor([[1.0, 1.0], [1.0, 1.25]], dtype=torch.float64)
        A = torch.diag(a)
        return joint @ A @ torch.linalg.inv(A @ joint @ A + torch.diag(b * b))

    def forward(self, x: Tensor, s: int, label: Tensor | None = None) -> Tensor:
        return torch.einsum("ij,bjhw->bihw", self.gains(s), x)


def estimator(sigma_y: float | None, N: int, side: int = 4, draw: str = "fresh") -> ComponentStates:
    curve = None if sigma_y is None else Geometric(sigma_max=sigma_y)
    y = Observation(Edges(), curve, draw)
    return ComponentStates([1, side, side], Geometric(sigma_max=50.0), observation=y, S=N, terminal_bound=0.021)


def moments(states: ComponentStates) -> tuple[float, float]:
    """Mean and deviation of x at row 0, given y = 1: the recursion of the ancestral chain, exactly."""
    pair, mean, variance = Pair(states), 0.0, 1.0
    for s in range(states.S, 0, -1):
        (kx, ky), a, b = pair.gains(s)[0].tolist(), float(states.a[s, 1]), float(states.b[s, 1])
        c0, cx, cz = (float(c[0]) for c in transition(states, s, s - 1, 1.0)[:3])
        mean = (c0 * kx + cx) * mean + c0 * ky * a
        variance = (c0 * kx + cx) ** 2 * variance + (c0 * ky * b) ** 2 + cz**2
    return mean, variance**0.5


def test_estimators_rank_as_they_should_with_any_number_of_steps():
    """CDE = CMDE with little noise > CMDE with more >> CDiffE, for 20, 100 and 1,000 steps; posterior .8, .447214."""
    known = {None: (0.79994, 0.44925), 0.05: (0.79977, 0.44940), 0.5: (0.79772, 0.45053), 1.0: (0.79492, 0.45177),
             5.0: (0.76917, 0.46177), 50.0: (0.58116, 0.55325)}  # fmt: skip
    for N in (20, 100, 1000):
        found = {sigma: moments(estimator(sigma, N)) for sigma in known}
        bias = [abs(mean - 0.8) for mean, _ in found.values()]
        assert bias == sorted(bias)
        assert bias[0] < 1e-3
        assert bias[3] < 0.01 < 0.2 < bias[5]
        error = [math.hypot(mean - 0.8, deviation - math.sqrt(0.2)) for mean, deviation in found.values()]
        assert error[5] > 2.5 * max(error[:5])  # that of few steps is in all of them
        assert max(error[:4]) < 2.0 / N + 0.006
        if N == 1000:  # of the exploding process by Euler steps, which differ in the third digit
            for sigma, (mean, deviation) in known.items():
                assert found[sigma][0] == pytest.approx(mean, abs=2e-3)
                assert found[sigma][1] == pytest.approx(deviation, abs=7e-3)


@pytest.mark.parametrize(("sigma", "draw"), [(None, "fresh"), (1.0, "fresh"), (1.0, "bridge"), (50.0, "fresh")])
def test_conditional_chains_have_the_moments_of_the_recursion(sigma, draw):
    states = estimator(sigma, 20, 16, draw)
    x = Ancestral(clip=None)(Pair(states), range(100), given=torch.ones(100, 1, 16, 16))
    assert list(x.shape) == [100, 1, 16, 16]
    mean, deviation = moments(states)
    assert float(x.mean()) == pytest.approx(mean, abs=4 * deviation / 160)
    # along a bridge the noise of y is correlated over rows, and counts for more
    assert float(x.std()) == pytest.approx(deviation, rel=4 / math.sqrt(2 * 25600) + 0.02 * (draw == "bridge"))


@pytest.mark.parametrize("sampler", [DDIM(clip=None), DDIM(0.5, clip=None), Ancestral(clip=None), DPMSolver(clip=None)])
@pytest.mark.parametrize("draw", ["fresh", "bridge"])
@pytest.mark.parametrize("basis", [None, Haar(1), Haar(1, [2.0, 0.5])])
def test_observation_channels_follow_their_marginal_at_every_row(sampler, draw, basis):
    """q(y_s | y_0) at every row, of each component that is live there, whatever the sampler takes of noise itself."""
    y = Observation(Edges(), Geometric(sigma_max=1.0), draw)
    states = ComponentStates([1, 8, 8], Geometric(sigma_max=110.0), basis, observation=y, S=10)
    given = (torch.arange(64.0).view(1, 1, 8, 8) / 64).expand(400, -1, -1, -1)
    model = Exact(states, (1.0,) * states.K)
    y0 = given if basis is None else basis.forward(given)
    seen = []
    for s, x, _ in sampler.walk(model, range(400), given=given):
        y_s, h = x[:, 1:], x.shape[-1]
        a, b = (states.spread(c[s], (2, h, h))[1:].expand(1, h, h) for c in (states.a, states.b))
        off = y_s - a * y0[..., :h, :h]
        assert float((off.mean(0)).abs().max()) <= 5 * float(b.max()) / 20 + 1e-6
        if s == 0:
            assert float(off.abs().max()) < 1e-6
            break
        assert float(off.square().mean() / b.square().mean()) == pytest.approx(1, rel=0.1)
        seen.append((off / b)[..., :4, :4].flatten())
    correlation = torch.corrcoef(torch.stack(seen[-2:]))[0, 1].item()  # of two neighbours above row 0
    assert abs(correlation) < 0.05 if draw == "fresh" else correlation > 0.02


@pytest.mark.parametrize("draw", ["fresh", "bridge"])
def test_a_clean_observation_stays_as_it_is(draw):
    """Also where the sampler has noise at hand."""
    states, given = estimator(None, 5, 8, draw), torch.rand(3, 1, 8, 8) * 2 - 1
    for _, x, _ in Ancestral(clip=None).walk(Pair(states), range(3), given=given):
        assert torch.equal(x[:, 1:], given.double())


def test_cmde_with_extreme_curves_is_cde_or_cdiffe():
    """CMDE with y at +inf is CDE, with the image's curve CDiffE: the same tables, losses and images."""
    x0, eps, s = torch.rand(4, 1, 8, 8) * 2 - 1, torch.randn(4, 2, 8, 8), torch.tensor([1, 3, 5, 9])
    x_curve = Geometric(sigma_max=110.0)
    slow = ComponentStates([1, 8, 8], x_curve, observation=Observation(Inpainting(), Geometric(sigma_max=0.5)), S=10)
    table = slow.log_snr.clone()[:, :1]
    clean = ComponentStates([1, 8, 8], x_curve, observation=Observation(Inpainting()), S=10)
    equal = ComponentStates([1, 8, 8], x_curve, observation=Observation(Inpainting(), x_curve), S=10)
    assert torch.equal(clean.log_snr, torch.cat([table, torch.full_like(table, math.inf)], 1))
    assert torch.equal(equal.log_snr, torch.cat([table, table], 1))
    torch.manual_seed(0)
    network = UNet([2, 8, 8], channels=[16, 32], layers=1)
    losses = {}
    for name, states in (("clean", clean), ("equal", equal), ("slow", slow)):
        model = Denoiser(network, Eps(), states)
        losses[name] = model.loss(model.encode(x0, torch.arange(4)), s, eps)
        assert model.shape == [1, 8, 8]
    whole = Denoiser(network, Eps(), LatentStates(x_curve, S=10))
    joint = clean.encode(x0, torch.arange(4))
    assert torch.allclose(losses["equal"], whole.loss(joint, s, eps), rtol=1e-6)  # one diffusion of the pair
    a, b = clean.coefficients(s, joint)
    error = network(a * joint + b * eps, clean.index[s])[:, :1] - eps[:, :1]
    assert torch.allclose(losses["clean"], error.square().mean((1, 2, 3)), rtol=1e-6)
    assert not torch.allclose(losses["slow"], losses["clean"])


class Says(Network):
    """Zero, or what it is told."""

    def __init__(self, shape: list[int], conditioning=None) -> None:
        super().__init__(shape, None, conditioning)
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, index: Tensor | None = None, label: Tensor | None = None) -> Tensor:
        return x * 0 + self.weight


def two_rows(t: float, dt: float, ends: tuple[float, ...], observation: Observation | None = None) -> ComponentStates:
    """Rows at t - dt and t of the continuous curves of several scales."""
    time = torch.tensor([t - dt, t], dtype=torch.float64)
    table = torch.stack([(10 - 20 * (time - 1e-3) / (end - 1e-3)).where(time <= end, -math.inf) for end in ends], 1)
    table = torch.cat([torch.full((1, len(ends)), math.inf, dtype=torch.float64), table])
    basis = Haar(len(ends) - 1)
    return ComponentStates.of_table(table, torch.arange(3), LogLinear(2), [3, 16, 16], basis, observation, 1.0)


@pytest.mark.parametrize(("t", "loss"), [(0.1, 69.3205), (0.4, 36.3180), (0.6, 25.0317), (0.9, 20.0200)])
def test_losses_of_a_zero_network_are_the_mean_of_the_weights(t, loss):
    """With noise of unit squares 2/dt of the likelihood's loss is the mean of the known weights over what is live."""
    states, dt = two_rows(t, 1e-5, (1.0, 0.75, 0.5, 0.25)), 1e-5
    model = Denoiser(Says(states.shape_at(2)), Eps(Likelihood()), states, [2])
    x0 = model.encode(torch.rand(2, 3, 16, 16))
    losses = model.loss(x0, torch.tensor([2, 2]), torch.ones_like(x0)) * 2 / dt
    assert losses.tolist() == [pytest.approx(loss, rel=1e-3)] * 2


@pytest.mark.parametrize(("curve", "loss"), [(None, 21.3993), (221.702454, 21.3993), (1.0, 15.9980)])
def test_losses_of_a_zero_network_given_an_observation(curve, loss):
    """CDE, CDiffE and CMDE: over what diffuses, in one step of 100,000."""
    T = 100_001
    y = Observation(Inpainting(), None if curve is None else Geometric(T, sigma_max=curve))
    states = ComponentStates([1, 8, 8], Geometric(T, sigma_max=221.702454), observation=y, indices=[49_999, 50_000, T])
    model = Denoiser(Says([2, 8, 8]), Eps(Likelihood()), states, [2])
    x0 = model.encode(torch.rand(2, 1, 8, 8), torch.arange(2))
    losses = model.loss(x0, torch.tensor([2, 2]), torch.ones_like(x0)) * 2 * (T - 1)
    assert losses.tolist() == [pytest.approx(loss, rel=1e-3)] * 2


@pytest.mark.parametrize("objective", [Eps(), X0(), V()])
@pytest.mark.parametrize("scales", [None, [4.0, 0.5, 0.3]])
def test_the_exact_prediction_has_no_error(objective, scales):
    """A network that says the target, as an image of its scale, makes x0_hat = x0 and loss 0."""
    states = ComponentStates(
        [2, 8, 8], space=Haar(2, scales), S=6, observation=Observation(Edges(), LogLinear(low=0.0))
    )
    x0, eps = (torch.randn(3, 2, 8, 8, dtype=torch.float64) for _ in range(2))
    for rows, finished in (([1, 2], 0), ([3, 4], 1), ([5, 6], 2)):
        network = Says(states.shape_at(rows[0])).double()
        model = Denoiser(network, objective, states, rows)
        z0 = model.encode(x0, torch.arange(3))
        assert list(z0.shape[1:]) == [3, 8 >> finished, 8 >> finished]
        eps = torch.randn_like(z0)
        s = torch.tensor([rows[0], rows[1], rows[0]])
        a, b = states.coefficients(s, z0)
        target = objective.target(z0, eps, a, b)
        network.forward = lambda x, *_, t=target, n=finished: Haar(2).inverse(t, n)
        assert float(model.loss(z0, s, eps).max()) < 1e-20
        a, b = states.coefficients(rows[0], z0)
        target = objective.target(z0, eps, a, b)
        network.forward = lambda x, *_, t=target, n=finished: Haar(2).inverse(t, n)
        assert torch.allclose(model(a * z0 + b * eps, rows[0]), z0, atol=1e-10)


def experts(states: ComponentStates, each: bool = False) -> list[Denoiser]:
    torch.manual_seed(1)
    out = []
    for block in states.blocks_of_rows:
        for rows in [[s] for s in block] if each else [block]:
            shape = states.shape_at(rows[0], [])
            network = UNet(shape, channels=[8, 16], layers=1, groups=4, conditioning="none" if each else None)
            out.append(Denoiser(network, V(), states, rows).eval())
    return out


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("condition", [None, Observation(Inpainting(), Geometric(T=1000, sigma_max=1.0))])
def test_composites_of_scales(each, condition):
    """One network a scale, or a row, composed: images do not depend on the batch; wrong scales and gaps are refused."""
    states = ComponentStates([1, 8, 8], space=Haar(1), S=4, observation=condition)
    parts = experts(states, each)
    model = CompositeDenoiser(parts).eval()
    assert model.shape == [1, 8, 8]
    given = None if condition is None else torch.rand(20, 1, 8, 8) * 2 - 1
    whole = torch.cat(list(sample(model, Ancestral(), range(20), given=given)))
    assert list(whole.shape) == [20, 1, 8, 8]
    some = torch.cat(list(sample(model, Ancestral(), [17, 3], given=None if given is None else given[[17, 3]])))
    assert torch.equal(some, whole[[17, 3]])
    with pytest.raises(InputError, match="no expert owns row"):
        CompositeDenoiser(parts[:-1])
    with pytest.raises(InputError, match="cannot be filled: no expert"):
        CompositeDenoiser([p for p in parts if p.rows[0] <= 2], "nearest")
    if each:
        filled = CompositeDenoiser([p for p in parts if p.rows != [3]], "nearest")
        assert filled.filled == {3: "row 4"}
        next(sample(filled, DDIM(), range(2), given=None if given is None else given[:2]))


def test_networks_of_another_scale_are_refused():
    states = ComponentStates([1, 8, 8], space=Haar(1), S=4)
    with pytest.raises(InputError, match=r"takes \[1, 8, 8\], states of rows \[3, 4\] are \[1, 4, 4\]"):
        Denoiser(UNet([1, 8, 8], channels=[8, 16], layers=1, groups=4), V(), states, [3, 4])
    with pytest.raises(InputError, match=r"have states of \[1, 8, 8\] and \[1, 4, 4\]"):
        Denoiser(UNet([1, 8, 8], channels=[8, 16], layers=1, groups=4), V(), states)


def test_observations_that_do_not_fit_are_refused():
    states = ComponentStates([1, 8, 8], observation=Observation(Inpainting()), S=4)
    (model,) = experts(states)
    for given, why in (
        (None, r"given an observation \(Inpainting, \[1, 8, 8\]\); none was given"),
        (torch.zeros(2, 1, 8, 4), r"for 2 images of Inpainting are \[2, 1, 8, 8\], these are \[2, 1, 8, 4\]"),
        (torch.zeros(1, 1, 8, 8), r"are \[2, 1, 8, 8\], these are \[1, 1, 8, 8\]"),
        (torch.full((2, 1, 8, 8), 255.0), "lie in .*, these run from 255 to 255"),
        (torch.full((2, 1, 8, 8), math.nan), "lie in "),
        (torch.zeros(3, 1, 8, 8), r"are \[2, 1, 8, 8\], these are \[3, 1, 8, 8\]"),
    ):
        with pytest.raises(InputError, match=why):
            DDIM()(model, [0, 1], given=given)
        with pytest.raises(InputError, match=why):
            next(sample(model, DDIM(), [0, 1], given=given))
    with pytest.raises(InputError, match="pass item, one per image"):
        model.encode(torch.zeros(1, 1, 8, 8))
    plain = Denoiser(UNet([1, 8, 8], channels=[8, 16], layers=1, groups=4), V(), LatentStates(S=4))
    with pytest.raises(InputError, match="unconditional model"):
        DDIM()(plain, [0, 1], given=torch.zeros(2, 1, 8, 8))


def test_held_out_errors_by_component():
    """x0: mean squares of pixels of the coarse image; eps: by each component's own SNR; what is given is in neither."""
    y = Observation(Edges(), LogLinear(low=0.0))
    states = ComponentStates([1, 8, 8], space=Haar(1, [2.0, 0.5]), S=4, observation=y)
    fine, coarse = (Denoiser(Says(states.shape_at(rows[0])), X0(), states, rows) for rows in ([1, 2], [3, 4]))
    images = torch.rand(5, 1, 8, 8) * 2 - 1
    x0, eps = state_errors(fine, images, range(5), [1, 2])
    assert torch.allclose(x0, images.double().square().mean((1, 2, 3)).expand(2, -1), rtol=1e-5)
    z, column, snr = states.space.forward(images), states.space.columns(8, 8), states.log_snr.exp()
    expected = sum(float(snr[2, k]) * z[..., column == k].square().sum((1, 2)) for k in range(2)) / 64
    assert torch.allclose(eps[1].float(), expected, rtol=1e-5)
    x0, eps = state_errors(coarse, images, range(5), [4])
    small = torch.nn.functional.avg_pool2d(images, 2)
    assert torch.allclose(x0[0].float(), small.square().mean((1, 2, 3)), rtol=1e-5)
    assert torch.allclose(eps[0].float(), float(snr[4, 0]) * small.square().mean((1, 2, 3)), rtol=1e-5)


def test_clipping_is_that_of_pixels():
    states = ComponentStates([1, 8, 8], space=Haar(2, [3.0, 2.0, 1.0]), S=3)
    x = torch.randn(4, 1, 8, 8) * 3
    for finished in range(3):
        small = states.space.coarse(x, finished)
        z = states.space.clamp(states.space.forward(small, finished), 1.0, finished)
        assert torch.allclose(
            states.space.inverse(z, finished), small.clamp(-(2.0**finished), 2.0**finished), atol=1e-5
        )
        assert torch.allclose(
            states.decode(z, finished)[..., :: 2**finished, :: 2**finished],
            small.clamp(-(2.0**finished), 2.0**finished) / 2**finished,
            atol=1e-5,
        )


def test_pictures_of_all_scales_have_the_size_of_images():
    y = Observation(Inpainting(), Geometric(sigma_max=1.0))
    states = ComponentStates([1, 8, 8], space=Haar(1), S=4, observation=y)
    model, images = CompositeDenoiser(experts(states)), torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8)
    strip = forward_strip(model, images, [1, 2, 3, 4])
    assert list(strip.shape) == [3, 5, 1, 8, 8]
    assert torch.equal(strip[:, 0], images)
    assert torch.equal(strip[:, 3, :, ::2, ::2], strip[:, 3, :, 1::2, 1::2])  # of half the resolution
    steps, rows = reverse_strip(model, DDIM(), range(3), given=torch.zeros(3, 1, 8, 8))
    assert list(steps.shape) == [3, 5, 1, 8, 8]
    assert rows == [4, 3, 2, 1, 0]
    assert list(estimate_strip(model, images, 4).shape) == [3, 3, 1, 8, 8]
