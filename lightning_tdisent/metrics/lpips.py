"""LPIPS (1801.03924) of generated images and their originals."""

import importlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_tdisent.digests import sha256
from lightning_tdisent.errors import InputError, Unavailable
from lightning_tdisent.files import expand
from lightning_tdisent.images import from_uint8
from lightning_tdisent.metrics.metric import Column, Pair, PairedMetric

# file of torchvision, and least side of the images in pixels
BACKBONES = {"alex": ("alexnet-owt-7be5be79.pth", 31), "vgg": ("vgg16-397923af.pth", 16)}


class LPIPS(PairedMetric):
    """Perceptual distance, averaged over images.

    distance: maps two uint8 batches (B, C, H, W) to B distances (`load_lpips`).
    """

    name = "lpips"
    asked_by = "asked for by --metrics of evaluate, or by lpips: of a study"
    columns = (Column("lpips", "LPIPS", "lower", with_features=False),)

    def __init__(self, distance: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.distance = distance

    def of_images(self, pair: Pair) -> Tensor:
        """Return the distance of each image, float64 (B,)."""
        return self.distance(pair.images, pair.originals).double().flatten()

    def to(self, device: torch.device | str) -> None:
        """Move the network to a device."""
        if isinstance(self.distance, nn.Module):
            self.distance.to(device)


class _LPIPS(nn.Module):
    def __init__(self, net: str, module: nn.Module) -> None:
        super().__init__()
        self.net, self.module = net, module.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor, originals: Tensor) -> Tensor:
        least, found = BACKBONES[self.net][1], tuple(images.shape[1:])
        if found[0] not in (1, 3) or min(found[1:]) < least:
            raise InputError(f"lpips: {self.net} takes 1 or 3 channels and at least {least} pixels a side, got {found}")
        pair = (from_uint8(x).expand(-1, 3, -1, -1) for x in (images, originals))
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):  # float32 is float32
            distances: Tensor = self.module(*pair)
        return distances.flatten()


def load_lpips(weights: str | Path | None = None, net: str = "alex") -> nn.Module:
    """Return LPIPS (1801.03924, v0.1) as a module that maps uint8 images and originals (B, 1 or 3, H, W) to (B,).

    It is computed by the package lpips; torch-fidelity's and torchmetrics' implementations need torchvision, too. net:
    ``alex``, as in the code of 2207.09786, or ``vgg``; weights: file of that backbone of torchvision, the one in the
    cache of torch.hub if None. Nothing is downloaded. Raises `Unavailable` if the package or the file is missing,
    `InputError` for another file.
    """
    if net not in BACKBONES:
        raise InputError(f"lpips: there is no net {net!r}; choose from {', '.join(BACKBONES)}")
    try:
        package = importlib.import_module("lpips")
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not match torch
        raise Unavailable(
            f"lpips: cannot be imported ({error}): pip install lpips, which brings a torchvision that must match torch"
        ) from None
    name = BACKBONES[net][0]
    path = Path(expand(str(weights))) if weights else Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        raise Unavailable(f"lpips: no file {path}. Get https://download.pytorch.org/models/{name} and give its path")
    digest, wanted = sha256(path), name[-12:-4]
    if not digest.startswith(wanted):  # torchvision has it in the name of the file
        raise InputError(f"lpips: {path} has SHA-256 {digest}, expected {wanted}..: it is another file, or damaged")
    module = package.LPIPS(net=net, pnet_rand=True, verbose=False)  # pnet_rand=False would download the backbone
    state = torch.load(path, map_location="cpu", weights_only=True)
    module.net.load_state_dict({k: state[f"features.{k.split('.', 1)[1]}"] for k in module.net.state_dict()})
    return _LPIPS(net, module)
