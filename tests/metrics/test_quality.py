"""Metrics of images: feature networks, the protocol, sums over any ranks and batches, the kept reference.

Long, as networks, protocol and reference are tested on the images that one small network makes countable.
"""

import dataclasses
import json

import pytest
import torch
from oracle import CASES, RECORDED, features
from safetensors import safe_open
from safetensors.torch import save_file

from lightning_tdisent.data.shards import load
from lightning_tdisent.errors import InputError
from lightning_tdisent.metrics import reference as references
from lightning_tdisent.metrics import registry
from lightning_tdisent.metrics.features import SHIPPED, SmallClassifier, load_classifier, load_features, save_classifier
from lightning_tdisent.metrics.inception_score import InceptionScore, Scores
from lightning_tdisent.metrics.network import Extracted, FeatureNetwork
from lightning_tdisent.metrics.protocol import PRESETS, Protocol
from lightning_tdisent.metrics.quality import Quality
from lightning_tdisent.metrics.reference import cache_folder, measure, reference, remembered

SAID = json.loads(RECORDED.read_text(encoding="utf-8"))["features"]


class Flat(FeatureNetwork):
    """Pixels as features, classes and inner features: every number can be worked out by hand."""

    name, num_features, classes, num_spatial = "flat", 4, 4, 2

    def extract(self, images):
        x = images.flatten(1).float()
        return Extracted(x, x / 50, x[:, :2])


@pytest.fixture(scope="module")
def sets(digits):
    return load(digits, "train", 1), load(digits, "test", 1)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TDISENT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def drawn(n, seed=0, shape=(1, 2, 2)):
    return torch.randint(0, 256, (n, *shape), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def protocol_of(features="flat", **fields):
    settings = {k: fields.pop(k) for k in ("neighbours", "score_splits", "score_part", "score_seed") if k in fields}
    return Protocol(features, settings=settings, **fields)


def quality_of(real, network=None, **fields):
    network = network or Flat()
    protocol = protocol_of(**fields).resolved(network, "digest", len(real), real.shape[1:])
    return Quality(protocol, network, measure(protocol, network, lambda i: real[i]))


def test_every_number_is_that_of_its_function(sets):
    from lightning_tdisent.metrics.distances import Moments, frechet, kernel_distance, precision_recall

    train, test = sets
    network = load_features("digits")
    p = Protocol.preset("digits", n=len(test)).resolved(network, train.digest, len(train), (1, 8, 8))
    quality = Quality(p, network, measure(p, network, lambda i: train.images[i]))
    quality.add(test.images, torch.arange(len(test)))
    found = quality.compute()
    real, fake = network(train.images).features, network(test.images)
    assert found["fd_digits"] == pytest.approx(frechet(Moments.of(real), Moments.of(fake.features)), rel=1e-12)
    assert found["kid_digits"] == pytest.approx(kernel_distance(real, fake.features), rel=1e-12)
    shares = {f"{k}_digits": v for k, v in precision_recall(real, fake.features, 5).items()}
    assert {k: found[k] for k in shares} == shares
    probability = fake.logits.double().softmax(1)
    expected = (probability * (probability.log() - probability.mean(0).log())).sum(1).mean().exp()
    assert found["is_digits"] == pytest.approx(float(expected), rel=1e-12)
    assert found["fd_bias_digits"] == pytest.approx(2.4, abs=0.2)  # of a distance of 3.3 of real images


@pytest.mark.parametrize("case", CASES)
def test_the_score_is_torch_fidelitys(case):
    _, _, logits = features(case)
    said, n = SAID[case]["torch_fidelity"], len(logits)
    ten, one, score = Scores(20, n, 10), Scores(20, n, 1, None), InceptionScore(10)
    for numbers in torch.arange(n).flip(0).split(7):  # in another order, too
        ten.update(logits[numbers], numbers)
        one.update(logits[numbers], numbers)
    found = score.compute(None, ten.compute())
    expected = {"is": said["isc_10"]["mean"], "is_std": said["isc_10"]["std"]}
    assert found == pytest.approx(expected, rel=1e-9)
    assert InceptionScore().compute(None, one.compute()) == pytest.approx({"is": said["isc_1"]}, rel=1e-9)
    assert float(one.compute()) == pytest.approx(SAID[case]["torchmetrics"]["isc_1"], rel=1e-5)


def test_images_sorted_by_class_have_the_same_score(sets):
    _, test = sets
    values = []
    for order in (torch.arange(297), test.labels.argsort()):
        quality = quality_of(test.images, load_features("digits"), n=297, metrics=("is",), score_splits=3)
        quality.add(test.images[order], order)
        values.append(quality.compute())
    assert values[0] == pytest.approx(values[1], rel=1e-13)
    assert values[0]["is_std_flat"] > 0


def test_real_images_are_at_no_distance_from_themselves(sets):
    train, _ = sets
    quality = quality_of(train.images, load_features("digits"), n=1500, metrics=("fd", "kid", "prdc"))
    quality.add(train.images, torch.arange(1500))
    found = quality.compute()
    assert abs(found["fd_flat"]) < 1e-6
    assert (found["precision_flat"], found["recall_flat"], found["coverage_flat"]) == (1, 1, 1)


def test_inner_features_have_a_distance_of_their_own():
    real, fake = drawn(200), drawn(100, 1)
    quality = quality_of(real, n=100, metrics=("fd", "sfd"))
    quality.add(fake, torch.arange(100))
    found = quality.compute()
    from lightning_tdisent.metrics.distances import Moments, frechet

    halves = (Moments.of(x.flatten(1)[:, :2]) for x in (real, fake))
    assert found["sfd_flat"] == pytest.approx(frechet(*halves), rel=1e-12)
    assert found["sfd_flat"] < found["fd_flat"]


def test_noise_scores_worse_than_digits(sets):
    train, test = sets
    quality = quality_of(train.images, load_features("digits"), n=297)
    values = []
    for images in (test.images, drawn(297, shape=(1, 8, 8))):
        quality.reset()
        quality.add(images, torch.arange(297))
        values.append(quality.compute())
    real, noise = values
    assert noise["fd_flat"] > 10 * real["fd_flat"]
    assert noise["is_flat"] < real["is_flat"] / 2


@pytest.mark.parametrize("name", ["digits", "mnist", "cifar10", "random"])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_features_of_an_image_are_bitwise_the_same_in_any_batch(name, size):
    network = load_features(name)
    images = drawn(70, shape=tuple(network.shape or (3, 12, 12)))
    whole, parts = network(images), [network(part) for part in images.split(size)]
    assert torch.equal(torch.cat([p.features for p in parts]), whole.features)
    if whole.logits is not None:
        assert torch.equal(torch.cat([p.logits for p in parts]), whole.logits)


def test_measuring_moves_no_generator(sets, cache):
    _, test = sets
    before = torch.get_rng_state()
    p = Protocol.preset("digits", n=50).resolved(network := load_features("digits"), "x", 297, (1, 8, 8))
    quality = Quality(p, network, reference(p, network, lambda i: test.images[i]))
    quality.add(test.images[:50], torch.arange(50))
    quality.compute()
    assert torch.equal(before, torch.get_rng_state())


# --- networks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "limit", "width"), [("digits", 300_000, 64), ("mnist", 1_000_000, 64), ("cifar10", 5_000_000, 320)]
)
def test_shipped_features_are_small_and_load(name, limit, width):
    assert (SHIPPED / f"{name}.safetensors").stat().st_size < limit
    network = load_features(name)
    assert (network.num_features, network.name, len(network.weights_sha256)) == (width, name, 64)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize(("name", "least"), [("digits", 0.99), ("mnist", 0.98), ("cifar10", 0.90)])
def test_shipped_classifiers_know_their_data(name, least, digits, prepared):
    data = load(digits if name == "digits" else prepared(name), "test", 3 if name == "cifar10" else 1, 2000)
    network = load_features(name)
    right = torch.cat([network(part).logits.argmax(1) for part in data.images.split(500)]) == data.labels
    assert right.double().mean() > least  # of the first 2,000


def test_random_features_are_those_of_their_seed_and_see_a_change():
    network = load_features("random", channels=1)
    assert network.weights_sha256 == load_features("random", channels=1).weights_sha256
    assert network.weights_sha256 != load_features("random", channels=3).weights_sha256
    values = []
    for shift in (0, 10, 40):
        quality = quality_of(drawn(300, 1, (1, 8, 8)) // 2, network, n=200, metrics=("fd", "kid"))
        quality.add(drawn(200, 2, (1, 8, 8)) // 2 + shift, torch.arange(200))
        values.append(quality.compute())
    assert values[0]["fd_flat"] < values[1]["fd_flat"] < values[2]["fd_flat"]
    assert values[0]["kid_flat"] < values[1]["kid_flat"] < values[2]["kid_flat"]


def test_a_classifier_round_trips(tmp_path):
    network = SmallClassifier([3, 16, 16], 5, 4).eval()
    save_classifier(tmp_path / "mine.safetensors", network)
    again, images = load_classifier(tmp_path / "mine.safetensors"), drawn(20, shape=(3, 16, 16))
    assert again.name == "mine"
    assert torch.equal(again(images).logits, network(images).logits)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 1, 8, 8), r"uint8, 0 to 255, got torch.float32 from 0 to 0"),
        (torch.linspace(-1, 1, 64).view(1, 1, 8, 8), r"got torch.float32 from -1 to 1; see to_uint8"),
        (torch.full((1, 1, 8, 8), 300), r"got torch.int64 from 300 to 300"),
        (torch.zeros(1, 1, 8, 9, dtype=torch.uint8), r"takes images of \[1, 8, 8\], got \[1, 8, 9\]"),
        (torch.zeros(1, 8, 8, dtype=torch.uint8), r"takes images of \[1, 8, 8\], got \[8, 8\]"),
    ],
)
def test_images_of_another_kind_are_refused(images, message):
    with pytest.raises(InputError, match=message):
        load_features("digits")(images)


def test_unknown_features_are_refused():
    with pytest.raises(
        InputError, match=r"no 'digit'. Did you mean 'digits'.*cifar10, digits, mnist, random, inception"
    ):
        load_features("digit")
    with pytest.raises(InputError, match="'digits' has its own"):
        load_features("digits", weights="x")


# --- what cannot be measured ----------------------------------------------------------------------------------------


def test_images_that_are_all_the_same_are_refused(sets):
    train, _ = sets
    quality = quality_of(train.images, load_features("digits"), n=20)
    quality.add(train.images[:1].expand(20, -1, -1, -1), torch.arange(20))
    with pytest.raises(InputError, match="all 20 images are the same"):
        quality.compute()
    quality.reset()  # and what comes after is measured again
    quality.add(train.images[:20], torch.arange(20))
    assert quality.compute()["fd_flat"] > 0


@pytest.mark.parametrize("metrics", ["fd", "is", "kid", "prdc"])
def test_features_that_are_not_finite_are_refused(metrics):
    class Broken(Flat):
        def extract(self, images):
            found = super().extract(images)
            return found._replace(features=found.features / 0 * 0, logits=found.logits * float("nan"))

    quality = quality_of(drawn(30), n=20, metrics=(metrics,))
    quality.network = Broken()
    quality.add(drawn(20, 1), torch.arange(20))
    with pytest.raises(InputError, match=r"20 images are NaN or infinite|NaN or infinite in at least one of 20 images"):
        quality.compute()


@pytest.mark.parametrize(("metric", "lacks"), [("is", "classes"), ("sfd", "num_spatial")])
def test_a_metric_that_the_network_cannot_give_is_refused(metric, lacks):
    network = Flat()
    setattr(network, lacks, None)
    with pytest.raises(InputError, match=f"{metric}: flat .*leave it out of metrics"):
        quality_of(drawn(20), network, n=5, metrics=(metric,))


@pytest.mark.parametrize(
    ("metric", "numbers", "found"),
    [("fd", range(12), 12), ("is", range(12), 12), ("kid", range(12), 12), ("kid", [0] * 20, 1)],
)
def test_another_number_of_images_than_the_protocol_says_is_refused(metric, numbers, found):
    quality = quality_of(drawn(30), n=20, metrics=(metric,))
    quality.add(drawn(len(numbers), 1), torch.tensor(list(numbers)))
    with pytest.raises(InputError, match=f"{found} images were measured, the protocol says 20"):
        quality.compute()


def test_fd_infinity_comes_with_its_interval_and_needs_images():
    real, fake = drawn(4000), drawn(400, 1) // 2
    quality = quality_of(real, n=400, metrics=("fd", "fd_infinity"))
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    quality.add(fake[order], order)
    found = quality.compute()
    again = quality_of(real, n=400, metrics=("fd_infinity",))
    again.add(fake, torch.arange(400))
    assert again.compute()["fd_infinity_flat"] == pytest.approx(found["fd_infinity_flat"], rel=1e-9)  # in any order
    low, value, high = (found[f"fd_infinity{end}_flat"] for end in ("_low", "", "_high"))
    assert low < value < high
    assert value < found["fd_flat"]
    with pytest.raises(InputError, match="4 features need 40 images at least, got n=39"):
        quality_of(real, n=39, metrics=("fd_infinity",))
    assert quality.of(39, fewer=True).protocol.metrics == ("fd",)


# --- protocol -------------------------------------------------------------------------------------------------------

CHANGED = {
    "features": "mnist", "n": 11, "first_seed": 1, "split": "test", "n_real": 6, "resize": "clean", "dtype": "float64",
    "kept": 100, "n_split": 9, "image_range": "x", "labels": "y", "moments": "z",
    "shape": (1, 2, 3), "weights_sha256": "w", "real": "r", "versions": "v",
}  # fmt: skip
SETTINGS = {"neighbours": 4, "score_splits": 2, "score_seed": 1, "score_part": 3}


def changes(base):
    """Protocols with one field changed, by the field."""
    out = {k: dataclasses.replace(base, **{k: v}) for k, v in CHANGED.items()}
    return out | {k: dataclasses.replace(base, settings={**base.settings, k: v}) for k, v in SETTINGS.items()}


def test_the_hash_changes_with_every_field_but_the_metrics():
    base = Protocol("digits")
    names = {f.name for f in dataclasses.fields(Protocol)}
    assert names == {*CHANGED, "metrics", "settings"}
    assert {*base.settings} == {*SETTINGS, "balls"}
    hashes = {protocol.hash for protocol in changes(base).values()} | {base.hash}
    assert len(hashes) == len(CHANGED) + len(SETTINGS) + 1
    assert dataclasses.replace(base, metrics=("kid",)).hash == base.hash == Protocol("digits").hash


def test_the_reference_depends_on_the_real_images_alone():
    base = Protocol("digits")
    same = {k for k, protocol in changes(base).items() if protocol.reference == base.reference}
    assert same == {"n", "first_seed", "labels", *SETTINGS}
    assert dataclasses.replace(base, metrics=("sfd",)).reference != base.reference


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_protocols_and_differ(name):
    assert Protocol.preset(name).hash not in {Protocol.preset(other).hash for other in PRESETS if other != name}


def parts(protocol):
    """Parts of the images that the Inception Score is averaged over, and the seed that makes them."""
    (score,) = (metric for metric in protocol.chosen if isinstance(metric, InceptionScore))
    return tuple(score.options(protocol.n).values())


def test_presets_are_those_of_the_literature():
    adm, clean = Protocol.preset("adm"), Protocol.preset("clean")
    assert (adm.features, adm.resize, adm.n, adm.settings["neighbours"]) == ("inception", "tf1", 50_000, 3)
    assert parts(adm) == (10, None)
    assert [parts(Protocol.preset("adm", n=n))[0] for n in (1000, 10_000, 12_000)] == [1, 2, 3]  # of 5,000 images
    assert parts(Protocol.preset("torch-fidelity", n=50)) == (1, 2020)
    assert parts(Protocol.preset("torch-fidelity", n=50, score_splits=25)) == (25, 2020)
    assert parts(Protocol.preset("torch-fidelity").of_files(99)) == (1, 2020)
    assert (clean.features, clean.resize) == ("inception", "pil_bicubic")
    assert Protocol.preset("torch-fidelity").settings["score_seed"] == 2020
    assert Protocol.preset("torchmetrics").resize == "torch_antialias"
    assert Protocol.preset({"preset": "adm", "n": 7}, n=None).n == 7
    assert Protocol.preset({"preset": "adm", "n": 7}, n=8).n == 8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Protocol.preset("digit"), "there is no 'digit'. Did you mean 'digits'"),
        (lambda: Protocol.preset("adm", feature="x"), "no field 'feature'. Did you mean 'features'"),
        (lambda: Protocol("digits", n=1), "n: at least two images are required, got 1"),
        (lambda: Protocol("digits", n_real=1), "n_real: at least two images"),
        (lambda: Protocol("digits", metrics=("fid",)), "there is no 'fid'. Did you mean 'fd'"),
        (lambda: protocol_of(score_splits=0), "score_splits: 1 to n"),
        (lambda: Protocol("digits", settings={"neighbour": 4}), "no field 'neighbour'. Did you mean 'neighbours'"),
        (lambda: Protocol.preset("digits", balls="open"), "balls: only 'closed for .*got 'open'"),
        (lambda: Protocol.preset("digits", score_seed="x"), "score_seed: expected a whole number, got 'x'"),
        (lambda: Protocol.preset("digits", n=True), "n: expected a whole number, got True"),
        (lambda: Protocol.preset("digits", split=1), "split: expected text, got 1"),
        (lambda: Protocol.preset("digits", metrics="fd"), "metrics: expected a list of names, got 'fd'"),
        (lambda: Protocol("digits", metrics=("fd", "psnr")), "metrics: psnr is computed for every conditional model"),
        (lambda: Protocol("digits", metrics=("bpd",)), "metrics: bpd is asked for by --metrics of evaluate"),
        (lambda: Protocol("digits", metrics=()), "metrics: none is asked for"),
        (lambda: Protocol("digits", first_seed=-1), "first_seed: image seeds must lie in"),
        (lambda: Protocol("digits", first_seed=2**32 - 9, n=10), "first_seed: image seeds must lie in"),
        (
            lambda: Protocol.preset("digits", dtype="float64").resolved(Flat(), "", 9, (1, 2, 2)),
            "dtype: digits has",
        ),
        (lambda: Protocol.preset("digits", resize="tf1").resolved(Flat(), "", 9, (1, 2, 2)), "resize: digits has"),
        (lambda: protocol_of(n=5, neighbours=5, metrics=("prdc",)), "neighbours: 1 to below.*5, got 5"),
    ],
)
def test_protocols_that_cannot_be_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_names_say_the_features():
    digits = {key: name for cls in registry.known() for c in cls.columns for name, key in c.names("digits").items()}
    some = {"fd_digits": "fd", "fd_bias_digits": "fd_bias", "fd_infinity_low_digits": "fd_infinity_low", "psnr": "psnr"}
    assert some.items() <= digits.items()
    names = ["fid", "sfid", "is", "kid", "precision", "recall", "density", "coverage", "fid_infinity"]
    assert list(registry.columns("inception"))[:9] == names
    assert {"jfid", "bpd"} < registry.columns("inception").keys()


# --- reference ------------------------------------------------------------------------------------------------------


class Counting(Flat):
    calls = 0

    def extract(self, images):
        Counting.calls += 1
        return super().extract(images)


def cached(take, n=40, **fields):
    network = Counting()
    protocol = protocol_of(**fields).resolved(network, "digest", n, (1, 2, 2))
    return protocol, network, reference(protocol, network, take)


def test_a_second_run_passes_no_real_image(cache):
    real = drawn(40)
    first = cached(lambda i: real[i], metrics=("fd", "sfd"), kept=10)[2]
    calls = Counting.calls

    def never(numbers):
        raise AssertionError("a real image was asked for")

    again = cached(never, metrics=("fd", "sfd"), kept=10)[2]
    assert Counting.calls == calls > 0
    assert torch.equal(again.moments.covariance, first.moments.covariance)
    assert torch.equal(again.kept, real[::4].flatten(1).float())  # evenly spaced
    assert torch.equal(again.spatial.mean, first.spatial.mean)
    assert again.moments.n == 40


@pytest.mark.parametrize("place", [0.1, 0.4, 0.7, 0.999])
def test_a_changed_byte_is_refused_and_measured_anew(cache, place):
    real = drawn(40)
    first = cached(lambda i: real[i])[2]
    (file,) = cache_folder().rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=r"refused \(.*computed again"):
        again = cached(lambda i: real[i])[2]
    assert torch.equal(again.moments.covariance, first.moments.covariance)
    cached(lambda i: 1 / 0)  # and it has been mended


def kept_reference(real):
    """Measure images, and return the file, tensors and metadata of the cache."""
    cached(lambda i: real[i])
    (file,) = cache_folder().rglob("*.safetensors")
    with safe_open(file, "pt") as old:
        return file, {k: old.get_tensor(k) for k in old.keys()}, old.metadata()  # noqa: SIM118


def test_a_reference_of_a_newer_version_is_refused_and_left_alone(cache):
    file, tensors, about = kept_reference(real := drawn(40))
    save_file(tensors, file, about | {"schema": "2"})
    content = file.read_bytes()
    with pytest.raises(InputError, match=r"safetensors: schema 2, made by a newer version.*TDISENT_CACHE"):
        cached(lambda i: real[i])
    assert file.read_bytes() == content


def test_remembered_numbers_of_a_newer_version_are_refused_and_left_alone(cache):
    assert remembered("x", lambda: {"x": 1}) == {"x": 1}
    assert remembered("x", lambda: {"x": 2}) == {"x": 1}
    (file,) = cache_folder().rglob("x.json")
    file.write_text(file.read_text(encoding="utf-8").replace('"x": 1', '"x": 3'), encoding="utf-8")
    assert remembered("x", lambda: {"x": 2}) == {"x": 2}  # changed by another
    content = file.read_text(encoding="utf-8").replace('"schema": 1', '"schema": 2')
    file.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"x.json: schema 2, made by a newer version.*TDISENT_CACHE"):
        remembered("x", lambda: {"x": 4})
    assert file.read_text(encoding="utf-8") == content


def test_a_reference_under_another_name_is_refused(cache):
    real = drawn(40)
    protocol = cached(lambda i: real[i])[0]
    (file,) = cache_folder().rglob("*.safetensors")
    other = dataclasses.replace(protocol, dtype="float64")
    file.rename(file.with_name(f"{other.real}-{other.reference}.safetensors"))
    with pytest.warns(UserWarning, match=f"belongs to protocol {protocol.reference}, not to {other.reference}"):
        reference(other, Counting(), lambda i: real[i])


def test_a_forged_file_is_refused(cache):
    file, tensors, about = kept_reference(real := drawn(40))
    tensors["mean"] = tensors["mean"] + 1
    save_file(tensors, file, about)
    with pytest.warns(UserWarning, match="its sha256 is .*it was written with"):
        cached(lambda i: real[i])


def test_a_reference_of_another_protocol_is_refused():
    real, network = drawn(40), Flat()
    protocol = Protocol("flat").resolved(network, "digest", 40, (1, 2, 2))
    found = measure(protocol, network, lambda i: real[i])
    other = dataclasses.replace(protocol, resize="tf1")
    with pytest.raises(InputError, match=f"measured by another protocol \\({protocol.reference}\\).*{other.reference}"):
        Quality(other, network, found)


def test_real_images_are_taken_in_batches(monkeypatch):
    monkeypatch.setattr(references, "BATCH", 7)
    real, network = drawn(40), Flat()
    protocol = Protocol("flat", n_real=30).resolved(network, "digest", 40, (1, 2, 2))
    asked = []
    found = measure(protocol, network, lambda i: asked.append(len(i)) or real[i])
    assert asked == [7, 7, 7, 7, 2]
    assert found.moments.n == 30
    chosen = [40 * k // 30 for k in range(30)]  # evenly spaced: shards may be sorted by class
    assert torch.allclose(found.moments.mean, real[chosen].flatten(1).double().mean(0))
