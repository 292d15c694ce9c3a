"""The LightningModules: one training step, and who owns which rows.

None of them holds a formula: the table, the loss and the sampler live below. EMA weights, kept by the `EMA` callback,
are what is validated and exported.
"""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any, Literal, Self

import lightning.pytorch as L
import torch
from torch import Tensor

import lightning_tdisent
from lightning_tdisent.diffusion.objectives import Objective, V
from lightning_tdisent.diffusion.rng import draw_rows, key
from lightning_tdisent.diffusion.spec import Part, build, spec
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError
from lightning_tdisent.networks.network import Network
from lightning_tdisent.sampling.composite import CompositeDenoiser, load_model
from lightning_tdisent.sampling.denoiser import Denoiser
from lightning_tdisent.sampling.evaluation import x0_errors
from lightning_tdisent.sampling.expert import Card
from lightning_tdisent.sampling.sampler import DDIM, Sampler, from_uint8, probe_rows, to_uint8


class DenoiserModule(L.LightningModule):
    """What every module does with a finished denoiser: held-out errors per row, images from seeds."""

    denoiser: Denoiser | CompositeDenoiser
    sampler: Sampler

    @property
    def rows(self) -> list[int]:
        """Rows this module answers for."""
        return self.denoiser.rows if isinstance(self.denoiser, Denoiser) else self.denoiser.states.rows

    @property
    def whole(self) -> bool:
        """Whether it owns every row, so that images can be sampled from it alone."""
        return self.rows == self.denoiser.states.rows

    def setup(self, stage: str) -> None:
        """Refuse data of another shape or with other classes, before anything is spent."""
        data = getattr(self.trainer, "datamodule", None)
        shape = getattr(data, "image_shape", None)
        if shape is not None and shape != self.denoiser.shape:
            raise InputError(
                f"model.network.shape is {self.denoiser.shape}, the images of data.path {data.path} have {shape}. "
                "Set the network's shape to that of the data."
            )
        labels = data.held_out.labels if shape is not None else None
        if labels is not None and self.denoiser.classes is not None:
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.denoiser.classes:
                raise InputError(
                    f"model.network.classes is {self.denoiser.classes}, but labels of {data.path} run from {low} to "
                    f"{high} (-1: none)"
                )

    def on_validation_epoch_start(self) -> None:
        """Start sums of errors over the probe rows."""
        self._probe = probe_rows(self.rows)
        self._sums = torch.zeros(len(self._probe) + 1, dtype=torch.float64)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Error of x0_hat at the probe rows, on noise keyed by image and row."""
        label = batch["label"] if self.denoiser.classes else None
        errors = x0_errors(self.denoiser, batch["image"], batch["id"].tolist(), self._probe, label)
        self._sums += torch.cat([errors.sum(1), torch.tensor([errors.shape[1]])])

    def on_validation_epoch_end(self, prefix: str = "val") -> None:
        """Log eps-MSE and x0-MSE per probe row, exact over all ranks (the mean of equal values is what it was)."""
        sums = self.trainer.strategy.reduce(self._sums.to(self.device), reduce_op="sum").cpu()
        x0 = sums[:-1] / sums[-1]
        eps = x0 * self.denoiser.states.log_snr[self._probe].exp().mean(1).cpu()
        for s, x0_mse, eps_mse in zip(self._probe, x0.tolist(), eps.tolist(), strict=True):
            t = int(self.denoiser.states.index[s])
            self.log_dict({f"{prefix}_x0_mse/t{t:04d}": x0_mse, f"{prefix}_eps_mse/t{t:04d}": eps_mse}, sync_dist=True)
        self.log(f"{prefix}/eps_mse", float(eps.mean()), prog_bar=True, sync_dist=True)
        self.log(f"{prefix}/x0_mse", float(x0.mean()), sync_dist=True)

    on_test_epoch_start, test_step = on_validation_epoch_start, validation_step

    def on_test_epoch_end(self) -> None:
        """As in validation."""
        self.on_validation_epoch_end("test")

    def predict_step(self, batch: list[int], batch_idx: int) -> Tensor:
        """Images of a list of seeds, uint8 (B, C, H, W)."""
        if not self.whole:
            raise InputError(f"this model owns rows {self.rows} only; compose it with the other experts to sample")
        return to_uint8(self.sampler(self.denoiser, batch))


class Diffusion(Part, DenoiserModule):
    """Trains one network for the rows it owns; `Baseline`, `ReducedStates` and `SingleState` differ in the rows.

    network: the network; states: the table; objective: meaning of the output, V if not given; sampler: for pictures
    and metrics during training, DDIM if not given; lr, warmup, decay: AdamW's rate, its linear warm-up in steps, and
    its course after that (``cosine`` needs trainer.max_steps); weight_decay; clip_norm: bound of the gradient's norm,
    null for none; draw: rows of a batch ``balanced`` over the rows owned or ``iid``; label_drop: share of labels
    replaced by the null label; warm_start: weights of another run to start from, see `SingleState`.
    """

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
        states = states or LatentStates()
        rows = self.owned(states)
        if len(rows) == 1 and network.conditioning is None:
            network = network.time_agnostic()
        self.denoiser = Denoiser(network, objective or V(), states, rows)
        self.sampler, self.warm_start = sampler or DDIM(), warm_start
        self.lr, self.warmup, self.decay, self.weight_decay = lr, warmup, decay, weight_decay
        self.clip_norm, self.draw, self.label_drop = clip_norm, draw, label_drop
        self.register_buffer("row_choices", torch.tensor(rows), persistent=False)
        self.generator = torch.Generator()
        self.images_seen, self.seconds, self.seed = 0, 0.0, 0
        self._since: float | None = None

    network = property(lambda self: self.denoiser.network)
    states = property(lambda self: self.denoiser.states)
    objective = property(lambda self: self.denoiser.objective)
    denoiser: Denoiser
    row_choices: Tensor

    def owned(self, states: LatentStates) -> list[int]:
        """Rows of the table that this module owns."""
        return states.rows

    def setup(self, stage: str) -> None:
        """Check the data, and take the weights of ``warm_start`` for a new run."""
        super().setup(stage)
        if stage == "fit" and self.warm_start and not self.trainer.ckpt_path:
            start_warm(self.denoiser, self.warm_start)

    def on_fit_start(self) -> None:
        """Put the generator of the training noise on the device."""
        self.generator = torch.Generator(self.device)
        self.seed = torch.initial_seed() & 0xFFFFFFFF

    def on_train_start(self) -> None:
        """Start the clock of ``seconds``, which runs while training, not while validating."""
        self._since = time.perf_counter()

    def on_validation_start(self) -> None:
        """Stop the clock."""
        self._tick(running=False)

    def on_validation_end(self) -> None:
        """Start it again."""
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._since = time.perf_counter()

    def on_train_end(self) -> None:
        """Stop the clock."""
        self._tick(running=False)

    def _tick(self, running: bool) -> None:
        now = time.perf_counter()
        if self._since is not None:
            self.seconds += now - self._since
        self._since = now if running and self._since is not None else None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make this step's randomness a function of (seed, rank, step)."""
        step_key = key(self.seed, self.trainer.global_rank, self.trainer.fit_loop.epoch_loop.total_batch_idx)
        self.generator.manual_seed(step_key)
        if self.network_is_random:
            torch.manual_seed(step_key)

    @property
    def network_is_random(self) -> bool:
        """Whether the network draws from the global generator (dropout)."""
        return bool(getattr(self.denoiser.network, "dropout", 0.0))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Noise the batch to rows owned, and take the loss of each image."""
        x0 = from_uint8(batch["image"])
        s = draw_rows(self.row_choices, len(x0), self.generator, self.draw == "balanced")
        eps = torch.randn(x0.shape, generator=self.generator, device=x0.device)
        losses = self.denoiser.loss(x0, s, eps, self.drop_labels(batch["label"]))
        self.images_seen += len(x0) * self.trainer.world_size
        return {"loss": losses.mean(), "losses": losses.detach(), "row": s}

    def drop_labels(self, label: Tensor) -> Tensor | None:
        """Replace a share of the labels by the null label; None for an unconditional network."""
        if self.denoiser.classes is None:
            return None
        drop = torch.rand(len(label), generator=self.generator, device=label.device) < self.label_drop
        return label.masked_fill(drop, self.denoiser.classes)

    def configure_optimizers(self) -> Any:
        """AdamW with linear warm-up; fused where the device has it."""
        optimizer = torch.optim.AdamW(
            self.denoiser.parameters(),
            self.lr,
            weight_decay=self.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
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
        """Clip by norm here: Lightning's own clipping refuses a fused optimizer under mixed precision."""
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], self.clip_norm)

    def card(self, weights: str, ema_decay: float | None = None) -> Card:
        """Card of the present weights."""
        self._tick(running=True)
        data = getattr(self._trainer, "datamodule", None) if self._trainer else None
        return Card.of(
            self.denoiser,
            module=f"{type(self).__module__}.{type(self).__qualname__}",
            data=getattr(data, "digest", "unknown"),
            weights=weights,
            ema_decay=ema_decay,
            images_seen=self.images_seen,
            steps=self._trainer.global_step if self._trainer else 0,
            seconds=round(self.seconds, 3),
            seed=self.seed,
            version=lightning_tdisent.__version__,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the checkpoint say what it holds, in plain data that loads with weights_only."""
        checkpoint["module"] = spec(self)
        checkpoint["card"] = dataclasses.asdict(self.card("live"))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the counts, refusing a checkpoint of another table, row or network."""
        mine, theirs = dataclasses.asdict(self.card("live")), checkpoint["card"]
        wrong = [k for k in ("network", "objective", "fingerprint", "rows") if mine[k] != theirs[k]]
        if wrong:
            raise InputError(
                "this checkpoint belongs to another model:\n"
                + "\n".join(f"  - {k}: the checkpoint has {theirs[k]}, the config {mine[k]}" for k in wrong)
            )
        self.images_seen, self.seconds = theirs["images_seen"], theirs["seconds"]

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, weights: Literal["ema", "live"] = "ema") -> Self:
        """Return the module that the checkpoint names, which must be a ``cls``, with its EMA weights if it has any."""
        checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
        if "module" not in checkpoint:
            raise InputError(f"{checkpoint_path}: not a checkpoint of this project")
        module = build(checkpoint["module"], cls)
        module.load_state_dict(checkpoint["state_dict"])
        if weights == "ema" and "ema" in checkpoint:
            module.denoiser.load_state_dict({**module.denoiser.state_dict(), **checkpoint["ema"]["weights"]})
        module.images_seen, module.seconds = checkpoint["card"]["images_seen"], checkpoint["card"]["seconds"]
        return module


class Baseline(Diffusion):
    """One network for every row of its table: by default all T = 1000 rows of the DDPM schedule."""


class ReducedStates(Diffusion):
    """One network for S of the T rows (2508.14413, contribution 1); ``states.S`` must be given and below T."""

    def owned(self, states: LatentStates) -> list[int]:
        """All S rows; refuses the full chain."""
        if states.S >= states.schedule.T:
            raise InputError(
                f"ReducedStates trains S < T rows, but the table has all {states.S}. "
                "Set model.states.S, or use Baseline."
            )
        return states.rows


class SingleState(Diffusion):
    """One expert: one row, or one block of rows, of a table shared by all (2508.14413, contribution 2).

    expert: which one, 1..experts; experts: how many share the rows 1..S in contiguous blocks, S (one row each) if not
    given. An expert of one row is time-agnostic unless its network says ``conditioning: state``. With warm_start it
    begins as the shared model at its row, exactly: the time embedding of that row is folded into the network.
    """

    def __init__(
        self, network: Network, states: LatentStates, expert: int = 1, experts: int | None = None, **kwargs: Any
    ):
        self.expert, self.experts = expert, experts
        super().__init__(network, states, **kwargs)

    def owned(self, states: LatentStates) -> list[int]:
        """The block of this expert."""
        blocks = states.blocks(self.experts or states.S)
        if not 1 <= self.expert <= len(blocks):
            raise InputError(f"model.expert: {self.expert} is not among the {len(blocks)} experts 1..{len(blocks)}")
        return blocks[self.expert - 1]


class Composite(DenoiserModule):
    """Experts behind one denoiser, for validate, test and predict; it has nothing to train.

    path: a composite folder, a folder of experts' runs, or one file that owns all rows; sampler: DDIM if not given.
    """

    def __init__(self, path: str, sampler: Sampler | None = None) -> None:
        super().__init__()
        self.path, self.sampler = path, sampler or DDIM()
        self.denoiser, self.cards = load_model(path)

    def configure_optimizers(self) -> None:
        """Refuse to train."""
        raise InputError("a composite is not trained: fit its experts one by one (SingleState), then compose them")

    def training_step(self, *_: Any) -> None:
        """Never reached: see `configure_optimizers`."""


def start_warm(denoiser: Denoiser, source: str) -> None:
    """Give a denoiser the weights of another run whose table has its rows at the same values.

    A network that sees the state takes them as they are; a time-agnostic one takes those of the source at its row,
    with the time embedding folded in, so that both say the same there.
    """
    shared = load_model(source)[0]
    here, there = denoiser.states, shared.states
    row_there = {t: s for s, t in enumerate(there.index.tolist())}
    indices = {s: int(here.index[s]) for s in denoiser.rows}
    missing = [t for t in indices.values() if t not in row_there]
    if missing or not isinstance(shared, Denoiser):
        raise InputError(f"warm_start: {source} must be one network that has indices {list(indices.values())}")
    if not all(torch.allclose(here.log_snr[s], there.log_snr[row_there[t]]) for s, t in indices.items()):
        raise InputError(
            f"warm_start: {source} was trained with other noise levels at indices {list(indices.values())}"
        )
    if type(shared.objective) is not type(denoiser.objective):
        raise InputError(
            f"warm_start: {source} predicts {shared.objective.prediction}, this model {denoiser.objective.prediction}"
        )
    network = shared.network
    if network.sees_state and not denoiser.network.sees_state:
        network = network.at_index(indices[denoiser.rows[0]])
    if spec(network)["init_args"] | {"conditioning": 0} != spec(denoiser.network)["init_args"] | {"conditioning": 0}:
        raise InputError(f"warm_start: {source} holds another network: {spec(network)} is not {spec(denoiser.network)}")
    denoiser.network.load_state_dict(network.state_dict())
