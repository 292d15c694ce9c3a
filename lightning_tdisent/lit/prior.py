"""Training of a prior that is learned: a run like any other, whose export is a prior instead of a model."""

import copy
import math
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_tdisent.diffusion.process import noise
from lightning_tdisent.diffusion.rng import seed_noise
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError
from lightning_tdisent.lit.inference import DenoiserModule, clean
from lightning_tdisent.lit.modules import Diffusion
from lightning_tdisent.models.start import FITTING, PriorCard, rebuilt_prior, save_prior
from lightning_tdisent.priors.prior import Prior
from lightning_tdisent.runs import PRIOR
from lightning_tdisent.sampling.errors_by_row import HELD_OUT

UNITS = {"nll": 1.0, "bits": math.log(2)}  # of -log p per value, in nats
FIRST = 512  # images that a prior is initialised with


class PriorAt(nn.Module):
    """A prior at the last row of a table that is cut off there, with what a training asks of a denoiser."""

    classes = None

    def __init__(self, prior: Prior, states: LatentStates, at: int | float) -> None:
        super().__init__()
        self.prior, self.states = prior, states.truncate(at)
        self.rows = [self.states.S]

    @property
    def shape(self) -> list[int]:
        """(C, H, W) of x."""
        return list(self.prior.shape or [])

    @property
    def index(self) -> int:
        """Original index of the row."""
        return int(self.states.index[-1])

    def states_of(self, x0: Tensor, eps: Tensor) -> Tensor:
        """x = a x0 + b eps at the row."""
        return noise(self.states, x0, self.rows[0], eps)

    def loss(self, x0: Tensor, s: Tensor, eps: Tensor, label: Tensor | None = None) -> Tensor:
        """-log p(x)/D of x = a x0 + b eps in nats per value, float32 (B,): its mean is what 2206.05173 minimises."""
        return (-self.prior.log_prob(self.states_of(x0, eps)) / self.prior.size).float()


class PriorModule(Diffusion):
    """Trains a learned prior of the states at one row, to start sampling from there (2206.05173).

    prior: e.g. `Flow`, of the data's shape where it has none; states: the table of the model that will start from it;
    at: the row, or a share of the rows; the others as in `Diffusion`. Validated is -log p of held-out states, ``nll``
    in nats and ``bits`` in bits per value. The run leaves ``prior.safetensors`` for `sampling.start.load_prior`.
    """

    file = PRIOR
    same = ("prior", "fingerprint", "row", "data")
    whole = False
    network_is_random = False

    def __init__(
        self,
        prior: Prior,
        states: LatentStates,
        at: int | float,
        lr: float = 1e-3,
        warmup: int = 100,
        decay: Literal["constant", "cosine"] = "constant",
        weight_decay: float = 0.0,
        clip_norm: float | None = 1.0,
    ) -> None:
        DenoiserModule.__init__(self)
        name = type(prior).__name__
        if not prior.learned:
            raise InputError(f"model.prior: {name} is not trained but fitted at once: use the command prior")
        if states.K > 1:
            raise InputError(f"priors are fitted at rows of tables of one column, this one has {states.K}")
        self.table, self.at = states, at
        self.draw, self.label_drop, self.warm_start = "balanced", 0.0, None
        self._train(PriorAt(prior, states, at), lr, warmup, decay, weight_decay, clip_norm)

    denoiser: PriorAt
    prior = property(lambda self: self.denoiser.prior)
    states = property(lambda self: self.table)
    rows = property(lambda self: self.denoiser.rows)

    def setup(self, stage: str) -> None:
        """Give the prior the data's shape, or refuse another, and initialise that of a new run by the data."""
        data = self.needed_shards("PriorModule")
        shape = data.image_shape
        if self.prior.shape is None:
            self.prior.build(shape)
        if shape != self.denoiser.shape:
            raise InputError(
                f"model.prior.shape is {self.denoiser.shape}, the images of data.path {data.path} have {shape}. Leave "
                "it out, or set it to that of the data."
            )
        super().setup(stage)
        if stage == "fit" and not self.trainer.ckpt_path:
            images = data.images(data.train, FIRST)  # on all ranks the same
            x0 = clean(images.batch(torch.arange(len(images)))).to(self.device)
            eps = seed_noise(range(len(x0)), FITTING + self.denoiser.index, x0.shape[1:]).to(x0)
            self.prior.initialise(self.denoiser.states_of(x0, eps))

    def rebuilt(self) -> PriorAt:
        """The prior that a file of this one would give back; see `rebuilt_prior`."""
        return PriorAt(rebuilt_prior(self.prior), self.table, self.at)

    def on_validation_epoch_start(self) -> None:
        """Start the sum."""
        self._sums = torch.zeros(2, dtype=torch.float64)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """-log p of the held-out states, on noise keyed by image and row."""
        x0 = clean(batch)
        eps = seed_noise(batch["id"].tolist(), HELD_OUT + self.denoiser.index, x0.shape[1:]).to(x0)
        total = -self.prior.log_prob(self.denoiser.states_of(x0, eps)).sum() / self.prior.size
        self._sums += torch.tensor([float(total), len(x0)], dtype=torch.float64)

    def on_validation_epoch_end(self, prefix: str = "val") -> None:
        """Log its mean, exact over all ranks."""
        total, n = self.trainer.strategy.reduce(self._sums.to(self.device), reduce_op="sum").tolist()
        self.publish({f"{prefix}/{name}": total / n / unit for name, unit in UNITS.items()})

    def validated(self) -> list[str]:
        """Return the names of the numbers that a validation logs."""
        return [f"val/{name}" for name in UNITS]

    on_test_epoch_start, test_step = on_validation_epoch_start, validation_step

    def predict_step(self, batch: list[int], batch_idx: int) -> Tensor:
        """Refuse: these are no images."""
        raise InputError("a prior makes states to start from, no images: sample a model that is cut off at its row")

    def card(self, weights: str, average: dict[str, float] | None = None) -> PriorCard:
        """Card of the present weights."""
        self._tick(running=True)
        data = self.shards
        kind = "".join(f", {name} {value:g}" for name, value in (average or {}).items())
        return PriorCard.of(
            self.prior,
            self.states,
            self.rows[0],
            data=data.digest if data else "unknown",
            n=len(data.shards) if data else 0,
            images_seen=self.images_seen,
            steps=self._trainer.global_step if self._trainer else 0,
            seconds=round(self.seconds, 3),
            notes=[f"weights: {weights}{kind}"],
            run=self.run,
        )

    def export(
        self, path: Path, weights: dict[str, Tensor] | None = None, average: dict[str, float] | None = None
    ) -> None:
        """Write the prior, with an average of its weights where one is given, and its card."""
        prior, state = copy.deepcopy(self.prior), self.denoiser.state_dict() if weights is None else weights
        prior.load_state_dict({name.removeprefix("prior."): tensor for name, tensor in state.items()})
        save_prior(path, prior, self.card("live" if weights is None else "ema", average))
