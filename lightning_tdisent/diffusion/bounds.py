"""Limit the memory and the work of building a model from a file: its card may ask for any size or number of layers."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_tdisent.errors import InputError


class Bounded(TorchDispatchMode):
    """Raise InputError in this context for tensors far larger than those of a file, and for too many operations.

    A tensor may have up to max(4 ``largest``, 2^24) values, checked before memory is allocated; up to max(100
    ``count``, 5,000) operations may run.

    where: the file, for the message.
    largest: number of values of the largest tensor in the file.
    count: number of tensors in the file.
    """

    def __init__(self, where: str, largest: int, count: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.where, self.largest = where, largest
        self.most, self.left = max(4 * largest, 1 << 24), max(100 * count, 5_000)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and check the size of its results.

        An operation that creates a tensor from no other tensor is run on the meta device first, so that no memory is
        taken.
        """
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
