"""Check the inputs of a sampler: seeds, labels, observations and masks of known pixels."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_tdisent.diffusion.table import Table
from lightning_tdisent.errors import InputError
from lightning_tdisent.sampling.denoiser import DenoiserProtocol


def check_seeds(seeds: Sequence[int]) -> list[int]:
    """Return seeds as Python integers; raises InputError if they are no sequence of integers."""
    try:
        return [operator.index(seed) for seed in seeds]
    except TypeError:
        raise InputError(f"seeds: integers, one for each image, such as range(64), got {seeds!r}") from None


def check_label(denoise: DenoiserProtocol, label: Any, n: int) -> Tensor | None:
    """Return one label for each of n images, int64 (n,), or None without a label.

    label: one integer for all images, or a sequence or tensor of n integers; the number of classes is the null label.

    Raises InputError for other labels, and for labels given to a model without classes.
    """
    if label is None:
        return None
    if not denoise.classes:
        raise InputError(f"label: {label!r} is given to a model without classes")
    try:
        found = torch.as_tensor(label)
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(0)
    if found.ndim == 0:
        found = found.expand(n)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool or list(found.shape) != [n]:
        raise InputError(f"label: an integer, or one for each of the {n} images, got {label!r}")
    if n and not 0 <= int(found.min()) <= int(found.max()) <= denoise.classes:
        raise InputError(
            f"label: 0 to {denoise.classes - 1}, or {denoise.classes} for none; got {int(found.min())} to "
            f"{int(found.max())}"
        )
    return found.long()


def check_given(states: Table, given: Tensor | None, n: int) -> Tensor | None:
    """Return observations (n, C', H, W); raises InputError if they do not fit a model of this table.

    An unconditional model takes none; a conditional one requires one for each of n images, in [-1, 1].
    """
    if states.observation is None:
        if given is not None:
            raise InputError("an observation was given to an unconditional model")
        return None
    assert states.image_shape is not None
    c, *sides = states.image_shape
    shape = [n, states.observation.channels(c), *sides]
    name = type(states.observation.operator).__name__
    if given is None:
        raise InputError(f"this model draws images given an observation ({name}, {shape[1:]}); none was given")
    if list(given.shape) != shape:
        raise InputError(f"observations for {n} images of {name} are {shape}, these are {list(given.shape)}")
    low, high = float(given.min()), float(given.max())
    if not -1.001 <= low <= high <= 1.001:
        raise InputError(f"observations lie in [-1, 1], these run from {low:.4g} to {high:.4g}")
    return given


def check_known(states: Table, known: Tensor | None, given: Tensor | None) -> Tensor | None:
    """Return masks of known pixels in the dtype and on the device of the observations, or None without masks.

    Raises InputError for masks of another shape than (B, 1, H, W), without observations, for observations with other
    channels than the image, and for tables whose components are not pixels.
    """
    if known is None:
        return None
    if given is None or states.image_columns > 1:
        parts = f"the image has {states.image_columns} components, not pixels"
        why = "no observation shows them" if given is None else parts
        raise InputError(f"known pixels cannot be put back: {why}")
    assert states.image_shape is not None
    c, *sides = states.image_shape
    if list(known.shape) != [len(given), 1, *sides] or given.shape[1] != c:
        raise InputError(
            f"masks of known pixels are {[len(given), 1, *sides]} for {c} channels, got {list(known.shape)}"
        )
    return known.to(given)
