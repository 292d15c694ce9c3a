import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import conv2d, gelu, interpolate, layer_norm, linear, scaled_dot_product_attention

from lightning_tdisent.diffusion.spec import build, spec
from lightning_tdisent.errors import InputError
from lightning_tdisent.metrics.dinov2 import DINOv2
from lightning_tdisent.metrics.network import FeatureNetwork

WIDTH, LAYERS, HEADS, GRID = 32, 2, 2, 37


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny DINOv2 as transformers saves it, with the published one's 37 x 37 positions."""
    from transformers.models.dinov2 import Dinov2Config, Dinov2Model

    path = tmp_path_factory.mktemp("dinov2")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Dinov2Config(
            hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, image_size=14 * GRID, patch_size=14
        )
        model = Dinov2Model(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0, 0.3)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def copy(folder, tmp_path_factory):
    def copied(**config):
        path = tmp_path_factory.mktemp("copy")
        shutil.copytree(folder, path, dirs_exist_ok=True)
        said = json.loads((path / "config.json").read_text(encoding="utf-8"))
        (path / "config.json").write_text(json.dumps(said | config), encoding="utf-8")
        return path

    return copied


@pytest.fixture(scope="module")
def network(folder):
    return DINOv2(str(folder))


@pytest.fixture(scope="module")
def exact(folder):
    network = DINOv2(str(folder), dtype="float64")
    assert all(p.dtype == torch.float64 for p in network.parameters())
    return network


@pytest.fixture(scope="module")
def few():
    return torch.from_numpy(np.random.RandomState(0).randint(0, 256, (3, 3, 32, 48), np.uint8))


def tokens(folder, x, more=0.1):
    """DINOv2's forward from the names in the file, after facebookresearch/dinov2: (B, 3, 224, 224), normalised."""
    w = load_file(folder / "model.safetensors")
    learned = w["embeddings.position_embeddings"]
    w, x = {name: value.double() for name, value in w.items()}, x.double()
    lin = lambda x, name: linear(x, w[f"{name}.weight"], w[f"{name}.bias"])  # noqa: E731
    norm = lambda x, name: layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)  # noqa: E731
    patches = "embeddings.patch_embeddings.projection"
    x = conv2d(x, w[f"{patches}.weight"], w[f"{patches}.bias"], stride=14).flatten(2).transpose(1, 2)
    places = learned[:, 1:].reshape(1, GRID, GRID, WIDTH).permute(0, 3, 1, 2)
    places = interpolate(places, scale_factor=((16 + more) / GRID, (16 + more) / GRID), mode="bicubic")
    assert places.shape[-2:] == (16, 16)
    places = torch.cat([learned[:, :1], places.permute(0, 2, 3, 1).reshape(1, -1, WIDTH)], 1)
    x = torch.cat([w["embeddings.cls_token"].expand(len(x), -1, -1), x], 1) + places
    for i in range(LAYERS):
        block = f"encoder.layer.{i}"
        y = norm(x, f"{block}.norm1")
        parts = (lin(y, f"{block}.attention.attention.{name}") for name in ("query", "key", "value"))
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in parts)
        y = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + lin(y, f"{block}.attention.output.dense") * w[f"{block}.layer_scale1.lambda1"]
        y = lin(gelu(lin(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
        x = x + y * w[f"{block}.layer_scale2.lambda1"]
    return norm(x, "layernorm")[:, 0]


def normalised(x):
    mean, std = (
        torch.tensor(v, dtype=torch.float64)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    return (x / 255 - mean) / std


def test_what_it_says_of_itself(network, folder):
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert isinstance(network, FeatureNetwork)
    assert (network.shape, network.num_features, network.classes, network.num_spatial) == (None, WIDTH, None, None)
    assert (network.weights_sha256, network.resize) == (digest, "pil_bicubic_uint8")
    assert network.name == "dinov2_32x2"  # only ViT-L/14 is called dinov2
    assert network.packages == ("transformers", "pillow")
    assert not any(p.requires_grad for p in network.parameters())
    assert not any(m.training for m in network.modules())
    described = spec(network)
    expected = {"weights": str(folder), "resize": "pil_bicubic_uint8", "sha256": None, "dtype": "float32"}
    assert described["init_args"] == expected
    again = build(json.loads(json.dumps(described)), FeatureNetwork)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


def test_features_are_the_class_token_of_the_papers_code(network, exact, folder, few):
    # 2306.04675: the image of bytes is resized by Pillow, and rounded to bytes again
    pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC) for x in few]
    resized = torch.from_numpy(np.stack([np.uint8(p) for p in pictures])).permute(0, 3, 1, 2)
    expected = tokens(folder, normalised(resized.float()))
    found = exact(few).features
    assert found.dtype == network(few).features.dtype == torch.float32
    assert (found - expected).abs().max() < 2e-6
    assert (network(few).features - expected).abs().max() < 2e-4
    assert expected.std(0).max() > 1e-2
    # where transformers puts the positions
    assert (tokens(folder, normalised(resized.float()), 1e-6) - expected).abs().max() > 1e-4


def test_torch_bicubic_is_edm2(exact, folder, few):
    resized = interpolate(few.float(), (224, 224), mode="bicubic", antialias=True)
    expected = tokens(folder, normalised(resized))
    found = DINOv2(str(folder), "torch_bicubic", dtype="float64")(few).features
    assert (found - expected).abs().max() < 2e-6
    assert (found - exact(few).features).abs().max() > 1e-4


def test_positions_of_the_size_of_the_input_are_left_as_they_are(tmp_path, few):
    from transformers.models.dinov2 import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Dinov2Model(Dinov2Config(**sizes, image_size=224, patch_size=14)).eval()
    model.save_pretrained(tmp_path)
    x = interpolate(few.float(), (224, 224), mode="bicubic", antialias=True)
    with torch.no_grad():
        expected = model(normalised(x)).pooler_output
    assert torch.allclose(DINOv2(str(tmp_path), "torch_bicubic")(few).features, expected, atol=1e-5)


def test_grey_is_repeated(network, few):
    grey = few[:, :1]
    assert torch.equal(network(grey).features, network(grey.expand(-1, 3, -1, -1)).features)


def test_what_it_refuses(network, folder, copy, few, tmp_path):
    with pytest.raises(InputError, match=r"no weights are given.*facebook/dinov2-large.*--weights FOLDER"):
        DINOv2()
    with pytest.raises(InputError, match=rf"{tmp_path} has no config\.json"):
        DINOv2(str(tmp_path))
    with pytest.raises(InputError, match=r"no resize 'torch'"):
        DINOv2(str(folder), "torch")
    with pytest.raises(InputError, match="float32 or float64, got 'bfloat16'"):
        DINOv2(str(folder), dtype="bfloat16")
    with pytest.raises(InputError, match=f"SHA-256 {network.weights_sha256}, expected 00"):
        DINOv2(str(folder), sha256="00")
    with pytest.raises(InputError, match="type 'clip', expected 'dinov2'"):
        DINOv2(str(copy(model_type="clip")))
    with pytest.raises(InputError, match="patch_size 15, which does not divide 224"):
        DINOv2(str(copy(patch_size=15)))
    with pytest.raises(InputError, match="1 or 3 channels, got 2"):
        network(few[:, :2])
    broken = copy()
    (broken / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="is not JSON"):
        DINOv2(str(broken))


def test_weights_that_are_not_all_there_are_refused(copy, capfd):
    missing, damaged = copy(num_hidden_layers=3), copy()
    with pytest.raises(InputError, match=r"does not hold the network .*missing keys encoder\.layer\.2"):
        DINOv2(str(missing))
    with pytest.raises(InputError, match=r"does not hold the network .*unexpected keys encoder\.layer\.1"):
        DINOv2(str(copy(num_hidden_layers=1, out_features=None, out_indices=None)))
    with pytest.raises(InputError, match="cannot be read"):
        DINOv2(str(copy(hidden_size=64)))
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be read"):
        DINOv2(str(damaged))
    renamed = copy()
    state = load_file(renamed / "model.safetensors")
    state["layernorm.wight"] = state.pop("layernorm.weight")
    save_file(state, renamed / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"missing keys layernorm\.weight; unexpected keys layernorm\.wight"):
        DINOv2(str(renamed))
    assert capfd.readouterr() == ("", "")


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_it_imports_no_transformers_and_using_it_needs_no_network(folder):
    program = "import sys, lightning_tdisent.metrics.dinov2 as d; print('transformers' in sys.modules)"
    program += f"\nimport socket; socket.socket.connect = None\nd.DINOv2({str(folder)!r})\n"
    assert run(program + "print('torchvision' in sys.modules)").split() == ["False", "False"]


def test_without_transformers_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'lightning_tdisent\[dinov2\]'"):
        DINOv2(str(folder))
