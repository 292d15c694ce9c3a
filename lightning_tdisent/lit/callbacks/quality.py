"""Frechet distance and Inception Score during validation."""

import lightning.pytorch as L

from lightning_tdisent.errors import InputError
from lightning_tdisent.lit.inference import DenoiserModule
from lightning_tdisent.metrics.quality import Protocol, Quality
from lightning_tdisent.sampling.evaluation import score


class SampleQuality(L.Callback):
    """Sample from fixed seeds at each validation and compare with the training images, as is the custom.

    features: the feature network (``digits``, ``mnist``); the metric's name says which, and ``protocol`` what it
    depends on. n: images, seeds first_seed .. + n - 1, each rank its
    share; split, n_real: the real ones, the first of a split. A model that owns only some rows of its
    table cannot be sampled and is left out.
    """

    def __init__(
        self, features: str, n: int = 500, first_seed: int = 0, split: str = "train", n_real: int = 10000
    ) -> None:
        self.features, self.n, self.first_seed, self.split, self.n_real = features, n, first_seed, split, n_real
        self._quality: Quality | None = None

    def setup(self, trainer: L.Trainer, pl_module: DenoiserModule, stage: str) -> None:
        """Load the features and the real images' moments once; refuse images of another shape."""
        if not pl_module.whole or stage == "predict" or self._quality is not None:
            return
        quality, data = Quality(self.features), trainer.datamodule.images(self.split, self.n_real)
        if quality.shape != pl_module.denoiser.shape:
            raise InputError(
                f"the features {self.features!r} take images {quality.shape}, the model makes "
                f"{pl_module.denoiser.shape}; choose other features or remove SampleQuality"
            )
        quality.add_real(data.images[trainer.global_rank :: trainer.world_size])
        self.protocol = Protocol(self.features, self.n, self.first_seed, data.digest, len(data))
        self._quality = quality

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: DenoiserModule) -> None:
        """Score this rank's share of the seeds and log the numbers over all."""
        if self._quality is None or trainer.sanity_checking:
            return
        quality = self._quality.to(pl_module.device)
        place = (trainer.global_rank, trainer.world_size)
        values = score(pl_module.denoiser, pl_module.sampler, quality, self.n, self.first_seed, 250, *place)
        pl_module.publish({f"quality/{name}/{self.protocol.hash}": float(v) for name, v in values.items()})

    on_test_epoch_end = on_validation_epoch_end
