import math
import sys

import pytest
import torch

from lightning_tdisent.diffusion.rng import seed_noise
from lightning_tdisent.diffusion.spec import build, spec
from lightning_tdisent.errors import InputError, Unavailable
from lightning_tdisent.priors.flow import Flow

pytest.importorskip("normflows")


def stirred(shape, strength=0.2, **options):
    """Return a flow whose couplings act, as in a trained one; those of a new flow do not."""
    torch.manual_seed(3)
    flow = Flow(shape, **{"blocks": 2, "hidden": 8, **options})
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(strength * torch.randn_like(p))
    return flow


def train(flow, draw, steps, lr=5e-3, n=256):
    """Train by maximum likelihood on samples of ``draw``, with a cosine learning rate schedule."""
    flow.initialise(draw(1024))
    optimizer = torch.optim.Adam(flow.parameters(), lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        (-flow.log_prob(draw(n)).mean() / flow.size).backward()
        optimizer.step()


def two_moons(n):
    """Draw from two arcs, a distribution that no Gaussian approximates."""
    angle, which = math.pi * torch.rand(n), torch.randint(2, (n,))
    arc = torch.stack([angle.cos() + which - 0.5, angle.sin() * (1 - 2 * which) + 0.5 * which - 0.25], 1)
    return (arc + 0.1 * torch.randn(n, 2)).view(n, 1, 1, 2)


def mass(flow, side=10.0, cells=400):
    """Return the integral of the density over a square, by the midpoint rule."""
    at = (torch.arange(cells) + 0.5) / cells * 2 * side - side
    points = torch.cartesian_prod(at, at).view(-1, 1, 1, 2)
    with torch.no_grad():
        return float(flow.log_prob(points).exp().sum()) * (2 * side / cells) ** 2


def test_a_density_of_two_values_integrates_to_1_before_and_after_training():
    flow = stirred([1, 1, 2], levels=0, blocks=4, hidden=16)
    assert mass(flow) == pytest.approx(1, abs=1e-2)
    torch.manual_seed(0)
    held = two_moons(2000)
    train(flow, two_moons, 200)
    assert mass(flow) == pytest.approx(1, abs=1e-2)
    covariance = torch.cov(held.view(-1, 2).T)
    gaussian = 0.5 * torch.logdet(2 * math.pi * math.e * covariance)  # the bound of any Gaussian
    assert -flow.log_prob(held).mean() < gaussian - 0.3


@pytest.mark.parametrize(
    ("shape", "levels"), [([1, 4, 4], 1), ([1, 4, 4], 2), ([1, 8, 8], 2), ([2, 4, 2], 1), ([1, 1, 5], 0)], ids=str
)
def test_the_log_density_is_that_of_autograd(shape, levels):
    flow = stirred(shape, levels=levels).double()
    x = torch.randn(3, *shape, dtype=torch.float64)

    def latent(one):
        return torch.cat([z.flatten() for z in flow.to_latents(one[None])[0]])

    locs, scales = (torch.cat([getattr(q, k).flatten() for q in flow.flow.q0]) for k in ("loc", "log_scale"))
    base = torch.distributions.Normal(locs, scales.exp())
    for one, found in zip(x, flow.log_prob(x).tolist(), strict=True):
        jacobian = torch.autograd.functional.jacobian(latent, one).flatten(1)
        expected = base.log_prob(latent(one)).sum() + torch.linalg.slogdet(jacobian).logabsdet
        assert found == pytest.approx(expected.item(), abs=1e-9)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float64, 1e-10)], ids=str)
@pytest.mark.parametrize(
    ("shape", "levels"), [([1, 8, 8], 2), ([3, 8, 8], 3), ([1, 28, 28], 2), ([1, 1, 2], 0)], ids=str
)
def test_back_and_forth_is_where_it_was(shape, levels, dtype, bound):
    flow = stirred(shape, 0.05, levels=levels).to(dtype)
    x = torch.randn(5, *shape, dtype=dtype)
    with torch.no_grad():
        latents, log_det = flow.to_latents(x)
        again, back = flow.to_state(latents)
    assert sum(z[0].numel() for z in latents) == flow.size
    assert again.shape == x.shape
    assert float((again - x).abs().max()) < bound
    assert float((log_det + back).abs().max()) < bound * flow.size


def test_the_log_density_is_float64_and_the_same_under_autocast():
    flow, x = stirred([1, 8, 8]), torch.randn(4, 1, 8, 8)
    plain = flow.log_prob(x)
    assert plain.dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(flow.log_prob(x), plain)


@pytest.mark.parametrize(("shape", "levels", "bound"), [([1, 1, 2], 0, 0.01), ([1, 4, 4], 1, 0.01)], ids=str)
def test_of_gaussian_data_it_learns_the_entropy(shape, levels, bound):
    D = math.prod(shape)
    i = torch.arange(D)
    covariance = 0.7 ** (i[:, None] - i).abs() * 0.5
    factor, mean = torch.linalg.cholesky(covariance), torch.linspace(-1, 1, D)
    truth = torch.distributions.MultivariateNormal(mean, scale_tril=factor)
    torch.manual_seed(1)
    flow = Flow(shape, levels=levels, blocks=3, hidden=16)
    held = truth.sample((4000,))
    train(flow, lambda n: truth.sample((n,)).view(n, *shape), 300)
    with torch.no_grad():
        found = -float(flow.log_prob(held.view(-1, *shape)).mean()) / D
    best = -float(truth.log_prob(held).mean()) / D
    assert best == pytest.approx(float(truth.entropy()) / D, abs=0.03)
    assert -0.001 < found - best < bound  # the difference is KL/D; sampling error hides no density that is too high


@pytest.mark.parametrize(("shape", "levels"), [([1, 8, 8], 2), ([1, 1, 2], 0)], ids=str)
def test_samples_are_functions_of_their_seeds(shape, levels):
    flow = stirred(shape, 0.05, levels=levels)
    torch.manual_seed(11)
    x = flow.sample([7, 2, 2**32 - 1, 2], 992)
    state = torch.random.get_rng_state()
    assert x.shape == (4, *shape)
    assert (x.dtype, x.requires_grad) == (torch.float32, False)
    for row, seed in enumerate([7, 2, 2**32 - 1, 2]):
        assert torch.equal(flow.sample([seed], 992)[0], x[row])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(flow.sample([7], 991), flow.sample([7], 992))
    # back to the noise that they were made from
    with torch.no_grad():
        latents, _ = flow.to_latents(x)
        noise = [((z - q.loc) / q.log_scale.exp()).flatten(1) for z, q in zip(latents, flow.flow.q0, strict=True)]
    gap = torch.cat(noise, 1) - seed_noise([7, 2, 2**32 - 1, 2], 992, [flow.size])
    assert float(gap.abs().max()) < 1e-4
    assert flow.sample([], 992).shape == (0, *shape)


def test_initialised_by_data_it_begins_normalised_and_in_the_tensors_it_had():
    torch.manual_seed(0)
    flow = Flow([1, 1, 3], levels=0, blocks=2, hidden=4)
    before = {name: p.data_ptr() for name, p in flow.named_parameters()}
    x = torch.randn(500, 1, 1, 3) * torch.tensor([0.1, 1, 5]) + torch.tensor([3.0, 0, -2])
    flow.initialise(x)
    assert {name: p.data_ptr() for name, p in flow.named_parameters()} == before
    last = flow.flow.flows[0][-1]  # the first layer that x passes
    y, _ = last.inverse(x.flatten(1))
    assert torch.allclose(y.mean(0), torch.zeros(3), atol=1e-4)
    assert torch.allclose(y.std(0), torch.ones(3), atol=1e-3)
    kept = {name: p.clone() for name, p in flow.state_dict().items()}
    flow.log_prob(10 * x)  # another batch changes nothing
    assert all(torch.equal(p, kept[name]) for name, p in flow.state_dict().items())


def test_a_new_flow_waits_for_no_data():
    flow = Flow([1, 4, 4], levels=1)
    kept = {name: p.clone() for name, p in flow.state_dict().items()}
    flow.log_prob(torch.randn(8, 1, 4, 4) + 3)
    assert all(torch.equal(p, kept[name]) for name, p in flow.state_dict().items())


def test_built_later_it_is_the_same():
    late = Flow(levels=1, blocks=2, hidden=8)
    with pytest.raises(InputError, match="no shape yet"):
        late.log_prob(torch.zeros(1, 1, 4, 4))
    with pytest.raises(InputError, match="no shape yet"):
        late.sample([0], 1)
    torch.manual_seed(5)
    late.build([1, 4, 4])
    torch.manual_seed(5)
    early = build(spec(late), Flow)
    assert early.state_dict().keys() == late.state_dict().keys()
    x = torch.randn(2, 1, 4, 4)
    assert torch.equal(early.log_prob(x), late.log_prob(x))


def test_what_it_refuses(monkeypatch):
    with pytest.raises(InputError, match=r"divisible by 8, the shape is \[1, 28, 28\]; set levels to 2 or less"):
        Flow([1, 28, 28], levels=3)
    with pytest.raises(InputError, match=r"divisible by 2, .*\[1, 8, 7\]; set levels to 0 or less"):
        Flow([1, 8, 7], levels=1)
    with pytest.raises(InputError, match="at least 2 values"):
        Flow([1, 1, 1], levels=0)
    for wrong in ({"levels": -1}, {"blocks": 0}, {"hidden": 0}):
        with pytest.raises(InputError, match=f"{next(iter(wrong))} {next(iter(wrong.values()))}"):
            Flow([1, 8, 8], **wrong)
    with pytest.raises(InputError, match="is trained"):
        Flow([1, 8, 8]).fit(torch.zeros(4, 1, 8, 8), 0.5, 0.5)
    monkeypatch.setitem(sys.modules, "normflows", None)
    with pytest.raises(Unavailable, match=r"pip install 'lightning_tdisent\[prior\]'"):
        Flow([1, 8, 8])
