"""The shipped feature networks, and `load_features`, which loads any feature network by name."""

import json
import os
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lightning_tdisent.diffusion.spec import build, spec
from lightning_tdisent.digests import digest_of, sha256
from lightning_tdisent.errors import InputError, nearest
from lightning_tdisent.files import write_whole
from lightning_tdisent.images import from_uint8
from lightning_tdisent.metrics.network import Extracted, FeatureNetwork
from lightning_tdisent.schemas import check_metadata, parse_json

SCHEMA = 1  # of a classifier's file; files without a schema have schema 1
SHIPPED = Path(__file__).parent / "shipped"


class SmallClassifier(FeatureNetwork):
    """Three convolutions and a linear layer; the features are the 64 activations before the classification layer.

    shape: (C, H, W) of an image; classes: number of classes; width: channels of the convolutions. The resolution is
    halved once, and a second time if the image has at least 16 rows.
    """

    num_features = 64

    def __init__(self, shape: list[int], classes: int = 10, width: int = 32) -> None:
        super().__init__()
        self.shape, self.classes, self.width = shape, classes, width
        channels, height, side = shape
        cut = 2 if height >= 16 else 1
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(cut),
            nn.Flatten(),
            nn.Linear(width * (height // 2 // cut) * (side // 2 // cut), self.num_features),
            nn.ReLU(),
        )
        self.head = nn.Linear(self.num_features, classes)

    def extract(self, images: Tensor) -> Extracted:
        """Return the 64 activations and the logits."""
        features = self.body(from_uint8(images))
        return Extracted(features, self.head(features))


class WhitenedClassifier(FeatureNetwork):
    """Three stages of two convolutions on decorrelated 2 x 2 patches (2404.00498); features are pooled over the image.

    shape: (C, H, W), sides of at least 16; classes: number of classes; widths: channels of the stages, the last one is
    the number of features. `whiten` sets the first convolution, which is not trained.
    """

    def __init__(self, shape: list[int], classes: int = 10, widths: tuple[int, ...] = (64, 256, 320)) -> None:
        super().__init__()
        self.shape, self.classes, self.widths = shape, classes, tuple(widths)
        self.num_features = widths[-1]
        patch = 4 * shape[0]
        self.whitening = nn.Conv2d(shape[0], 2 * patch, 2)
        self.whitening.weight.requires_grad_(False)
        stages = [_stage(i, o) for i, o in pairwise((2 * patch, *widths))]
        self.body = nn.Sequential(nn.GELU(), *stages, nn.AdaptiveMaxPool2d(1), nn.Flatten())
        self.head = nn.Linear(self.num_features, classes, bias=False)

    @torch.no_grad()
    def whiten(self, images: Tensor) -> None:
        """Set the first convolution to eigenvectors of 2 x 2 patches divided by their deviation, with both signs."""
        x = from_uint8(images).unfold(2, 2, 1).unfold(3, 2, 1)
        patches = x.permute(0, 2, 3, 1, 4, 5).reshape(-1, 4 * images.shape[1]).double()
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / (values + 5e-4).sqrt()).T.float().view(-1, *self.whitening.weight.shape[1:])
        self.whitening.weight.copy_(torch.cat([filters, -filters]))

    def once(self, images: Tensor) -> Extracted:
        """Return pooled activations and logits of the images without their mirror images, for training."""
        features = self.body(self.whitening(from_uint8(images)))
        return Extracted(features, self.head(features) / 9)

    def extract(self, images: Tensor) -> Extracted:
        """Return the means of `once` over the images and their mirror images."""
        one, other = self.once(images), self.once(images.flip(3))
        return Extracted((one.features + other.features) / 2, (one.logits + other.logits) / 2)  # type: ignore[operator]


def _stage(inside: int, outside: int) -> nn.Sequential:
    def normed() -> list[nn.Module]:
        norm = nn.BatchNorm2d(outside, momentum=0.4)
        norm.weight.requires_grad_(False)
        return [norm, nn.GELU()]

    convolutions = [nn.Conv2d(i, outside, 3, padding=1, bias=False) for i in (inside, outside)]
    for c in convolutions:  # the first channels are the identity at the start
        nn.init.dirac_(c.weight[: c.in_channels])
    first, second = convolutions
    return nn.Sequential(first, nn.MaxPool2d(2), *normed(), second, *normed())


class Random(FeatureNetwork):
    """Four untrained convolutions for images of any kind, without a download: shows that a curve moves, not quality.

    Weights are He-initialised from ``seed`` on the CPU; the 2 width features are mean and standard deviation over the
    places of the last layer's ``width`` channels. Random features do distinguish distributions, but poorly (1801.03924,
    table 5).

    channels: of the images. width: channels of each layer. seed: of the weights.
    """

    name = "random"

    def __init__(self, channels: int = 3, width: int = 32, seed: int = 0) -> None:
        super().__init__()
        self.channels, self.width, self.seed, self.num_features = channels, width, seed, 2 * width
        generator = torch.Generator().manual_seed(seed)
        sizes = [channels, width, width, width, width]
        weights = [
            torch.randn(outside, inside, 3, 3, generator=generator) * (2 / (9 * inside)) ** 0.5
            for inside, outside in pairwise(sizes)
        ]
        self.weights = nn.ParameterList(weights)
        self.weights_sha256 = digest_of(w.numpy().tobytes() for w in weights)
        self.requires_grad_(False)

    def extract(self, images: Tensor) -> Extracted:
        """Return mean and standard deviation of the last activations."""
        x = from_uint8(images)
        for i, weight in enumerate(self.weights):
            x = nn.functional.conv2d(x, weight, padding=1, stride=1 if i == 0 else 2).relu()
        return Extracted(torch.cat([x.mean((2, 3)), x.std((2, 3), correction=0)], 1))


def load_classifier(path: Path) -> FeatureNetwork:
    """Load a feature network that `save_classifier` wrote, frozen and in float32."""
    with safe_open(path, "pt") as file, torch.device("meta"):  # no weights are initialised
        about = file.metadata()
        check_metadata(about, str(path), SCHEMA)
        network = build(parse_json(about["spec"]), FeatureNetwork)
    state = {k: v.float() if v.is_floating_point() else v.clone() for k, v in load_file(path).items()}
    network.load_state_dict(state, assign=True)
    network.name, network.weights_sha256 = path.stem, sha256(path)
    return network.eval().requires_grad_(False)


def save_classifier(path: Path, network: FeatureNetwork, dtype: torch.dtype = torch.float32) -> None:
    """Write a feature network with its spec.

    dtype: of the weights in the file; float16 halves it, and the loaded network then has the rounded weights.
    """
    state = network.state_dict().items()
    tensors = {k: (v.to(dtype) if v.is_floating_point() else v).detach().contiguous() for k, v in state}
    write_whole(path, save(tensors, {"schema": str(SCHEMA), "spec": json.dumps(spec(network))}))


def load_features(
    name: str, weights: str | None = None, resize: str | None = None, dtype: str | None = None, channels: int = 3
) -> FeatureNetwork:
    """Return the feature network of a protocol, frozen: a shipped classifier, ``random``, ``inception`` or ``dinov2``.

    weights, resize, dtype: arguments of `Inception` and `DINOv2`; channels: number of image channels, for ``random``.
    Raises InputError for an unknown name, and `Unavailable` if a package or file is missing.
    """
    dtype = dtype or "float32"
    if name == "inception":
        from lightning_tdisent.metrics.inception import Inception

        return Inception(weights, resize or "tf1", dtype=dtype)
    if name == "dinov2":
        from lightning_tdisent.metrics.dinov2 import DINOv2

        return DINOv2(weights, resize or "pil_bicubic_uint8", dtype=dtype)
    if weights is not None:
        raise InputError(f"weights: {name!r} has its own weights; leave them out. They are for inception and dinov2")
    if name == "random":
        return Random(channels)
    if name not in (known := known_features()):
        raise InputError(f"features: there is no {name!r}.{nearest(name, known)} Choose from {', '.join(known)}")
    return load_classifier(SHIPPED / f"{name}.safetensors")


def foreign_features(name: str, data: str | Path) -> list[str]:
    """Return a note if the features are of a classifier of another data set, judged by the name of its folder."""
    shipped = (SHIPPED / f"{name}.safetensors").exists()
    if not shipped or name in os.path.basename(os.path.abspath(data)).lower():
        return []
    return [
        f"the features are of a classifier of {name} and say little of other images; {data} is another data set by its "
        "name: take Inception for it (fetch inception), or random to compare models"
    ]


def known_features() -> list[str]:
    """Return the names that `load_features` takes."""
    return [*sorted(p.stem for p in SHIPPED.glob("*.safetensors")), "random", "inception", "dinov2"]
