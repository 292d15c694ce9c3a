"""Conditional models in an evaluation: their observations, and the metrics of several draws for each of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_tdisent.data.image_set import ImageSet
from lightning_tdisent.diffusion.operators import Operator
from lightning_tdisent.diffusion.spec import spec
from lightning_tdisent.distributed import rank_and_world
from lightning_tdisent.errors import InputError
from lightning_tdisent.evaluation.observations import Observations
from lightning_tdisent.evaluation.real_images import RealImages
from lightning_tdisent.images import from_uint8, spaced
from lightning_tdisent.metrics.metric import PairedMetric
from lightning_tdisent.metrics.paired import PairedQuality
from lightning_tdisent.metrics.quality import Quality
from lightning_tdisent.sampling.denoiser import DenoiserProtocol

DRAWS = 4
REFERENCE = 10_000  # largest number of real pairs for the joint distance


def refuse_number(n: int, held_out: int, draws: int = DRAWS) -> None:
    """Raise InputError unless n images are `draws` draws for each of at most `held_out` images."""
    if n < draws or n % draws:
        raise InputError(
            f"n={n}: a conditional model draws {draws} images for each held-out one, so that n is a multiple of {draws}"
        )
    if n // draws > held_out:
        raise InputError(
            f"n={n}: {draws} draws of {n // draws} held-out images; there are {held_out}. Lower n to "
            f"{draws * held_out}, or hold out more images if the split has more (n_held_out of a study, --held-out)"
        )


class Given:
    """Held-out images observed by a conditional model's operator; image k of n is draw k % draws of item k // draws."""

    def __init__(
        self,
        model: DenoiserProtocol,
        held_out: ImageSet,
        quality: Quality,
        draws: int = DRAWS,
        further: Sequence[PairedMetric] = (),
    ) -> None:
        assert model.states.observation is not None
        self.operator: Operator = model.states.observation.operator
        self.draws, self.items = draws, quality.protocol.n // draws
        refuse_number(quality.protocol.n, len(held_out), draws)
        images = held_out.images[: self.items]
        self.observations = Observations.of(self.operator, images, torch.arange(self.items))
        self.observations.check(model.states)
        protocol = quality.protocol
        asked = [metric for metric in protocol.chosen if isinstance(metric, PairedMetric)]
        self.paired = PairedQuality(
            self.operator, draws, self.items, quality.network, [*further, *asked], protocol.features
        ).to(quality.device)
        self.paired.begin(list(images.shape[1:]))

    def reference(self, real: RealImages, known: dict[str, Metric], batch_size: int = 250) -> None:
        """Add evenly spaced real pairs, on each rank its share; their items, and so their masks, are separate.

        known: real pairs by operator, which models of the same operator share; it is extended.
        """
        name, n, (rank, world) = str(spec(self.operator)), min(real.n, REFERENCE), rank_and_world()
        if name in known:
            self.paired.states["real"] = known[name]
            return
        for numbers in spaced(n, real.n)[rank::world].split(batch_size):
            images = real.take(numbers)
            self.paired.reference(images, self.operator.observe(from_uint8(images), numbers))
        known[name] = self.paired.states["real"]

    @property
    def given(self) -> Tensor:
        """The observation of each of the n images."""
        return self.observations.y.repeat_interleave(self.draws, 0)

    def add(self, images: Tensor, numbers: Tensor) -> None:
        """Add generated images uint8 (B, C, H, W) with their numbers, int64 (B,)."""
        item = (numbers // self.draws).cpu()
        some = self.observations.take(item)
        self.paired.add(
            images, some.original.to(images.device), some.y.to(images.device), item, (numbers % self.draws).cpu()
        )

    def numbers(self) -> dict[str, Any]:
        """Return keys of a row (collective)."""
        arguments = ", ".join(f"{k}={v}" for k, v in spec(self.operator)["init_args"].items())
        given = f"{type(self.operator).__name__}({arguments})"
        return {**self.paired.compute(), "draws": self.draws, "given": given}
