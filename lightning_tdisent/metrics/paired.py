"""`PairedQuality`: metrics of conditional generation, with several draws for each observation of a held-out item."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_tdisent.diffusion.operators import Operator
from lightning_tdisent.distributed import all_gather
from lightning_tdisent.errors import InputError
from lightning_tdisent.images import from_uint8
from lightning_tdisent.metrics.accumulators import FeatureMoments, RowSums, computed
from lightning_tdisent.metrics.consistency import Consistency
from lightning_tdisent.metrics.distances import frechet
from lightning_tdisent.metrics.diversity import Diversity
from lightning_tdisent.metrics.joint_frechet import JointFrechetDistance
from lightning_tdisent.metrics.metric import Pair, PairedMetric
from lightning_tdisent.metrics.network import FeatureNetwork
from lightning_tdisent.metrics.psnr import PSNR
from lightning_tdisent.metrics.ssim import SSIM


class PairedQuality:
    """How draws x of held-out items agree with their originals x_0, their observations y = A(x_0) and each other.

    operator: A; draws, items: number of each; draw d of item i is added exactly once, on any rank, and i is also the
    number that determines A's mask. network: of the joint distance, none without; features: its name in keys. further:
    metrics besides PSNR, SSIM and consistency. Diversity needs two draws. States are float64 sums, which ranks add.
    """

    def __init__(
        self,
        operator: Operator,
        draws: int,
        items: int,
        network: FeatureNetwork | None,
        further: Sequence[PairedMetric] = (),
        features: str = "",
    ) -> None:
        if draws < 1 or items < 1:
            raise InputError(f"draws, items: at least 1 of each, got {draws} and {items}")
        self.operator, self.draws, self.items, self.network = operator, draws, items, network
        self.features = features or (network.name if network is not None else "")
        self.of_images: tuple[PairedMetric, ...] = (PSNR(), SSIM(), Consistency(), *further)
        self.shape: list[int] | None = None
        self.states: dict[str, Metric] = {"images": RowSums(items * draws, 1 + len(self.of_images))}
        if network is not None:
            self.states |= {k: FeatureMoments(2 * network.num_features) for k in ("real", "pairs")}

    @property
    def device(self) -> torch.device:
        """Device of the networks and states."""
        return self.states["images"].device

    def to(self, device: torch.device | str) -> "PairedQuality":
        """Move the networks and states to a device."""
        for part in (self.network, *self.of_images, *self.states.values()):
            if part is not None:
                part.to(device)
        return self

    def reference(self, images: Tensor, observations: Tensor) -> None:
        """Add real pairs, uint8 (B, C, H, W) and float (B, C', H, W) in [-1, 1]; without a network, only check them."""
        self._check(images, observations)
        if self.network is not None:
            pairs = JointFrechetDistance.features(self.network, images.to(self.device), observations.to(self.device))
            self.states["real"].update(pairs)

    def add(self, images: Tensor, originals: Tensor, observations: Tensor, item: Tensor, draw: Tensor) -> None:
        """Add draws and originals, uint8 (B, C, H, W), stored observations, and item and draw numbers, int64 (B,).

        Raises `InputError` for other shapes, dtypes, ranges or numbers, and for an observation that is not A of the
        original with the item's number. On a GPU this synchronises with the host.
        """
        self._check(images, observations)
        if originals.dtype != torch.uint8 or originals.shape != images.shape:
            raise InputError(f"originals: expected uint8 {tuple(images.shape)} like the images, got {_said(originals)}")
        for name, numbers, below in (("item", item, self.items), ("draw", draw, self.draws)):
            if numbers.shape != (len(images),) or numbers.dtype != torch.int64:
                raise InputError(
                    f"{name}: expected an int64 number for each of {len(images)} images, got {_said(numbers)}"
                )
            if len(wrong := numbers[(numbers < 0) | (numbers >= below)]):
                raise InputError(f"{name}: expected numbers from 0 to {below - 1}, got {int(wrong[0])}")
        if not len(images):
            return
        images, originals, item, draw = (part.to(self.device) for part in (images, originals, item, draw))
        y = observations.to(self.device).double()
        self.operator.refuse_others(from_uint8(originals, torch.float64), y, item, "observations")
        pair = Pair(images, originals, y, self.operator.observe(from_uint8(images, torch.float64), item))
        once = torch.ones(len(images), dtype=torch.float64, device=self.device)
        values = torch.stack([once, *(metric.of_images(pair) for metric in self.of_images)], 1)
        self.states["images"].update(item * self.draws + draw, values)
        if self.draws > 1:
            Diversity.add(self.states["draws"], item, images)  # type: ignore[arg-type]
        if self.network is not None:
            self.states["pairs"].update(JointFrechetDistance.features(self.network, images, y))

    def compute(self) -> dict[str, float]:
        """Synchronise over ranks and return the numbers by key (collective).

        Raises `InputError` on all ranks if a draw is missing or was added twice, or if features are not a distribution.
        """
        shapes = sorted({tuple(shape) for shape in all_gather(self.shape) if shape})
        if len(shapes) > 1:
            raise InputError(f"all images must have one shape, ranks have {' and '.join(map(str, shapes))}")
        if shapes:  # a rank without images sends sums, too
            self.begin(list(shapes[0]))
        images = computed(self.states["images"])
        if len(wrong := (images[:, 0] != 1).nonzero()):
            i, d = divmod(int(wrong[0]), self.draws)
            raise InputError(
                f"{int(images[:, 0].sum()):,} images were measured, expected {len(images):,} ({self.items:,} items of "
                f"{self.draws} draws): draw {d} of item {i} was added {int(images[wrong[0], 0])} times"
            )
        means = images[:, 1:].mean(0).tolist()
        out = {m.columns[0].key(self.features): m.finish(x) for m, x in zip(self.of_images, means, strict=True)}
        if self.draws > 1:
            out[Diversity.name] = Diversity.compute(computed(self.states["draws"]), self.draws)
        if self.network is not None:
            try:
                real, pairs = (computed(self.states[name]) for name in ("real", "pairs"))
            except InputError as error:
                raise InputError(f"jfd: {error}; real pairs are added by reference()") from None
            out[JointFrechetDistance.columns[0].key(self.features)] = frechet(real, pairs)
        return out

    def reset(self) -> None:
        """Remove the generated images; the real pairs stay."""
        for name, state in self.states.items():
            if name != "real":
                state.reset()

    def begin(self, shape: list[int]) -> None:
        """Create the state that depends on the shape of the images, (C, H, W).

        Raises `InputError` for a shape that A cannot degrade, and for sums that are too large.
        """
        if self.shape is not None:
            return
        self.operator.check(shape)
        if self.draws > 1:
            self.states["draws"] = Diversity.sums(self.items, shape).to(self.device)
        self.shape = shape

    def _check(self, images: Tensor, observations: Tensor) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise InputError(f"images: expected uint8 (B, C, H, W), 0 to 255, got {_said(images)}; see to_uint8")
        shape = list(images.shape[1:])
        self.begin(shape)
        if shape != self.shape:
            raise InputError(f"images: the first had the shape {self.shape}, got {shape}")
        wanted = (len(images), self.operator.channels(shape[0]), *shape[1:])
        if not observations.is_floating_point() or observations.shape != wanted:
            raise InputError(f"observations: expected floats {wanted}, got {_said(observations)}")
        if observations.numel() and not float(observations.abs().max()) <= 1 + 1e-3:  # nor NaN
            raise InputError(f"observations: expected finite values in [-1, 1], got {_said(observations)}")


def _said(x: Tensor) -> str:
    said = f"{x.dtype} {tuple(x.shape)}"
    return f"{said} from {float(x.min()):g} to {float(x.max()):g}" if x.numel() and not x.is_complex() else said
