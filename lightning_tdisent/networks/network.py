"""The contract of every network, and the tools that make one time-agnostic."""

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_tdisent.diffusion.spec import Part, build, spec
from lightning_tdisent.errors import InputError, check_shape

Conditioning = Literal["state", "none"]


class Network(Part, nn.Module):
    """(x, original index or nothing, label) -> raw output; knows nothing of noise.

    A subclass takes these three arguments, keeps every constructor argument as an attribute of the same name, and
    implements ``forward(x, index, label)``: x and the result (B, C, H, W), index int64 (B,) in 1..T or None, label
    int64 (B,) in 0..classes (``classes`` itself is the null label of classifier-free guidance) or None.

    shape: (C, H, W) of an image, or whatever else a state is.
    classes: number of class labels, None for an unconditional network.
    conditioning: ``state`` sees the original index of the state, ``none`` is truly time-agnostic: no embedding, no
        projections, fewer parameters (2606.20416). Not given: ``state``, but an expert of one state takes ``none``.
    """

    def __init__(self, shape: list[int], classes: int | None, conditioning: Conditioning | None) -> None:
        super().__init__()
        check_shape("shape", shape)
        if classes is not None and (not isinstance(classes, int) or isinstance(classes, bool) or classes < 1):
            raise InputError(f"classes must be at least 1 or null, got {classes!r}")
        if conditioning not in (None, "state", "none"):
            raise InputError(f"conditioning must be state or none, got {conditioning!r}")
        self.shape, self.classes, self.conditioning = list(shape), classes, conditioning

    @property
    def sees_state(self) -> bool:
        """Whether the output may depend on the index."""
        return self.conditioning != "none"

    def time_agnostic(self) -> "Network":
        """Return a new network of the same arguments with ``conditioning: none``."""
        return self._with(conditioning="none")

    def of_shape(self, shape: list[int]) -> "Network":
        """Return a new network of the same arguments for states of another shape."""
        return self._with(shape=list(shape))

    def _with(self, **arguments: object) -> "Network":
        from lightning_tdisent.networks.rebuild import faithful

        faithful(self)  # else the new one would be of other arguments than this one
        data = spec(self)
        data["init_args"] |= arguments
        return build(data, Network)

    def at_index(self, index: int) -> "Network":
        """Return a time-agnostic network that says what this one says at the index, the embedding folded into it."""
        raise InputError(f"{type(self).__name__} has no at_index: it cannot start a time-agnostic expert warm")

    def example(self, n: int = 1) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return (x, index, label) as every network is called with: zeros (n, C, H, W), None for what it does not see.

        The labels are class 0, the last one is the null label.
        """
        parameter = next(self.parameters(), torch.zeros(()))
        x = torch.zeros(n, *self.shape).to(parameter)
        index = torch.ones(n, dtype=torch.long, device=x.device) if self.sees_state else None
        label = None if self.classes is None else torch.tensor([0] * (n - 1) + [self.classes], device=x.device)
        return x, index, label

    def indices(self, x: Tensor, index: Tensor | None) -> Tensor:
        """Return the original indices, or zeros for a time-agnostic network; refuse none where they are needed."""
        if not self.sees_state:
            return torch.zeros(len(x), dtype=torch.long, device=x.device)
        if index is None:
            raise InputError(f"this {type(self).__name__} is conditioned on the state: give the original index")
        return index

    def labels(self, x: Tensor, label: Tensor | None) -> Tensor | None:
        """Return the label, the null label where none is given, or None for an unconditional network."""
        if self.classes is None:
            if label is not None:
                raise InputError("a label was given to an unconditional network; set classes: on the network")
            return None
        return torch.full((len(x),), self.classes, device=x.device) if label is None else label


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Have all modules in eval mode inside, and in the mode that each had after it."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class Zero(nn.Module):
    """In place of an embedding: zeros (B, width), no parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, t: Tensor, *_: object) -> Tensor:
        """t is (B,) or (B, features)."""
        return torch.zeros(len(t), self.width, device=t.device, dtype=t.dtype)


class Nothing(nn.Module):
    """In place of an embedding whose users are gone."""

    def forward(self, *_: object) -> None:
        """Return None."""


class Bias(nn.Module):
    """In place of a projection of the embedding: the same learned vector for every sample."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, embedding: Tensor) -> Tensor:
        """(B, anything) -> (B, width)."""
        return self.bias.expand(len(embedding), -1)
