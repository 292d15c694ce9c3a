"""Truncated models: what sampling from a prior draws, and what is refused."""

import dataclasses
import io
import json
import random
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_tdisent.cli import main
from lightning_tdisent.data.decode import Decoder
from lightning_tdisent.data.shards import Shards
from lightning_tdisent.diffusion.components import ComponentStates
from lightning_tdisent.diffusion.objectives import V
from lightning_tdisent.diffusion.rng import seed_noise
from lightning_tdisent.diffusion.schedules import Linear, ScaledLinear
from lightning_tdisent.diffusion.spaces import Haar
from lightning_tdisent.diffusion.spec import build, spec
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError
from lightning_tdisent.models.compose import compose, load_model
from lightning_tdisent.models.export import export
from lightning_tdisent.models.model_prior import FITTING, ModelPrior
from lightning_tdisent.models.prior_files import PriorCard, fit_prior, fit_to, load_prior, save_prior
from lightning_tdisent.models.truncated import TruncatedModel, load_truncated, signal_note
from lightning_tdisent.priors.gaussian import Gaussian
from lightning_tdisent.priors.mixture import Mixture
from lightning_tdisent.priors.prior import Prior, StandardNormal
from lightning_tdisent.sampling.denoiser import Denoiser
from lightning_tdisent.sampling.guidance import Guided
from lightning_tdisent.sampling.likelihood import variational_bound
from lightning_tdisent.sampling.sample import sample
from lightning_tdisent.sampling.sampler import DDIM, Ancestral, DPMSolver


class Exact:
    """E[x_0 | x_s] of images with a common brightness N(m, v) and independent values N(0, w) on it."""

    classes = None

    def __init__(self, states, shape=(1, 8, 8), m=0.6, v=0.04, w=0.01):
        self.states, self.shape, self.m, self.v, self.w = states, list(shape), m, v, w
        self.weight = torch.zeros(1)

    def __call__(self, x, s, label=None):
        a, b = self.states.coefficients(s)
        D = x[0].numel()
        mean = x.mean((1, 2, 3), keepdim=True)
        along, across = D * self.v + self.w, self.w
        return (
            self.m
            + a * along / (a * a * along + b * b) * (mean - a * self.m)
            + a * across / (a * a * across + b * b) * (x - mean)
        )

    def data(self, n):
        generator = torch.Generator().manual_seed(0)
        brightness = self.m + self.v**0.5 * torch.randn(n, 1, 1, 1, generator=generator)
        return brightness + self.w**0.5 * torch.randn(n, *self.shape, generator=generator)

    def at(self, s):
        return self

    def parameters(self):
        return iter([self.weight])


def moments(model, sampler, n=2000):
    x = sampler(model, range(n))
    brightness = x.mean((1, 2, 3))
    return torch.stack([brightness.mean(), brightness.std(), (x - brightness[:, None, None, None]).std()])


@pytest.mark.parametrize("sampler", [DDIM(clip=None), Ancestral(clip=None), DPMSolver(clip=None)])
def test_a_cut_chain_with_the_exact_prior_draws_what_the_whole_one_does(sampler):
    model = Exact(LatentStates(S=100))
    whole = moments(model, sampler)
    prior = Gaussian()
    fit_prior(prior, model.states, 60, model.data(20_000), "data")
    cut = moments(TruncatedModel(model, prior, 60), sampler)
    assert torch.allclose(whole, cut, atol=0.012)
    assert float(cut[0]) == pytest.approx(0.6, abs=0.012)
    plain = moments(TruncatedModel(model, StandardNormal(), 30), sampler)  # most of the signal is still there
    assert abs(float(plain[0]) - 0.6) > 0.1


def test_a_gaussian_prior_repairs_the_brightness_of_a_schedule_that_ends_with_signal():
    states = LatentStates(
        ScaledLinear(beta_start=0.00085, beta_end=0.012), S=50, spacing="trailing", terminal_bound=0.1
    )
    assert float(states.a[-1]) ** 2 == pytest.approx(0.00466, rel=0.01)
    bright = Exact(states, m=0.9, v=0.0004)
    off = abs(float(moments(bright, DDIM(clip=None))[0]) - 0.9)
    for options in ({}, {"rank": 3}, {"low": 2}):
        prior = Gaussian(**options)
        fit_prior(prior, states, 50, bright.data(5000), "data")
        assert abs(float(moments(TruncatedModel(bright, prior, 50), DDIM(clip=None))[0]) - 0.9) < 0.002
    assert off > 0.005


def test_a_table_is_cut_with_its_values():
    states = LatentStates(S=32)
    for at, kept in ((20, 20), (0.6, 19), (1.0, 32), (1, 1)):
        cut = states.truncate(at)
        assert kept == cut.S
        assert torch.equal(cut.log_snr, states.log_snr[: kept + 1])
        assert torch.equal(cut.index, states.index[: kept + 1])
    for at in (0, 33, -1, 0.001, 1.5, True):
        with pytest.raises(InputError, match=r"a cut at .* is none of the rows 1\.\.32"):
            states.truncate(at)


@pytest.mark.parametrize(("at", "kept"), [(20, 20), (0.6, 19), (1.0, 32), (32, 32)])
def test_a_table_made_with_a_cut_is_the_whole_one_cut_there(at, kept):
    whole, cut = LatentStates(S=32), LatentStates(S=32, cut=at)
    assert cut.fingerprint == whole.truncate(at).fingerprint
    assert (cut.S, len(cut.rows)) == (kept, kept)
    again = build(spec(cut), LatentStates)  # as a checkpoint does
    assert (again.fingerprint, again.terminal_bound) == (cut.fingerprint, cut.terminal_bound)
    for wrong in (0, 33, 1.5):
        with pytest.raises(InputError, match=r"none of the rows 1\.\.32"):
            LatentStates(S=32, cut=wrong)
    with pytest.raises(InputError, match="requires kind: mapped, got native"):
        LatentStates(S=32, kind="native", cut=at, terminal_bound=1.0)


@pytest.fixture
def fitted(tmp_path):
    """A prior in a folder, fitted to random images at a row of 4."""

    def make(row=3, states=None, prior=None, data="data", n=40):
        prior, name = prior or Gaussian(), tmp_path / f"prior_{row}_{data}"
        images = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)
        card = fit_prior(prior, states or LatentStates(S=4), row, images, data)
        save_prior(name / "prior.safetensors", prior, card)
        return name

    return make


@pytest.mark.parametrize("prior", [None, Mixture(components=2, dimension=3), StandardNormal()])
def test_a_prior_is_read_back_as_it_was(prior, fitted):
    folder = fitted(prior=prior)
    one, card = load_prior(folder)
    assert (card.row, card.index, card.data, card.n) == (3, 750, "data", 40)
    other, _ = load_prior(folder / "prior.safetensors")
    assert torch.equal(one.sample(range(4), 750), other.sample(range(4), 750))
    if prior is not None:
        assert torch.equal(one.sample(range(4), 750), prior.sample(range(4), 750))
        assert torch.equal(one.log_prob(torch.ones(1, 1, 8, 8)), prior.log_prob(torch.ones(1, 1, 8, 8)))


def test_a_prior_of_another_row_table_or_data_is_refused(fitted, model, write, tmp_path):
    whole = write("whole", model(rows=[1, 2, 3, 4]), data="data")
    started = load_truncated(whole, str(fitted()))
    cards = started.cards
    assert (started.states.S, len(cards)) == (3, 1)
    x = started.start(range(5))
    assert torch.equal(x, load_prior(fitted())[0].sample(range(5), 750))
    first = next(DDIM().walk(started, range(5)))
    assert first[0] == 3
    assert torch.equal(first[1], x)
    with pytest.raises(InputError, match="row 4 is above the truncation: sampling starts at row 3"):
        started(x, 4)
    with pytest.raises(InputError, match=r"fitted to the data other, .* trained on data"):
        load_truncated(whole, str(fitted(data="other")))
    other = fitted(states=LatentStates(Linear(beta_end=0.03), S=4), data="table")
    with pytest.raises(InputError, match=r"fitted at row 3 \(index 750, log-SNR .* cut at row 3 .* has "):
        TruncatedModel(load_model(whole), *_prior_and_card(other, 3))
    with pytest.raises(InputError, match=r"fitted at row 2 .* cut at row 3"):
        TruncatedModel(load_model(whole), *_prior_and_card(fitted(row=2), 3))
    with pytest.raises(InputError, match=r"the prior makes \[1, 4, 4\], the model \[1, 8, 8\]"):
        TruncatedModel(load_model(whole), StandardNormal([1, 4, 4]), 3)
    plain = load_truncated(whole, "cut:0.5")
    assert plain.states.S == 2
    for wrong, message in (("cut:x", "expected cut:ROW"), ("cut:9", "a cut at 9"), ("nowhere", "no such file")):
        with pytest.raises(InputError, match=message):
            load_truncated(whole, wrong)


def _prior_and_card(folder, row):
    prior, card = load_prior(folder)
    return prior, row, card


def test_experts_above_the_truncation_may_be_missing(fitted, model, write, tmp_path):
    files = [write(f"e{s}", model(rows=[s], seed=s), data="data") for s in (1, 2, 3)]
    for k, file in enumerate(files):
        (tmp_path / "runs" / str(k)).mkdir(parents=True)
        (tmp_path / "runs" / str(k) / "model.safetensors").write_bytes(file.read_bytes())
    with pytest.raises(InputError, match="no expert owns row 4"):
        load_model(tmp_path / "runs")
    few = load_truncated(tmp_path / "runs", str(fitted()))
    cards = few.cards
    assert len(cards) == 3
    files.append(write("e4", model(rows=[4], seed=4), data="data"))
    whole = compose(files, tmp_path / "whole")
    for residency in ("resident", "stream"):
        started = load_truncated(whole, str(fitted()), residency)
        cards = started.cards
        assert len(cards) == 3
        images = [next(sample(m, DDIM(), range(5))) for m in (few, started)]
        assert torch.equal(*images)
    (tmp_path / "runs" / "2" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no expert owns row 3"):
        load_truncated(tmp_path / "runs", str(fitted()))


def test_a_model_prior_is_an_image_of_another_model_noised_to_the_row(model, write, tmp_path):
    source = write("source", model(rows=[1, 2, 3, 4], seed=7), data="data")
    prior, states = ModelPrior(str(source), steps=2), LatentStates(S=4)
    card = fit_prior(prior, states, 3, torch.zeros(2, 1, 8, 8), "data")
    a, b = states.coefficients(3)
    with torch.inference_mode():
        noises = [seed_noise([k], FITTING, [1, 8, 8]) for k in range(4)]
        drawn = [[*DDIM(steps=2).walk(load_model(source), [k], start=n)][-1][1] for k, n in enumerate(noises)]
        images = torch.cat(drawn)
    noise = StandardNormal([1, 8, 8]).sample(range(4), 750)
    assert torch.allclose(prior.sample(range(4), 750), a * images + b * noise, atol=1e-6)
    assert torch.equal(prior.sample(range(16), 750)[:4], prior.sample(range(4), 750))
    labelled = write("labelled", model(rows=[1, 2, 3, 4], classes=3), data="data")
    with pytest.raises(InputError, match="requires classes"):
        fit_prior(ModelPrior(str(labelled)), states, 3, torch.zeros(2, 1, 8, 8), "data")
    save_prior(tmp_path / "implicit" / "prior.safetensors", prior, card)
    again, _ = load_prior(tmp_path / "implicit")
    assert torch.equal(again.sample(range(4), 750), prior.sample(range(4), 750))
    with pytest.raises(InputError, match=r"makes \[1, 8, 8\], the data is \[1, 4, 4\]"):
        fit_prior(ModelPrior(str(source)), states, 3, torch.zeros(2, 1, 4, 4), "data")
    with pytest.raises(InputError, match="no density"):
        prior.log_prob(images)
    write("source", model(rows=[1, 2, 3, 4], seed=8), data="data")  # another model under the same name
    with pytest.raises(InputError, match=r"source\.safetensors: .*ModelPrior was made with a file of sha256"):
        load_prior(tmp_path / "implicit")
    of_a_folder = build(spec(prior) | {"files": {}}, ModelPrior)  # as where the source is a run or a composite
    with pytest.raises(InputError, match=r"the weights of .*source.* have the sha256 .* it was fitted with"):
        of_a_folder.sample(range(2), 750)


def test_a_multi_scale_source_is_sampled_in_its_own_shape(unet, write, tmp_path):
    table = ComponentStates([1, 8, 8], space=Haar(1, [2.0, 0.25]), S=4)
    for k, rows in enumerate(table.blocks_of_rows):
        net = unet(k, table.shape_at(rows[0], [1, 8, 8]))
        write(f"parts/{k}/model", Denoiser(net, V(), table, rows), data="data")
    source = compose([tmp_path / "parts" / str(k) for k in range(2)], tmp_path / "source")
    prior = ModelPrior(str(source))
    fit_prior(prior, LatentStates(S=4), 3, torch.zeros(2, 1, 8, 8), "data")
    model = load_model(source)
    with torch.inference_mode():
        noise = seed_noise([5], FITTING, table.shape_at(4, [1, 8, 8]))
        image = table.decode([*DDIM().walk(model, [5], start=noise)][-1][1])
        assert torch.equal(prior._images([5]), image)
    assert prior.evaluations == 4
    assert sum(card.images_seen for card in prior.cards) == sum(card.images_seen for card in load_model(source).cards)


def test_the_cost_of_the_source_of_a_prior_is_counted(model, write, digits, tmp_path, monkeypatch):
    monkeypatch.setenv("TDISENT_CACHE", str(tmp_path / "cache"))
    data = Shards.open(digits, "train", Decoder(1)).digest
    source = write("source", model(rows=[1, 2, 3, 4], seed=7), data=data, images_seen=1000)
    write("run/model", model(rows=[1, 2, 3, 4]), data=data, images_seen=500)
    for name, path, extra in (("other", source, 1000), ("itself", tmp_path / "run", 0)):
        fit = ["prior", str(tmp_path / "run"), "--at", "3", "--prior", "ModelPrior", "--prior.source", str(path)]
        fit += ["--prior.steps", "2", "--data", str(digits), "-n", "8", "--out", str(tmp_path / name)]
        assert main(fit) == 0
        words = ["evaluate", str(tmp_path / "run"), "--prior", str(tmp_path / name), "--data", str(digits), "-n", "16"]
        out = tmp_path / f"{name}_measured"
        assert main([*words, "--protocol", "digits", "--held-out", "40", "--out", str(out)]) == 0
        row = json.loads((out / "results.json").read_text(encoding="utf-8"))[0]
        assert (row["images_seen"], row["nfe"]) == (500 + extra, 3 + 2)


def test_latents_above_the_clip_are_refused(model, write, tmp_path):
    source = write("source", model(rows=[1, 2, 3, 4], seed=7), data="data")
    with pytest.raises(InputError, match="the data go up to 3, clip is 1; give clip: null for latents"):
        fit_prior(ModelPrior(str(source)), LatentStates(S=4), 3, torch.full((2, 1, 8, 8), 3.0), "data")
    prior = ModelPrior(str(source), clip=None)
    fit_prior(prior, LatentStates(S=4), 3, torch.full((2, 1, 8, 8), 3.0), "data")
    with torch.inference_mode():
        noise = seed_noise([5], FITTING, [1, 8, 8])
        free = [*DDIM(clip=None).walk(load_model(source), [5], start=noise)][-1][1]
    assert torch.equal(prior._images([5]), free)
    assert float(free.abs().max()) > 1


def test_a_table_with_signal_at_its_end_gets_a_note(unet, write, tmp_path, capsys):
    cut = LatentStates(S=4, cut=2)
    table = LatentStates(S=4)
    for name, states, said in (("cut", cut, True), ("whole", table, False)):
        write(f"{name}/model", Denoiser(unet(), V(), states), data="unknown")
        assert bool(signal_note(load_model(tmp_path / name))) == said
        words = ["sample", str(tmp_path / name), "--out", str(tmp_path / f"{name}_images"), "--seeds", "0:2"]
        assert main(words) == 0
        assert ("its table ends at row 2 with 0.28 of the signal" in capsys.readouterr().out) == said
        page = (export(tmp_path / name, tmp_path / f"{name}_exported") / "README.md").read_text(encoding="utf-8")
        assert ("Note: its table ends at row 2" in page) == said


def test_a_prior_of_few_images_is_fitted_to_images_spread_over_the_data(model, write, tmp_path):
    levels = [10 + 20 * k for k in range(10)]
    with tarfile.open(tmp_path / "train-0000.tar", "w") as tar:
        for i, level in enumerate(np.repeat(levels, 20)):
            stream = io.BytesIO()
            Image.fromarray(np.full((8, 8), level + i % 2, dtype=np.uint8)).save(stream, "png")
            info = tarfile.TarInfo(f"{i:04d}.png")
            info.size = stream.tell()
            tar.addfile(info, io.BytesIO(stream.getvalue()))
    source = write("run/model", model(rows=[1, 2, 3, 4]), data="unknown")
    prior, card = fit_to(source, 2, {"class_path": "lightning_tdisent.Gaussian", "init_args": {}}, tmp_path, n=20)
    a, _ = LatentStates(S=4).coefficients(2)
    assert card.n == 20
    assert float((prior.mean.mean() / a + 1) * 127.5) == pytest.approx(np.mean(levels), abs=1)


def test_an_autoencoder_can_be_the_source_of_a_prior(tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=2, block_out_channels=(8, 8), norm_num_groups=4, sample_size=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    prior = ModelPrior(str(tmp_path / "vae"))
    fit_prior(prior, LatentStates(S=4), 2, torch.zeros(2, 1, 8, 8), "data")
    x = prior.sample(range(3), 500)
    assert x.shape == (3, 1, 8, 8)
    assert torch.equal(prior.sample(range(3), 500), x)


def test_files_that_are_no_priors_are_refused(fitted, tmp_path):
    folder = fitted()
    file = folder / "prior.safetensors"
    tensors, content = {k: v.clone() for k, v in load_file(file).items()}, file.read_bytes()
    file.write_bytes(content[:200])
    with pytest.raises(InputError, match="not a prior written by this project"):
        load_prior(folder)
    save_file(tensors, file)
    with pytest.raises(InputError, match="not a prior written by this project"):
        load_prior(folder)
    file.write_bytes(
        content.replace(b"lightning_tdisent.priors.gaussian.Gaussian", b"lightning_tdisent.priors.gaussian.Prior   ")
    )
    with pytest.raises(InputError):
        load_prior(folder)


def test_the_command_fits_prints_and_is_used_by_sample_and_evaluate(
    model, write, digits, tmp_path, capsys, monkeypatch
):
    from lightning_tdisent.data.shards import load

    monkeypatch.setenv("TDISENT_CACHE", str(tmp_path / "cache"))
    digest = load(digits, "train", 1).digest
    whole = write("whole", model(rows=[1, 2, 3, 4]), data=digest)
    out = tmp_path / "prior"
    words = ["prior", str(whole), "--data", str(digits), "--out", str(out)]
    assert main([*words, "--at", "0", "--prior", "Gaussian"]) == 2
    assert main([*words, "--at", "0.75", "--prior", "Mixture", "--prior.components", "3", "--prior.dimension=4"]) == 0
    assert "Mixture at row 3 (index 750), 1,500 images" in capsys.readouterr().out
    assert main([*words, "--at", "3"]) == 2
    assert "already holds a prior" in capsys.readouterr().err
    assert main(["sample", str(whole), "--prior", str(out), "--out", str(tmp_path / "images"), "--seeds", "0:3"]) == 0
    ask = ["evaluate", str(whole), "--prior", str(out), "--data", str(digits), "--protocol", "digits", "-n", "30"]
    ask += ["--bits-images", "20", "--decoder", "uniform", "--out", str(tmp_path / "eval"), "--metrics"]
    assert main([*ask, "fd,bpd,bpd_ode"]) == 2
    assert "needs 100 of them; no model here has as many" in capsys.readouterr().err
    assert main([*ask, "fd,bpd"]) == 0
    row = json.loads((tmp_path / "eval" / "results.json").read_text(encoding="utf-8"))[0]
    assert (row["cut"], row["prior"], row["nfe"]) == (3, "Mixture", 3)
    terms = row["bpd_terms"]
    assert row["bpd"] == pytest.approx(terms["decoder"] + terms["prior"] + sum(terms["rows"].values()))
    assert list(terms["rows"]) == ["2", "3"]
    assert row["bpd_low"] < row["bpd"] < row["bpd_high"]
    assert "uniform decoder, 20 held-out images" in row["bpd_how"]


@pytest.fixture
def digest(digits):
    from lightning_tdisent.data.shards import load

    return {split: load(digits, split, 1).digest for split in ("train", "test")}


def fitting(weights, out, *words):
    return ["prior", str(weights), "--data", "data/digits", "--at", "3", "--out", str(out), *map(str, words)]


def test_a_prior_of_data_that_the_model_has_not_seen_is_refused_when_it_is_fitted(
    model, write, digest, tmp_path, capsys
):
    trained = write("trained", model(rows=[1, 2, 3, 4]), data=digest["train"])
    assert main(fitting(trained, tmp_path / "p", "--split", "test")) == 2
    said = capsys.readouterr().err
    assert digest["train"] in said
    assert digest["test"] in said
    assert "split test" in said
    assert not (tmp_path / "p").exists()
    other = write("other", model(rows=[1, 2, 3, 4]), data="0" * 16)
    assert main(fitting(other, tmp_path / "p")) == 2
    unknown = write("unknown", model(rows=[1, 2, 3, 4]), data="unknown")
    assert main(fitting(unknown, tmp_path / "p")) == 0


def test_a_prior_is_not_written_into_the_folder_of_a_run(model, write, digest, tmp_path, capsys):
    path = write("model", model(rows=[1, 2, 3, 4]), data=digest["train"])
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("id: aaaa000011112222", encoding="utf-8")
    for out in (run, path.parent):
        assert main(fitting(path, out)) == 2
        assert "is the folder of a run or of weights; choose another for the prior" in capsys.readouterr().err
    assert sorted(p.name for p in run.iterdir()) == ["config.yaml"]


def test_a_prior_of_few_images_says_its_rank(model, write, digest, tmp_path, capsys):
    trained = write("trained", model(rows=[1, 2, 3, 4]), data=digest["train"])
    assert main(fitting(trained, tmp_path / "few", "-n", 2)) == 0
    assert "note: 2 images for 64 directions: their covariance has rank 1 at most" in capsys.readouterr().out
    assert main(fitting(trained, tmp_path / "one", "-n", 1)) == 2
    assert "wants 2 images at least, there are 1" in capsys.readouterr().err
    assert main(fitting(trained, tmp_path / "rank", "-n", 9, "--prior.rank", 8)) == 0
    assert main(fitting(trained, tmp_path / "all")) == 0
    assert "note" not in capsys.readouterr().out


def test_a_prior_of_a_class_conditional_model_says_of_which_classes_it_is(model, write, digest, tmp_path, capsys):
    """One of all classes is named as such when it is fitted and used; one of a class draws that class alone."""
    trained = write("trained", model(rows=[1, 2, 3, 4], classes=10), data=digest["train"])
    assert main(fitting(trained, tmp_path / "all")) == 0
    assert "note: fitted to images of all classes" in capsys.readouterr().out
    assert main(fitting(trained, tmp_path / "three", "--label", 3)) == 0
    assert "161 images of class 3" in capsys.readouterr().out
    from lightning_tdisent.data.shards import load

    images = load("data/digits", "train", 1)
    prior, card = load_prior(tmp_path / "three")
    alone = Gaussian()
    fit_prior(alone, LatentStates(Linear(), S=4), 3, images.images[images.labels == 3], "any")
    assert torch.equal(prior.sample([0, 1], 750), alone.sample([0, 1], 750))
    assert (card.label, card.n) == (3, 161)
    ask = ["sample", str(trained), "--seeds", "0:3", "--prior"]
    assert main([*ask, str(tmp_path / "all"), "--label", "3", "--out", str(tmp_path / "a")]) == 0
    assert "note: the prior was fitted to images of all classes" in capsys.readouterr().out
    assert main([*ask, str(tmp_path / "three"), "--label", "3", "--out", str(tmp_path / "b")]) == 0
    assert "note" not in capsys.readouterr().out
    for more, said in (
        (["--label", "4"], "class 3 alone, class 4 is asked for"),
        ([], "class 3 alone, all classes are drawn in turn"),
    ):
        assert main([*ask, str(tmp_path / "three"), "--out", str(tmp_path / "c"), *more]) == 2
        assert said in capsys.readouterr().err
    words = ["evaluate", str(trained), "--data", "data/digits", "--protocol", "digits", "-n", "20"]
    assert main([*words, "--prior", str(tmp_path / "three"), "--out", str(tmp_path / "e")]) == 2
    assert "class 3 alone" in capsys.readouterr().err
    started, label = load_truncated(trained, str(tmp_path / "three")), torch.tensor([3, 3])
    assert len(torch.cat(list(sample(started, DDIM(), [0, 1], 2, label)))) == 2
    assert variational_bound(started, images.images[:2], [0, 1], label).prior.isfinite().all()
    for odd in (None, torch.tensor([3, 4])):  # from Python too, with guidance around the model and for a likelihood
        for made in (started, Guided(started, 2.0)):
            with pytest.raises(InputError, match="class 3 alone"):
                list(sample(made, DDIM(), [0, 1], 2, odd))
            with pytest.raises(InputError, match="class 3 alone"):
                variational_bound(made, images.images[:2], [0, 1], odd)
    for label, said in ((10, "has classes 0 to 9"), (-1, "has classes 0 to 9")):
        assert main(fitting(trained, tmp_path / "odd", "--label", label)) == 2
        assert said in capsys.readouterr().err
    plain = write("plain", model(rows=[1, 2, 3, 4]), data=digest["train"])
    assert main(fitting(plain, tmp_path / "odd", "--label", 1)) == 2
    assert "has no classes" in capsys.readouterr().err


def test_priors_written_before_classes_were_kept_are_read(fitted):
    _, card = load_prior(fitted())
    content = {k: v for k, v in dataclasses.asdict(card).items() if k != "label"}
    assert PriorCard.from_json(content, "old") == card


def test_every_flipped_bit_of_a_prior_is_found(fitted):
    file = fitted() / "prior.safetensors"
    content = file.read_bytes()
    rng = random.Random(0)  # noqa: S311
    for _ in range(200):
        at = rng.randrange(len(content))
        file.write_bytes(content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :])
        with pytest.raises(InputError):
            load_prior(file)
    file.write_bytes(content)
    load_prior(file)
    card = json.loads(read_metadata(file)["prior"])
    assert len(card.pop("sha256")) == 64
    save_file(load_file(file), file, {"prior": json.dumps(card)})  # as the first versions wrote it
    load_prior(file)


def read_metadata(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


@pytest.mark.parametrize("old", ["sampling.start.Implicit", "Implicit"])
def test_a_model_prior_is_built_from_its_earlier_class_paths(old):
    prior = build({"class_path": f"lightning_tdisent.{old}", "init_args": {"source": "runs/vae", "steps": 2}}, Prior)
    assert isinstance(prior, ModelPrior)
    assert (prior.source, prior.steps) == ("runs/vae", 2)
