import json
import math
import signal
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
import yaml
from watching import Memory

from lightning_tdisent.diffusion.process import noise
from lightning_tdisent.diffusion.rng import seed_noise
from lightning_tdisent.diffusion.schedules import Linear
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError
from lightning_tdisent.images import from_uint8
from lightning_tdisent.lit.callbacks.checkpoint import Checkpoint, Preempted
from lightning_tdisent.lit.callbacks.guard import Guard
from lightning_tdisent.lit.callbacks.losses import LossPerState
from lightning_tdisent.lit.callbacks.pictures import Pictures
from lightning_tdisent.lit.callbacks.quality import SampleQuality
from lightning_tdisent.lit.callbacks.weights import EMA, Export
from lightning_tdisent.lit.checkpoints import DurableIO, load, newest
from lightning_tdisent.lit.entry import run
from lightning_tdisent.lit.modules import Diffusion, ReducedStates
from lightning_tdisent.lit.prior import PriorAt, PriorModule
from lightning_tdisent.models.prior_files import load_prior
from lightning_tdisent.models.truncated import TruncatedModel
from lightning_tdisent.priors.flow import Flow
from lightning_tdisent.priors.gaussian import Gaussian
from lightning_tdisent.sampling.errors_by_row import HELD_OUT
from lightning_tdisent.sampling.sample import sample
from lightning_tdisent.sampling.sampler import DDIM

pytest.importorskip("normflows")

FIT = ["fit", "--config", "experiments/digits/prior_flow.yaml", "--model.prior.init_args.hidden", "8"]


@pytest.fixture
def make():
    def module(shape=(1, 8, 8), at=2, states=None, **options):
        torch.manual_seed(7)
        flow = Flow(shape, blocks=2, hidden=8)
        return PriorModule(flow, states or LatentStates(S=8), at, **{"lr": 5e-3, "warmup": 3, **options})

    return module


def held_out_nll(prior, data, index, a, b):
    """Return -log p of the held-out states in nats per value, by definition."""
    x0 = from_uint8(data.held_out.images)
    eps = seed_noise(range(len(x0)), HELD_OUT + index, x0.shape[1:])
    with torch.no_grad():
        return -float(prior.log_prob(a * x0 + b * eps).mean()) / x0[0].numel()


def test_training_lowers_the_held_out_nll_and_leaves_the_averaged_prior(make, fit, data, tmp_path):
    ema, memory = EMA(0.9), Memory()
    module, shards = make(), data()
    trainer = fit(module, 60, ema=ema, logger=memory, val_check_interval=30)
    prior, card = load_prior(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()

    # the export: the averages, bit for bit, and all other state
    averages = ema.weights(module)
    state = prior.state_dict()
    assert all(torch.equal(state[name.removeprefix("prior.")], w) for name, w in averages.items())
    assert state.keys() == module.prior.state_dict().keys()
    assert any(not torch.equal(p, module.prior.state_dict()[name]) for name, p in state.items())

    # the card
    states = LatentStates(S=8)
    assert (card.row, card.index) == (2, int(states.index[2]))
    assert card.log_snr == states.log_snr[2].tolist()
    assert card.fingerprint == states.truncate(2).fingerprint
    assert (card.data, card.n) == (shards.digest, len(shards.shards))
    assert (card.images_seen, card.steps, card.notes) == (60 * 32, 60, ["weights: ema, decay 0.9, steps 60"])
    assert card.seconds > 0

    # validation: the averaged weights, in nats and bits per value
    a, b = states.coefficients(2)
    last = trainer.callback_metrics
    assert float(last["val/nll"]) == pytest.approx(held_out_nll(prior, shards, card.index, a, b), abs=1e-5)
    assert float(last["val/bits"]) == pytest.approx(float(last["val/nll"]) / math.log(2), rel=1e-6)
    assert memory.values[60 * 32]["val/nll"] < memory.values[30 * 32]["val/nll"] < 1.3
    # training: the mean loss of steps 56..60 is the same quantity
    assert memory.values[60 * 32]["train/loss"] == pytest.approx(float(last["val/nll"]), abs=0.05)


def test_a_loaded_prior_has_the_same_density_and_samples(make, fit, tmp_path):
    module = make()
    fit(module, 4, ema=EMA(0))
    prior, card = load_prior(tmp_path / "prior.safetensors")
    x = torch.randn(6, 1, 8, 8)
    assert torch.allclose(prior.log_prob(x), module.prior.log_prob(x).detach(), rtol=0, atol=1e-4)
    assert torch.allclose(prior.sample(range(3), card.index), module.prior.sample(range(3), card.index), atol=1e-5)


def test_a_model_starts_from_the_prior(make, fit, tiny, tmp_path):
    fit(make(at=0.25), 4)
    prior, card = load_prior(tmp_path)
    torch.manual_seed(0)
    denoiser = ReducedStates(tiny(), LatentStates(S=8)).denoiser.eval()
    started = TruncatedModel(denoiser, prior, card.row, card)
    assert (card.row, started.states.S) == (2, 2)
    images = torch.cat(list(sample(started, DDIM(), [0, 5])))
    assert torch.equal(images[1:], torch.cat(list(sample(started, DDIM(), [5]))))
    assert torch.equal(next(DDIM().walk(started, [5]))[1], prior.sample([5], card.index))
    with pytest.raises(InputError, match="fitted at row 2"):
        TruncatedModel(denoiser, prior, 3, card)


def test_the_loss_is_the_density_at_the_row():
    states, flow = LatentStates(S=8), Flow([1, 8, 8], blocks=1, hidden=4)
    at = PriorAt(flow, states, 0.6)
    assert (at.rows, at.states.S, at.index) == ([5], 5, int(states.index[5]))
    x0, eps, s = torch.rand(3, 1, 8, 8), torch.randn(3, 1, 8, 8), torch.full((3,), 5)
    loss = at.loss(x0, s, eps)
    assert loss.dtype == torch.float32
    expected = -flow.log_prob(noise(states, x0, s, eps)) / 64
    assert torch.allclose(loss.double(), expected, atol=1e-6)


def test_the_prior_may_take_its_shape_from_the_data(make, fit, tmp_path):
    module = make(shape=None)
    fit(module, 2)
    assert load_prior(tmp_path)[1].prior["init_args"]["shape"] == [1, 8, 8]
    assert len(list(module.prior.parameters())) > 0


def test_pictures_and_quality_leave_it_alone(make, fit, tmp_path):
    fit(make(), 2, Pictures(samples=4, strips=2), SampleQuality("digits", n=20))
    names = {p.name for p in (tmp_path / "pictures").iterdir()}
    assert names == {"forward_strip_0000002.png", "samples_0000002.png"}


def train(folder, data, make, stop=None):
    """Start or resume the run in a folder, up to 12 steps or until a signal after step ``stop``."""

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == stop:
                signal.raise_signal(signal.SIGTERM)

    module = make(decay="cosine")
    trainer = L.Trainer(
        callbacks=[Stop(), EMA(0.9), LossPerState(), Guard(), Export(), Checkpoint()],
        plugins=[DurableIO()],
        logger=False,
        max_steps=12,
        max_epochs=-1,
        val_check_interval=6,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=4,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        accelerator="cpu",
    )
    path, _, _ = newest(folder / "checkpoints")
    trainer.fit(module, datamodule=data(seed=3, batch_size=200), ckpt_path=path, weights_only=True)


def test_a_run_that_was_stopped_ends_as_one_that_was_not(make, data, tmp_path):
    train(tmp_path / "whole", data, make)
    for stop in (5, 9):
        with pytest.raises(Preempted, match="143"):
            train(tmp_path / "broken", data, make, stop)
        assert not (tmp_path / "broken" / "prior.safetensors").exists()
    train(tmp_path / "broken", data, make)
    ends = [load(newest(tmp_path / name / "checkpoints")[0]) for name in ("whole", "broken")]
    for part in ("state_dict", "ema"):
        one, other = (end[part]["weights"] if part == "ema" else end[part] for end in ends)
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    (a, card_a), (b, card_b) = (load_prior(tmp_path / name) for name in ("whole", "broken"))
    assert all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())
    assert card_a.run != card_b.run
    assert {**vars(card_a), "seconds": 0, "run": ""} == {**vars(card_b), "seconds": 0, "run": ""}


def test_the_command_line_trains_resumes_and_validates(tmp_path, capsys):
    folder = tmp_path / "run"
    more = ["--run", str(folder), "--trainer.accelerator", "cpu", "--trainer.val_check_interval", "2"]
    more += ["--trainer.max_steps"]
    run([*FIT, *more, "4"])
    assert "PriorModule" in capsys.readouterr().out
    assert load_prior(folder)[1].steps == 4
    with pytest.raises(SystemExit) as ended:
        run([*FIT, *more, "4"])
    assert ended.value.code == 0
    assert "all 4 steps are done" in capsys.readouterr().out
    nll = float(run([*FIT, *more, "6"]).trainer.callback_metrics["val/nll"])
    prior, card = load_prior(folder)
    assert (card.steps, card.images_seen) == (6, 6 * 64)
    content = json.loads((folder / "checkpoints" / "newest.json").read_text(encoding="utf-8"))
    path = folder / "checkpoints" / content["file"]
    again = run(["validate", *FIT[1:], "--run", str(folder), "--ckpt_path", str(path), "--trainer.accelerator", "cpu"])
    assert float(again.trainer.callback_metrics["val/nll"]) == pytest.approx(nll, abs=1e-6)
    module = Diffusion.load_from_checkpoint(path)
    assert isinstance(module, PriorModule)
    assert all(torch.equal(w, prior.state_dict()[name]) for name, w in module.prior.state_dict().items())


def test_what_the_prior_module_refuses(make, fit, data, tmp_path):
    with pytest.raises(InputError, match="Gaussian is not trained but fitted at once: use the command prior"):
        PriorModule(Gaussian(), LatentStates(S=8), 2)
    for at in (0, 9, -1, 0.0, 1.5):
        with pytest.raises(InputError, match=rf"a cut at {at} is none of the rows 1\.\.8"):
            make(at=at)
    two = LatentStates.from_table(LatentStates(S=8).log_snr.repeat(1, 2), LatentStates(S=8).index, Linear())
    with pytest.raises(InputError, match="one column, this one has 2"):
        make(states=two)
    with pytest.raises(InputError, match=r"model.prior.shape is \[1, 16, 16\], the images .* have \[1, 8, 8\]"):
        fit(make(shape=[1, 16, 16]), 1)
    with pytest.raises(InputError, match="no images"):
        make().predict_step([0], 0)


def test_a_checkpoint_of_another_prior_or_row_or_of_a_model_is_refused(make, fit, tiny, tmp_path):
    def checkpoint(module, name):
        fit(module, 1).save_checkpoint(tmp_path / name)
        return tmp_path / name

    mine, model = checkpoint(make(), "prior.ckpt"), checkpoint(ReducedStates(tiny(), LatentStates(S=8)), "model.ckpt")
    other = make()
    other.prior.blocks = 3
    for module, path, field in (
        (make(at=3), mine, "row: the checkpoint has 2, the config 3"),
        (other, mine, "prior: the checkpoint has"),
        (make(), model, "prior: the checkpoint has None"),
        (ReducedStates(tiny(), LatentStates(S=8)), mine, "network: the checkpoint has None"),
    ):
        with pytest.raises(InputError, match=field):
            fit(module, 2, ckpt_path=path)


def test_a_closed_form_prior_in_a_config_is_refused_by_name(tmp_path):
    config = yaml.safe_load(Path("experiments/digits/prior_flow.yaml").read_text(encoding="utf-8"))
    config["model"]["init_args"]["prior"] = {"class_path": "Gaussian"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.raises(InputError, match="use the command prior"):
        run(["fit", "--config", str(tmp_path / "config.yaml"), "--run", str(tmp_path / "run")])
