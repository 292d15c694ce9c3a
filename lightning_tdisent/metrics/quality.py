"""Distance of generated images to real ones, and the protocol that a number belongs to."""

import dataclasses
import hashlib
import json
import warnings
from importlib.metadata import version

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from lightning_tdisent.metrics.features import SHIPPED, SmallClassifier, load_features


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Everything an evaluation number depends on besides the model; its hash is printed beside the number.

    features: name of the feature network; n: generated images; first_seed: they have seeds first_seed .. + n - 1;
    real: digest and split of the real images; n_real: how many.
    """

    features: str
    n: int
    first_seed: int
    real: str
    n_real: int
    image_range: str = "uint8, rounded"
    moments: str = "float64"
    labels: str = "seed modulo classes"
    torchmetrics: str = dataclasses.field(default_factory=lambda: version("torchmetrics"))
    weights_sha256: str = ""

    def __post_init__(self) -> None:
        digest = hashlib.sha256((SHIPPED / f"{self.features}.safetensors").read_bytes()).hexdigest()
        object.__setattr__(self, "weights_sha256", digest)

    @property
    def hash(self) -> str:
        """Eight hex digits; numbers with different hashes must not share a table or a curve."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:8]


class _Logits(nn.Module):
    def __init__(self, network: SmallClassifier) -> None:
        super().__init__()
        self.network, self.num_features = network, network.classes

    def forward(self, images: Tensor) -> Tensor:
        return self.network.logits(images)


class Quality:
    """Frechet distance and Inception Score in the features of a named network, exact under any split over ranks.

    Both are torchmetrics' own. Results are named after the features (``fd_digits``, ``is_digits``): neither is
    comparable with numbers from the Inception network. The score is taken over the whole set at once, so the order of
    the images does not matter.
    """

    def __init__(self, features: str) -> None:
        self.features = features
        network = load_features(features)
        self.shape = network.shape
        self.fd = FrechetInceptionDistance(network, reset_real_features=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*save all extracted features.*")  # ten numbers an image
            self.score = InceptionScore(_Logits(network), splits=1)

    def to(self, device: torch.device) -> "Quality":
        """Move networks and states to a device."""
        self.fd.to(device)
        self.score.to(device)
        return self

    def add_real(self, images: Tensor) -> None:
        """Add uint8 images (B, C, H, W) to the reference; they stay over `reset`."""
        for part in images.split(500):
            self.fd.update(part.to(self.fd.device), real=True)

    def add(self, images: Tensor) -> None:
        """Add generated uint8 images (B, C, H, W)."""
        images = images.to(self.fd.device)
        self.fd.update(images, real=False)
        self.score.update(images)

    def compute(self) -> dict[str, float]:
        """Synchronise over ranks and return the numbers by name."""
        # the score permutes, which must not move the training's generator, and takes the deviation of its one split
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"std\(\): degrees of freedom")
            mean, _ = self.score.compute()
            return {f"fd_{self.features}": float(self.fd.compute()), f"is_{self.features}": float(mean)}

    def reset(self) -> None:
        """Forget the generated images."""
        self.fd.reset()
        self.score.reset()
