"""Bounds on what is built from the words of a file: a card may ask for terabytes, or for layers without end."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_tdisent.errors import InputError


class Bounded(TorchDispatchMode):
    """Refuse a tensor of far more values than a file has, before it takes memory, and operations without end.

    What is built inside may make tensors of up to 4 times ``largest`` values, or 16 million, and run 100 operations for
    each of ``count`` tensors, or 5,000. where: the file, for the message.
    """

    def __init__(self, where: str, largest: int, count: int) -> None:
        super().__init__()
        self.where, self.largest = where, largest
        self.most, self.left = max(4 * largest, 1 << 24), max(100 * count, 5_000)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, on the meta device first if it makes a tensor of nothing."""
        self.left -= 1
        if self.left < 0:
            raise InputError(f"{self.where}: its card asks for far more layers than the file has weights")
        kwargs = kwargs or {}
        if "device" in kwargs and not any(isinstance(value, Tensor) for value in tree_leaves((args, kwargs))):
            self._refuse(func(*args, **{k: v for k, v in kwargs.items() if k != "generator"} | {"device": "meta"}))
        out = func(*args, **kwargs)
        self._refuse(out)
        return out

    def _refuse(self, made: Any) -> None:
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.numel() > self.most:
                raise InputError(
                    f"{self.where}: its card asks for a tensor of {list(tensor.shape)}, the largest in the file has "
                    f"{self.largest:,} values"
                )
