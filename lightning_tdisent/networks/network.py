"""`Network`, the base class of all networks, and modules that replace embeddings in time-agnostic networks."""

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_tdisent.diffusion.spec import Part, arguments, build, spec
from lightning_tdisent.errors import InputError, check_shape

Conditioning = Literal["state", "none"]


class Network(Part, nn.Module):
    """Base class of networks: (x, time or None, label) -> raw output. It does not use the noise schedule.

    The constructor of a subclass takes ``shape``, the other two arguments below if it uses them, and its own, and keeps
    every argument as an attribute of the same name. The subclass implements ``forward(x, time, label)``: x and the
    result (B, C, H, W), time (B,) or None, label int64 (B,) in 0..classes (``classes`` itself is the null label of
    classifier-free guidance) or None. The time of a state is its index in 1..T, int64, or what its schedule says
    (`NoiseSchedule.times`), float32.

    shape: (C, H, W) of an image, or the shape of any other state.
    classes: number of class labels, None for an unconditional network.
    conditioning: ``state`` conditions on the time of the state; ``none`` is fully time-agnostic: no
        embedding, no projections, fewer parameters (2606.20416). If not given: ``none`` for an expert of one state,
        else ``state``.
    """

    def __init__(self, shape: list[int], classes: int | None = None, conditioning: Conditioning | None = None) -> None:
        super().__init__()
        check_shape("shape", shape)
        if classes is not None and (not isinstance(classes, int) or isinstance(classes, bool) or classes < 1):
            raise InputError(f"classes must be at least 1 or null, got {classes!r}")
        if conditioning not in (None, "state", "none"):
            raise InputError(f"conditioning must be state or none, got {conditioning!r}")
        self.shape, self.classes, self.conditioning = list(shape), classes, conditioning

    @property
    def sees_state(self) -> bool:
        """True if the output may depend on the time."""
        return self.conditioning != "none"

    def time_agnostic(self) -> "Network":
        """Return a new network with the same arguments except ``conditioning: none``."""
        if "conditioning" not in arguments(type(self)):
            raise InputError(
                f"{type(self).__name__} has no argument conditioning, and an expert of one state is not told the time: "
                "add conditioning=None to its constructor, pass it to super().__init__, and ignore the time if "
                "self.sees_state is false"
            )
        return self._with(conditioning="none")

    def of_shape(self, shape: list[int]) -> "Network":
        """Return a new network with the same arguments except ``shape``."""
        return self._with(shape=list(shape))

    def _with(self, **arguments: object) -> "Network":
        from lightning_tdisent.networks.rebuild import faithful

        faithful(self)  # otherwise the new network might have other arguments than this one
        data = spec(self)
        data["init_args"] |= arguments
        return build(data, Network)

    def at_time(self, time: float) -> "Network":
        """Return a time-agnostic network that equals this one at ``time``: its weights absorb the time embedding."""
        raise InputError(f"{type(self).__name__} has no at_time: a time-agnostic expert cannot start warm from it")

    def example(self, n: int = 1) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return example inputs (x, time, label) with the shapes and dtypes that training uses.

        x: zeros (n, C, H, W); time: ones (n,), or None for a time-agnostic network; label: class 0 for all but the
        last sample, which has the null label, or None without classes.
        """
        parameter = next(self.parameters(), torch.zeros(()))
        x = torch.zeros(n, *self.shape).to(parameter)
        time = torch.ones(n, dtype=torch.long, device=x.device) if self.sees_state else None
        label = None if self.classes is None else torch.tensor([0] * (n - 1) + [self.classes], device=x.device)
        return x, time, label

    def times(self, x: Tensor, time: Tensor | None) -> Tensor:
        """Return the times, or zeros for a time-agnostic network. Raises InputError if they are missing."""
        if not self.sees_state:
            return torch.zeros(len(x), dtype=torch.long, device=x.device)
        if time is None:
            raise InputError(f"this {type(self).__name__} is conditioned on the state: pass the time")
        return time

    def labels(self, x: Tensor, label: Tensor | None) -> Tensor | None:
        """Return the labels (B,): the null label if none are given, None for an unconditional network.

        Raises InputError for labels given to an unconditional network.
        """
        if self.classes is None:
            if label is not None:
                raise InputError("a label was given to an unconditional network; set classes: on the network")
            return None
        return torch.full((len(x),), self.classes, device=x.device) if label is None else label


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Set all modules to eval mode inside the context, and restore the mode of each afterwards."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class Zero(nn.Module):
    """Replacement for an embedding: returns zeros (B, width), has no parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, t: Tensor, *_: object) -> Tensor:
        """Return zeros (B, width) for t of shape (B,) or (B, features)."""
        return torch.zeros(len(t), self.width, device=t.device, dtype=t.dtype)


class Nothing(nn.Module):
    """Replacement for an embedding that no module uses any more."""

    def forward(self, *_: object) -> None:
        """Return None."""


class Bias(nn.Module):
    """Replacement for a projection of the embedding: returns the same learned vector for every sample."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, embedding: Tensor) -> Tensor:
        """Return the vector expanded to (B, width) for an embedding (B, ...)."""
        return self.bias.expand(len(embedding), -1)
