"""The table of latent states: the numbers that every method of this project is made of.

Rows are latent states 0..S (0 is the data), columns are K components of the data (K = 1: all of it). An entry is a pair
(a, b), float64, and a state is

    x_s = a_s x_0 + b_s eps,        log-SNR L = 2 log(a / b) falls from row to row.

Any positive pairs will do. With n = sqrt(a^2 + b^2), the ``scale`` of an entry, x / n is the variance-preserving state
of equal SNR: a / n = sqrt(sigmoid(L)), b / n = sqrt(sigmoid(-L)).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tdisent.diffusion.observation import Observation
from lightning_tdisent.diffusion.schedules import NoiseSchedule
from lightning_tdisent.diffusion.spaces import Pixels, Space
from lightning_tdisent.diffusion.spec import Part, first_name, identity, spec
from lightning_tdisent.digests import digest
from lightning_tdisent.errors import InputError

TERMINAL_BOUND = 0.01  # largest signal at a last row from which sampling starts as from pure noise
OBSERVED = " | "  # separates the space from the observation in a fingerprint
Coefficient = float | Tensor


class Table(Part, nn.Module):
    """Rows 0..S of a diffusion process, and what its states are made of.

    Base class: `LatentStates` makes one from a schedule, `ComponentStates` one with a column per component of an image.

    Attributes, (S+1, K) float64: ``a``, ``b``, ``log_snr``, +inf in row 0 and -inf where a component has been dropped,
    and ``scale``; copies of them in ``on_cpu``; ``variance_preserving``: whether every scale is 1. (S+1,): ``index``,
    int64, position of each row in the chain of T levels, the key of its noise; ``time``, what a network is told;
    ``levels``, number of components dropped at each row. ``schedule``: the chain; ``space``: how an image becomes a
    state; ``observation``: what is observed of an image, if anything is; ``image_shape``: (C, H, W) where columns are
    components of an image, else None. Buffers follow devices but never dtypes.
    """

    log_snr: Tensor
    scale: Tensor
    a: Tensor
    b: Tensor
    index: Tensor
    time: Tensor

    schedule: NoiseSchedule
    terminal_bound: float
    space: Space = Pixels()
    observation: Observation | None = None
    image_shape: list[int] | None = None

    def _set(self, log_snr: Tensor, index: Tensor, scale: Tensor | None = None, time: Tensor | None = None) -> None:
        """Store the numbers and what follows from them."""
        for name, value in {
            "log_snr": log_snr,
            "scale": (scale := torch.ones_like(log_snr) if scale is None else scale),
            "a": scale * torch.sigmoid(log_snr).sqrt(),
            "b": scale * torch.sigmoid(-log_snr).sqrt(),
            "index": index,
            "time": index if time is None else time,
        }.items():
            self.register_buffer(name, value, persistent=False)
        self.variance_preserving = bool((scale == 1).all())
        self.on_cpu = {name: getattr(self, name).cpu() for name in ("a", "b", "scale", "log_snr")}
        dropped = log_snr[:, : self.space.K].isneginf().sum(1)
        self.levels: list[int] = dropped.tolist() if self.space.K > 1 else [0] * len(log_snr)

    @property
    def S(self) -> int:
        """Number of latent states."""
        return len(self.log_snr) - 1

    @property
    def K(self) -> int:
        """Number of columns."""
        return self.log_snr.shape[1]

    @property
    def image_columns(self) -> int:
        """Number of columns of the image; those of an observation follow them."""
        return self.K if self.image_shape is None else self.space.K

    @property
    def rows(self) -> list[int]:
        """The latent rows 1..S."""
        return list(range(1, self.S + 1))

    @property
    def made_of(self) -> str:
        """Text that names the space and the observed operator, empty for a table of one column."""
        return self._layout(self.observation and self.observation.operator)

    def _layout(self, observed: Part | None) -> str:
        parts = [str(first_name(identity(spec(part)))) for part in (self.space, observed) if part is not None]
        return OBSERVED.join(parts) if self.image_shape is not None and self.K > 1 else ""

    @property
    def fingerprint(self) -> str:
        """Hash of the table to 8 significant digits: machines differ in the last bits of a logarithm."""
        rows = zip(self.index.tolist(), self.log_snr.tolist(), strict=True)
        text = ";".join(f"{t}:" + ",".join(f"{L:.8g}" for L in row) for t, row in rows) + self._layout(self.observation)
        if not self.variance_preserving:
            text += "scale " + ",".join(f"{n:.8g}" for n in self.on_cpu["scale"].flatten().tolist())
        if self.time.tolist() != self.index.tolist():
            text += "time " + ",".join(f"{t:.8g}" for t in self.time.tolist())
        return digest(text)[:16]

    def level(self, rows: Sequence[int]) -> int:
        """Return how many components have been dropped at these rows; refuse rows that differ in it."""
        found = sorted({self.levels[s] for s in rows})
        if len(found) > 1:
            shapes = " and ".join(str(self.shape_at(rows[k])) for k in (0, -1))
            ends = [block[-1] for block in self.blocks_of_rows]
            raise InputError(
                f"rows {rows[0]}..{rows[-1]} have states of {shapes}: a network is for rows whose states have one "
                f"shape, the intervals that end at rows {ends}; train one for each (SingleState with experts: "
                f"{len(ends)})"
            )
        return found[0]

    def shape_at(self, s: int, shape: Sequence[int] | None = None) -> list[int]:
        """Return (C, H, W) of state s, with the channels of an observation; shape: of images, if the table has none."""
        given = self.image_shape or shape
        if given is None:
            raise InputError("the shape of states follows from that of images: give it")
        c, h, w = given
        extra = self.observation.channels(c) if self.observation else 0
        return [c + extra, h >> self.levels[s], w >> self.levels[s]]

    def encode(self, x0: Tensor, item: Tensor | None = None, level: int = 0) -> Tensor:
        """Return state 0 of images (B, C, H, W), with the observation of each in the channels after its own.

        item: int64 (B,), numbers of the images, which an observation may depend on. level: components dropped.
        """
        return self.space.encode(x0 if self.observation is None else self.observation.beside(x0, item), level)

    def decode(self, x: Tensor, level: int = 0) -> Tensor:
        """Return a state as full-size images (B, C, H, W) in [-1, 1], without the observation."""
        return self.space.decode(x if self.image_shape is None else x[:, : self.image_shape[0]], level)

    def multiplier(self, c: Coefficient, x: Tensor) -> Coefficient:
        """Return what multiplies a state x (B, C, H, W) for coefficients c (K,) or (B, K), in the dtype of x.

        A float for a float, and for one row of a table of one column, else a tensor (.., C or 1, H or 1, W or 1).
        """
        if not isinstance(c, Tensor):
            return c
        if c.ndim == 1 and self.K == 1:
            return float(c)
        return self.spread(c.to(x.device, x.dtype), x.shape)

    def spread(self, c: Tensor, shape: Sequence[int]) -> Tensor:
        """Return coefficients (.., K) as a tensor that multiplies a state (B, C, H, W) of this shape."""
        columns = self._buffers.get("columns")
        return c[..., None, None] if columns is None else c[..., columns[:, : shape[-2], : shape[-1]]]

    def coefficients(self, s: int | Tensor, x: Tensor | None = None) -> tuple[Coefficient, Coefficient]:
        """Return (a_s, b_s) as they multiply a state x: floats for one row of a table of one column.

        s: a row 0..S, or int64 rows (B,). x: the state, (B, C, H, W); if not given, float64 (.., K, 1, 1).
        """
        if x is None and self.image_shape is not None and not (isinstance(s, int) and self.K == 1):
            raise InputError("coefficients of components multiply a state: give x")
        a, b = (self.on_cpu["a"][s], self.on_cpu["b"][s]) if isinstance(s, int) else (self.a[s], self.b[s])
        if x is None:
            x = torch.empty(1, 1, 1, 1, dtype=a.dtype, device=self.a.device)
        return self.multiplier(a, x), self.multiplier(b, x)

    def normalised(self, s: int | Tensor, x: Tensor) -> tuple[Tensor, Coefficient, Coefficient]:
        """Return x / n, a / n and b / n at row s, n = sqrt(a^2 + b^2): the variance-preserving state of equal SNR."""
        a, b = self.coefficients(s, x)
        if self.variance_preserving:
            return x, a, b
        a, b, n = (self.on_cpu[k][s] if isinstance(s, int) else getattr(self, k)[s] for k in ("a", "b", "scale"))
        return x / self.multiplier(n, x), self.multiplier(a / n, x), self.multiplier(b / n, x)

    @property
    def learned(self) -> Tensor:
        """Whether the loss counts an entry, bool (S+1, K)."""
        if self.image_shape is None:
            return torch.ones_like(self.log_snr, dtype=torch.bool)
        out = self.log_snr.isfinite()  # neither dropped nor noise-free
        if self.observation is not None and not self.observation.weight:
            out[:, self.image_columns :] = False
        return out

    @property
    def blocks_of_rows(self) -> list[list[int]]:
        """Rows by the shape of their states: one network can serve a block."""
        out: list[list[int]] = []
        for s in self.rows:
            if out and self.levels[s] == self.levels[s - 1]:
                out[-1].append(s)
            else:
                out.append([s])
        return out

    def blocks(self, owners: int) -> list[list[int]]:
        """Split rows 1..S into contiguous blocks, one per owner, of sizes as equal as possible, low noise first."""
        return split_rows([len(block) for block in self.blocks_of_rows], owners)

    def restrict(self, indices: Sequence[int]) -> "Table":
        """Return the table of these original indices alone, values unchanged; refuse an index that is no row here."""
        raise NotImplementedError

    def truncate(self, at: int | float) -> "Table":
        """Return rows 1..at alone, values unchanged; a float up to 1.0 is a share of the rows (2206.05173)."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        device = fn(torch.empty(0, device=self.a.device)).device
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(device)
        return self


def split_rows(sizes: Sequence[int], owners: int) -> list[list[int]]:
    """Split rows 1.. into contiguous blocks as equal as possible, one per owner; no block crosses a run of ``sizes``.

    sizes: lengths of the runs of rows whose states have one shape. owners: one per row, or a multiple of the number of
    runs. Raises InputError for other numbers.
    """
    S = sum(sizes)
    if not isinstance(owners, int) or not 1 <= owners <= S:
        raise InputError(f"experts: {owners} owners cannot share {S} rows; choose 1..{S}")
    each = [*sizes] if owners == S else [owners // len(sizes)] * len(sizes)
    if sum(each) != owners or any(n > size for n, size in zip(each, sizes, strict=True)):
        raise InputError(
            f"experts: {owners} owners cannot share the intervals of {list(sizes)} rows, as no network is for rows of "
            f"two; choose {S}, or a multiple of {len(sizes)}"
        )
    out, begin = [], 1
    for n, size in zip(each, sizes, strict=True):
        cut = [begin + round(k * size / n) for k in range(n + 1)]
        out += [list(range(lo, hi)) for lo, hi in pairwise(cut)]
        begin += size
    return out


def row_of(at: int | float, S: int) -> int:
    """Return the row of 1..S that a row number, or a share of the rows in float, names."""
    row = round(at * S) if isinstance(at, float) and abs(at) <= 1 else at
    if isinstance(row, bool) or not isinstance(row, (int, float)) or row not in range(1, S + 1):
        raise InputError(f"a cut at {at} is none of the rows 1..{S}, nor a share of them above 0 and up to 1")
    return int(row)


def round_up(value: float) -> float:
    """Round up to two significant digits, so that a bound that a message proposes is enough; 0 stays 0."""
    if value <= 0:
        return 0.0
    scale = 10.0 ** (1 - int(f"{value:e}".split("e")[1]))
    return -(-value * scale // 1) / scale
