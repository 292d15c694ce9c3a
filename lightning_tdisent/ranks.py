"""Processes that share a work: rank, gather, errors that reach all ranks, and which items of a set are taken."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_tdisent.errors import InputError


@contextlib.contextmanager
def shared_errors() -> Iterator[None]:
    """Raise on all ranks what one of them raises inside as `InputError`, where the others would wait for it."""
    error: InputError | None = None
    try:
        yield
    except InputError as raised:
        error = raised
    said = [e for e in gather(None if error is None else str(error)) if e is not None]
    if error is not None:
        raise error
    if said:
        raise InputError(said[0])


def place() -> tuple[int, int]:
    """Number of this process among those that share the work, and how many they are; (0, 1) if it is alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(mine: Any) -> list[Any]:
    """What each rank has to say, in their order; each of them must ask."""
    if not dist.is_initialized():
        return [mine]
    answers = [None] * dist.get_world_size()
    dist.all_gather_object(answers, mine)
    return answers


def spaced(n: int, total: int) -> Tensor:
    """Return n numbers below total, evenly spaced, int64: a set may be sorted by class."""
    return torch.arange(n) * total // n
