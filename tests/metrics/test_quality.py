import warnings

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from lightning_tdisent.errors import InputError
from lightning_tdisent.metrics.features import SHIPPED, SmallClassifier, load_features, save_features
from lightning_tdisent.metrics.quality import Protocol, Quality
from lightning_tdisent.streaming.shards import load


@pytest.fixture(scope="module")
def sets(digits):
    return load(digits, "train", 1), load(digits, "test", 1)


def frechet(a, b):
    """The closed form, written independently with scipy's square root."""
    a, b = a.double().numpy(), b.double().numpy()
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    with warnings.catch_warnings():  # some features are zero on all images
        warnings.simplefilter("ignore")
        root = sqrtm(ca @ cb).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * root))


def test_the_distance_is_the_closed_form(sets):
    train, test = sets
    quality = Quality("digits")
    quality.add_real(train.images)
    for part in test.images.split(50):
        quality.add(part)
    features = load_features("digits")
    expected = frechet(features(train.images), features(test.images))
    assert quality.compute()["fd_digits"] == pytest.approx(expected, rel=1e-3)
    quality.reset()
    quality.add(train.images)
    assert quality.compute()["fd_digits"] == pytest.approx(0, abs=1e-3)


def test_the_score_is_the_closed_form_and_knows_no_order(sets):
    _, test = sets
    p = load_features("digits").logits(test.images).double().softmax(1)
    expected = (p * (p.log() - p.mean(0).log())).sum(1).mean().exp().item()
    values = []
    for images in (test.images, test.images[test.labels.argsort()]):
        quality = Quality("digits")
        quality.add_real(test.images)
        quality.add(images)
        values.append(quality.compute()["is_digits"])
    assert values[0] == pytest.approx(expected, rel=1e-5)
    assert values[1] == pytest.approx(values[0], rel=1e-6)


def test_noise_scores_worse_than_digits(sets):
    train, test = sets
    quality = Quality("digits")
    quality.add_real(train.images)
    quality.add(test.images)
    real = quality.compute()
    quality.reset()
    quality.add(torch.randint(0, 256, test.images.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8))
    noise = quality.compute()
    assert noise["fd_digits"] > 10 * real["fd_digits"]
    assert noise["is_digits"] < real["is_digits"] / 2


def test_measuring_moves_no_generator(sets):
    _, test = sets
    quality = Quality("digits")
    before = torch.get_rng_state()
    quality.add_real(test.images)
    quality.add(test.images[:50])
    quality.compute()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("name", "limit"), [("digits", 300_000), ("mnist", 1_000_000)])
def test_shipped_features_are_small_and_load(name, limit):
    assert (SHIPPED / f"{name}.safetensors").stat().st_size < limit
    assert load_features(name).num_features == 64


def test_the_digit_classifier_knows_digits(sets):
    _, test = sets
    assert (load_features("digits").logits(test.images).argmax(1) == test.labels).double().mean() > 0.98


def test_features_round_trip_and_refuse(tmp_path):
    network = SmallClassifier([3, 16, 16], 5, 4)
    save_features(tmp_path / "x.safetensors", network)
    with pytest.raises(InputError, match=r"uint8 images \[3, 16, 16\], got torch.float32"):
        network(torch.zeros(1, 3, 16, 16))
    with pytest.raises(InputError, match="'inception' is not shipped; choose from digits, mnist"):
        load_features("inception")


def test_the_protocol_hash_changes_with_every_field():
    base = {"features": "digits", "n": 10, "first_seed": 0, "real": "abc", "n_real": 5}
    other = {"features": "mnist", "n": 11, "first_seed": 1, "real": "abd", "n_real": 6}
    hashes = {Protocol(**{**base, k: other[k]}).hash for k in base} | {Protocol(**base).hash}
    assert len(hashes) == 6
    assert Protocol(**base).hash == Protocol(**base).hash
