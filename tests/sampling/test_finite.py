"""Values that are not finite raise an error that names them: weights when loaded or written, images when drawn."""

import json
import types
from pathlib import Path

import pytest
import torch

from lightning_tdisent.cli import main
from lightning_tdisent.data.shards import load
from lightning_tdisent.diffusion.objectives import X0, V
from lightning_tdisent.digests import sha256
from lightning_tdisent.errors import InputError, NotFinite
from lightning_tdisent.evaluation.evaluate import Contender, evaluate
from lightning_tdisent.evaluation.pictures import estimate_strip
from lightning_tdisent.evaluation.real_images import real_images
from lightning_tdisent.evaluation.score import open_quality, score
from lightning_tdisent.finite import non_finite
from lightning_tdisent.lit.callbacks.pictures import Pictures
from lightning_tdisent.metrics.features import load_features
from lightning_tdisent.metrics.protocol import Protocol
from lightning_tdisent.models.compose import compose, load_model
from lightning_tdisent.models.expert import load_expert, save_expert
from lightning_tdisent.models.prior_files import fit_prior, load_prior, save_prior
from lightning_tdisent.models.truncated import TruncatedModel
from lightning_tdisent.priors.gaussian import Gaussian
from lightning_tdisent.sampling.denoiser import Denoiser
from lightning_tdisent.sampling.guidance import Guided
from lightning_tdisent.sampling.sample import sample
from lightning_tdisent.sampling.sampler import DDIM, DPMSolver

NAME = "network.net.conv_in.weight"


def spoilt(denoiser, value=float("nan")):
    with torch.no_grad():
        denoiser.state_dict()[NAME].view(-1)[3] = value
    return denoiser


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_file_of_weights_that_are_not_finite_names_file_and_tensor(model, forge, value):
    path = forge(spoilt(model(), value), lambda card: None)
    with pytest.raises(NotFinite, match=rf"forged.safetensors: {NAME} \(1 in all\) hold values that are not finite"):
        load_expert(path)


def test_half_precision_is_looked_at_value_by_value(model, forge):
    denoiser = model().half()
    for tensor in denoiser.state_dict().values():
        tensor.fill_(60_000)  # their sum overflows, none of them does
    assert non_finite(denoiser.state_dict()) == []
    load_expert(forge(denoiser, lambda card: None))
    with pytest.raises(NotFinite, match=NAME):
        load_expert(forge(spoilt(denoiser, float("inf")), lambda card: None))


def test_nothing_that_is_not_finite_is_written(model, card_of, tmp_path):
    denoiser = spoilt(model())
    with pytest.raises(NotFinite, match=NAME):
        save_expert(tmp_path / "model.safetensors", denoiser, card_of(denoiser))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("residency", ["resident", "offload", "stream"])
def test_a_composite_names_the_expert_that_is_not_finite(model, forge, write, residency, tmp_path):
    files = [write(f"{s}/model", model(rows=[s], seed=s)) for s in (1, 2, 4)]
    (tmp_path / "3").mkdir()
    bad = forge(spoilt(model(rows=[3])), lambda card: None, "3/model")
    with pytest.raises(NotFinite, match=rf"3/model.safetensors: {NAME}"):
        load_model(tmp_path, residency)
    with pytest.raises(NotFinite, match=rf"3/model.safetensors: {NAME}"):
        compose([*files, bad], tmp_path / "composite")
    assert not (tmp_path / "composite").exists()
    folder = compose([*files, write("3/good", model(rows=[3]))], tmp_path / "composite")
    load_model(folder, residency)
    (folder / "rows_0003.safetensors").unlink()
    (folder / "rows_0003.safetensors").write_bytes(bad.read_bytes())
    manifest = json.loads((folder / "composite.json").read_text(encoding="utf-8"))
    manifest["experts"][2]["sha256"] = sha256(bad)
    (folder / "composite.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(NotFinite, match=rf"rows_0003.safetensors: {NAME}"):
        load_model(folder, residency)


def test_a_prior_that_is_not_finite_is_neither_written_nor_loaded(states, tmp_path, monkeypatch):
    prior = Gaussian()
    card = fit_prior(prior, states, 2, torch.randn(40, 1, 4, 4), "data")
    prior.mean.view(-1)[0] = float("nan")
    with pytest.raises(NotFinite, match=r"prior.safetensors: mean \(1 in all\)"):
        save_prior(tmp_path / "prior.safetensors", prior, card)
    monkeypatch.setattr("lightning_tdisent.models.prior_files.refuse_non_finite", lambda *_: None)
    save_prior(tmp_path / "prior.safetensors", prior, card)
    monkeypatch.undo()
    with pytest.raises(NotFinite, match=r"prior.safetensors: mean \(1 in all\)"):
        load_prior(tmp_path)


class Fragile(torch.nn.Module):
    """x0_hat = 0 but at one row, where it is what is given for images whose first value is above a bound."""

    classes = None

    def __init__(self, states, value, row=2, bound=-torch.inf):
        super().__init__()
        self.states, self.shape, self.weight = states, [1, 4, 4], torch.nn.Parameter(torch.zeros(()))
        self.value, self.row, self.bound = value, row, bound

    def at(self, s):
        return self

    def forward(self, x, s, label=None):
        bad = (x[:, :1, :1, :1] > self.bound) & (s == self.row)
        return torch.where(bad, self.value, torch.zeros_like(x))


@pytest.mark.parametrize("sampler", [DDIM(), DDIM(clip=None), DPMSolver()])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_images_that_are_not_finite_are_named_with_the_row(states, sampler, value):
    assert len(torch.cat(list(sample(Fragile(states, 0.5), sampler, range(40))))) == 40
    with pytest.raises(NotFinite, match=r"x0_hat at row 2 .* for 40 of 40 images, seeds 3, 4, 5, 6, 7, \.\.: "):
        list(sample(Fragile(states, value), sampler, range(3, 43)))
    with pytest.raises(NotFinite, match=r"x0_hat at row 4 .* for 2 of 2 images, seeds 8, 9: "):
        sampler(Fragile(states, value, row=4), [8, 9])
    fragile = Fragile(states, value, bound=0.0)
    with pytest.raises(NotFinite, match="not finite") as found:
        list(sample(fragile, sampler, [5, 6, 7]))
    wrong = {int(n) for n in str(found.value).partition("seeds ")[2].partition(":")[0].split(", ")}
    alone = set()
    for seed in (5, 6, 7):
        try:
            list(sample(fragile, sampler, [seed]))
        except NotFinite:
            alone.add(seed)
    assert wrong == alone


def test_a_start_that_is_not_finite_is_named(states):
    walk = DDIM().walk(Fragile(states, 0.5), [1, 2], start=torch.full((2, 1, 4, 4), float("nan")))
    with pytest.raises(NotFinite, match=r"the start at row 4 is not finite .* seeds 1, 2:"):
        list(walk)
    prior = Gaussian()
    card = fit_prior(prior, states, 2, torch.randn(40, 1, 4, 4), "data")
    prior.mean.view(-1)[0] = float("nan")
    with pytest.raises(NotFinite, match="the start at row 2"):
        list(sample(TruncatedModel(Fragile(states, 0.5), prior, 2, card), DDIM(), [1]))


def test_half_precision_that_overflows_draws_nothing(toy, states):
    network = toy([1, 8, 8])
    denoiser = Denoiser(network, X0(), states).half()
    assert len(next(iter(sample(denoiser, DDIM(), [1])))) == 1
    network.forward = lambda x, *_: x * 60_000  # infinite, and 1 after the clip: white images
    with pytest.raises(NotFinite, match=r"x0_hat at row 4 .* overflowed"):
        list(sample(denoiser, DDIM(), [1]))


def test_guidance_that_overflows_draws_nothing(model):
    guided = Guided(model(classes=3).half(), 60_000.0)
    with pytest.raises(NotFinite, match="guidance"):
        list(sample(guided, DDIM(), [1, 2], label=torch.tensor([0, 1])))
    for scale in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="guidance: scale must be finite, got"):
            Guided(model(classes=3), scale)
    with pytest.raises(InputError, match=r"sampler\.clip: must be a positive bound"):
        DDIM(clip=float("nan"))


@pytest.fixture
def quality(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("TDISENT_CACHE", str(tmp_path / "cache"))
    protocol = Protocol.preset("digits", n=20, metrics=("fd",))
    return open_quality(protocol, load_features("digits"), real_images(digits, "train", 1), [1, 8, 8])


def test_an_evaluation_says_why_and_measures_the_others(model, write, forge, digits, quality, tmp_path):
    good = write("good", model())
    bad = model(V())
    for p in bad.parameters():
        p.data.mul_(1e20)  # finite, and what it computes is not
    files = {"good": good, "bad": write("bad", bad)}
    real, held_out = real_images(digits, "train", 1), load(digits, "test", 1)
    protocol = Protocol.preset("digits", n=20, metrics=("fd",))
    contenders = [Contender(name, path, DDIM()) for name, path in files.items()]
    rows, images = evaluate(contenders, protocol, load_features("digits"), real, held_out)
    assert "refused" not in rows[0]
    assert "x0_hat at row 4 is not finite" in rows[1]["refused"]
    assert not {"fd_digits", "x0_mse", "eps_mse"} & rows[1].keys()
    assert list(images) == ["good"]
    json.dumps(rows, allow_nan=False)
    assert len(score(load_model(good), DDIM(), quality, keep=5).images) == 5
    assert len(score(load_model(files["bad"]), DDIM(), quality, keep=5).images) == 0


def test_the_command_draws_nothing_and_exits_with_two(model, forge, write, tmp_path, capsys):
    bad = forge(spoilt(model()), lambda card: None)
    assert main(["sample", str(bad), "--out", str(tmp_path / "images")]) == 2
    assert f"{NAME} (1 in all) hold values that are not finite" in capsys.readouterr().err
    wild = model()
    for p in wild.parameters():
        p.data.mul_(1e20)
    assert main(["sample", str(write("wild", wild)), "--out", str(tmp_path / "images"), "--seeds", "3:5"]) == 2
    said = capsys.readouterr().err
    assert "x0_hat at row 4 is not finite (NaN or infinity) for 2 of 2 images, seeds 3, 4:" in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "images").exists()


def test_pictures_of_a_training_are_left_out_with_a_word(model, states, digits, tmp_path):
    held_out = load(digits, "test", 1)

    def draw(denoiser, whole=True):
        module = types.SimpleNamespace(denoiser=denoiser, rows=denoiser.rows, whole=whole, sampler=DDIM())
        trainer = types.SimpleNamespace(
            is_global_zero=True, datamodule=types.SimpleNamespace(held_out=held_out), loggers=[], global_step=7,
            default_root_dir=str(tmp_path / "run"),
        )  # fmt: skip
        Pictures(samples=4, strips=2).on_validation_epoch_end(trainer, module)
        return {p.name.rpartition("_")[0] for p in Path(tmp_path / "run/pictures").iterdir()}

    with pytest.warns(UserWarning, match="no picture of samples at step 7: x0_hat at row 4 is not finite"):
        assert draw(spoilt(model())) == {"forward_strip"}
    with pytest.warns(UserWarning, match="no picture of samples at step 7: the model: x0_hat at row 3"):
        assert draw(spoilt(model(rows=[3])), whole=False) == {"forward_strip"}
    assert draw(model()) == {"forward_strip", "samples", "reverse_strip"}
    with pytest.raises(NotFinite, match="x0_hat at row 3"):
        estimate_strip(spoilt(model()), held_out.images[:2], 3)
