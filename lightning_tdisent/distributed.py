"""Rank, world size and collectives of a distributed run; a single process is rank 0 of 1."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from lightning_tdisent.errors import InputError


@contextlib.contextmanager
def shared_errors() -> Iterator[None]:
    """Re-raise an InputError from any rank on every rank (collective).

    Without this the other ranks would wait forever for the rank that failed.
    """
    error: InputError | None = None
    try:
        yield
    except InputError as raised:
        error = raised
    said = [e for e in all_gather(None if error is None else str(error)) if e is not None]
    if error is not None:
        raise error
    if said:
        raise InputError(said[0])


def rank_and_world() -> tuple[int, int]:
    """Return the rank of this process and the world size."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_gather(obj: Any) -> list[Any]:
    """Return the objects of all ranks in rank order (collective: every rank must call)."""
    if not dist.is_initialized():
        return [obj]
    answers = [None] * dist.get_world_size()
    dist.all_gather_object(answers, obj)
    return answers
