"""The LightningModules: the training step, and the rows of the table that each module trains.

They contain no formula: the table, the loss and the sampler are defined in diffusion/ and sampling/. The EMA weights
of the `EMA` callback are the ones that are validated and exported.
"""

import dataclasses
import itertools
import math
import sys
import time
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import clip_grad_norm_

import lightning_tdisent
from lightning_tdisent.diffusion.objectives import Objective, V
from lightning_tdisent.diffusion.rng import draw_rows, key
from lightning_tdisent.diffusion.spec import SCRIPT, Part, build, changed, filled, identity, spec
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.distributed import all_gather
from lightning_tdisent.errors import InputError, check_number
from lightning_tdisent.lit.checkpoints import load
from lightning_tdisent.lit.inference import DenoiserModule, clean
from lightning_tdisent.lit.preflight import (
    preflight,
    refuse_callbacks,
    refuse_monitors,
    refuse_trainer,
    refuse_unweighted,
)
from lightning_tdisent.lit.resume import options_of, refuse_changes, seed_of
from lightning_tdisent.models.card import Card
from lightning_tdisent.models.expert import rebuilt, save_expert, weights_digest
from lightning_tdisent.models.truncated import signal_note
from lightning_tdisent.models.warm import start_warm
from lightning_tdisent.networks.network import Network
from lightning_tdisent.networks.rebuild import draws
from lightning_tdisent.runs import WEIGHTS
from lightning_tdisent.sampling.denoiser import Denoiser
from lightning_tdisent.sampling.sampler import DDIM, Sampler

FUSED = (torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)  # optimizers with a fused kernel


class Diffusion(Part, DenoiserModule):
    """Train one network for the rows of the table that it owns.

    `Baseline`, `ReducedStates` and `SingleState` differ in the rows they own.

    network: the network, of the shape of the images; it is rebuilt if the states of the rows owned have another shape.
    states: the table of latent states.
    objective: meaning of the network's output and the weight of each row's loss, V if not given.
    sampler: sampler for pictures and metrics during training, DDIM if not given.
    lr: learning rate of AdamW.
    warmup: number of steps over which the learning rate rises linearly.
    decay: schedule of the learning rate after the warm-up, ``constant`` or ``cosine``, which needs trainer.max_steps.
    weight_decay: weight decay of AdamW.
    clip_norm: largest norm of the gradient, to which it is clipped, null for no clipping.
    draw: how to draw the rows of a batch, ``balanced`` over the rows owned or ``iid``.
    label_drop: share of the labels replaced by the null label, for classifier-free guidance.
    warm_start: weights of another run to start from, see `SingleState`.
    """

    names_files = False  # the spec has no digest of the ``warm_start`` file, whose weights have been copied
    file = WEIGHTS  # name of the export in the run folder
    same = ("network", "objective", "fingerprint", "rows", "image_range", "data")  # card fields equal in a resumed run

    def __init__(
        self,
        network: Network,
        states: LatentStates | None = None,
        objective: Objective | None = None,
        sampler: Sampler | None = None,
        lr: float = 1e-3,
        warmup: int = 100,
        decay: Literal["constant", "cosine"] = "constant",
        weight_decay: float = 0.0,
        clip_norm: float | None = 1.0,
        draw: Literal["balanced", "iid"] = "balanced",
        label_drop: float = 0.1,
        warm_start: str | None = None,
    ) -> None:
        super().__init__()
        check_number("model.label_drop", label_drop, most=1)
        if draw not in ("balanced", "iid"):
            raise InputError.of_value("model.draw", draw, "balanced or iid")
        states = states or LatentStates()
        rows = self.owned(states)
        if network.shape == states.image_shape != (shape := states.shape_at(rows[0], network.shape)):
            network = network.of_shape(shape)
        if len(rows) == 1 and network.conditioning is None:
            network = network.time_agnostic()
        if network.classes and states.observation is not None:
            raise InputError(
                f"network.classes: {network.classes}, states.observation: a model is given a class or an observation, "
                "not both: its images would be drawn for another class than that of what they observe. Leave one out"
            )
        self.sampler, self.warm_start = sampler or DDIM(), warm_start
        self.draw, self.label_drop = draw, label_drop
        self._train(Denoiser(network, objective or V(), states, rows), lr, warmup, decay, weight_decay, clip_norm)

    def _train(
        self, denoiser: Any, lr: float, warmup: int, decay: str, weight_decay: float, clip_norm: float | None
    ) -> None:
        """Set the denoiser and the optimizer's options, and reset all counters."""
        lazy = [name for name, p in (*denoiser.named_parameters(), *denoiser.named_buffers()) if is_lazy(p)]
        if lazy:
            raise InputError(
                f"model.network: {', '.join(lazy[:4])}: weights of lazy layers, whose shape is known after a batch "
                "only; use layers that are given their sizes"
            )
        check_number("model.lr", lr, above=True)
        check_number("model.warmup", warmup, whole=True)
        check_number("model.weight_decay", weight_decay)
        if clip_norm is not None:
            check_number("model.clip_norm (null for none)", clip_norm, above=True)
        if decay not in ("constant", "cosine"):
            raise InputError.of_value("model.decay", decay, "constant or cosine")
        self.denoiser = denoiser
        self.lr, self.warmup, self.decay, self.weight_decay, self.clip_norm = lr, warmup, decay, weight_decay, clip_norm
        self.register_buffer("row_choices", torch.tensor(denoiser.rows), persistent=False)
        self.generator, self.skipped, self.gradient_norm = torch.Generator(), torch.zeros(()), torch.zeros(())
        self.images_seen, self.seconds, self.seed = 0, 0.0, 0
        self.initial = ""  # digest of the initial weights if they were random
        self.validation = {"passes": 0, "seconds": 0.0}
        # for an adaptive budget: number of this round, and images seen and seconds at the end of each past round
        self.round, self.rounds = 0, dict[str, dict[str, float]]()
        self.run = ""  # identity of the run, set once its folder is known
        self.parents: list[dict[str, Any]] = []
        self.before = 0  # steps of the average that a warm start continues, 0 when training from scratch
        self.measured: tuple[int, dict[int, float]] = (-1, {})  # images seen, errors of x0_hat by probe row
        self._since: float | None = None

    network = property(lambda self: self.denoiser.network)
    states = property(lambda self: self.denoiser.states)
    objective = property(lambda self: self.denoiser.objective)
    denoiser: Denoiser
    row_choices: Tensor
    _hook: Any = None
    _seeded = False  # whether ``seed`` is the seed of a training
    _first = True  # whether the next batch is the first; only its values are checked on a GPU, to avoid synchronising
    # images seen at the last validation, and ``validation`` before it
    _counted: tuple[int, dict[str, float]] = (-1, {})
    _again: dict[str, float] = {}  # cost of a validation that a resumed training repeats

    def owned(self, states: LatentStates) -> list[int]:
        """Return the rows of the table that this module owns: all of them."""
        return states.rows

    def setup(self, stage: str) -> None:
        """Check the data, the trainer and the weights, and load the weights of ``warm_start`` into a new run."""
        super().setup(stage)
        if stage != "fit":
            return
        seed = self.trainer.strategy.broadcast(torch.initial_seed() & 0xFFFFFFFF)
        again = self._seeded and self.trainer.global_step > 0  # ``fit`` is called again with the same trainer
        self._take_seed(seed_of(self.seed, seed) if again else seed)
        refuse_trainer(self.trainer)
        refuse_monitors(self.trainer, self)
        parameters = list(self.denoiser.parameters())
        if not any(p.requires_grad for p in parameters):
            raise InputError(
                f"model.network: none of its {len(parameters)} weights is trained: requires_grad is False of all, "
                "or there are none. Let some be trained: module.network.requires_grad_(True)"
            )
        if isinstance(self.denoiser, Denoiser):
            refuse_unweighted(self.denoiser)
            if (cls := type(self.denoiser.network)).__module__ == SCRIPT and self.trainer.is_global_zero:
                print(
                    f"note: the class {cls.__name__} is defined in the script that runs, so that no command or other "
                    "program can read its weights; put it into a module, and import it here",
                    file=sys.stderr,
                )
            if self.whole and (note := signal_note(self.denoiser)) and self.trainer.is_global_zero:
                print(f"note: {note}", file=sys.stderr)
        if not (self.warm_start or self.trainer.ckpt_path or self.trainer.global_step):
            self.initial = weights_digest(self.denoiser)
        if self.warm_start and not self.trainer.ckpt_path:
            self.parents = start_warm(self.denoiser, self.warm_start)
            of_start = self.parents[-1]  # it has trained these rows in a share of its steps
            self.before = max(1, round(of_start["steps"] * len(self.rows) / len(of_start["rows"])))

    def configure_callbacks(self) -> list[L.Callback]:
        """Return the callbacks that the trainer lacks: see `brought`.

        Lightning calls this before the `setup` of callbacks, so that unsupported callbacks are refused here.
        """
        if self.trainer.state.fn == "fit":
            refuse_callbacks(self.trainer)
        from lightning_tdisent.lit.callbacks.brought import brought  # imported here because it imports this module

        return brought(self.trainer)

    def on_fit_start(self) -> None:
        """Create the generator of the training noise on the device, and run the preflight."""
        self.generator = torch.Generator(self.device)
        self.skipped = torch.zeros((), device=self.device)
        preflight(self.trainer, self)

    def _take_seed(self, seed: int) -> None:
        """Use this seed for the training noise and the order of the data."""
        self.seed, self._seeded = seed, True
        if self.shards is not None:
            self.shards.run_seed = seed

    def rebuilt(self) -> Denoiser:
        """Return the denoiser rebuilt from its card; raise InputError if it computes another function."""
        return rebuilt(self.denoiser)

    def on_train_start(self) -> None:
        """Start the clock of ``seconds``, which runs during training but not during validation.

        The learning rate and weight decay of the config replace those restored from a checkpoint. (They are equal
        unless the run was branched.) An optimizer that a subclass configures is left unchanged.
        """
        self._since, self._first = time.perf_counter(), True
        for name, counted in self._again.items():
            self.validation[name] -= counted
        self._again = {}
        self._refuse_equal_noise()
        self._note_validation()
        if type(self).configure_optimizers is not Diffusion.configure_optimizers:
            return
        for config in self.trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
                scheduler.base_lrs = [self.lr for _ in scheduler.base_lrs]
                for group, rate in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
                    group["initial_lr"], group["weight_decay"] = self.lr, self.weight_decay
                    group["lr"] = self.lr * rate(scheduler.last_epoch)

    def _refuse_equal_noise(self) -> None:
        """Raise InputError if ranks draw equal noise: they would train on fewer samples than are counted."""
        generator = torch.Generator().manual_seed(key(self.seed, self.trainer.global_rank, 0))
        draws = all_gather(torch.randn(4, generator=generator).tolist())
        same = [r for r, draw in enumerate(draws) if draws.count(draw) > 1]
        if same:
            raise InputError(f"ranks {same} draw the same training noise: each must have a rank number of its own")

    def _note_validation(self) -> None:
        """Print a note if the training will end before its first validation."""
        trainer, every = self.trainer, self.trainer.val_check_batch  # None: validated at intervals of time
        if not trainer.enable_validation or trainer.max_steps < 0 or every is None or not trainer.is_global_zero:
            return
        if epochs := (trainer.check_val_every_n_epoch or 1) - 1:  # epochs before the first one that validates
            every += epochs * trainer.num_training_batches
        first = every / trainer.accumulate_grad_batches
        if trainer.max_steps < first < math.inf:  # infinite for a loader without a length
            print(
                f"note: the first validation would be after {first:,.10g} steps (trainer.val_check_interval, "
                f"trainer.check_val_every_n_epoch), and this training ends after {trainer.max_steps:,}: nothing is "
                "validated or drawn",
                file=sys.stderr,
            )

    def on_validation_start(self) -> None:
        """Stop the clock of training, and start to count the network passes and seconds of validation."""
        self._tick(running=False)
        self._begun, self._passed = time.perf_counter(), 0
        if isinstance(self.denoiser, Denoiser):  # a prior has no network to count
            self._hook = self.denoiser.network.register_forward_pre_hook(self._count)

    def _count(self, network: nn.Module, args: tuple[Any, ...]) -> None:
        self._passed += len(args[0])

    def on_validation_epoch_end(self, prefix: str = "val") -> None:
        """Log the errors, and keep them for other users at the same step."""
        super().on_validation_epoch_end(prefix)
        if prefix == "val" and self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.measured = self.images_seen, dict(zip(self._probe, self.errors[0].tolist(), strict=True))

    def on_validation_end(self) -> None:
        """Add the passes of all ranks and the seconds of this validation to the total, and restart the clock."""
        super().on_validation_end()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self.trainer.state.fn != "fit":
            return
        self._counted = self.images_seen, dict(self.validation)
        passed = torch.tensor(self._passed, device=self.device)
        self.validation["passes"] += int(self.trainer.strategy.reduce(passed, reduce_op="sum"))
        self.validation["seconds"] += time.perf_counter() - self._begun
        if not self.trainer.sanity_checking:
            self._since = time.perf_counter()

    def start_errors(self) -> list[float]:
        """Return the held-out error at each row owned, measured once before the first step (collective)."""
        if self.measured[0] != 0:
            self.measured = 0, self.held_out()
        return self.row_errors()

    def row_errors(self) -> list[float]:
        """Return the last measured errors, one per row owned; other rows have the error of the next probe row."""
        errors = self.measured[1]
        return [errors[next(p for p in errors if p >= s)] for s in self.rows] if errors else []

    def held_out(self) -> dict[int, float]:
        """Return the held-out error of x0_hat at each probe row for the current weights (collective).

        It is measured as in a validation of `fit`, on the same batches. Empty if there are no validation batches.
        """
        trainer = self.trainer
        loader, limit = trainer.val_dataloaders, trainer.limit_val_batches
        if loader is None and trainer.datamodule is not None:
            loader = trainer.datamodule.val_dataloader()
        loader = loader[0] if isinstance(loader, (list, tuple)) and loader else loader
        if loader is None or not limit:
            return {}
        try:
            count = limit if isinstance(limit, int) else int(len(loader) * limit)
        except TypeError:  # a stream without a length, which Lightning reads to its end
            count = None
        counted = self._counted
        running, modes = self._since is not None, {module: module.training for module in self.modules()}
        DenoiserModule.on_validation_epoch_start(self)
        self.on_validation_start()
        self.eval()
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            for i, batch in enumerate(itertools.islice(loader, count)):
                batch = self.on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), 0)
                self.validation_step(trainer.strategy.batch_to_device(batch), i)
        errors = dict(zip(self._probe, self.mean_errors()[0].tolist(), strict=True))
        for module, mode in modes.items():
            module.training = mode
        self.on_validation_end()
        self._counted = counted
        if not running:
            self._since = None
        return errors

    def on_train_end(self) -> None:
        """Stop the clock of training."""
        self.stop_clock()

    def stop_clock(self) -> None:
        """Stop counting seconds of training until the clock is started again."""
        self._tick(running=False)

    def _tick(self, running: bool) -> None:
        now = time.perf_counter()
        if self._since is not None:
            self.seconds += now - self._since
        self._since = now if running and self._since is not None else None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the generators so that the randomness of this step is a function of (seed, rank, step)."""
        step_key = key(self.seed, self.trainer.global_rank, self.trainer.fit_loop.epoch_loop.total_batch_idx)
        self.generator.manual_seed(step_key)
        if self.network_is_random:
            torch.manual_seed(step_key)

    @cached_property
    def network_is_random(self) -> bool:
        """True if the network draws from the global generator: it has dropout, or drew in a trial evaluation."""
        network = self.denoiser.network
        return any(isinstance(m, _DropoutNd) and m.p > 0 for m in network.modules()) or draws(network)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Noise the images of the batch to random rows owned, and return their losses with ids and rows."""
        look = self._first or self.device.type == "cpu"
        self._first = False
        batch = self.known(batch, training=True, look=look)
        x0 = self.components(clean(batch, self.generator, look))
        s = draw_rows(self.row_choices, len(x0), self.generator, self.draw == "balanced")
        eps = torch.randn(x0.shape, generator=self.generator, device=x0.device)
        losses = self.denoiser.loss(x0, s, eps, self.drop_labels(batch["label"]))
        self.images_seen += len(x0) * self.trainer.world_size
        loss = losses.mean()
        # multiplied by 1, or by NaN if not finite: then all gradients, and after the all-reduce all ranks, are NaN
        return {"loss": loss * (loss.detach() * 0 + 1), "losses": losses.detach(), "row": s, "id": batch["id"]}

    def components(self, x0: Tensor) -> Tensor:
        """Return state 0 of images; for a conditional model a new observation is drawn at every step."""
        if self.states.image_shape is None:
            return x0
        if self.states.observation is None:
            return self.denoiser.encode(x0)
        if self.states.observation.anneal:
            self.denoiser.anneal(self.global_step)
        item = torch.randint(1 << 32, (len(x0),), generator=self.generator, device=x0.device)
        return self.denoiser.encode(x0, item)

    def drop_labels(self, label: Tensor) -> Tensor | None:
        """Replace a random share of the labels by the null label; return None for an unconditional network."""
        if self.denoiser.classes is None:
            return None
        drop = torch.rand(len(label), generator=self.generator, device=label.device) < self.label_drop
        return label.masked_fill(drop, self.denoiser.classes)

    def configure_optimizers(self) -> Any:
        """Return AdamW with linear warm-up; fused on CPU and CUDA except under 16-mixed."""
        # under 16-mixed a fused optimizer unscales the gradients itself, after they were clipped
        fused = self.device.type in ("cpu", "cuda") and self.trainer.precision != "16-mixed"
        optimizer = torch.optim.AdamW(
            self.denoiser.parameters(),
            self.lr,
            weight_decay=self.weight_decay,
            fused=fused,
        )
        steps = self.trainer.max_steps
        if self.decay == "cosine" and steps < 1:
            raise InputError("model.decay: cosine needs trainer.max_steps")

        def rate(step: int) -> float:
            warm = min(1.0, (step + 1) / max(1, self.warmup))
            if self.decay == "constant":
                return warm
            return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Clip the norm of all gradients, and skip the step if it is not finite.

        A skipped step changes neither weights nor moments, and the decision does not synchronise the device for a
        fused optimizer. The trainer's clipping options are refused in `setup`. (Lightning's clipping refuses a fused
        optimizer under mixed precision.)
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.gradient_norm = clip_grad_norm_(parameters, math.inf if self.clip_norm is None else self.clip_norm)
        self.skipped = (~self.gradient_norm.isfinite()).float()
        if isinstance(optimizer, FUSED) and optimizer.defaults["fused"]:
            optimizer.found_inf = self.skipped  # as a GradScaler does; the kernel then leaves the weights unchanged
        elif self.skipped:
            self.zero_grad()  # AdamW skips weights without a gradient

    def card(self, weights: str, average: dict[str, float] | None = None) -> Card:
        """Return the card of the current weights."""
        self._tick(running=True)
        return Card.of(
            self.denoiser,
            module=f"{type(self).__module__}.{type(self).__qualname__}",
            data=self.shards.digest if self.shards else "unknown",
            weights=weights,
            average=average,
            images_seen=self.images_seen,
            parents=self.parents,
            steps=self._trainer.global_step if self._trainer else 0,
            seconds=round(self.seconds, 3),
            seed=self.seed,
            version=lightning_tdisent.__version__,
            validation=self.validation | {"seconds": round(self.validation["seconds"], 3)},
            rounds=self._rounds(),
            run=self.run,
            initial=self.initial,
            label_drop=self.label_drop if self.denoiser.classes else None,
        )

    def _rounds(self) -> dict[str, dict[str, float]]:
        if not self.round and not self.rounds:
            return {}
        return self.rounds | {str(self.round): {"images_seen": self.images_seen, "seconds": round(self.seconds, 3)}}

    def export(
        self, path: Path, weights: dict[str, Tensor] | None = None, average: dict[str, float] | None = None,
        kind: str | None = None, errors: dict[str, float] | None = None,
    ) -> None:  # fmt: skip
        """Write weights with their card.

        weights: the live ones if not given. average: the kind of average they are. kind: what the card calls them,
        ``ema`` if weights are given, else ``live``. errors: held-out errors for the card.
        """
        card = self.card(kind or ("live" if weights is None else "ema"), average)
        save_expert(path, self.denoiser, dataclasses.replace(card, errors=errors or {}), weights)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the description of the module to the checkpoint, as plain data that loads with weights_only."""
        checkpoint["module"] = spec(self)
        checkpoint["card"] = dataclasses.asdict(self.card("live"))
        checkpoint["training"] = {"seed": self.seed, **options_of(self.trainer)}
        if self._counted[0] == self.images_seen:  # a resumed training repeats a validation at this step
            checkpoint["validation"] = self._counted[1]
        if self.measured[0] == self.images_seen:
            checkpoint["measured"] = list(self.measured)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters; raise InputError for another table, rows, network, objective, image range or data."""
        if "card" not in checkpoint:
            raise InputError("this checkpoint is none of this project: it has no card")
        mine, theirs = dataclasses.asdict(self.card("live")), checkpoint["card"]
        theirs = dict.fromkeys(self.same) | theirs  # None: the card is of another kind of model
        wrong = [
            k
            for k in self.same
            if identity(filled(mine[k])) != identity(filled(theirs[k])) and "unknown" not in (mine[k], theirs[k])
        ]
        if wrong:
            raise InputError(
                "this checkpoint belongs to another model:\n"
                + "\n".join(
                    [f"  - {k}: the checkpoint has {theirs[k]}, the config {mine[k]}" for k in wrong]
                    + [f"  - {line}" for line in changed([theirs.get(k) for k in ("states", "network", "objective")])]
                )
            )
        if self.trainer.state.fn == "fit" and self.trainer.ckpt_path:
            self._go_on(checkpoint)
        self.images_seen, self.seconds = theirs["images_seen"], theirs["seconds"]
        self.parents, self.run = theirs.get("parents", []), theirs.get("run", "")
        self.initial = theirs.get("initial", "")
        self.validation |= theirs.get("validation") or {}
        self._again = {k: self.validation[k] - v for k, v in checkpoint.get("validation", {}).items()}
        if "measured" in checkpoint:
            self.measured = checkpoint["measured"][0], dict(checkpoint["measured"][1])
        if theirs.get("rounds") or self.round:
            self.rounds = theirs.get("rounds") or {"0": {"images_seen": self.images_seen, "seconds": self.seconds}}
        if self.trainer.state.fn != "fit" and "ema" in checkpoint:  # the averaged weights are evaluated
            average = {f"denoiser.{name}": weight for name, weight in checkpoint["ema"]["weights"].items()}
            checkpoint["state_dict"] = {**checkpoint["state_dict"], **average}

    def _go_on(self, checkpoint: dict[str, Any]) -> None:
        """Use the seed of the resumed training; refuse options, or averages, that differ from the checkpoint's."""
        then = dict(checkpoint.get("training", {}))  # not in older checkpoints
        begun = then.pop("seed", checkpoint["card"].get("seed"))
        if not self.trainer.fast_dev_run:
            refuse_changes({"model": checkpoint["module"], **then}, {"model": spec(self), **options_of(self.trainer)})
        from lightning_tdisent.lit.callbacks.weights import EMA  # imported here because it imports this module

        if "ema" in checkpoint and not any(isinstance(c, EMA) for c in self.trainer.callbacks):
            raise InputError(
                f"ema: the checkpoint has averages {checkpoint['ema']['kinds']}, this trainer no EMA callback, so that "
                "they would be lost. Add lightning_tdisent.lit.callbacks.weights.EMA of these to its callbacks"
            )
        if begun is not None and (seed := seed_of(begun, self.seed)) != self.seed:
            self._take_seed(seed)
            if self.trainer.is_global_zero:
                print(f"seed: none was set by seed_everything, so it is {seed}, with which the training was begun")

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path,
        weights: Literal["ema", "live"] = "ema",
        map_location: torch.device | str = "cpu",
    ) -> Self:
        """Return the module of a checkpoint, built from the class and arguments that the checkpoint names.

        checkpoint_path: a local checkpoint of an instance of ``cls``. weights: ``ema`` (if the checkpoint has averages,
        else the live weights) or ``live``. Raises InputError for any other file.
        """
        checkpoint = load(checkpoint_path)
        if "module" not in checkpoint or "card" not in checkpoint:
            raise InputError(f"{checkpoint_path}: not a checkpoint of this project: it has no card")
        module = build(checkpoint["module"], cls)
        module.load_state_dict(checkpoint["state_dict"])
        if weights == "ema" and "ema" in checkpoint:
            module.denoiser.load_state_dict({**module.denoiser.state_dict(), **checkpoint["ema"]["weights"]})
        module.images_seen, module.seconds = checkpoint["card"]["images_seen"], checkpoint["card"]["seconds"]
        return module.to(map_location)


class Baseline(Diffusion):
    """Train one network for every row of its table, by default all T = 1000 rows of the DDPM schedule."""


class ReducedStates(Diffusion):
    """Train one network for S of the T rows (2508.14413, contribution 1); ``states.S`` must be given and below T."""

    def owned(self, states: LatentStates) -> list[int]:
        """Return all S rows; raise InputError for the full chain."""
        if states.S >= states.schedule.T:
            raise InputError(
                f"ReducedStates trains S < T rows, but the table has all {states.S}. "
                "Set model.states.S, or use Baseline."
            )
        return states.rows


class SingleState(Diffusion):
    """Train one expert: the network of one row, or of one block of rows, of a table that all experts share.

    This is contribution 2 of 2508.14413.

    An expert of one row is time-agnostic unless its network sets ``conditioning: state``: if that is not set, a
    time-agnostic network with the same arguments and new weights is built. With ``warm_start`` the expert starts as an
    exact copy of the shared model at its row, with the time embedding of that row folded into the network, or as a
    copy of the expert of another row. The other arguments are those of `Diffusion`.

    expert: number of this expert, 1..experts.
    experts: number of experts that share the rows 1..S in contiguous blocks, S (one row each) if not given.
    rows: the rows that the expert owns, in ascending order, instead of ``expert`` and ``experts``.
    """

    def __init__(
        self,
        network: Network,
        states: LatentStates,
        expert: int = 1,
        experts: int | None = None,
        rows: list[int] | None = None,
        **kwargs: Any,
    ):
        if experts is not None:
            check_number("model.experts", experts, 1, whole=True)
        check_number("model.expert", expert, 1, whole=True)
        self.expert, self.experts, self.chosen = expert, experts, rows
        super().__init__(network, states, **kwargs)

    def owned(self, states: LatentStates) -> list[int]:
        """Return the block of rows of this expert, or the rows it was given."""
        if self.chosen is not None:
            if self.chosen != sorted({*self.chosen} & {*states.rows}) or not self.chosen:
                raise InputError(f"model.rows: {self.chosen} must be ascending rows of 1..{states.S}")
            return self.chosen
        blocks = states.blocks(self.experts or states.S)
        if not 1 <= self.expert <= len(blocks):
            raise InputError(f"model.expert: {self.expert} is not among the {len(blocks)} experts 1..{len(blocks)}")
        return blocks[self.expert - 1]
