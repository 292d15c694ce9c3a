"""Helpers of the training tests: recording callbacks, and callbacks that inject faults."""

import copy
from itertools import pairwise

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import Logger

from lightning_tdisent.images import from_uint8
from lightning_tdisent.lit.callbacks.weights import EMA
from lightning_tdisent.lit.modules import ReducedStates


def vector(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def same(one, other):
    """Return whether nested tensors are equal and of the same dtypes; NaN is not equal to NaN."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one.dtype == other.dtype and torch.equal(one, other)


def adam(trainer):
    """Return AdamW's step count and moments; before the first step they are zero, or do not exist yet."""
    (optimizer,) = trainer.optimizers
    parameters = optimizer.param_groups[0]["params"]
    states = [optimizer.state.get(p, {}) for p in parameters]
    return {
        "step": torch.stack([torch.as_tensor(s.get("step", 0.0)) for s in states]),
        **{k: vector(s.get(k, torch.zeros_like(p)) for s, p in zip(states, parameters, strict=True)) for k in MOMENTS},
    }


MOMENTS = ("exp_avg", "exp_avg_sq")


class Watch(L.Callback):
    """Record everything that training changes, before each batch and at the end, and the batches."""

    def __init__(self):
        self.live, self.adam, self.averages = [], [], []
        self.batches, self.rows, self.losses, self.ids = [], [], [], []

    def _look(self, trainer, pl_module):
        self.live.append(vector(pl_module.denoiser.parameters()).clone())
        self.adam.append(adam(trainer))
        self.averages.append([a.clone() for c in trainer.callbacks if isinstance(c, EMA) for a in c.averages])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._look(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append(copy.deepcopy(batch))
        self.rows.append(outputs["row"].clone())
        self.losses.append(outputs["losses"].clone())
        self.ids.append(batch["id"].tolist())

    def on_train_end(self, trainer, pl_module):
        self._look(trainer, pl_module)

    def moved(self):
        """Return for each batch whether it changed the live weights."""
        return [not same(a, b) for a, b in pairwise(self.live)]

    def frozen(self, n):
        """Return whether batch n (1, 2, ..) changed nothing."""
        return all(same(kept[n - 1], kept[n]) for kept in (self.live, self.adam, self.averages))

    def named(self, n, positions):
        """Return the samples of batch n in the words of the guard."""
        rows = self.rows[n - 1].tolist()
        return ", ".join(f"{self.ids[n - 1][i]} (state {rows[i]})" for i in positions)


class Explode(torch.autograd.Function):
    """The identity function with an infinite gradient for one sample."""

    @staticmethod
    def forward(ctx, x, position):
        ctx.position = position
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient[ctx.position] = float("inf")
        return gradient, None


class Poison(L.Callback):
    """Inject a value that is not finite at some steps.

    It is put into the image of a sample, its loss (by a constant) or its gradient, or into the gradient of a weight.
    """

    def __init__(self, steps, kind="image", position=5, micro=0, rank=0):
        self.steps, self.kind, self.position, self.micro, self.rank = steps, kind, position, micro, rank
        self.gradients, self.hooks = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        denoiser = pl_module.denoiser
        vars(denoiser).pop("loss", None)
        while self.hooks:
            self.hooks.pop().remove()
        here = (trainer.global_step + 1, batch_idx % trainer.accumulate_grad_batches, trainer.global_rank)
        if here not in [(step, self.micro, self.rank) for step in self.steps]:
            return
        if self.kind == "image":
            batch["x0"] = from_uint8(batch["image"])
            batch["x0"][self.position, 0, 3, 4] = float("nan")
            return
        if self.kind == "weight":
            first = next(denoiser.parameters())
            infinite = torch.zeros_like(first).index_fill_(0, torch.tensor([2]), float("inf"))
            self.hooks.append(first.register_hook(lambda gradient: gradient + infinite))
            return
        clean = denoiser.loss

        def loss(*args):
            if self.kind == "gradient":
                return Explode.apply(clean(*args), self.position)
            added = torch.zeros(len(args[0]))
            added[self.position] = float(self.kind)
            losses = clean(*args) + added
            own = torch.autograd.grad(losses.mean(), list(denoiser.parameters()), retain_graph=True)
            self.gradients.append(vector(own))
            return losses

        denoiser.loss = loss


class Unfused(ReducedStates):
    """A module with AdamW as on a device without a fused kernel."""

    def configure_optimizers(self):
        optimizers, schedulers = super().configure_optimizers()
        assert optimizers[0].defaults["fused"]
        group = optimizers[0].param_groups[0]
        plain = torch.optim.AdamW(group["params"], self.lr, weight_decay=self.weight_decay, fused=False)
        rate = schedulers[0]["scheduler"].lr_lambdas[0]
        schedulers[0]["scheduler"] = torch.optim.lr_scheduler.LambdaLR(plain, rate)
        return [plain], schedulers


class Memory(Logger):
    """A logger that keeps the logged values by images seen."""

    name, version = "memory", 0

    def __init__(self):
        super().__init__()
        self.values = {}

    def log_metrics(self, metrics, step=None):
        self.values.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, *_, **__):
        pass
