"""`PairedQuality`: numbers of conditional generation, several draws for each held-out item given its observation."""

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.functional.image import structural_similarity_index_measure

from lightning_tdisent.diffusion.operators import Operator
from lightning_tdisent.digests import sha256
from lightning_tdisent.distributed import all_gather
from lightning_tdisent.errors import InputError, Unavailable
from lightning_tdisent.files import expand
from lightning_tdisent.images import GREY_LEVELS, from_uint8, to_uint8
from lightning_tdisent.metrics.distances import frechet
from lightning_tdisent.metrics.network import FeatureNetwork
from lightning_tdisent.metrics.quality import named
from lightning_tdisent.metrics.scores import FeatureMoments

LIMIT = 1 << 30  # bytes of the sums over draws; torchmetrics keeps them twice, and each rank's twice to add them up
PERFECT = 100.0  # dB of an image without error, and the most that any counts


class PairedQuality:
    """How draws x of held-out items agree with their originals x_0, their observations y = A(x_0) and each other.

    operator: A; draws, items: how many of each; draw d of item i comes exactly once, on any rank, and i is also the
    number that A's mask is drawn by. network: of the joint distance, none without; lpips: two uint8 batches
    (B, C, H, W) to (B,) distances (`load_lpips`), none without. States are float64 sums, which ranks add.

    - ``psnr``: 10 log10(255^2 / mean square error) of an image, at most 100 dB; ``lpips``; both averaged over images.
    - ``ssim``: of an image (Wang et al. 2004, eq. 13) as torchmetrics has it, in a Gaussian window of 11 x 11 and
      deviation 1.5, edges reflected; see `ssim_sigma` for images below 11 pixels. Averaged over images.
    - ``consistency``: root of the mean of (A(x) - y)^2 over images, channels and pixels, in grey levels. y is as
      stored: if rounded to uint8, even originals have about 0.3, and a hole's mid-grey counts 0.5.
    - ``diversity``: standard deviation over an item's draws (divided by draws; torch.std in 2207.09786's code divides
      by draws - 1), in grey levels, averaged over pixels, channels and items. Absent with one draw.
    - ``jfd_<features>``, ``jfid``: Frechet distance between [f(y), f(x)] of all draws together and [f(y), f(x_0)] of
      the pairs of `reference`. f sees y as uint8, with the channels of x: repeated, or their mean.
    """

    def __init__(
        self,
        operator: Operator,
        draws: int,
        items: int,
        network: FeatureNetwork | None,
        lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        if draws < 1 or items < 1:
            raise InputError(f"draws, items: 1 at least of each, got {draws} and {items}")
        self.operator, self.draws, self.items, self.network, self.lpips = operator, draws, items, network, lpips
        self.names = ("psnr", "ssim", "consistency", *(("lpips",) if lpips else ()))
        self.shape: list[int] | None = None
        self.metrics: dict[str, Metric] = {"images": _RowSums(items * draws, 1 + len(self.names))}
        if network is not None:
            self.metrics |= {k: FeatureMoments(2 * network.num_features) for k in ("real", "pairs")}

    @property
    def device(self) -> torch.device:
        """Where networks and states are."""
        return self.metrics["images"].device

    def to(self, device: torch.device | str) -> "PairedQuality":
        """Move networks and states to a device."""
        for part in (self.network, self.lpips, *self.metrics.values()):
            if isinstance(part, nn.Module):
                part.to(device)
        return self

    def reference(self, images: Tensor, observations: Tensor) -> None:
        """Add real pairs, uint8 (B, C, H, W) and float (B, C', H, W) in [-1, 1]; nothing to do without a network."""
        self._check(images, observations)
        if self.network is not None:
            self.metrics["real"].update(self._joint(images.to(self.device), observations.to(self.device)))

    def add(self, images: Tensor, originals: Tensor, observations: Tensor, item: Tensor, draw: Tensor) -> None:
        """Add draws and originals, uint8 (B, C, H, W), stored observations, and their numbers, int64 (B,).

        Raises `InputError` for other shapes, dtypes, ranges or numbers, and for an observation that A does not make of
        the original by the item's number. On a GPU this waits for it.
        """
        self._check(images, observations)
        if originals.dtype != torch.uint8 or originals.shape != images.shape:
            raise InputError(f"originals: uint8 {tuple(images.shape)} as the images, got {_said(originals)}")
        for name, numbers, below in (("item", item, self.items), ("draw", draw, self.draws)):
            if numbers.shape != (len(images),) or numbers.dtype != torch.int64:
                raise InputError(f"{name}: an int64 number for each of {len(images)} images, got {_said(numbers)}")
            if len(wrong := numbers[(numbers < 0) | (numbers >= below)]):
                raise InputError(f"{name}: numbers from 0 to {below - 1}, got {int(wrong[0])}")
        if not len(images):
            return
        images, originals, item, draw = (part.to(self.device) for part in (images, originals, item, draw))
        x, x0, y = images.double(), originals.double(), observations.to(self.device).double()
        self.operator.refuse_others(from_uint8(originals, torch.float64), y, item, "observations")
        observed = self.operator.observe(from_uint8(images, torch.float64), item)
        found = [
            torch.ones(len(x), dtype=torch.float64, device=self.device),
            (10 * torch.log10(255**2 / (x - x0).square().flatten(1).mean(1))).clamp_max(PERFECT),
            structural_similarity_index_measure(
                x, x0, sigma=ssim_sigma(min(x.shape[2:])), reduction="none", data_range=255.0
            ),
            (GREY_LEVELS * (observed - y)).square().flatten(1).mean(1),
        ]
        if self.lpips is not None:
            found.append(self.lpips(images, originals).double().flatten())
        self.metrics["images"].update(item * self.draws + draw, torch.stack(found, 1))  # type: ignore[arg-type]
        if self.draws > 1:
            self.metrics["draws"].update(item, torch.stack([x, x.square()], 1))
        if self.network is not None:
            self.metrics["pairs"].update(self._joint(images, y))

    def compute(self) -> dict[str, float]:
        """Synchronise over ranks, all of which must ask, and return the numbers by name.

        Raises `InputError` on all of them where a draw is missing or came twice, or features are no distribution.
        """
        shapes = sorted({tuple(shape) for shape in all_gather(self.shape) if shape})
        if len(shapes) > 1:
            raise InputError(f"images of one shape are compared, ranks have {' and '.join(map(str, shapes))}")
        if shapes:  # a rank without images has sums to send all the same
            self.begin(list(shapes[0]))
        images = _computed(self.metrics["images"])
        if len(wrong := (images[:, 0] != 1).nonzero()):
            i, d = divmod(int(wrong[0]), self.draws)
            raise InputError(
                f"{int(images[:, 0].sum()):,} images were measured, {self.items:,} items of {self.draws} draws are "
                f"{len(images):,}: draw {d} of item {i} came {int(images[wrong[0], 0])} times"
            )
        out = dict(zip(self.names, images[:, 1:].mean(0).tolist(), strict=True))
        out["consistency"] **= 0.5
        if self.draws > 1:
            rows = _computed(self.metrics["draws"])  # integers below 2^53, so that no order matters
            total = 0.0
            for first, second in (part.unbind(1) for part in rows.split(64)):
                total += float((self.draws * second - first.square()).sqrt().sum())
            out["diversity"] = total / self.draws / rows[:, 0].numel()
        if self.network is not None:
            try:
                real, pairs = (_computed(self.metrics[name]) for name in ("real", "pairs"))
            except InputError as error:
                raise InputError(f"jfd: {error}; real pairs are those of reference()") from None
            out[named("jfd", self.network.name)] = frechet(real, pairs)
        return out

    def reset(self) -> None:
        """Forget the generated images; the real pairs stay."""
        for name, metric in self.metrics.items():
            if name != "real":
                metric.reset()

    def begin(self, shape: list[int]) -> None:
        """Make what the first images' shape decides; refuse one that A cannot degrade, and sums that do not fit."""
        if self.shape is not None:
            return
        self.operator.check(shape)
        size = 16 * self.items * shape[0] * shape[1] * shape[2]
        if self.draws > 1:
            if size > LIMIT:
                raise InputError(
                    f"diversity: sums of {self.items:,} items of {shape} are {size / 2**30:.3g} GiB, at most "
                    f"{LIMIT / 2**30:.3g} are kept: take fewer items"
                )
            self.metrics["draws"] = _RowSums(self.items, 2, *shape).to(self.device)
        self.shape = shape

    def _check(self, images: Tensor, observations: Tensor) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise InputError(f"images: uint8 (B, C, H, W), 0 to 255, got {_said(images)}; see to_uint8")
        shape = list(images.shape[1:])
        self.begin(shape)
        if shape != self.shape:
            raise InputError(f"images of {self.shape} came first, got {shape}")
        wanted = (len(images), self.operator.channels(shape[0]), *shape[1:])
        if not observations.is_floating_point() or observations.shape != wanted:
            raise InputError(f"observations: floats {wanted}, got {_said(observations)}")
        if observations.numel() and not float(observations.abs().max()) <= 1 + 1e-3:  # nor NaN
            raise InputError(f"observations: finite and in [-1, 1], got {_said(observations)}")

    def _joint(self, images: Tensor, observations: Tensor) -> Tensor:
        """[f(y), f(x)] (B, 2 d)."""
        assert self.network is not None
        y = observations.double()
        if y.shape[1] != images.shape[1]:
            y = y.mean(1, keepdim=True).expand(-1, images.shape[1], -1, -1)
        return torch.cat([self.network(to_uint8(y)).features, self.network(images).features], 1)


class _RowSums(Metric):
    """Sums of what is added to each row."""

    full_state_update = False
    rows: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__(compute_with_cache=False)
        self.add_state("rows", torch.zeros(*shape, dtype=torch.float64), "sum")

    def update(self, numbers: Tensor, values: Tensor) -> None:
        """Add values (B, ..) to the rows with these numbers."""
        self.rows.index_add_(0, numbers, values)

    def compute(self) -> Tensor:
        """All of them."""
        return self.rows


def _computed(metric: Metric) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*was called before the ``update``.*")  # more ranks than images
        try:
            return metric.compute()
        except InputError:
            if metric._is_synced:  # torchmetrics leaves it so
                metric.unsync()
            raise


def ssim_sigma(side: int) -> float:
    """Deviation of SSIM's window: 1.5 from 11 pixels on, else that of the largest odd window that fits the image.

    torchmetrics takes no size of a Gaussian window but cuts it at 3.5 deviations: a smaller one has a smaller
    deviation. 11 x 11 on 8 pixels would see more reflections than image, and below 6 there are not enough to see.
    """
    return 1.5 if side >= 11 else max((side - 1) // 2 / 3.5, 0.1)


def _said(x: Tensor) -> str:
    said = f"{x.dtype} {tuple(x.shape)}"
    return f"{said} from {float(x.min()):g} to {float(x.max()):g}" if x.numel() and not x.is_complex() else said


BACKBONES = {"alex": ("alexnet-owt-7be5be79.pth", 31), "vgg": ("vgg16-397923af.pth", 16)}  # least sides of images


class _LPIPS(nn.Module):
    def __init__(self, net: str, module: nn.Module) -> None:
        super().__init__()
        self.net, self.module = net, module.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor, originals: Tensor) -> Tensor:
        least, found = BACKBONES[self.net][1], tuple(images.shape[1:])
        if found[0] not in (1, 3) or min(found[1:]) < least:
            raise InputError(f"lpips: {self.net} takes 1 or 3 channels and {least} pixels a side at least, got {found}")
        pair = (from_uint8(x).expand(-1, 3, -1, -1) for x in (images, originals))
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):  # float32 is float32
            distances: Tensor = self.module(*pair)
        return distances.flatten()


def load_lpips(weights: str | Path | None = None, net: str = "alex") -> nn.Module:
    """LPIPS (1801.03924, v0.1) for `PairedQuality`: uint8 images and originals (B, 1 or 3, H, W) to (B,).

    Of the package lpips; torch-fidelity's and torchmetrics' need torchvision as it does. net: ``alex``, as in
    2207.09786's code, or ``vgg``; weights: file of that backbone of torchvision, the one in torch.hub's cache if None:
    nothing is downloaded. Raises `Unavailable` without package or file, `InputError` for another file.
    """
    if net not in BACKBONES:
        raise InputError(f"lpips: there is no net {net!r}; choose from {', '.join(BACKBONES)}")
    try:
        package = importlib.import_module("lpips")
    except (ImportError, RuntimeError) as error:  # the second from a torchvision that does not fit
        raise Unavailable(
            f"lpips: cannot be imported ({error}): pip install lpips, which brings torchvision, that must fit torch"
        ) from None
    name = BACKBONES[net][0]
    path = Path(expand(str(weights))) if weights else Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        raise Unavailable(f"lpips: no file {path}. Get https://download.pytorch.org/models/{name} and name it")
    digest, wanted = sha256(path), name[-12:-4]
    if not digest.startswith(wanted):  # torchvision names its files by it
        raise InputError(f"lpips: {path} has SHA-256 {digest}, expected {wanted}..: another file or a damaged one")
    module = package.LPIPS(net=net, pnet_rand=True, verbose=False)  # it would download the backbone
    state = torch.load(path, map_location="cpu", weights_only=True)
    module.net.load_state_dict({k: state[f"features.{k.split('.', 1)[1]}"] for k in module.net.state_dict()})
    return _LPIPS(net, module)
