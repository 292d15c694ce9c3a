"""Models on tables that are not variance preserving, or whose networks are told another time than the index."""

import pytest
import torch

from lightning_tdisent.diffusion.objectives import V
from lightning_tdisent.diffusion.process import first_state, noise
from lightning_tdisent.diffusion.rng import seed_noise
from lightning_tdisent.diffusion.schedules import FlowMatching, Geometric, Linear, VarianceExploding
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError
from lightning_tdisent.evaluation.pictures import forward_strip
from lightning_tdisent.models.compose import compose
from lightning_tdisent.models.composite import CompositeDenoiser
from lightning_tdisent.models.export import pipeline
from lightning_tdisent.models.model_prior import FITTING, ModelPrior
from lightning_tdisent.models.truncated import TruncatedModel, signal_note
from lightning_tdisent.models.warm import start_warm
from lightning_tdisent.priors.prior import StandardNormal
from lightning_tdisent.sampling.denoiser import Denoiser
from lightning_tdisent.sampling.likelihood import ode_likelihood, variational_bound
from lightning_tdisent.sampling.sampler import DDIM, Ancestral

SIGMA = {"sigma_min": 0.02, "sigma_max": 110.0}
PRESERVING = LatentStates(Geometric(**SIGMA), S=4)
EXPLODING = LatentStates(VarianceExploding(**SIGMA), S=4)
FLOW = LatentStates(FlowMatching(), S=4)


class Rescaled(Denoiser):
    """The model of another table of equal SNR: it is asked for x / n."""

    def forward(self, x, s, label=None):
        x, _, _ = EXPLODING.normalised(s, x)
        return Denoiser(self.network, self.objective, PRESERVING).eval()(x, s, label)


@pytest.fixture
def pair(unet):
    """A denoiser on the variance-preserving table, and the same function on the variance-exploding one."""
    network = unet(0)
    return Denoiser(network, V(), PRESERVING).eval(), Rescaled(network, V(), EXPLODING).eval()


@pytest.mark.parametrize("cut", [2, 3])
@pytest.mark.parametrize("sampler", [DDIM(), Ancestral()])
def test_a_chain_cut_at_a_row_starts_at_the_scale_of_that_row(pair, sampler, cut):
    mine, theirs = (sampler(TruncatedModel(d, StandardNormal(), cut), range(4)) for d in pair)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-5)


def test_likelihoods_of_two_scalings_are_equal(pair):
    images, ids = torch.randint(256, (3, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte(), range(3)
    for measure in (variational_bound, ode_likelihood):
        mine, theirs = (measure(d, images, ids).total for d in pair)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-3)


def test_states_are_shown_in_one_range(pair):
    images = torch.randint(256, (3, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    mine, theirs = (forward_strip(d, images, [1, 2, 4]).int() for d in pair)
    assert (mine - theirs).abs().max() <= 1  # a rounding


def test_the_note_on_signal_at_the_end_is_that_of_equal_snr(pair):
    assert [signal_note(d) for d in pair] == ["", ""]
    short = LatentStates(VarianceExploding(sigma_max=5.0), S=4, terminal_bound=0.5)
    assert "with 0.2 of the signal" in signal_note(Denoiser(pair[0].network, V(), short))


@pytest.mark.parametrize("states", [EXPLODING, FLOW], ids=["exploding", "flow"])
def test_the_scheduler_of_diffusers_is_refused_for_other_tables(unet, states):
    assert pipeline(Denoiser(unet(0), V(), PRESERVING).eval())
    with pytest.raises(InputError, match="its table is not variance preserving"):
        pipeline(Denoiser(unet(0), V(), states).eval())


@pytest.mark.parametrize(("here", "there"), [(EXPLODING, PRESERVING), (PRESERVING, EXPLODING)])
def test_weights_of_another_scale_are_refused(unet, write, tmp_path, here, there):
    shared = write("shared", Denoiser(unet(0), V(), there))
    with pytest.raises(InputError, match="scale at index"):
        start_warm(Denoiser(unet(1), V(), here), str(shared))
    experts = [write(f"e{s}", Denoiser(unet(s, conditioning="none"), V(), here, [s])) for s in (1, 2, 4)]
    with pytest.raises(InputError, match="scale at index"):
        compose(experts, tmp_path / "all", fill=f"shared:{shared}")


def test_rows_differ_by_log_snr_scale_or_time():
    shifted = LatentStates(FlowMatching(shift=3.0), S=4)
    untimed = LatentStates.from_table(shifted.log_snr, shifted.index, shifted.schedule, 1.0, shifted.scale)
    assert shifted.difference(2, shifted, 2) is None
    assert shifted.difference(2, untimed, 2)[0] == "time"
    assert PRESERVING.difference(2, EXPLODING, 2)[0] == "scale"
    assert PRESERVING.difference(2, PRESERVING, 3)[0] == "log-SNR"


def test_an_expert_of_a_flow_matching_table_starts_warm_at_its_time(unet, write):
    """The embedding that is folded in is that of 1000 sigma, which is no index of a shifted path."""
    states = LatentStates(FlowMatching(shift=3.0), S=4)
    shared = Denoiser(unet(0), V(), states).eval()
    file, x = write("shared", shared), torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for s in (1, 3):
        expert = Denoiser(unet(5, conditioning="none"), V(), states, [s]).eval()
        start_warm(expert, str(file))
        torch.testing.assert_close(expert(x, s), shared(x, s), rtol=0, atol=1e-5)


def test_training_and_sampling_tell_a_network_the_same_time(unet):
    told = []

    class Told(Denoiser):
        def _raw(self, x, time, label):
            told.append(time)
            return super()._raw(x, time, label)

    model = Told(unet(0), V(), LatentStates(FlowMatching(shift=3.0), S=4)).eval()
    x = torch.zeros(1, 1, 8, 8)
    for s in (1, 2, 3, 4):
        model(x, s)
        model.loss(x, torch.tensor([s]), x)
    assert all(
        a.dtype == b.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(told[::2], told[1::2], strict=True)
    )


@pytest.mark.parametrize("kind", ["native", "rescaled"])
def test_the_time_of_a_native_table_is_that_of_its_own_levels(kind):
    states = LatentStates(FlowMatching(shift=3.0), S=3, kind=kind)
    torch.testing.assert_close(states.time.double(), 1000 * states.b[:, 0], rtol=1e-6, atol=0)


def test_experts_of_a_flow_matching_table_compose_and_sample(unet):
    experts = [Denoiser(unet(s, conditioning="none"), V(), FLOW, [s]).eval() for s in FLOW.rows]
    composite = CompositeDenoiser(experts).eval()
    x0, eps = torch.zeros(2, 1, 8, 8), torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    x = noise(FLOW, x0, 2, eps)
    assert torch.equal(composite(x, 2), experts[1](x, 2))
    images = DDIM()(composite, range(3))
    assert bool(images.isfinite().all())
    torch.testing.assert_close(images[1:2], DDIM()(composite, [1]), rtol=0, atol=1e-5)


def test_the_source_of_a_prior_draws_the_images_that_it_would_draw_itself(pair, write):
    """The chain of the source starts at its own scale, 110 on this table."""
    mine, theirs = (ModelPrior(str(write(str(k), d))) for k, d in enumerate(pair))
    for prior, denoiser in ((mine, pair[0]), (theirs, Denoiser(pair[1].network, V(), EXPLODING).eval())):
        images = prior._images(range(3))
        noise = torch.cat([seed_noise([seed], FITTING, [1, 8, 8]) for seed in range(3)])
        *_, (_, x, _) = DDIM().walk(denoiser, list(range(3)), start=first_state(denoiser.states, noise))
        torch.testing.assert_close(images, x, rtol=0, atol=1e-5)


class Halved(Linear):
    """Linear, whose networks are told half the level."""

    def times(self):
        return torch.arange(self.T + 1).float() / 2


@pytest.mark.parametrize("several", [False, True])
def test_an_exported_network_is_told_the_time_and_not_the_index(unet, several):
    states, x = LatentStates(Halved(), S=4), torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    if several:
        parts = [Denoiser(unet(k, conditioning="state"), V(), states, rows) for k, rows in enumerate(([1, 3], [2, 4]))]
        model = CompositeDenoiser([part.eval() for part in parts]).eval()
    else:
        model = Denoiser(unet(0), V(), states).eval()
    net = pipeline(model).unet
    for s in states.rows:
        owner = model.at(s)
        raw = owner.network(x, torch.full((2,), 125.0 * s), None)
        torch.testing.assert_close(net(x, s - 1).sample, raw, rtol=0, atol=1e-6)


def test_a_variance_exploding_schedule_has_no_zero_terminal():
    with pytest.raises(TypeError, match="zero_terminal"):
        VarianceExploding(zero_terminal=True)
    torch.testing.assert_close(LatentStates(VarianceExploding(), S=8).a, torch.ones(9, 1).double(), rtol=0, atol=1e-12)
