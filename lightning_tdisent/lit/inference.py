"""Validation, test and prediction, which all modules share: held-out errors per row, and images from seeds."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from lightning_tdisent.errors import InputError
from lightning_tdisent.images import from_uint8
from lightning_tdisent.lit.checkpoints import refuse_to_load
from lightning_tdisent.lit.datamodule import ImageShards
from lightning_tdisent.models.compose import load_model
from lightning_tdisent.models.composite import CompositeDenoiser
from lightning_tdisent.sampling.denoiser import Denoiser
from lightning_tdisent.sampling.errors_by_row import has_signal, state_errors
from lightning_tdisent.sampling.sample import sample
from lightning_tdisent.sampling.sampler import DDIM, Sampler, probe_rows


def clean(batch: dict[str, Any], generator: torch.Generator | None = None, look: bool = True) -> Tensor:
    """Return x0 of a batch, float (B, C, H, W): its images in [-1, 1], or samples of its latents.

    ``image`` is uint8. Floats must be named ``x0``, which declares that they are in [-1, 1]. A latent is sampled as
    mean + deviation z, z ~ N(0, 1), as the autoencoder does (its ``latent_dist``).

    generator: for sampling latents; without one their mean is returned. look: whether to check the range of ``x0``,
    which synchronises with a GPU. Raises InputError for values in another range or of another dtype.
    """
    if "x0" in batch:
        x0: Tensor = batch["x0"]
        most = 1.01  # resizing and bfloat16 may exceed 1 slightly; `Guard` handles values that are not finite
        if not x0.is_floating_point() or (look and float(x0.abs().max()) > most):
            ends = f"{float(x0.min()):g} to {float(x0.max()):g}"
            raise InputError(f"the batch's 'x0' is {x0.dtype} from {ends}; expected floats in [-1, 1]")
        return x0.float()
    if "image" in batch:
        image: Tensor = batch["image"]
        if image.dtype != torch.uint8 and bool(image.isfinite().all()):  # if not finite, the loss is reported instead
            ends = f"{float(image.min()):g} to {float(image.max()):g}"
            raise InputError(
                f"the batch's 'image' is {image.dtype} from {ends}; expected uint8, 0 to 255. Name floats in [-1, 1] "
                "'x0' instead (2 * image - 1 of floats in [0, 1])"
            )
        return from_uint8(image)
    mean: Tensor
    deviation: Tensor
    mean, deviation = batch["latent"].float().unbind(1)
    if generator is None:
        return mean
    return mean + deviation * torch.randn(mean.shape, generator=generator, device=mean.device)


def as_batch(batch: Any, shape: list[int], classes: int | None, look: bool = True) -> dict[str, Any]:
    """Return the batch of any loader as a dict of image (or latent) and label, in the form of `ImageShards`.

    batch: a tensor of images, a pair of images and labels, or a dict that names them. Missing labels become -1 (no
    label). shape: (C, H, W) of the network. classes: number of its classes, None if it is unconditional. look:
    whether to check the range of the labels, which synchronises with a GPU.

    Raises InputError for any other form, for images of another shape, and, if the network is class-conditional, for
    labels that are missing or out of range.
    """
    form = "a batch must be a tensor of images, a pair (images, labels), or a dict with image (x0, latent) and label"
    if isinstance(batch, Mapping):
        found, seen = dict(batch), f"a dict with the keys {list(batch)}"
    elif isinstance(batch, list | tuple):
        found = dict(zip(("image", "label"), batch, strict=False)) if len(batch) < 3 else {}
        seen = f"a {type(batch).__name__} of {', '.join(type(item).__name__ for item in batch)}"
    else:
        found, seen = {"image": batch}, f"a {type(batch).__name__}"
    if len(given := [name for name in ("x0", "image", "latent") if name in found]) > 1:
        raise InputError(f"{form}; the loader gives {seen}, of which {' and '.join(given)} each are images; give one")
    images = next((found[name] for name in given), None)
    if not isinstance(images, Tensor):
        raise InputError(f"{form}; the loader gives {seen}")
    if list(images.shape[-3:]) != shape or images.ndim != (4 if found.keys() & {"x0", "image"} else 5):
        raise InputError(f"model.network.shape is {shape}, the loader gives images of shape {list(images.shape)}")
    if classes is not None and found.get("label") is None:
        raise InputError(f"{form}; model.network.classes is {classes}, but the loader gives {seen}, without labels")
    label = found.get("label")
    label = torch.full((len(images),), -1, device=images.device) if label is None else label
    if not isinstance(label, Tensor) or label.is_floating_point() or label.shape != images.shape[:1]:
        kind = f"{label.dtype} {list(label.shape)}" if isinstance(label, Tensor) else type(label).__name__
        raise InputError(f"labels must be integers, one for each of the {len(images)} images; the loader gives {kind}")
    if look and classes is not None and not 0 <= int(label.min()) <= int(label.max()) < classes:
        raise InputError(
            f"model.network.classes is {classes}, the loader gives labels from {int(label.min())} to {int(label.max())}"
        )
    return found | {"label": label.long()}


class DenoiserModule(L.LightningModule):
    """Base class of all modules: validation, test and prediction with a denoiser.

    Validation logs held-out errors per row, and prediction samples images from seeds.
    """

    denoiser: Denoiser | CompositeDenoiser
    sampler: Sampler
    images_seen = 0
    load_from_checkpoint = refuse_to_load
    _returned: list[Any] = []  # always reassigned, never changed in place

    @property
    def rows(self) -> list[int]:
        """Rows of the table that this module owns."""
        return self.denoiser.rows if isinstance(self.denoiser, Denoiser) else self.denoiser.states.rows

    @property
    def classes(self) -> int | None:
        """Number of classes of the network, None if it is unconditional."""
        return self.denoiser.classes

    @property
    def whole(self) -> bool:
        """True if the module owns every row, so that it can sample images alone."""
        return self.rows == self.denoiser.states.rows

    @property
    def shards(self) -> ImageShards | None:
        """The trainer's data module if it is an `ImageShards`, else None."""
        data = self._trainer.datamodule if self._trainer else None
        return data if isinstance(data, ImageShards) else None

    def needed_shards(self, who: str) -> ImageShards:
        """Return the trainer's `ImageShards`; raise InputError, naming the part ``who``, if it has other data."""
        if self.shards is None:
            raise InputError(
                f"{who} reads images from ImageShards, but the trainer has other data. Pass "
                f"datamodule=ImageShards(..), or leave {who} out"
            )
        return self.shards

    def setup(self, stage: str) -> None:
        """Refuse data whose shape or classes do not fit the network, and a sampler that does not fit the table."""
        if self.whole:
            self.sampler.check(self.denoiser.states)
        data = self.shards
        if data is None:
            return
        if (shape := data.image_shape) != self.denoiser.shape:
            raise InputError(
                f"model.network.shape is {self.denoiser.shape}, the images of data.path {data.path} have {shape}. "
                "Set the network's shape to that of the data."
            )
        labels = data.examples.labels
        if self.denoiser.classes is not None:
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.denoiser.classes:
                raise InputError(
                    f"model.network.classes is {self.denoiser.classes}, but labels of {data.path} run from {low} to "
                    f"{high} (-1: none)"
                    + ". Samples without KEY.cls have no class; `data prepare` takes classes from folders, "
                    "dataset.json, KEY.json and tables" * (low < 0)
                )

    def known(self, batch: Any, training: bool = False, look: bool = True) -> dict[str, Any]:
        """Return a batch of any loader in the form of `ImageShards`, with ids if it has none.

        In validation an id is the key of the noise: the position of the image among all held-out images. In training
        ids only identify images in messages (-1: unknown).
        """
        if self.shards is not None:
            return dict(batch)
        found = as_batch(batch, self.denoiser.shape, self.classes, look)
        trainer, n = self.trainer, len(found["label"])
        if "id" not in found and training:
            found["id"] = torch.full((n,), -1)
        elif "id" not in found:
            found["id"] = (torch.arange(n) + int(self._sums[-1])) * trainer.world_size + trainer.global_rank
        return found

    def on_validation_epoch_start(self) -> None:
        """Reset the sums of errors at the probe rows."""
        self._probe = probe_rows(self.rows)
        self._sums = torch.zeros(2 * len(self._probe) + 1, dtype=torch.float64)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add up the errors of x0_hat and eps_hat at the probe rows, on noise keyed by image and row."""
        batch = self.known(batch)
        label = batch["label"] if self.denoiser.classes else None
        errors = state_errors(self.denoiser, clean(batch), batch["id"].tolist(), self._probe, label)
        self._sums += torch.cat([errors.sum(2).flatten(), torch.tensor([errors.shape[2]])])

    def on_validation_epoch_end(self, prefix: str = "val") -> None:
        """Log eps-MSE and x0-MSE per probe row, exact over all ranks; eps-MSE only at rows that contain signal."""
        self.errors = self.mean_errors()
        self.publish(self._named(prefix, *self.errors))

    def _named(self, prefix: str, x0: Tensor, eps: Tensor) -> dict[str, float]:
        states, probe, values = self.denoiser.states, probe_rows(self.rows), {f"{prefix}/x0_mse": float(x0.mean())}
        lit = torch.tensor([has_signal(states, s) for s in probe])
        if lit.any():
            values[f"{prefix}/eps_mse"] = float(eps[lit].mean())
        for s, signal, x0_mse, eps_mse in zip(probe, lit.tolist(), x0.tolist(), eps.tolist(), strict=True):
            t = int(states.index[s])
            values[f"{prefix}_x0_mse/t{t:04d}"] = x0_mse
            if signal:
                values[f"{prefix}_eps_mse/t{t:04d}"] = eps_mse
        return values

    def validated(self) -> list[str]:
        """Return the names of the metrics that a validation logs."""
        return list(self._named("val", *torch.zeros(2, len(probe_rows(self.rows)))))

    def mean_errors(self) -> Tensor:
        """Return the mean errors of x0_hat and eps_hat at the probe rows, (2, P), over all ranks (collective)."""
        sums = self.trainer.strategy.reduce(self._sums.to(self.device), reduce_op="sum").cpu()
        return (sums[:-1] / sums[-1]).view(2, -1)

    def publish(self, values: dict[str, float]) -> None:
        """Log metrics that are equal on all ranks; the x-axis is images seen."""
        self.log_dict(values, logger=False, sync_dist=True)  # for callbacks that monitor a metric
        fn, trainer = self.trainer.state.fn, self.trainer
        loop = {"validate": trainer.validate_loop, "test": trainer.test_loop}.get(str(fn and fn.value))
        self._returned = loop._logged_outputs if loop else []
        if not self.trainer.sanity_checking:
            for logger in self.loggers:
                logger.log_metrics(values, self.images_seen)

    def on_validation_end(self) -> None:
        """Add the metrics of `publish` to what ``trainer.validate`` and ``trainer.test`` return.

        Lightning returns only metrics that it logs itself, and would log each of these a second time, over steps.
        Therefore they are added to its list after it has logged and before it returns the list.
        """
        for outputs in self._returned:
            outputs.update(self.trainer.callback_metrics)
        self._returned = []

    on_test_epoch_start, test_step, on_test_end = on_validation_epoch_start, validation_step, on_validation_end

    def on_test_epoch_end(self) -> None:
        """Log the errors as in validation, with the prefix ``test``."""
        self.on_validation_epoch_end("test")

    def predict_step(self, batch: list[int], batch_idx: int) -> Tensor:
        """Return the images of a list of seeds, uint8 (B, C, H, W)."""
        if not self.whole:
            raise InputError(f"this model owns rows {self.rows} only; compose it with the other experts to sample")
        if self.denoiser.states.observation is not None:
            raise InputError("a conditional model is given observations: sample it with --observe DATA, or evaluate it")
        return torch.cat(list(sample(self.denoiser, self.sampler, batch, len(batch))))


class Composite(DenoiserModule):
    """Composite of experts as one denoiser, for validate, test and predict; it cannot be trained.

    path: a composite folder, a folder of experts' runs, or one file that owns all rows.
    sampler: sampler for images, DDIM if not given.
    """

    def __init__(self, path: str, sampler: Sampler | None = None) -> None:
        super().__init__()
        self.path, self.sampler = path, sampler or DDIM()
        self.denoiser = load_model(path)
        self.cards = self.denoiser.cards

    def configure_optimizers(self) -> None:
        """Raise InputError: a composite cannot be trained."""
        raise InputError("a composite is not trained: fit its experts one by one (SingleState), then compose them")

    def training_step(self, *_: Any) -> None:
        """Do nothing; `configure_optimizers` raises before the first step."""
