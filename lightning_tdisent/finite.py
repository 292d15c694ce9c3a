"""Detect tensors with non-finite values before they are used, written or turned into images."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_tdisent.errors import NotFinite


def non_finite(data: Any) -> list[str]:
    """Return the names of the floating-point tensors in nested data that contain NaN or infinity.

    Synchronises once per device, and again for each tensor whose sum is not finite.
    """
    found: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors(data):
        if tensor.is_floating_point() and tensor.numel():
            found.setdefault(tensor.device, []).append((name, tensor))
    out = []
    for pairs in found.values():  # the sum is non-finite if any value is, or if it overflows
        finite = torch.stack([tensor.sum().float() for _, tensor in pairs]).isfinite().tolist()
        suspects = [pair for pair, good in zip(pairs, finite, strict=True) if not good]
        out += [name for name, tensor in suspects if not tensor.isfinite().all()]
    return out


def refuse_non_finite(where: str, data: Any) -> None:
    """Raise `NotFinite` naming the tensors in ``data`` that contain NaN or infinity; where: prefix of the message."""
    if bad := non_finite(data):
        raise NotFinite(
            f"{where}: {', '.join(bad[:3])} ({len(bad)} in all) hold values that are not finite (NaN or infinity), "
            "which cannot give an image. Use an earlier checkpoint, or train again"
        )


def tensors(data: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for all tensors in nested dicts, lists and tuples, e.g. named ``state_dict.a.weight``."""
    if isinstance(data, Tensor):
        yield name, data
    elif isinstance(data, dict):
        for key, value in data.items():
            yield from tensors(value, f"{name}.{key}" if name else str(key))
    elif isinstance(data, (list, tuple)):
        for key, value in enumerate(data):
            yield from tensors(value, f"{name}.{key}")
