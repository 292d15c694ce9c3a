"""Feature networks behind one small interface; each is named after the data it was trained on.

A feature network maps uint8 images (B, C, H, W) to float32 features (B, num_features), and has ``logits`` for the
Inception Score. Numbers from different networks are never comparable; the metric's name says which was used.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_tdisent.diffusion.spec import Part, build, spec
from lightning_tdisent.errors import InputError

SHIPPED = Path(__file__).parent / "weights"


class SmallClassifier(Part, nn.Module):
    """Three convolutions and a linear layer; the features are the 64 activations before the classes.

    shape: (C, H, W) of an image; classes: number of classes; width: channels of the convolutions. The image is halved
    once, and once more if it has 16 rows or more.
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

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> features (B, 64)."""
        if images.dtype != torch.uint8 or list(images.shape[1:]) != self.shape:
            raise InputError(
                f"this feature network takes uint8 images {self.shape}, got {images.dtype} {list(images.shape[1:])}"
            )
        out: Tensor = self.body(images.float() / 127.5 - 1)
        return out

    def logits(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> (B, classes)."""
        out: Tensor = self.head(self(images))
        return out


def load_features(name: str) -> SmallClassifier:
    """Load a shipped feature network, frozen: ``digits`` or ``mnist`` (experiments/features/train.py made them)."""
    path = SHIPPED / f"{name}.safetensors"
    if not path.exists():
        shipped = sorted(p.stem for p in SHIPPED.glob("*.safetensors"))
        raise InputError(f"features: {name!r} is not shipped; choose from {', '.join(shipped)}")
    with safe_open(path, "pt") as file:
        network = build(json.loads(file.metadata()["spec"]), SmallClassifier)
    network.load_state_dict(load_file(path))
    return network.eval().requires_grad_(False)


def save_features(path: Path, network: SmallClassifier) -> None:
    """Write a feature network with its description."""
    tensors = {k: v.detach().contiguous() for k, v in network.state_dict().items()}
    save_file(tensors, path, {"spec": json.dumps(spec(network))})
    path.chmod(0o644)
