"""Preflight of a fit: try everything that the run needs later once, before the first step."""

import contextlib
import itertools
import re
import sys
import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_tdisent.diffusion.operators import probe
from lightning_tdisent.diffusion.spec import said
from lightning_tdisent.distributed import shared_errors
from lightning_tdisent.errors import InputError, nearest
from lightning_tdisent.evaluation.observations import observed
from lightning_tdisent.images import to_uint8
from lightning_tdisent.sampling.denoiser import Denoiser
from lightning_tdisent.sampling.sampler import Sampler, probe_rows

if TYPE_CHECKING:
    from lightning_tdisent.lit.modules import Diffusion

N = 2  # images in each trial
FEW, LONG = 10_000, 60.0  # a validation of fewer images, or fewer seconds, is not announced
EVALUATIONS = 4  # network evaluations for the sample
# errors of a device, which may not occur at the next attempt
DEVICE = tuple(getattr(torch, name) for name in ("OutOfMemoryError", "AcceleratorError") if hasattr(torch, name))


class Rehearsed(L.Callback):
    """Base class of callbacks whose work at a validation is tried before the first step."""

    def rehearse(self, trainer: L.Trainer, module: "Diffusion", images: Tensor | None) -> None:
        """Do the work of a validation for a few images; log and write nothing, and use no collectives.

        images: uint8 on the device, sampled from the untrained module; None if the module cannot sample.
        """
        raise NotImplementedError

    def passes(self, trainer: L.Trainer, module: "Diffusion") -> int:
        """Return the images that all ranks pass through the network at each validation."""
        return 0


class Logs(L.Callback):
    """Base class of callbacks that declare before training which metrics they log."""

    def logged_by(self, trainer: L.Trainer, module: Any) -> list[str]:
        """Return the names of the metrics, or patterns of names."""
        raise NotImplementedError


def preflight(trainer: L.Trainer, module: "Diffusion") -> None:
    """Try everything that the run needs later on two images; raise InputError in one line for what fails.

    The model is rebuilt as if loaded from its file (see `models.expert.rebuilt`). With the rebuilt model, the preflight
    runs a training step with gradients, a validation batch, a sample of at most four network evaluations, and the work
    of callbacks. Only a copy of the weights is used: weights, buffers, random generators, counters and the position in
    the data do not change.
    """
    live, seen = module.denoiser, module.images_seen
    module.log = module.log_dict = _log_nothing
    with isolate_rng(), shared_errors():
        try:
            with trying("the model that a file would give back"):
                batch = _batch(trainer, module)
                if module.states.observation is not None:
                    probe(module.states.observation.operator, module.states.image_shape)
                module.card("live")
                if isinstance(live, Denoiser):  # not a prior
                    refuse_wrong_estimate(live)
                module.denoiser = _copied(module.rebuilt())
            _try_all(trainer, module, batch)
        finally:
            module.denoiser, module.images_seen = live, seen
            del module.log, module.log_dict
    note_cost(trainer, module)


def _log_nothing(*_: Any, **__: Any) -> None:
    """Replace `LightningModule.log`, which Lightning forbids before the first step."""


def _try_all(trainer: L.Trainer, module: "Diffusion", batch: dict[str, Any] | None) -> None:
    precision, denoiser = trainer.precision_plugin, module.denoiser
    if batch is not None:
        with trying("a training step"), torch.enable_grad(), precision.train_step_context():
            denoiser.train()
            out: Any = module.training_step(batch, 0)
            (out["loss"] if isinstance(out, dict) else out).backward()
    denoiser.eval()
    with torch.no_grad(), precision.val_step_context():
        if batch is not None:
            with trying("a validation batch"):
                module.on_validation_epoch_start()
                module.validation_step(batch, 0)
        images = None
        if module.whole:
            with trying("a sample"):
                images = _sampled(module, batch)
        for callback in trainer.callbacks:
            if isinstance(callback, Rehearsed):
                with trying(type(callback).__name__):
                    callback.rehearse(trainer, module, images)


def _batch(trainer: L.Trainer, module: "Diffusion") -> dict[str, Any] | None:
    """Return a batch for the trials: some images of `ImageShards`, or random images if the data are other.

    Return None for other data if the module has its own training or validation step, which may need another batch.
    """
    if module.shards is not None:
        held_out = module.shards.examples
        batch: dict[str, Any] = held_out.batch(torch.arange(min(N, len(held_out))))
    else:
        own = (type(module).training_step, type(module).validation_step)
        if not all(step.__module__.startswith("lightning_tdisent.") for step in own):
            return None
        image = torch.randint(256, (N, *module.denoiser.shape), dtype=torch.uint8)
        batch = {"image": image, "label": torch.zeros(N, dtype=torch.long), "id": torch.arange(N)}
    batch = trainer.strategy.batch_to_device(batch, module.device)
    converted: dict[str, Any] = trainer.precision_plugin.convert_input(batch)
    return converted


def _copied(denoiser: Any) -> Any:
    """Replace the weights and buffers of a denoiser by copies, and return it."""
    for module in denoiser.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.clone()
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.clone()
    return denoiser


def _sampled(module: "Diffusion", batch: dict[str, Any] | None) -> Tensor:
    """Return the images of two seeds, sampled along the first and the last rows of the sampler's path only."""
    denoiser, sampler = module.denoiser, module.sampler
    options: dict[str, Any] = {}
    blank = torch.zeros(N, *denoiser.shape, dtype=torch.uint8)
    image = blank if batch is None else batch.get("image", blank).cpu()
    if (given := observed(denoiser.states, image, N)) is not None:
        options["given"] = given
    if type(sampler).walk is Sampler.walk and len(rows := sampler.rows(denoiser.states)) > EVALUATIONS:
        options["rows"] = rows[: EVALUATIONS // 2] + rows[-(EVALUATIONS // 2) :]
    label = torch.zeros(N, dtype=torch.long) if denoiser.classes else None
    walk = sampler.walk(denoiser, range(N), label, **options)  # an overridden walk is stopped after EVALUATIONS steps
    *_, (_, x, _) = itertools.islice(walk, EVALUATIONS + 1)
    return to_uint8(denoiser.states.decode(x))


def note_cost(trainer: L.Trainer, module: "Diffusion") -> None:
    """Print how long each validation will take, if that is more than `LONG` seconds; measured with one batch.

    Without this, a long validation looks like a training that hangs.
    """
    plain = isinstance(module.denoiser, Denoiser) and module.states.observation is None
    if not trainer.enable_validation or module.shards is None or not plain:
        return
    n, rows = len(module.shards.held_out), len(probe_rows(module.rows))
    parts = {f"{n:,} held-out images at {rows} rows": n * rows}
    for callback in trainer.callbacks:
        if isinstance(callback, Rehearsed):
            parts[type(callback).__name__] = callback.passes(trainer, module)
    total, denoiser = sum(parts.values()), module.denoiser
    if total < FEW:
        return
    x = torch.zeros(min(n, 64), *denoiser.network.shape, device=module.device)
    label = torch.zeros(len(x), dtype=torch.long, device=module.device) if denoiser.classes else None
    with torch.no_grad(), trainer.precision_plugin.val_step_context():
        for _ in range(2):  # the first call is slower
            begun = time.perf_counter()
            float(denoiser(x, module.rows[-1], label).sum())
            spent = time.perf_counter() - begun
    seconds = spent / len(x) * total / trainer.world_size
    if seconds > LONG and trainer.is_global_zero:
        listed = ", ".join(f"{name}: {passes:,}" for name, passes in parts.items() if passes)
        print(
            f"note: each validation passes {total:,} images through the network ({listed}), about {seconds / 60:,.1f} "
            "minutes; data.val_limit, the arguments of these callbacks and trainer.val_check_interval make that less",
            file=sys.stderr,
        )


@contextlib.contextmanager
def trying(what: str) -> Iterator[None]:
    """Turn exceptions into an InputError that names ``what`` was tried; except errors of disk, memory and device."""
    try:
        yield
    except (InputError, OSError, MemoryError, *DEVICE):
        raise
    except Exception as error:
        raise InputError(f"tried before the first step, {what} fails: {said(error)}") from error


PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")


def refuse_trainer(trainer: L.Trainer) -> None:
    """Raise InputError for a trainer that trains nothing, clips gradients, or rounds or shards the weights.

    Averages and exports need whole weights in full precision.
    """
    remedies = {
        "max_steps": "at least 1, or -1 for no limit",
        "max_epochs": "at least 1, or -1 for no limit",
        "limit_train_batches": "a number of batches, or 1.0 for all",
    }
    if nothing := [name for name in remedies if getattr(trainer, name) == 0]:
        raise InputError(f"trainer.{nothing[0]}: 0 trains nothing; give {remedies[nothing[0]]}")
    for name in ("gradient_clip_val", "gradient_clip_algorithm"):
        if (value := getattr(trainer, name)) is not None:
            raise InputError(
                f"trainer.{name}: {getattr(value, 'value', value)} has no effect: the module clips the norm of its "
                "gradients itself, at model.clip_norm (null: not at all). Leave it out, and set model.clip_norm"
            )
    if trainer.precision not in PRECISIONS:
        raise InputError(
            f"trainer.precision: {trainer.precision} keeps the weights themselves in half precision, in which steps of "
            f"the optimizer are lost; choose one of {', '.join(PRECISIONS)}"
        )
    strategy = type(trainer.strategy).__name__
    if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)):
        raise InputError(
            f"trainer.strategy: {strategy} splits the weights over the ranks, and their averages and exports are made "
            "of whole ones; choose auto or ddp"
        )


SEARCH = "searches anew in every run that is resumed, and the run is then not that of its config; set"
REFUSED: dict[type[L.Callback], str] = {
    GradientAccumulationScheduler: "accumulates another number of batches in later epochs, which a resumed run does "
    "not know; set trainer.accumulate_grad_batches for the whole run",
    BatchSizeFinder: f"{SEARCH} data.batch_size",
    LearningRateFinder: f"{SEARCH} model.lr",
}


def refuse_callbacks(trainer: L.Trainer) -> None:
    """Refuse Lightning callbacks whose effect is lost when a run is resumed, or that need a missing backbone."""
    for callback in trainer.callbacks:
        if isinstance(callback, BackboneFinetuning) and not hasattr(trainer.lightning_module, "backbone"):
            name = type(trainer.lightning_module).__name__
            raise InputError(f"trainer.callbacks: BackboneFinetuning needs a module with a backbone; {name} has none")
        for cls, why in REFUSED.items():
            # a `Tuner` runs the search alone, without a training
            alone = isinstance(callback, BatchSizeFinder | LearningRateFinder) and callback._early_exit
            if isinstance(callback, cls) and not alone:
                raise InputError(f"trainer.callbacks: {type(callback).__name__} {why}")


def refuse_monitors(trainer: L.Trainer, module: "Diffusion") -> None:
    """Raise InputError for a callback that monitors a metric which nothing logs.

    This is checked only if the module and all callbacks are classes of this project or of Lightning, since others may
    log any metric. In that case such a callback ends the training when it first looks for its metric.
    """
    callbacks = trainer.callbacks
    known = all(type(part).__module__.startswith(("lightning_tdisent.", "lightning.")) for part in (module, *callbacks))
    if not known or any(isinstance(callback, LambdaCallback) for callback in callbacks):
        return
    names = [*(module.validated() if trainer.enable_validation else []), "epoch", "step", "lr-*"]
    for callback in callbacks:
        names += callback.logged_by(trainer, module) if isinstance(callback, Logs) else []
    for callback in callbacks:
        if not isinstance(callback, EarlyStopping | ModelCheckpoint):
            continue
        if isinstance(callback, EarlyStopping) and not callback.strict:
            continue
        asked = callback.monitor
        if asked is not None and not any(fnmatchcase(asked, name) for name in names):
            logged = ", ".join(name for name in names if not re.search(r"/t\d+$|^lr-", name))
            raise InputError(
                f"trainer.callbacks: {type(callback).__name__}.monitor: nothing logs {asked!r}."
                f"{nearest(asked, names)} There are: {logged}, and some of these by state"
            )


def refuse_wrong_estimate(denoiser: Denoiser) -> None:
    """Refuse an objective whose estimate of x_0 from its own target is not x_0, at any row owned."""
    states, objective = denoiser.states, denoiser.objective
    a, b = torch.sigmoid(states.log_snr).sqrt(), torch.sigmoid(-states.log_snr).sqrt()
    x0, eps = torch.tensor([0.5, -0.75], dtype=torch.float64), torch.tensor([1.25, 0.5], dtype=torch.float64)
    for s in denoiser.rows:
        if not bool(states.learned[s, 0]):
            continue
        row = (a[s, 0].cpu(), b[s, 0].cpu())
        found = objective.x0(objective.target(x0, eps, *row), row[0] * x0 + row[1] * eps, *row)
        if found.shape != x0.shape or not torch.allclose(found, x0, rtol=0, atol=1e-3):
            raise InputError(
                f"model.objective: {type(objective).__name__}.x0 is not the inverse of its target: for x_0 = "
                f"{x0.tolist()} at row {s} it returns {found.tolist()}"
            )


def refuse_unweighted(denoiser: Denoiser) -> None:
    """Refuse a loss weight of 0 at all rows of an expert, or at the row where sampling starts.

    A row with weight 0 is never trained. At other rows of a shared model a warning is given instead.
    """
    states, objective = denoiser.states, denoiser.objective
    zero = (denoiser.weights.float() == 0) & states.learned
    rows = [s for s in denoiser.rows if bool(zero[s].any())]
    if not rows:
        return
    snr = ", ".join(f"{v:.3g}" for v in states.log_snr[rows[-1]].exp().tolist())
    said = (
        f"model.objective: the weight {type(objective.weight).__name__} of {type(objective).__name__} is 0 at row"
        f"{'s' * (len(rows) > 1)} {', '.join(map(str, rows))} (SNR {snr} at the last), which would never be trained"
    )
    remedy = "Use the weight Constant or Likelihood, or a table that ends with signal"
    if rows == denoiser.rows:
        raise InputError(f"{said}: this expert has no other. {remedy}")
    if states.S in rows:
        raise InputError(f"{said}, and sampling starts at row {states.S}. {remedy}")
    rank_zero_warn(f"{said}. {remedy}")
