"""Random numbers as functions of what they are for: an image's seed, or a training step. No global generator.

A torch CPU generator keeps only 32 bits of its seed, so keys are built by bijections of 32-bit words: two images of
one stream can never share their noise, as hashing 50,000 of them into 32 bits would risk.
"""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_tdisent.errors import InputError

_WORD = 1 << 32


def mix32(word: int) -> int:
    """Bijection of 32-bit words with good avalanche (the finaliser of MurmurHash3)."""
    word &= _WORD - 1
    word = (word ^ word >> 16) * 0x85EBCA6B & _WORD - 1
    word = (word ^ word >> 13) * 0xC2B2AE35 & _WORD - 1
    return word ^ word >> 16


def key(*parts: int) -> int:
    """32-bit key of a few integers; a bijection of the last one."""
    out = 0
    for part in parts:
        out = mix32(out + 0x9E3779B9 ^ part)
    return out


def seed_noise(seeds: Sequence[int], stream: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise (len(seeds), *shape), float32 on the CPU; row i is a function of (seeds[i], stream) alone.

    stream: what the noise is for: the original index at which it enters the chain. Drawn on the CPU also for a GPU,
    whose generators give other numbers on other models. Seeds are integers of any type (Python, numpy, a tensor's) and
    must lie in [0, 2^32).
    """
    generator, out = torch.Generator(), torch.empty(len(seeds), *shape)
    for i, given in enumerate(seeds):
        try:
            seed = operator.index(given)  # a word of numpy would overflow in `key`
        except TypeError:
            raise InputError(f"image seeds are integers, got {given!r}") from None
        if not 0 <= seed < _WORD:
            raise InputError(f"image seeds must lie in [0, 2^32), got {seed}")
        torch.randn(tuple(shape), generator=generator.manual_seed(key(stream, seed)), out=out[i])
    return out


def draw_rows(rows: Tensor, n: int, generator: torch.Generator | None, balanced: bool = True) -> Tensor:
    """Draw n of the given rows (R,), int64: uniformly, and if balanced one from each of n equal strata of the list.

    A balanced draw has every row n/R times if R divides n, else within one of that. Which row a place in the batch gets
    is independent of the place: readers fill places shard by shard, so every row must meet every place.
    """
    u = torch.rand(1 if balanced else n, generator=generator, device=rows.device, dtype=torch.float64)
    if balanced:
        u = (torch.arange(n, device=rows.device) + u) / n
        if len(rows) > 1:
            u = u[torch.randperm(n, generator=generator, device=rows.device)]
    return rows[(u * len(rows)).long().clamp_max(len(rows) - 1)]
