"""Training of a learned prior: a run like any other, which exports a prior instead of a model."""

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
from lightning_tdisent.models.model_prior import FITTING
from lightning_tdisent.models.prior_files import PriorCard, rebuilt_prior, save_prior
from lightning_tdisent.priors.prior import Prior
from lightning_tdisent.runs import PRIOR
from lightning_tdisent.sampling.errors_by_row import HELD_OUT

UNITS = {"nll": 1.0, "bits": math.log(2)}  # units of -log p per value, in nats
FIRST = 512  # number of images that a prior is initialised with


class PriorAt(nn.Module):
    """Prior of the states at one row of a table, with the attributes and methods of a denoiser that training uses.

    prior: the prior. states: the table, which is truncated so that ``at`` is its last row. at: the row (int), or a
    share of the rows (float up to 1.0).
    """

    classes = None

    def __init__(self, prior: Prior, states: LatentStates, at: int | float) -> None:
        super().__init__()
        self.prior, self.states = prior, states.truncate(at)
        self.rows = [self.states.S]

    @property
    def shape(self) -> list[int]:
        """Shape (C, H, W) of a state."""
        return list(self.prior.shape or [])

    @property
    def index(self) -> int:
        """Index of the row in the full chain."""
        return int(self.states.index[-1])

    def states_of(self, x0: Tensor, eps: Tensor) -> Tensor:
        """Return the states x = a x0 + b eps at the row."""
        return noise(self.states, x0, self.rows[0], eps)

    def loss(self, x0: Tensor, s: Tensor, eps: Tensor, label: Tensor | None = None) -> Tensor:
        """Return -log p(x)/D of x = a x0 + b eps in nats per value, float32 (B,); 2206.05173 minimises its mean."""
        return (-self.prior.log_prob(self.states_of(x0, eps)) / self.prior.size).float()


class PriorModule(Diffusion):
    """Train a prior of the states at one row, from which sampling can start (2206.05173).

    Validation logs -log p of held-out states, ``nll`` in nats and ``bits`` in bits per value. The run exports
    ``prior.safetensors``, which `models.prior_files.load_prior` reads.

    prior: a learned prior such as `Flow`; it takes the shape of the data if it has none.
    states: the table of the model that will start from the prior.
    at: the row (an integer), or a share of the rows (a float up to 1.0).
    lr: learning rate of AdamW.
    warmup: number of steps over which the learning rate rises linearly.
    decay: schedule of the learning rate after the warm-up, ``constant`` or ``cosine``, which needs trainer.max_steps.
    weight_decay: weight decay of AdamW.
    clip_norm: largest norm of the gradient, to which it is clipped, null for no clipping.
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
        """Set the prior's shape to that of the data, or refuse another shape; initialise the prior of a new run."""
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
            images = data.images(data.train, FIRST)  # the same on all ranks
            x0 = clean(images.batch(torch.arange(len(images)))).to(self.device)
            eps = seed_noise(range(len(x0)), FITTING + self.denoiser.index, x0.shape[1:]).to(x0)
            self.prior.initialise(self.denoiser.states_of(x0, eps))

    def rebuilt(self) -> PriorAt:
        """Return the prior as it would be loaded from its file; see `rebuilt_prior`."""
        return PriorAt(rebuilt_prior(self.prior), self.table, self.at)

    def on_validation_epoch_start(self) -> None:
        """Reset the sum of -log p."""
        self._sums = torch.zeros(2, dtype=torch.float64)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add up -log p of the held-out states, on noise keyed by image and row."""
        x0 = clean(batch)
        eps = seed_noise(batch["id"].tolist(), HELD_OUT + self.denoiser.index, x0.shape[1:]).to(x0)
        total = -self.prior.log_prob(self.denoiser.states_of(x0, eps)).sum() / self.prior.size
        self._sums += torch.tensor([float(total), len(x0)], dtype=torch.float64)

    def on_validation_epoch_end(self, prefix: str = "val") -> None:
        """Log the mean of -log p, exact over all ranks."""
        total, n = self.trainer.strategy.reduce(self._sums.to(self.device), reduce_op="sum").tolist()
        self.publish({f"{prefix}/{name}": total / n / unit for name, unit in UNITS.items()})

    def validated(self) -> list[str]:
        """Return the names of the metrics that a validation logs."""
        return [f"val/{name}" for name in UNITS]

    on_test_epoch_start, test_step = on_validation_epoch_start, validation_step

    def predict_step(self, batch: list[int], batch_idx: int) -> Tensor:
        """Raise InputError: a prior makes states, not images."""
        raise InputError("a prior makes states to start from, no images: sample a model that is cut off at its row")

    def card(self, weights: str, average: dict[str, float] | None = None) -> PriorCard:
        """Return the card of the current weights."""
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
        """Write the prior and its card.

        weights: an average of its weights, the live ones if not given. average: the kind of average they are.
        """
        prior, state = copy.deepcopy(self.prior), self.denoiser.state_dict() if weights is None else weights
        prior.load_state_dict({name.removeprefix("prior."): tensor for name, tensor in state.items()})
        save_prior(path, prior, self.card("live" if weights is None else "ema", average))
