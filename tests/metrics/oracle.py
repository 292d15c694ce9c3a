"""What torch-fidelity and torchmetrics say of numbers, images and weights that a seed makes; tests compare with it.

    python tests/metrics/oracle.py

writes torch_fidelity.json beside this file. It needs torch-fidelity and torchmetrics; a test needs neither: it makes
the same inputs with `features`, `images` and `state`, and reads the outputs there. All randomness is numpy's
RandomState, whose streams are frozen, so the inputs are the same under any version.
"""

import hashlib
import importlib.util
import io
import json
import platform
import sys
import types
import warnings
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

RECORDED = Path(__file__).with_name("torch_fidelity.json")

# name: seed, number of generated and of real samples, width, whether negative numbers are cut off
CASES = {
    "shifted_64": (1, 512, 512, 64, False),
    "relu_32": (2, 512, 512, 32, True),
    "fewer_than_256": (3, 100, 100, 256, False),
    "unequal_16": (4, 300, 500, 16, False),
}
CLASSES = 20
NEIGHBOURS = (3, 5)
IMAGES = 16
STATE_SEED, IMAGE_SEED = 6726825, 2015


def features(case: str) -> tuple[Tensor, Tensor, Tensor]:
    """(generated (n, d), real (m, d), logits (n, 20)) of a case, float32.

    Samples are z A + b: z standard normal, A normal / sqrt(d) and b normal / 4, both drawn anew for generated and
    real. Of ``relu`` cases the negative numbers are zero. Logits are normal, the one of a random class 3 higher.
    """
    seed, n, m, width, cut = CASES[case]
    rng = np.random.RandomState(seed)
    sets = []
    for count in (n, m):
        mixing, shift = rng.standard_normal((width, width)) / width**0.5, rng.standard_normal(width) / 4
        samples = rng.standard_normal((count, width)) @ mixing + shift
        sets.append(np.maximum(samples, 0) if cut else samples)
    logits = rng.standard_normal((n, CLASSES))
    logits[np.arange(n), rng.randint(0, CLASSES, n)] += 3
    generated, real, scores = (torch.from_numpy(x.astype(np.float32)) for x in (*sets, logits))
    return generated, real, scores


def images() -> tuple[Tensor, Tensor]:
    """(generated, real), uint8 (16, 3, 32, 32): a colour, noisy patches over it at any contrast; real is brighter."""
    rng = np.random.RandomState(IMAGE_SEED)
    sets = []
    for top in (200, 256):
        colour, contrast = rng.randint(0, top, (IMAGES, 3, 1, 1)), rng.uniform(0, 1, (IMAGES, 1, 1, 1))
        patches = rng.randint(0, 256, (IMAGES, 3, 4, 4)).repeat(8, 2).repeat(8, 3)
        noise = rng.randint(-40, 41, (IMAGES, 3, 32, 32))
        drawn = colour + contrast * (patches + noise - colour)
        sets.append(torch.from_numpy(drawn.clip(0, 255).astype(np.uint8)))
    return sets[0], sets[1]


def state(layers: nn.Module, seed: int = STATE_SEED) -> dict[str, Tensor]:
    """Weights for torch-fidelity's Inception layers (24 million, float32), in the order of their state dict.

    Convolutions are He-normal, statistics and scales around those of standard normal activations; as in the published
    file, there are no counts of batches.
    """
    rng = np.random.RandomState(seed)
    made = {}
    for name, tensor in layers.state_dict().items():
        shape = tuple(tensor.shape)
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("conv.weight"):
            values = rng.standard_normal(shape) * (2 / np.prod(shape[1:])) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            values = rng.uniform(0.5, 1.5, shape)
        elif name == "fc.weight":
            values = rng.standard_normal(shape) / 16
        else:  # shifts
            values = rng.standard_normal(shape) / 10
        made[name] = torch.from_numpy(values.astype(np.float32))
    return made


def save_state(file: Path, layers: nn.Module, seed: int = STATE_SEED) -> str:
    """Write `state` as the published weights are written, and return the SHA-256 of the file."""
    torch.save(state(layers, seed), file)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _import_torch_fidelity() -> str:
    """Import it with torchvision or without: none of the functions recorded here uses that; returns which."""
    if importlib.util.find_spec("torchvision") is not None:
        return version("torchvision")
    names = ["", ".transforms", ".transforms.functional", ".datasets"]
    modules = {name: types.ModuleType(f"torchvision{name}") for name in names}
    for module in modules.values():
        module.__spec__ = ModuleSpec(module.__name__, None)
    for name in ("CIFAR10", "CIFAR100", "STL10"):
        setattr(modules[".datasets"], name, type(name, (), {}))
    modules[""].transforms, modules[""].datasets = modules[".transforms"], modules[".datasets"]
    modules[".transforms"].functional = modules[".transforms.functional"]
    sys.modules.update({module.__name__: module for module in modules.values()})
    importlib.import_module("torch_fidelity")
    for module in modules.values():
        del sys.modules[module.__name__]  # torchmetrics would take it for the real one
    return "not installed; an empty module in its place (0.28.0 changes no number)"


def _fidelity(generated: Tensor, real: Tensor, logits: Tensor) -> dict[str, object]:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    said: dict[str, object] = {}
    for dtype in ("float32", "float64"):
        g, r = generated.to(getattr(torch, dtype)), real.to(getattr(torch, dtype))
        statistics = fid_features_to_statistics(g), fid_features_to_statistics(r)
        said[f"fid_{dtype}"] = fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
        if len(g) == len(r):
            kid = kid_features_to_metric(g, r, kid_subsets=1, kid_subset_size=len(g), verbose=False)
            said[f"kid_all_{dtype}"] = kid["kernel_inception_distance_mean"]
        for k in NEIGHBOURS:
            prc = prc_features_to_metric(g, r, prc_neighborhood=k, verbose=False)  # in this order, by its convention
            said[f"prc_{k}_{dtype}"] = {"precision": prc["precision"], "recall": prc["recall"]}
    size = min(len(generated), len(real)) // 2
    kid = kid_features_to_metric(generated, real, kid_subset_size=size, verbose=False)
    said["kid_subsets"] = {"subsets": 100, "size": size, "rng_seed": 2020, **_short(kid)}
    said["isc_10"] = _short(isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=2020))
    said["isc_1"] = _short(isc_features_to_metric(logits, splits=1, shuffle=False))["mean"]
    return said


def _short(said: dict[str, float]) -> dict[str, float]:
    return {name.rsplit("_", 1)[1]: value for name, value in said.items()}


class _Passed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, numbers: Tensor) -> Tensor:
        return numbers


def _torchmetrics(generated: Tensor, real: Tensor, logits: Tensor) -> dict[str, float]:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    said = {}
    width = generated.shape[1]
    fid = FrechetInceptionDistance(_Passed(width))
    fid.set_dtype(torch.float64)
    fid.update(real.double(), real=True)
    fid.update(generated.double(), real=False)
    said["fid"] = fid.compute().item()
    if len(generated) == len(real):
        kid = KernelInceptionDistance(_Passed(width), subsets=1, subset_size=len(generated))
        kid.update(real, real=True)
        kid.update(generated, real=False)
        said["kid_all"] = kid.compute()[0].item()
    score = InceptionScore(_Passed(CLASSES), splits=1)
    score.update(logits)
    said["isc_1"] = score.compute()[0].item()
    return said


def _end_to_end(folder: Path) -> dict[str, object]:
    """Images through torch-fidelity's own Inception with `state`, and its numbers of what comes out."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    from lightning_tdisent.metrics.inception import empty

    weights = folder / "state.pth"
    save_state(weights, empty())
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(weights))
    spatial: list[Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, made: spatial.append(made[:, :7]))
    (generated, logits), (real, _) = (network(x) for x in images())
    said = _fidelity(generated, real, logits)
    places = [x.permute(0, 2, 3, 1).flatten(1) for x in spatial]
    said["first_features"] = generated[0, :8].tolist()
    said["first_logits"] = logits[0, :8].tolist()
    said["mean_feature"], said["mean_logit_size"] = generated.mean().item(), logits.abs().mean().item()
    said["spatial_mean"], said["spatial_last"] = places[0].mean().item(), places[0][-1, -7:].tolist()
    return said


def main() -> None:
    """Record everything anew."""
    import tempfile

    torchvision = _import_torch_fidelity()
    torch.set_num_threads(1)
    torch.manual_seed(0)  # torchmetrics permutes the logits
    warnings.simplefilter("ignore")
    said = {
        "provenance": {
            "command": "python tests/metrics/oracle.py",
            "inputs": "features, images and state of that file, whose RandomState seeds stand in it",
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "torch-fidelity", "torchmetrics")},
            "torchvision": torchvision,
            "prc": "torch-fidelity's functions take (generated, real)",
            "kid_all": "one subset of all samples: the unbiased estimate, the same for any order",
        },
        "features": {
            case: {"torch_fidelity": _fidelity(*features(case)), "torchmetrics": _torchmetrics(*features(case))}
            for case in CASES
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        said["images"] = {"torch_fidelity": _end_to_end(Path(folder))}
    stream = io.StringIO()
    json.dump(said, stream, indent=1)
    RECORDED.write_text(stream.getvalue() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
