"""Co-training: train several experts on one device in one process, each with the result of training it alone.

Every fit is an unchanged command line in its own thread. The threads take turns: exactly one runs at any time, and it
hands over to the next at each batch. Therefore each trainer, its callbacks, checkpoints and curves are bit for bit
those of training alone, while equal data modules read and decode their data only once.

With ``stacked``, the losses and gradients of a step are computed in one call for all experts of one configuration,
that is with equal network, objective, table and precision (`networks.stacked`). Each expert then keeps its weights,
gradients and moments in one vector, so that clipping and AdamW take a few operations instead of a few per layer. The
order of summation differs, and with it the last bits of the results; ``stacked.json`` in the run folder records this.
"""

import json
import random
import signal
import sys
import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from torch import Tensor, nn

from lightning_tdisent.diffusion.spec import spec
from lightning_tdisent.errors import InputError
from lightning_tdisent.files import write_whole
from lightning_tdisent.lit.callbacks.checkpoint import STATUS, Checkpoint, Preempted, heeded
from lightning_tdisent.lit.callbacks.progress import StepProgress
from lightning_tdisent.lit.callbacks.weights import EMA
from lightning_tdisent.lit.entry import run
from lightning_tdisent.lit.modules import Diffusion
from lightning_tdisent.lit.shared import Shared
from lightning_tdisent.networks.stacked import obstacle, stack
from lightning_tdisent.sampling.denoiser import Denoiser

RECORD = "stacked.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]


def together(
    argvs: Sequence[Sequence[str]], callbacks: Sequence[Sequence[L.Callback]] | None = None, stacked: bool = False
) -> list[BaseException | None]:
    """Run several ``fit`` command lines in one process; return for each the exception that ended it early, or None.

    argvs: the command lines as they would be given alone, each with its own ``--run``.
    callbacks: callbacks of each fit, as in `entry.run`. At most one may draw a progress line. Fits without callbacks
        report nothing.
    stacked: compute steps jointly for experts of one configuration, if each gradient agrees with that of the expert
        alone. The reason why experts are not stacked is printed.

    A fit that fails or has fewer steps does not affect the others. In the main thread, SIGTERM, SIGUSR1, SIGHUP and
    Ctrl-C apply to all fits: each saves after its current step, and `Preempted` is raised as by a single fit.
    """
    group = Group(len(argvs), stacked)
    given = callbacks or [()] * len(argvs)
    threads = [
        threading.Thread(target=group.fit, args=(number, list(argv), own), daemon=True, name=f"fit {number}")
        for number, (argv, own) in enumerate(zip(argvs, given, strict=True))
    ]
    with group.listening(), own_randomness():
        for thread in threads:
            thread.start()
        if threads:
            group.turns[0].release()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.1)  # a signal may reach another thread, and is handled only when this thread wakes up
    if group.told:
        for argv, end in zip(argvs, group.ends, strict=True):
            if end is not None and not isinstance(end, Preempted):
                print(f"{' '.join(argv)}: {end}", file=sys.stderr)
        raise Preempted(group.code)
    return group.ends


@contextmanager
def own_randomness() -> Iterator[None]:
    """Restore the global random generators on exit, whatever is drawn or seeded inside.

    NumPy's bit generator is replaced rather than copied, because each fit has its own: copying its state, as
    `lightning.pytorch.utilities.seed.isolate_rng` does, takes five times as long as everything else.
    """
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    state = torch.get_rng_state(), random.getstate(), np.random.get_bit_generator()
    try:
        yield
    finally:
        torch.set_rng_state(state[0])
        random.setstate(state[1])
        np.random.set_bit_generator(state[2])
        torch.cuda.set_rng_state_all(cuda)


class Group:
    """Cooperative scheduler of the fits in one process: exactly one training thread runs at a time."""

    def __init__(self, size: int, stacked: bool) -> None:
        self.stacked, self.shared, self.told = stacked, Shared(), 0
        self.turns = [threading.Semaphore(0) for _ in range(size)]
        self.abandoned = False
        self.ends: list[BaseException | None] = [None] * size
        self.running = list(range(size))
        self.members: dict[int, Member] = {}
        self.waiting: dict[int, Inputs] = {}
        self.ready: dict[int, tuple[Tensor, Tensor] | None] = {}
        self._stacks: dict[tuple[int, ...], Stack] = {}

    @property
    def code(self) -> int:
        """Exit code after the signal that was received."""
        return STATUS[signal.Signals(self.told)]

    def fit(self, number: int, argv: list[str], callbacks: Sequence[L.Callback]) -> None:
        """Run one command line when its turn comes, then leave the group."""
        self.turns[number].acquire()
        np.random.set_bit_generator(np.random.MT19937())  # one per fit; seeding changes it in place
        try:
            if self.told:
                raise Preempted(self.code)
            self.members[number] = Member(self, number)
            run(argv, [*(callbacks or [StepProgress(shown=False)]), self.members[number]])
        except SystemExit as end:
            self.ends[number] = end if end.code else None
        except BaseException as error:
            self.ends[number] = error
        finally:
            follower = self._next(number)
            self.running.remove(number)
            self.members.pop(number, None)
            self._stacks = {numbers: stack for numbers, stack in self._stacks.items() if number not in numbers}
            if self.running:
                self.turns[follower].release()

    def _next(self, number: int) -> int:
        return next((n for n in self.running if n > number), self.running[0])

    def pass_on(self, number: int) -> None:
        """Let the other fits run until it is this one's turn again; the global random state is then restored."""
        if (follower := self._next(number)) == number:
            return
        with own_randomness():
            self.turns[follower].release()
            self.turns[number].acquire()
        if self.abandoned:
            raise SystemExit(130)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Forward signals to all fits while inside; fits that have not started do not start after a signal."""
        before: dict[int, Any] = {}

        def tell(signum: int, _: Any) -> None:
            if signum == signal.SIGINT and self.told == signal.SIGINT:  # second Ctrl-C: stop at once
                self.abandoned = True
                raise KeyboardInterrupt
            self.told = signum

        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, tell) for number in heeded()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def loss(self, number: int, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Return the losses (B,) of an expert and the gradient of their mean.

        Waits until all other fits have called this method or ended, so that they can be computed together.
        """
        self.waiting[number] = inputs
        while number not in self.ready:
            if all(n in self.waiting or (n in self.members and self.members[n].flat is None) for n in self.running):
                self._compute()
            else:
                self.pass_on(number)
        return self.ready.pop(number) or self.members[number].alone(inputs)

    def _compute(self) -> None:
        alike: dict[Hashable, list[int]] = {}
        for n, (x0, _, _, label) in sorted(self.waiting.items()):
            alike.setdefault((self.members[n].make, x0.shape, x0.dtype, label is None), []).append(n)
        for numbers in map(tuple, alike.values()):
            found: Sequence[tuple[Tensor, Tensor] | None] = [None] * len(numbers)
            members, inputs = [self.members[n] for n in numbers], [self.waiting[n] for n in numbers]
            if len(numbers) > 1 and not any(member.alone_for_good for member in members):
                try:
                    if numbers not in self._stacks:
                        self._stacks[numbers] = Stack(members)
                    found = self._stacks[numbers].losses(inputs)
                except Exception as error:  # any layer may raise, and memory may run out
                    print(f"not stacked, each expert computes its own gradients: {error}", file=sys.stderr)
                    for member in members:
                        member.alone_for_good = True
            self.ready.update(zip(numbers, found, strict=True))
        self.waiting.clear()


class Member(L.Callback):
    """Callback that connects one fit to its group."""

    def __init__(self, group: Group, number: int) -> None:
        self.group, self.number, self.make = group, number, ""
        self.flat: nn.Parameter | None = None  # if stacked: all weights in one vector, of which the module has views
        self.alone_for_good = False

    def setup(self, trainer: L.Trainer, pl_module: Diffusion, stage: str) -> None:
        """Share the data with the group, before anything is decoded."""
        if trainer.world_size > 1:
            raise InputError(
                f"trainer.devices: co-trained fits use one device, this one has {trainer.world_size}; set "
                "trainer.devices 1, or run it alone"
            )
        if pl_module.shards is not None:
            pl_module.shards.share(self.group.shared)

    def heed(self, trainer: L.Trainer, *_: Any) -> None:
        """Forward a signal that the group received to `Checkpoint`, whose hooks run after this one."""
        if self.group.told:
            for callback in trainer.callbacks:
                if isinstance(callback, Checkpoint):
                    callback.tell(self.group.told)

    on_train_batch_end = on_validation_start = on_validation_batch_end = heed

    def on_fit_start(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        """Move the weights, which are on the device by now, into one vector if this expert can be stacked."""
        why = self._obstacle(trainer, pl_module) if self.group.stacked else ""
        if why is not None:
            if why:
                print(f"{trainer.default_root_dir}: not stacked, {why}", file=sys.stderr)
            return
        denoiser = self.denoiser = pl_module.denoiser
        parts = (spec(denoiser.network), spec(denoiser.objective), denoiser.states.fingerprint, trainer.precision)
        self.make, self.folder = json.dumps(parts, sort_keys=True), Path(trainer.default_root_dir)
        self.parameters = list(denoiser.parameters())
        self.flat = nn.Parameter(torch.cat([p.detach().flatten() for p in self.parameters]))
        for p, part in zip(self.parameters, self.split(self.flat.detach()), strict=True):
            p.data = part
        denoiser.loss = self.loss

    def _obstacle(self, trainer: L.Trainer, module: Diffusion) -> str | None:
        """Return why this expert cannot be stacked, None if it can."""
        if type(module.denoiser) is not Denoiser:
            return f"its denoiser is a {type(module.denoiser).__name__}"
        if module.network_is_random:
            return "its network draws random numbers (dropout)"
        if type(module).training_step is not Diffusion.training_step:
            return f"{type(module).__name__} has a training_step of its own"
        if why := obstacle(module.denoiser.network):
            return why
        if trainer.precision not in ("32-true", "bf16-mixed"):
            return f"trainer.precision is {trainer.precision}, not 32-true or bf16-mixed"
        if (observation := module.states.observation) is not None and observation.anneal:
            return "its table changes while it trains (observation.anneal)"
        groups = [(o, group["params"]) for o in trainer.optimizers for group in o.param_groups]
        mine = list(module.denoiser.parameters())
        if len(groups) != 1 or [id(p) for p in groups[0][1]] != [id(p) for p in mine]:
            return "its optimizer does not have all weights in one group"
        if not isinstance(groups[0][0], torch.optim.AdamW) or not groups[0][0].defaults["fused"]:
            return "its optimizer is not the fused AdamW"
        return None

    def split(self, flat: Tensor) -> list[Tensor]:
        """Return views of a flat vector, one in the shape of each weight."""
        parts = flat.split([p.numel() for p in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    def on_train_start(self, trainer: L.Trainer, pl_module: Diffusion) -> None:
        """Make the averages and the optimizer, which are restored by now, use the flat vector instead of its parts."""
        if self.flat is None:
            return
        for callback in trainer.callbacks:
            if isinstance(callback, EMA):
                callback.walked = [self.flat.detach()]  # it still refers to the previous weights
        (optimizer,) = trainer.optimizers
        states = [optimizer.state.pop(p) for p in self.parameters if p in optimizer.state]
        if states:
            moments = {name: torch.cat([state[name].flatten() for state in states]) for name in MOMENTS}
            optimizer.state[self.flat] = {"step": states[0]["step"], **moments}
        optimizer.param_groups[0]["params"] = [self.flat]

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Diffusion, *_: Any) -> None:
        """Let the other fits take a step; stacked fits hand over in the loss instead."""
        if self.flat is None:
            self.group.pass_on(self.number)

    def loss(self, x0: Tensor, s: Tensor, eps: Tensor, label: Tensor | None = None) -> Tensor:
        """Return the losses as `Denoiser.loss` does; their gradient with respect to ``flat`` is already computed."""
        losses: Tensor = _KnownGradient.apply(*self.group.loss(self.number, (x0, s, eps, label)), self.flat)  # type: ignore[no-untyped-call]
        return losses

    def alone(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Return the losses (B,) and the gradient of their mean, computed by this expert's network alone."""
        losses = Denoiser.loss(self.denoiser, *inputs)
        gradients = torch.autograd.grad(losses.mean(), self.parameters, materialize_grads=True)
        return losses.detach(), torch.cat([g.flatten() for g in gradients])

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Diffusion, checkpoint: dict[str, Any]) -> None:
        """Save what a fit alone would save: weights and moments per parameter, as separate tensors."""
        if self.flat is None:
            return
        checkpoint["state_dict"] = {name: tensor.clone() for name, tensor in checkpoint["state_dict"].items()}
        (saved,) = checkpoint["optimizer_states"]
        saved["param_groups"][0]["params"] = list(range(len(self.parameters)))
        if whole := saved["state"].pop(0, None):
            moments = {name: [part.clone() for part in self.split(whole[name])] for name in MOMENTS}
            for i in range(len(self.parameters)):
                saved["state"][i] = {"step": whole["step"].clone(), **{name: moments[name][i] for name in MOMENTS}}


class _KnownGradient(torch.autograd.Function):
    """Attach the known gradient of the mean loss to the losses.

    Only correct if later operations weight all samples equally, as a mean does.
    """

    @staticmethod
    def forward(ctx: Any, losses: Tensor, gradient: Tensor, flat: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[None, None, Tensor]:
        return None, None, ctx.saved_tensors[0] * outer[0].sum()


class Stack:
    """Networks of several members evaluated as one."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members, first = members, members[0].denoiser
        network, self.weights = stack([member.denoiser.network for member in members])
        rows = sorted({s for member in members for s in member.denoiser.rows})
        self.denoiser = Denoiser(network, first.objective, first.states, rows)
        self._flat = [member.flat.detach() for member in members]
        self._rows = torch.stack(self._flat)
        parts = self._rows.split([w[0].numel() for w in self.weights.values()], 1)
        self._views = [part.view(w.shape) for part, w in zip(parts, self.weights.values(), strict=True)]
        self._checked = False

    def losses(self, inputs: Sequence[Inputs]) -> list[tuple[Tensor, Tensor]]:
        """Return for each member what `Member.alone` returns; the first call compares both.

        Raises InputError if they differ by more than the order of summation explains.
        """
        leaves = list(self.weights.values())
        with torch.no_grad():
            torch.stack(self._flat, out=self._rows)
            torch._foreach_copy_(leaves, self._views)
        *parts, labels = zip(*inputs, strict=True)
        x0, s, eps = (torch.stack(part, 1).flatten(0, 1) for part in parts)
        label = None if labels[0] is None else torch.stack(labels, 1).flatten(0, 1)
        losses = self.denoiser.loss(x0, s, eps, label).unflatten(0, (-1, len(self.members)))
        gradients = torch.autograd.grad(losses.mean(0).sum(), leaves)
        found = zip(losses.detach().unbind(1), torch.cat([g.flatten(1) for g in gradients], 1), strict=True)
        out = [(loss.contiguous(), gradient) for loss, gradient in found]
        if not self._checked:
            self._check(inputs, out)
        return out

    def _check(self, inputs: Sequence[Inputs], found: list[tuple[Tensor, Tensor]]) -> None:
        """Compare with each member alone and record the relative difference in ``stacked.json``.

        Raises InputError if the order of summation cannot explain the difference, as with a layer that mixes samples.
        """
        off: list[float] = []
        for member, own, (losses, gradient) in zip(self.members, inputs, found, strict=True):
            for alone, mine in zip(member.alone(own), (losses, gradient), strict=True):
                if alone.isfinite().all():
                    off.append(float((mine - alone).norm() / alone.norm().clamp_min(1e-12)))
        exact = self._rows.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        limit = 1e-4 if exact else 0.05
        if wrong := [value for value in off if not value < limit]:  # also where it is NaN
            raise InputError(
                f"losses or gradients computed in one call differ by {wrong[0]:.1g} from those computed alone, more "
                f"than {limit:g}"
            )
        worst = max(off, default=0.0)
        self._checked = True
        record = {"experts": [str(member.folder) for member in self.members], "relative_difference": worst}
        for member in self.members:
            write_whole(member.folder / RECORD, json.dumps(record, indent=1).encode())
        print(f"stacked: {len(self.members)} experts in one call, gradients within {worst:.0e} of those alone")
