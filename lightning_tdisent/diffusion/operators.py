"""Degradations y = A(x_0) of images: the input of conditional models, and what their samples must agree with.

Each is a deterministic function of an image and an item number, so that the mask of an item never changes and can be
computed again anywhere. Images and observations are in [-1, 1] and have the same height and width.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_tdisent.diffusion.rng import key
from lightning_tdisent.diffusion.spec import Part, spec
from lightning_tdisent.errors import InputError
from lightning_tdisent.images import LEVEL

GREY_LEVEL = LEVEL + 1e-3  # largest rounding error of an observation that was stored as uint8


class Operator(Part, ABC):
    """Base class of degradations of images (B, C, H, W), seeded by item number."""

    def channels(self, channels: int) -> int:
        """Return the number of channels of an observation for an image with ``channels`` channels."""
        return channels

    def check(self, shape: list[int]) -> None:
        """Raise InputError for images of shape (C, H, W) that this operator cannot degrade."""

    @abstractmethod
    def observe(self, x0: Tensor, item: Tensor) -> Tensor:
        """Return observations (B, C', H, W) of images x_0 (B, C, H, W); item: item numbers, int64 (B,)."""

    def refuse_others(self, x0: Tensor, y: Tensor, item: Tensor, where: str) -> None:
        """Raise InputError if observations y do not belong to these images and items, up to rounding to grey levels.

        where: name of the observations, for the message.
        """
        off = (self.observe(x0, item) - y).abs().flatten(1).amax(1)
        if len(off) and not bool((off <= GREY_LEVEL).all()):
            k = int((~(off <= GREY_LEVEL)).nonzero()[0])
            raise InputError(
                f"{where}: the observation of item {int(item[k])} differs by up to {float(off[k]):.3g} from what "
                f"{type(self).__name__} makes of its original, rounding by {GREY_LEVEL:.3g} at most: it has the mask "
                "(or kernel) of another item, or of another seed, or is of another image"
            )

    def kernel(self, shape: list[int], item: Tensor) -> Tensor:
        """Return what the observations were made with, to be stored with them: masks (B, 1, H, W), or one kernel."""
        return torch.ones(1, 1, 1, 1)


class Inpainting(Operator):
    """Hide a square hole at a place drawn from (seed, item), and fill it with mid-grey.

    share: fraction of the image's area that is hidden, in (0, 1); the side is floor(sqrt(share H W)) (2207.09786,
        section 6.2).
    seed: seed of the places.
    """

    def __init__(self, share: float = 0.25, seed: int = 0) -> None:
        if not 0 < share < 1:
            raise InputError(f"Inpainting: share of the image that is hidden, above 0 and below 1, got {share}")
        self.share, self.seed = share, seed

    def check(self, shape: list[int]) -> None:
        """Raise InputError for a hole that does not fit, or whose side is 0."""
        side = self._side(shape[1], shape[2])
        if not 1 <= side <= min(shape[1:]):
            raise InputError(f"Inpainting: a hole of side {side} ({self.share:g} of the area) in {shape[1]}x{shape[2]}")

    def _side(self, height: int, width: int) -> int:
        return int((self.share * height * width) ** 0.5)

    def kernel(self, shape: list[int], item: Tensor) -> Tensor:
        """Return masks (B, 1, H, W): 1 where the image is visible, 0 in the hole."""
        _, height, width = shape
        side = self._side(height, width)
        top = (key(self.seed, 0, item) % (height - side + 1))[:, None]  # type: ignore[arg-type, index]
        left = (key(self.seed, 1, item) % (width - side + 1))[:, None]  # type: ignore[arg-type, index]
        y, x = torch.arange(height, device=item.device), torch.arange(width, device=item.device)
        rows, columns = (y >= top) & (y < top + side), (x >= left) & (x < left + side)
        holes: Tensor = rows[:, None, :, None] & columns[:, None, None]
        return (~holes).float()

    def observe(self, x0: Tensor, item: Tensor) -> Tensor:
        """Return x_0 times the mask."""
        return x0 * self.kernel(list(x0.shape[1:]), item).to(x0.dtype)


class SuperResolution(Operator):
    """Replace every factor x factor block by its mean; the image keeps its size.

    factor: side of a block, at least 2.
    """

    def __init__(self, factor: int = 4) -> None:
        if factor < 2:
            raise InputError(f"SuperResolution: factor must be at least 2, got {factor}")
        self.factor = factor

    def check(self, shape: list[int]) -> None:
        """Raise InputError for sides that are not divisible by the factor."""
        if shape[1] % self.factor or shape[2] % self.factor:
            raise InputError(f"SuperResolution: {shape[1]}x{shape[2]} is not divisible by factor {self.factor}")

    def observe(self, x0: Tensor, item: Tensor) -> Tensor:
        """Return the means of the blocks, repeated to the size of x_0."""
        return F.interpolate(F.avg_pool2d(x0, self.factor), scale_factor=float(self.factor))

    def kernel(self, shape: list[int], item: Tensor) -> Tensor:
        """Return the box filter (1, 1, factor, factor)."""
        return torch.full((1, 1, self.factor, self.factor), self.factor**-2.0)


class Edges(Operator):
    """Edge strength: Sobel filters on the mean of the channels.

    It saturates at a gradient of a quarter of the range per pixel.
    """

    def channels(self, channels: int) -> int:
        """Return 1."""
        return 1

    def kernel(self, shape: list[int], item: Tensor) -> Tensor:
        """Return the two Sobel kernels, (2, 1, 3, 3)."""
        sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 4
        return torch.stack([sobel, sobel.T])[:, None]

    def observe(self, x0: Tensor, item: Tensor) -> Tensor:
        """Return min(1, |gradient|), scaled from [0, 1] to [-1, 1]."""
        grey = F.pad(x0.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        gradient = F.conv2d(grey, self.kernel([], item).to(x0))
        return 2 * gradient.square().sum(1, keepdim=True).sqrt().clamp_max(1) - 1


class Grey(Operator):
    """Luma of a colour image, 0.299 R + 0.587 G + 0.114 B (BT.601): the input of colourisation."""

    def channels(self, channels: int) -> int:
        """Return 1."""
        return 1

    def check(self, shape: list[int]) -> None:
        """Raise InputError for images that do not have 3 channels."""
        if shape[0] != 3:
            raise InputError(f"Grey: images must have 3 channels, got {shape[0]}")

    def kernel(self, shape: list[int], item: Tensor) -> Tensor:
        """Return the three weights, (1, 3, 1, 1)."""
        return torch.tensor([0.299, 0.587, 0.114])[None, :, None, None]

    def observe(self, x0: Tensor, item: Tensor) -> Tensor:
        """Return the luma, (B, 1, H, W)."""
        return F.conv2d(x0, self.kernel([], item).to(x0))


@torch.no_grad()
def masks(operator: Operator, shape: list[int], item: Tensor) -> Tensor | None:
    """Return the masks (B, 1, H, W) of an operator whose observation is the image times a mask, else None.

    A mask is 1 where a pixel is visible and 0 where it is mid-grey.
    """
    kernel = operator.kernel(list(shape), item)
    if list(kernel.shape[1:]) != [1, *shape[1:]] or not bool(((kernel == 0) | (kernel == 1)).all()):
        return None
    x0 = torch.rand(len(item), *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = operator.observe(x0.clone(), item)
    if y.shape != x0.shape or not bool(((y - x0 * kernel).abs() <= GREY_LEVEL).all()):
        return None
    return kernel.float().expand(len(item), -1, -1, -1)


@torch.no_grad()
def probe(operator: Operator, shape: list[int]) -> None:
    """Raise `InputError` if an operator cannot serve a model of images of ``shape`` (C, H, W).

    Observes two random images, a black and a white one, twice, and checks what training, sampling and evaluation rely
    on: the number of channels, the size, finite values in [-1, 1], the same y for the same image and item, alone or in
    a batch, and that the input is unchanged. The state of the global random generator is restored.
    """
    name = f"{type(operator).__module__}.{type(operator).__qualname__}"
    operator.check(shape)
    spec(operator)
    channels = operator.channels(shape[0])
    if not isinstance(channels, int) or isinstance(channels, bool) or channels < 1:
        raise InputError(f"{name}.channels({shape[0]}) returns {channels!r}: expected a number of channels")
    images = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images[2], images[3] = -1.0, 1.0
    item, given = torch.arange(4), images.clone()
    with torch.random.fork_rng(devices=[]):
        y, again = operator.observe(given, item), operator.observe(given, item)
        alone = [operator.observe(given[k : k + 1], item[k : k + 1]) for k in range(4)]
    if not isinstance(y, Tensor) or not y.is_floating_point():
        kind = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise InputError(f"{name}.observe returns {kind}: expected a tensor of floats")
    if list(y.shape) != (wanted := [4, channels, *shape[1:]]):
        raise InputError(
            f"{name}.observe makes {list(y.shape)} of images {list(images.shape)}, {wanted} is wanted: an observation "
            f"is as large as its image and has the channels that channels({shape[0]}) returns ({channels})"
        )
    if not torch.equal(given, images):
        raise InputError(f"{name}.observe changes its input: write to a copy")
    low, high = float(y.min()), float(y.max())
    if not -1 - GREY_LEVEL <= low <= high <= 1 + GREY_LEVEL:
        raise InputError(f"{name}.observe makes values from {low:.4g} to {high:.4g}: observations lie in [-1, 1]")
    in_batch = "makes another observation of an image alone than in a batch"
    for other, mine, why in (
        (again, y, "makes another observation at a second call"),
        *((one, y[k : k + 1], in_batch) for k, one in enumerate(alone)),
    ):
        if other.shape != mine.shape or not bool(((other - mine).abs() <= GREY_LEVEL).all()):
            raise InputError(f"{name}.observe {why}: y must be a function of the image and its item number alone")
    kernel = operator.kernel(list(shape), item)
    if not isinstance(kernel, Tensor) or kernel.ndim != 4:
        raise InputError(f"{name}.kernel: masks (B, 1, H, W) or one kernel of 4 dimensions expected, got {kernel!r}")
