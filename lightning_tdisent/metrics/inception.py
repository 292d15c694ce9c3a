"""The network of the literature's FID, Inception Score, KID and sFID, with the three resizes that papers use.

Its layers are those of torch-fidelity, a port of TensorFlow's inception-2015-12-05 graph, whose pooling layers differ
from those of any other Inception. torch-fidelity is an extra: it declares torchvision, which these layers do not use.
"""

import functools
import importlib
import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lightning_tdisent.errors import InputError, Unavailable, nearest
from lightning_tdisent.metrics import weights as files
from lightning_tdisent.metrics.network import Extracted, FeatureNetwork

SIDE = 299
RESIZES = ("tf1", "pil_bicubic", "torch_antialias")
AT_ONCE = 64  # images in the network at a time: 1 GB of activations on a GPU
_STEM = ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"]
_UP_TO_SPATIAL = [*_STEM, "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d"]
_TO_THE_END = ["Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool"]


class Inception(FeatureNetwork):
    """InceptionV3 of 2015-12-05 (1512.00567), the network that defines FID (1706.08500).

    weights: file of torch-fidelity's or pytorch-fid's conversion, the one in the cache if None (see `weights.fetch`);
    sha256: its digest if it is not the known file; dtype: of the computation, ``float32`` or ``float64``; resize:
    how images are resized to 299 x 299. ``tf1`` is bilinear with the coordinates of TensorFlow 1, as in the original
    code of FID, ADM's evaluator and torch-fidelity; ``pil_bicubic`` is antialiased, unrounded and clipped to 0..255, as
    in clean-fid (2104.11222); ``torch_antialias`` is bilinear and antialiased, the default of torchmetrics since 1.8.

    Features (B, 2048) are those of pool_3; logits (B, 1008) omit the bias of the classes, as in the Inception Score
    (1606.03498) of ADM and torch-fidelity; spatial features (B, 2023), for sFID (2103.03841), are the first 7 channels
    of TensorFlow's mixed_6/conv at 17 x 17 places, channels last as in the statistics that ADM publishes. All are
    float32. Grey images are repeated in three channels. Raises `InputError` for missing or other weights, a missing
    torch-fidelity, and images with a number of channels other than 1 or 3.
    """

    name = "inception"
    num_features = 2048
    classes = 1008
    num_spatial = 7 * 17 * 17

    def __init__(
        self, weights: str | None = None, resize: str = "tf1", sha256: str | None = None, dtype: str = "float32"
    ) -> None:
        super().__init__()
        if resize not in RESIZES:
            raise InputError(
                f"inception: there is no resize {resize!r}.{nearest(resize, RESIZES)} Choose from {', '.join(RESIZES)}"
            )
        if dtype not in ("float32", "float64"):
            raise InputError(f"inception: dtype: float32 or float64, got {dtype!r}")
        self.weights = None if weights is None else str(weights)
        self.resize, self.sha256, self.dtype = resize, sha256, dtype
        self.packages = ("torch-fidelity", "pillow") if resize == "pil_bicubic" else ("torch-fidelity",)
        self.weights_sha256 = (sha256 or files.KNOWN["inception"].sha256).lower()
        state = files.load("inception", weights, sha256)
        with torch.device("meta"):
            self.layers = empty()
        try:
            nn.Module.load_state_dict(self.layers, state, assign=True)
        except RuntimeError as error:
            wrong = " ".join(str(error).split())[:200]
            raise InputError(f"inception: {weights} holds the weights of another network: {wrong}") from None
        self.layers.to(getattr(torch, dtype))
        self.layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Inception":
        """Stay in eval mode, also as part of a module that is trained: the running statistics must not change."""
        return super().train(False)

    def extract(self, images: Tensor) -> Extracted:
        """Return features, logits without bias, and spatial features."""
        if images.shape[1] not in (1, 3):
            raise InputError(f"features inception: takes images of 1 or 3 channels, got {images.shape[1]}")
        parts = [self._extract(part) for part in images.split(AT_ONCE)]
        features, logits, spatial = (torch.cat(said) for said in zip(*parts, strict=True))
        return Extracted(features, logits, spatial)

    def _extract(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        classes = self.layers.get_parameter("fc.weight")
        x = _resized(images, self.resize, classes.dtype)
        x = ((x - 128) / 128).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        for name in _UP_TO_SPATIAL:
            x = getattr(self.layers, name)(x)
        # mixed_6/conv is the first of the four branches of the block mixed_6, which is Mixed_6d here
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        for name in _TO_THE_END:
            x = getattr(self.layers, name)(x)
        features = x.flatten(1)
        return features.float(), (features @ classes.T).float(), spatial.float()


def _resized(images: Tensor, resize: str, dtype: torch.dtype) -> Tensor:
    """Resize uint8 images (B, C, H, W) to (B, C, 299, 299), values from 0 to 255."""
    if resize == "tf1":
        return _torch_fidelity()[1](images.to(dtype), size=(SIDE, SIDE), align_corners=False)
    if resize == "torch_antialias":
        x = images.to(dtype)
        return nn.functional.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
    return pil_bicubic(images, SIDE, np.float32).to(images.device, dtype)


def pil_bicubic(images: Tensor, side: int, numbers: type[np.uint8] | type[np.float32]) -> Tensor:
    """Resize uint8 images (B, C, H, W) to (B, C, side, side) by Pillow on the CPU, values from 0 to 255.

    numbers: numpy.uint8 to compute with bytes, numpy.float32 for unrounded values.
    """
    resized = np.empty((*images.shape[:2], side, side), numbers)
    for i, image in enumerate(images.cpu().numpy()):
        for j, channel in enumerate(image.astype(numbers)):
            resized[i, j] = Image.fromarray(channel).resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(resized.clip(0, 255))


@functools.cache
def _torch_fidelity() -> tuple[type[nn.Module], Callable[..., Tensor]]:
    """Return the class of the layers and the resize of TensorFlow 1 (see ``lightning_tdisent.__init__``)."""
    try:
        layers = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        resize = importlib.import_module("torch_fidelity.interpolate_compat_tensorflow")
    except ImportError as error:
        raise Unavailable(
            f"inception: torch-fidelity is not installed ({error}): pip install lightning_tdisent[inception], or, "
            "if torchvision is not available or would replace torch, pip install --no-deps torch-fidelity"
        ) from None
    return layers.FeatureExtractorInceptionV3, resize.interpolate_bilinear_2d_like_tensorflow1x


def empty() -> nn.Module:
    """Return the layers without weights: their constructor would download them, or read a file unchecked."""
    layers, _ = _torch_fidelity()
    unread = type("FeatureExtractorInceptionV3", (layers,), {"load_state_dict": lambda self, state: None})
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    network: nn.Module = unread("inception-v3-compat", ["2048"], feature_extractor_weights_path=nothing)
    return network
