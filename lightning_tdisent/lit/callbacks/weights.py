"""Averaged weights: updated during training, used by validation, exported at the end."""

from pathlib import Path
from statistics import fmean
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_tdisent.distributed import shared_errors
from lightning_tdisent.errors import InputError, check_number
from lightning_tdisent.lit.checkpoints import refuse_other_run
from lightning_tdisent.lit.modules import Diffusion
from lightning_tdisent.models.averages import gamma
from lightning_tdisent.models.card import read_card
from lightning_tdisent.runs import AVERAGES, snapshot_name, snapshots_in


class EMA(L.Callback):
    """Exponential moving averages (EMA) of the network's weights, in float32.

    By default there is one average of fixed decay: after n updates the decay is min(decay, n/(9 + n)), the warm-up of
    diffusers' ``EMAModel``. With ``lengths`` there is one average per relative length sigma_rel, whose width is
    proportional to the time trained: beta_n = (1 - 1/n)^(gamma + 1) (2312.02696, section 3.1, see `averages.gamma`).
    The first of them is validated and exported. All are also written to ``averages/`` of the run folder every
    ``snapshot_every`` steps and at the end; the command ``average`` computes the average of any other length from
    these snapshots.

    A skipped step does not change the averages. This is decided on the device, which the averages of common libraries
    do not support; nor do they restore the live weights as late, so that metrics and pictures at the end of a
    validation use the average too. The live weights are restored bitwise, also after an exception. After `fit`,
    ``trainer.validate``, ``test`` and ``predict`` also use the average, unless the weights of the module have been
    changed since.

    A warm start continues the average that it starts from: update n counts as ``before`` + n, where ``before`` is the
    number of steps that its source has taken at the rows owned. The weights of the start are stored with the averages,
    for `Export`.

    decay: decay of the average, in [0, 1); its half-life should be a few percent of the run, 0 keeps the live weights.
    lengths: relative lengths sigma_rel of several averages, which replace the one of fixed decay.
    snapshot_every: steps between two snapshots of the averages of ``lengths``.
    """

    def __init__(self, decay: float = 0.999, lengths: list[float] | None = None, snapshot_every: int = 1000) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"ema.decay must lie in [0, 1), got {decay}")
        check_number("ema.snapshot_every", snapshot_every, 1, whole=True)
        self.decay, self.lengths, self.snapshot_every = decay, lengths or [], snapshot_every
        if len({f"{length:g}" for length in self.lengths}) < len(self.lengths):
            raise InputError.of_value("ema.lengths", self.lengths, "each must differ from the others")
        self.gammas = [gamma(length) for length in self.lengths]
        self.averages: list[Tensor] = []  # flat vectors, so that a step is one cat and one lerp for all parameters
        self.updates, self.before = 0, 0
        self.start: dict[str, Tensor] = {}  # initial weights of a warm start
        self.start_error: float | None = None
        self._live: list[Tensor] | None = None
        self._restored: list[Tensor] | None = None
        self._end_weights: Tensor | None = None  # the live weights at the end of training

    @property
    def kinds(self) -> list[dict[str, float]]:
        """Decay or relative length of each average."""
        return [{"sigma_rel": length} for length in self.lengths] or [{"decay": self.decay}]

    def betas(self, n: int) -> list[float]:
        """Return the decay of each average at update n = 1, 2, .., counted with the updates before a warm start."""
        return [(1 - 1 / n) ** (g + 1) for g in self.gammas] or [min(self.decay, n / (9 + n)) if n > 1 else 0.0]

    def _parameters(self, module: Diffusion) -> list[Tensor]:
        return list(module.denoiser.parameters())

    def _flat(self) -> Tensor:
        return torch.cat([p.flatten() for p in self.walked]).float()

    def _flat_parameters(self, module: Diffusion) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self._parameters(module)]).float()

    def _holds_end_weights(self, module: Diffusion) -> bool:
        return self._end_weights is not None and torch.equal(self._flat_parameters(module).cpu(), self._end_weights)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a second EMA, and callbacks that change weights at the end of an epoch or a run without its notice."""
        every = [c.kinds for c in trainer.callbacks if isinstance(c, EMA)]
        if len(every) > 1:
            raise InputError(
                f"trainer.callbacks: {len(every)} EMA callbacks, of {' and '.join(map(str, every))}: only one would be "
                "validated and exported. Keep one; for several averages give it lengths: EMA(lengths=[0.05, 0.1])"
            )
        changing = (ModelPruning, StochasticWeightAveraging, WeightAveraging)
        if stage == "fit" and (wrong := [type(c).__name__ for c in trainer.callbacks if isinstance(c, changing)]):
            raise InputError(
                f"trainer.callbacks: {', '.join(wrong)} changes weights without EMA's notice, and EMA's averages are "
                "exported. Leave it out: ema.decay and ema.lengths set the averages"
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        """Start the averages from the current or the restored weights; refuse a folder with another run's snapshots."""
        if self.lengths and not trainer.fast_dev_run:
            there = snapshots_in(Path(trainer.default_root_dir)) if trainer.is_global_zero else {}
            with shared_errors():
                refuse_other_run(trainer, [*there])
        self.walked = [p.detach() for p in self._parameters(pl_module)]  # the tensors that are averaged, in this order
        if self._restored is None:
            self.averages, self.updates, self.before = [self._flat() for _ in self.kinds], 0, pl_module.before
            state = pl_module.denoiser.state_dict() if self.before else {}
            self.start, self.start_error = {name: tensor.detach().clone() for name, tensor in state.items()}, None
        else:
            self.averages, self._restored = [a.to(pl_module.device) for a in self._restored], None

    def on_train_start(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        """Measure the error of a warm start, and delete snapshots newer than the checkpoint that is resumed."""
        self._seen = trainer.global_step
        if self.start and not trainer.global_step and (errors := pl_module.start_errors()):
            self.start_error = fmean(errors)
        if trainer.is_global_zero:
            for file, step in snapshots_in(Path(trainer.default_root_dir)).items():
                if step > self.updates and read_card(file).run in ("", pl_module.run):
                    file.unlink()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Diffusion, *_: Any) -> None:
        """Update the averages once per optimizer step."""
        if trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        self.updates += 1
        live, moved = self._flat(), 1 - pl_module.skipped
        for average, beta in zip(self.averages, self.betas(self.before + self.updates), strict=True):
            average.lerp_(live, (1 - beta) * moved)
        if self.lengths and self.updates % self.snapshot_every == 0:
            self._snapshot(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        """Write the last snapshots."""
        if self.lengths:
            self._snapshot(trainer, pl_module)

    def _snapshot(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:
            folder = Path(trainer.default_root_dir) / AVERAGES
            for i, length in enumerate(self.lengths):
                self.export(folder / snapshot_name(self.updates, length), pl_module, i)

    def _store_end_weights(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        if self.averages and trainer.state.fn == "fit":
            self._end_weights = self._flat_parameters(pl_module).cpu()

    on_fit_end = _store_end_weights

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Load the average into the module during `fit`.

        After `fit` it is loaded as long as the module holds the weights that training ended with.
        """
        if not self.averages or not isinstance(pl_module, Diffusion):
            return
        if trainer.state.fn == "fit" or self._holds_end_weights(pl_module):
            parameters = self._parameters(pl_module)
            self._live = [p.detach().clone() for p in parameters]
            with torch.no_grad():
                torch._foreach_copy_(parameters, list(self.weights(pl_module).values()))

    def on_validation_end(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        """Restore the live weights."""
        if self._live is not None:
            with torch.no_grad():
                torch._foreach_copy_(self._parameters(pl_module), self._live)
            self._live = None

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: L.Trainer, pl_module: Diffusion, exception: BaseException) -> None:
        """Restore the live weights before anything is saved."""
        self.on_validation_end(trainer, pl_module)
        self._store_end_weights(trainer, pl_module)

    def weights(self, module: Diffusion, i: int = 0) -> dict[str, Tensor]:
        """Return average i as tensors by the names of the denoiser's parameters."""
        named = dict(module.denoiser.named_parameters())
        parts = self.averages[i].split([p.numel() for p in named.values()])
        return {name: part.view(p.shape) for (name, p), part in zip(named.items(), parts, strict=True)}

    def state(self, module: Diffusion, i: int = 0) -> dict[str, Tensor]:
        """Return average i with the denoiser's buffers, which are not averaged."""
        return {**module.denoiser.state_dict(), **{k: w.clone() for k, w in self.weights(module, i).items()}}

    def describe(self, i: int = 0, steps: int | None = None) -> dict[str, float]:
        """Return the card's description of average i.

        steps: number of steps averaged, all updates so far if not given.
        """
        continued = {"before": self.before} if self.before else {}
        return self.kinds[i] | {"steps": self.updates if steps is None else steps} | continued

    def export(self, path: Path, module: Diffusion, i: int = 0) -> None:
        """Write average i with its card."""
        module.export(path, self.state(module, i), self.describe(i))

    def measure(self, trainer: L.Trainer, module: Diffusion) -> list[float]:
        """Return the held-out error of the first average at each row owned, measured once per step (collective)."""
        if module.measured[0] != module.images_seen:
            self.on_validation_start(trainer, module)
            try:
                module.measured = module.images_seen, module.held_out()
            finally:
                self.on_validation_end(trainer, module)
        return module.row_errors()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Diffusion, checkpoint: dict[str, Any]) -> None:
        """Store the averages in addition to the live weights."""
        if self.averages:
            first, *others = [self.weights(pl_module, i) for i in range(len(self.averages))]
            checkpoint["ema"] = {"kinds": self.kinds, "step": self.updates, "weights": first, "others": others}
            checkpoint["ema"] |= {"before": self.before, "start": self.start, "start_error": self.start_error}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Diffusion, checkpoint: dict[str, Any]) -> None:
        """Keep the stored averages until the fit starts; raise InputError for averages of another kind."""
        stored = checkpoint.get("ema")
        if trainer.state.fn != "fit":
            return
        if stored is None:
            if trainer.is_global_zero and trainer.ckpt_path:
                step = checkpoint["global_step"]
                print(f"ema: the checkpoint has no averages; they start from its weights, at step {step:,}")
            return
        if stored["kinds"] != self.kinds:
            raise InputError(f"ema: the checkpoint has averages {stored['kinds']}, the config {self.kinds}")
        self.updates, self.before = stored["step"], stored.get("before", 0)  # older checkpoints have no ``before``
        self.start_error = stored.get("start_error")
        self.start = {name: tensor.to(pl_module.device) for name, tensor in stored.get("start", {}).items()}
        kept = (stored["weights"], *stored["others"])
        self._restored = [torch.cat([w.flatten() for w in weights.values()]) for weights in kept]


class Export(L.Callback):
    """Export the averaged weights with their card when training ends.

    The file is ``model.safetensors``, or the one that the module names (``file``). After a warm start the initial
    weights are written instead, with ``weights: start`` in the card, if their held-out error (mean over the rows owned)
    is below that of the average. The card has both errors.

    brought: by a module to a trainer without this callback. The file is then written to the folder of a
        TensorBoardLogger or CSVLogger, which is new for each training; without one to ``trainer.default_root_dir``, or,
        if that is the current folder, as it is by default, not at all. Its path is printed. Otherwise it is always
        ``trainer.default_root_dir``.
    """

    def __init__(self, brought: bool = False) -> None:
        self.brought = brought

    def path(self, trainer: L.Trainer, pl_module: Diffusion) -> Path | None:
        """Return the file, None if there is no folder for it."""
        folder = Path(trainer.default_root_dir)
        if not self.brought:
            return folder / pl_module.file
        own = isinstance(trainer.logger, TensorBoardLogger | CSVLogger)  # others have one folder for all trainings
        folder = Path((trainer.log_dir if own else None) or folder)
        return folder / pl_module.file if folder.resolve() != Path.cwd() else None

    def on_fit_start(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        """Raise InputError for a folder that holds the weights of another run."""
        path = self.path(trainer, pl_module)
        if not trainer.fast_dev_run and path is not None:
            with shared_errors():
                refuse_other_run(trainer, [path] if trainer.is_global_zero and path.exists() else [])

    def on_fit_end(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        """Write the file on rank 0, also when a resumed run finds its training complete."""
        if trainer.interrupted or trainer.fast_dev_run or not trainer.global_step:
            return
        path = self.path(trainer, pl_module)
        if path is None:
            rank_zero_info(
                "no weights are written, since the trainer has neither a folder nor a logger: give it default_root_dir"
            )
            return
        ema = next((c for c in trainer.callbacks if isinstance(c, EMA)), None)
        start = ema.start_error if ema is not None else None
        own = ema.measure(trainer, pl_module) if ema is not None and start is not None else []
        if not trainer.is_global_zero:
            return
        if ema is None:
            pl_module.export(path)
        elif start is None or not own:
            ema.export(path, pl_module)
        else:
            errors = {"start": start, "ema": fmean(own)}
            if kept := not errors["ema"] <= errors["start"]:  # also if the error is NaN
                print(f"{path}: the initial weights are kept: held-out error {start:.4g}, trained {fmean(own):.4g}")
            weights, average = (ema.start, ema.describe(steps=0)) if kept else (ema.state(pl_module), ema.describe())
            pl_module.export(path, weights, average, "start" if kept else "ema", errors)
        if self.brought:
            print(f"weights of step {trainer.global_step:,}: {path}")
