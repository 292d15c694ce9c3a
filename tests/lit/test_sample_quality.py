"""SampleQuality in training: the code of evaluate, one curve per protocol, and no failure of the training."""

import pytest
import torch

from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError
from lightning_tdisent.evaluation.real_images import real_images
from lightning_tdisent.evaluation.score import open_quality, score
from lightning_tdisent.lit.callbacks.quality import SampleQuality
from lightning_tdisent.lit.modules import ReducedStates, SingleState
from lightning_tdisent.metrics.features import SmallClassifier, foreign_features, load_features
from lightning_tdisent.metrics.protocol import Protocol
from lightning_tdisent.sampling.sampler import DDIM


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TDISENT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def fitted(tiny, data, trainer):
    def fit(quality, steps=2, cls=ReducedStates, rows=None, broken=False):
        torch.manual_seed(0)
        module = cls(tiny(), LatentStates(S=4), **({"expert": 2} if cls is SingleState else {}))
        if broken:
            for p in module.denoiser.parameters():
                p.data.zero_()
            module.sampler = Constant()
        run = trainer(steps, quality, ema=0.0)
        run.fit(module, datamodule=data())
        return module, {k: float(v) for k, v in run.callback_metrics.items() if k.startswith("quality/")}

    return fit


class Constant(DDIM):
    def walk(self, denoise, seeds, label=None, start=None):
        yield 0, torch.zeros(len(seeds), *denoise.shape), None


def test_it_logs_the_numbers_of_evaluate(fitted, digits, capsys):
    module, found = fitted(SampleQuality("digits", 40, first_seed=3, n_real=1000))
    protocol = Protocol.preset("digits", n=40, first_seed=3, n_real=1000)
    quality = open_quality(protocol, load_features("digits"), real_images(digits, "train", 1), [1, 8, 8])
    values = score(module.denoiser.eval(), module.sampler, quality).values
    tagged = {f"quality/{k}/{quality.protocol.hash}": v for k, v in values.items()}
    assert found == pytest.approx(tagged, rel=1e-6)  # Lightning stores float32
    assert quality.protocol.n_real == 1000
    said = capsys.readouterr().err
    assert "note: SampleQuality: n=40 images leave a covariance of 64 features without full rank" in said
    assert "of a classifier of" not in said  # of these images
    assert foreign_features("digits", digits / "other") == [
        f"the features are of a classifier of digits and say little of other images; {digits / 'other'} is another "
        "data set by its name: take Inception for it (fetch inception), or random to compare models"
    ]
    assert not foreign_features("random", digits / "other")


def test_a_second_training_does_not_evaluate_real_images_again(fitted, monkeypatch):
    seen = []
    inner = SmallClassifier.extract
    monkeypatch.setattr(SmallClassifier, "extract", lambda self, x: seen.append(len(x)) or inner(self, x))
    fitted(SampleQuality("digits", 32))
    first, seen[:] = sum(seen), []
    fitted(SampleQuality("digits", 32))
    assert sum(seen) == 16 + 32  # a block of the preflight, and the images
    assert first >= 32 + 1500


def test_missing_weights_only_disable_the_metric(fitted):
    with pytest.warns(UserWarning, match="SampleQuality is left out: inception: no weights at .* fetch inception"):
        module, found = fitted(SampleQuality("adm", 32))
    assert found == {}
    assert module.images_seen == 64


def test_equal_images_only_cost_the_number(fitted):
    with pytest.warns(UserWarning, match="no quality at step 2: all 32 images are the same"):
        module, found = fitted(SampleQuality("digits", 32), broken=True)
    assert found == {}
    assert module.images_seen == 64


def test_an_expert_that_cannot_be_sampled_is_left_out(fitted):
    assert fitted(SampleQuality("digits", 32), cls=SingleState)[1] == {}


def test_features_of_another_shape_are_refused_before_the_first_step(fitted):
    with pytest.raises(InputError, match=r"features 'mnist' take images of \[1, 28, 28\], these are \[1, 8, 8\]"):
        fitted(SampleQuality("mnist", 32))


def test_unknown_protocols_are_refused_at_once():
    with pytest.raises(InputError, match="there is no 'digit'"):
        SampleQuality("digit")
    assert SampleQuality({"preset": "digits", "metrics": ["fd"], "neighbours": 7}).protocol.metrics == ("fd",)
