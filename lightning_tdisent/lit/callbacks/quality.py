"""Metrics of generated images during validation."""

import sys
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_tdisent.distributed import all_gather, shared_errors
from lightning_tdisent.errors import InputError, Unavailable, check_number
from lightning_tdisent.evaluation.observations import observed
from lightning_tdisent.evaluation.real_images import real_images
from lightning_tdisent.evaluation.score import open_quality, score
from lightning_tdisent.lit.inference import DenoiserModule
from lightning_tdisent.lit.preflight import Logs, Rehearsed
from lightning_tdisent.metrics.features import foreign_features, load_features
from lightning_tdisent.metrics.metric import PairedMetric
from lightning_tdisent.metrics.protocol import Protocol
from lightning_tdisent.metrics.quality import Quality


class SampleQuality(Rehearsed, Logs):
    """Sample from fixed seeds at each validation and compare with real images, with the code of ``evaluate``.

    Metrics are logged as ``quality/NAME/HASH`` with the hash of the protocol, so that each protocol has separate
    curves. Each rank samples its share of the images. Nothing is measured for a model that owns only some rows of its
    table, since it cannot sample, or if the feature network is not available.

    protocol: a preset (``digits``, ``cifar10``, ``adm``, ..), or a mapping of ``preset`` and the fields of `Protocol`
        that differ from it.
    n, first_seed, split, n_real: the fields of the protocol that are changed most often.
    weights: file of the feature network's weights, for networks that need one.
    batch_size: images sampled at a time on a GPU.
    """

    def __init__(
        self,
        protocol: str | Mapping[str, Any],
        n: int | None = 500,
        first_seed: int | None = None,
        split: str | None = None,
        n_real: int | None = 10_000,
        weights: str | None = None,
        batch_size: int = 250,
    ) -> None:
        check_number("SampleQuality.batch_size", batch_size, 1, whole=True)
        self.protocol = Protocol.preset(protocol, n=n, first_seed=first_seed, split=split, n_real=n_real)
        if pairs := [metric.name for metric in self.protocol.chosen if isinstance(metric, PairedMetric)]:
            raise InputError(
                f"SampleQuality: {', '.join(pairs)}: compare each image with the one that it was drawn for; only "
                "evaluate and study measure them"
            )
        self.weights, self.batch_size = weights, batch_size
        self._quality: Quality | None = None

    def setup(self, trainer: L.Trainer, pl_module: DenoiserModule, stage: str) -> None:
        """Load the feature network and the statistics of the real images once; refuse images of another shape."""
        if not pl_module.whole or stage == "predict" or self._quality is not None:
            return
        data, shape, p = pl_module.needed_shards("SampleQuality"), pl_module.denoiser.shape, self.protocol
        missing, network = "", None
        with shared_errors():
            real = real_images(data.path, p.split, shape[0], data.decoder.size)
            try:
                network = load_features(p.features, self.weights, p.resize, p.dtype, shape[0])
            except Unavailable as error:
                missing = str(error)
        if any(missing := all_gather(missing)):
            rank_zero_warn(f"SampleQuality is left out: {max(missing)}")
            return
        assert network is not None
        notes = foreign_features(p.features, data.path)
        self._quality = open_quality(p, network, real, shape, trainer.strategy.root_device)
        for name, bias in self._quality.biases.items() if p.n <= network.num_features else ():
            notes.append(
                f"n={p.n} images leave a covariance of {network.num_features} features without full rank; a perfect "
                f"model would have a distance of about {bias:.3f} ({name})"
            )
        for line in notes if trainer.is_global_zero else ():
            print(f"note: SampleQuality: {line}", file=sys.stderr)

    def logged_by(self, trainer: L.Trainer, module: DenoiserModule) -> list[str]:
        """Return the pattern of the metrics that callbacks can monitor."""
        return [] if self._quality is None else [f"quality/*/{self._quality.protocol.hash}"]

    def rehearse(self, trainer: L.Trainer, module: DenoiserModule, images: Tensor | None) -> None:
        """Compute the features of the images, and discard them."""
        if self._quality is not None and images is not None:
            quality = self._quality.to(module.device)
            quality.reset()  # an earlier `trainer.validate` leaves tensors that cannot be changed here
            quality.add(images, torch.arange(len(images)))
            quality.reset()

    def passes(self, trainer: L.Trainer, module: DenoiserModule) -> int:
        """Return the images of the protocol, once for each step of the sampler."""
        if self._quality is None:
            return 0
        return self._quality.protocol.n * len(module.sampler.rows(module.denoiser.states))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: DenoiserModule) -> None:
        """Score this rank's share of the seeds, and log the metrics over all ranks."""
        if self._quality is None or trainer.sanity_checking:
            return
        quality = self._quality.to(pl_module.device)
        given = observed(pl_module.denoiser.states, trainer.datamodule.held_out.images, quality.protocol.n)
        values = score(pl_module.denoiser, pl_module.sampler, quality, self.batch_size, given=given).values
        if isinstance(values, InputError):  # for example, all images of an untrained model may be equal
            rank_zero_warn(f"no quality at step {trainer.global_step}: {values}")
            return
        pl_module.publish({f"quality/{name}/{quality.protocol.hash}": v for name, v in values.items()})

    on_test_epoch_end = on_validation_epoch_end
