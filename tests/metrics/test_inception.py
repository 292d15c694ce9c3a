import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from oracle import RECORDED, images, save_state
from PIL import Image

from lightning_tdisent.diffusion.spec import build, spec
from lightning_tdisent.errors import InputError
from lightning_tdisent.metrics.accumulators import FeatureMoments
from lightning_tdisent.metrics.inception import RESIZES, Inception, empty
from lightning_tdisent.metrics.network import FeatureNetwork
from lightning_tdisent.metrics.protocol import Protocol
from lightning_tdisent.metrics.quality import Quality
from lightning_tdisent.metrics.reference import measure
from lightning_tdisent.metrics.weights import KNOWN

FEATURES = ["2048", "logits_unbiased"]


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> tuple[str, str]:
    path = tmp_path_factory.mktemp("weights") / "state.pth"
    return str(path), save_state(path, empty())


@pytest.fixture(scope="module")
def made(file):
    """One network per resize: they are 96 MB each and are never changed."""
    networks = {}

    def network(resize: str = "tf1") -> Inception:
        if resize not in networks:
            networks[resize] = Inception(file[0], resize, file[1])
        return networks[resize]

    return network


@pytest.fixture(scope="module")
def fidelity(file):
    """torch-fidelity's own extractor with the same weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    return FeatureExtractorInceptionV3("inception-v3-compat", FEATURES, file[0])


@pytest.fixture(scope="module")
def few():
    """Images smaller and larger than the input, of sides that differ, and one of its size."""
    rng = np.random.RandomState(0)
    sides = [(2, 3, 32, 32), (1, 3, 330, 410), (1, 3, 299, 299)]
    return [torch.from_numpy(rng.randint(0, 256, side, np.uint8)) for side in sides]


@torch.no_grad()
def said(network, x):
    """Of these images alone: on a CPU, a call of the network takes sixteen at a time, or fills them up."""
    return network.extract(x)


def close(a, b, tolerance=2e-5):
    assert a.shape == b.shape
    assert a.dtype == b.dtype == torch.float32
    assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_what_it_says_of_itself(made, file):
    network = made()
    assert isinstance(network, FeatureNetwork)
    assert (network.name, network.resize, network.shape) == ("inception", "tf1", None)
    assert (network.num_features, network.classes, network.num_spatial) == (2048, 1008, 2023)
    assert network.weights_sha256 == file[1]
    assert network.packages == ("torch-fidelity",)
    assert not any(p.requires_grad for p in network.parameters())
    network.train()
    assert not any(module.training for module in network.modules())
    described = spec(network)
    assert described["init_args"] == {"weights": file[0], "resize": "tf1", "sha256": file[1], "dtype": "float32"}
    again = build(json.loads(json.dumps(described)), FeatureNetwork)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


def test_tf1_is_torch_fidelity(made, fidelity, few):
    for x in few:
        ours = said(made(), x)
        features, logits = fidelity(x)
        close(ours.features, features)
        close(ours.logits, logits)
    assert features.std() > 0.1


@pytest.mark.parametrize(("resize", "antialias"), [("tf1", False), ("torch_antialias", True)])
def test_resizes_are_those_of_torchmetrics(made, file, few, resize, antialias):
    from torchmetrics.image.fid import NoTrainInceptionV3

    reference = NoTrainInceptionV3("inception-v3-compat", ["2048"], file[0], antialias)
    for x in few:
        close(said(made(resize), x).features, reference(x))


def test_pil_bicubic_is_clean_fid(made, fidelity, few):
    seen = []
    hook = made("pil_bicubic").layers.Conv2d_1a_3x3.register_forward_pre_hook(lambda m, given: seen.append(given[0]))
    for x in few:
        ours = said(made("pil_bicubic"), x)
        for image, input_ in zip(x, seen.pop(), strict=True):
            for channel, found in zip(image, input_, strict=True):
                floats = Image.fromarray(np.asarray(channel, np.float32)).resize((299, 299), Image.Resampling.BICUBIC)
                expected = (np.asarray(floats).clip(0, 255) - 128) / 128
                assert np.abs(found.numpy() - expected).max() < 1e-6
    hook.remove()
    # at the size of the input nothing is resized, and all resizes agree
    close(ours.features, fidelity(few[-1])[0])
    assert torch.equal(ours.features, said(made("tf1"), few[-1]).features)
    small = [said(made(resize), few[0][:1]).features for resize in RESIZES]
    assert (small[0] - small[1]).abs().max() > 1e-3 < (small[1] - small[2]).abs().max()


def test_float64_is_more_of_the_same(made, file, few):
    exact = Inception(file[0], sha256=file[1], dtype="float64")
    assert exact.layers.fc.weight.dtype == torch.float64
    for rough, fine in zip(said(made(), few[0][:1]), said(exact, few[0][:1]), strict=True):
        close(rough, fine, 1e-5)
        assert not torch.equal(rough, fine)


def test_spatial_features_are_the_first_channels_of_mixed_6(made, few):
    caught = []
    block = made().layers.Mixed_6d
    hooks = [m.register_forward_hook(lambda m, given, made: caught.append(made)) for m in (block.branch1x1, block)]
    spatial = said(made(), few[0]).spatial
    for hook in hooks:
        hook.remove()
    branch, whole = caught
    assert branch.shape == (2, 192, 17, 17)
    assert torch.equal(whole[:, :7], branch[:, :7])
    # as numpy's reshape of TensorFlow's (B, 17, 17, 7)
    assert torch.equal(spatial, branch[:, :7].permute(0, 2, 3, 1).reshape(2, 2023))
    assert spatial[1, 7 * (17 * 3 + 5) + 2] == branch[1, 2, 3, 5]


@pytest.mark.parametrize("resize", RESIZES)
def test_grey_is_repeated(made, few, resize):
    grey = few[0][:1, :1]
    for one, three in zip(said(made(resize), grey), said(made(resize), grey.expand(-1, 3, -1, -1)), strict=True):
        assert torch.equal(one, three)


def test_batches_are_cut_and_joined(made, few, monkeypatch):
    x = torch.cat([few[0], few[0][:1]])
    at_once = said(made(), x)
    monkeypatch.setattr("lightning_tdisent.metrics.inception.AT_ONCE", 2)
    for a, b in zip(said(made(), x), at_once, strict=True):
        close(a, b, 1e-5)
    assert said(made(), x[:0]).features.shape == (0, 2048)


def test_end_to_end_is_what_torch_fidelity_recorded(made):
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))["images"]["torch_fidelity"]
    generated, real = (made()(x) for x in images())
    assert generated.features[0, :8].tolist() == pytest.approx(recorded["first_features"], rel=1e-4, abs=1e-4)
    assert generated.logits[0, :8].tolist() == pytest.approx(recorded["first_logits"], rel=1e-4, abs=1e-3)
    assert generated.features.mean().item() == pytest.approx(recorded["mean_feature"], rel=1e-5)
    assert generated.spatial.mean().item() == pytest.approx(recorded["spatial_mean"], rel=1e-5)
    assert generated.spatial[-1, -7:].tolist() == pytest.approx(recorded["spatial_last"], rel=1e-4, abs=1e-4)
    # the trace of (C D)^1/2 is the sum of the singular values of the product of the centred samples: 16 x 16
    g, r = (x.features.double() for x in (generated, real))
    dg, dr = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (g, r))
    root = torch.linalg.svdvals(dg @ dr.T).sum()
    fid = (g.mean(0) - r.mean(0)).square().sum() + dg.square().sum() + dr.square().sum() - 2 * root
    assert fid.item() == pytest.approx(recorded["fid_float64"], rel=1e-4)
    p = generated.logits.double().softmax(1)
    score = (p * (p.log() - p.mean(0).log())).sum(1).mean().exp()
    assert score.item() == pytest.approx(recorded["isc_1"], rel=1e-4)


def test_what_it_refuses(made, file, few, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"no resize 'tf'.*Did you mean 'tf1'"):
        Inception(file[0], "tf", file[1])
    with pytest.raises(InputError, match="float32 or float64, got 'float16'"):
        Inception(file[0], sha256=file[1], dtype="float16")
    with pytest.raises(InputError, match=f"{file[1]}, expected {KNOWN['inception'].sha256}"):
        Inception(file[0])
    monkeypatch.setenv("TDISENT_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"no weights at .* fetch inception"):
        Inception()
    other = tmp_path / "other.pth"
    digest = save_state(other, torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"other\.pth holds the weights of another network: .*Missing key"):
        Inception(str(other), sha256=digest)
    with pytest.raises(InputError, match="1 or 3 channels, got 4"):
        made()(torch.zeros(1, 4, 8, 8, dtype=torch.uint8))
    with pytest.raises(InputError, match="must be uint8"):
        made()(few[0].float())


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_it_imports_neither_torch_fidelity_nor_torchvision():
    program = "import sys, lightning_tdisent.metrics.inception; print(*sys.modules)"
    assert {"torch_fidelity", "torchvision", "torchmetrics"}.isdisjoint(run(program).split())


def test_torchmetrics_and_lightning_can_be_imported_beside_it():
    # their import of torch-fidelity fails without torchvision; see the package's __init__
    program = "import lightning_tdisent, torchmetrics.image, lightning.pytorch; "
    assert run(program + "print(torchmetrics.image.FrechetInceptionDistance.__name__)") == "FrechetInceptionDistance"


def test_where_torchvision_is_there_torch_fidelity_is_the_real_one(tmp_path):
    stand_in = tmp_path / "torchvision"
    for module in ("", "transforms", "transforms/functional", "datasets"):
        (stand_in / module).mkdir(parents=True)
        (stand_in / module / "__init__.py").write_text("CIFAR10 = CIFAR100 = STL10 = object\n", encoding="utf-8")
    before = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import lightning_tdisent, torch_fidelity; "
    ours = "from lightning_tdisent.metrics.inception import empty; empty(); "
    assert run(before + ours + "print(torch_fidelity.calculate_metrics.__name__)") == "calculate_metrics"


def test_without_torch_fidelity_it_says_what_to_install(file):
    program = f"""
from importlib.machinery import PathFinder
find = PathFinder.find_spec
hidden = lambda name, *others: None if name == "torch_fidelity" else find(name, *others)
PathFinder.find_spec = staticmethod(hidden)
from lightning_tdisent.errors import InputError
from lightning_tdisent.metrics.inception import Inception
try:
    Inception({file[0]!r}, sha256={file[1]!r})
except InputError as error:
    print(error)
"""
    assert "pip install --no-deps torch-fidelity" in run(program)


def test_all_metrics_of_the_literature_come_from_one_pass(made):
    """adm's metrics and KID of a few images: their names, and the distances of both layers."""
    network = made()
    rng = np.random.RandomState(3)
    real, fake = (torch.from_numpy(rng.randint(0, top, (10, 3, 32, 32), np.uint8)) for top in (256, 128))
    protocol = Protocol.preset("adm", n=10, neighbours=2, metrics=("fd", "sfd", "is", "kid", "prdc"))
    full = protocol.resolved(network, "digest", 10, (3, 32, 32))
    quality = Quality(full, network, measure(full, network, lambda numbers: real[numbers]))
    quality.add(fake, torch.arange(10))
    found = quality.compute()
    names = ["fid", "sfid", "is", "kid", "precision", "recall", "density", "coverage", "fid_bias"]
    assert set(found) == set(names)
    expected = said(network, fake)
    for needs, layer in (("features", expected.features), ("spatial", expected.spatial)):
        metric = quality.accumulators[FeatureMoments, needs, "{}"]
        total = metric.total + metric.n * metric.shift
        torch.testing.assert_close(total, layer.double().sum(0), rtol=1e-4, atol=1e-4)
    assert found["sfid"] != found["fid"]
    assert "torch-fidelity 0.4.0" in full.versions
