"""Random numbers as functions of their purpose (an image's seed, a training step) instead of a global generator.

A torch CPU generator keeps only 32 bits of its seed, so keys are built by bijections of 32-bit words: two images of one
stream never share their noise, whereas hashing 50,000 of them into 32 bits would risk that.
"""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_tdisent.errors import InputError

_WORD = 1 << 32


def mix32(word: int) -> int:
    """Return a bijection of 32-bit words with good avalanche (the finaliser of MurmurHash3)."""
    word &= _WORD - 1
    word = (word ^ word >> 16) * 0x85EBCA6B & _WORD - 1
    word = (word ^ word >> 13) * 0xC2B2AE35 & _WORD - 1
    return word ^ word >> 16


def key(*parts: int) -> int:
    """Return a 32-bit key of a few integers; it is a bijection of the last one."""
    out = 0
    for part in parts:
        out = mix32(out + 0x9E3779B9 ^ part)
    return out


def seed_noise(seeds: Sequence[int], stream: int, shape: Sequence[int]) -> Tensor:
    """Return standard normal noise (len(seeds), *shape), float32 on the CPU.

    Row i is a function of (seeds[i], stream) alone. It is drawn on the CPU even for a GPU, because the generators of
    different GPU models give different numbers.

    seeds: integers of any type (Python, numpy, a tensor's) in [0, 2^32).
    stream: the purpose of the noise: the original index at which it enters the chain.

    Raises InputError for other seeds.
    """
    generator, out = torch.Generator(), torch.empty(len(seeds), *shape)
    for i, given in enumerate(seeds):
        try:
            seed = operator.index(given)  # a numpy integer would overflow in `key`
        except TypeError:
            raise InputError(f"image seeds are integers, got {given!r}") from None
        if not 0 <= seed < _WORD:
            raise InputError(f"image seeds must lie in [0, 2^32), got {seed}")
        torch.randn(tuple(shape), generator=generator.manual_seed(key(stream, seed)), out=out[i])
    return out


def draw_rows(rows: Tensor, n: int, generator: torch.Generator | None, balanced: bool = True) -> Tensor:
    """Draw n of the given rows (R,), int64: uniformly, or if balanced one from each of n equal strata of the list.

    A balanced draw has every row n/R times if R divides n, else within one of that. The row at a place in the batch is
    independent of the place: data readers fill places shard by shard, so every row must occur at every place.
    """
    u = torch.rand(1 if balanced else n, generator=generator, device=rows.device, dtype=torch.float64)
    if balanced:
        u = (torch.arange(n, device=rows.device) + u) / n
        if len(rows) > 1:
            u = u[torch.randperm(n, generator=generator, device=rows.device)]
    return rows[(u * len(rows)).long().clamp_max(len(rows) - 1)]
