"""The table of latent states: the numbers that every method of this project consists of.

Rows are latent states 0..S (0 is the data), columns are K components of the data (K = 1: all of it). An entry is a pair
(a, b), float64, and a state is

    x_s = a_s x_0 + b_s eps,        log-SNR L = 2 log(a / b) falls from row to row.

Any positive pairs are allowed. With n = sqrt(a^2 + b^2), the ``scale`` of an entry, x / n is the variance-preserving
state of equal SNR: a / n = sqrt(sigmoid(L)), b / n = sqrt(sigmoid(-L)).
"""

from abc import ABC, abstractmethod
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


class Table(Part, nn.Module, ABC):
    """Rows 0..S of a diffusion process, with the space and the observation of its states.

    This is the base class of `LatentStates`, which makes a table from a schedule, and `ComponentStates`, which has a
    column per component of an image. Buffers follow devices but never dtypes.

    Attributes of shape (S+1, K), float64:
    ``a``, ``b``: coefficients of the states.
    ``log_snr``: +inf in row 0, -inf where a component has been dropped.
    ``scale``: sqrt(a^2 + b^2).
    ``on_cpu``: copies of these four on the CPU, by name.

    Attributes of shape (S+1,):
    ``index``: int64, position of each row in the chain of T levels; it keys the noise of the row.
    ``time``: time input of a network: the index, int64, or what the schedule says (`NoiseSchedule.times`).
    ``levels``: number of components dropped at each row.

    Other attributes:
    ``variance_preserving``: whether every scale is 1.
    ``schedule``: the chain of T levels.
    ``space``: how an image is represented as a state.
    ``observation``: what is observed of an image, None for unconditional models.
    ``image_shape``: (C, H, W) where columns are components of an image, else None.
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
        """Store the numbers, and the attributes computed from them."""
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
        """Number of columns of the image; those of an observation come after them."""
        return self.K if self.image_shape is None else self.space.K

    @property
    def rows(self) -> list[int]:
        """The latent rows 1..S."""
        return list(range(1, self.S + 1))

    @property
    def made_of(self) -> str:
        """Name of the space and of the observed operator, empty for a table of one column."""
        return self._layout(self.observation and self.observation.operator)

    def _layout(self, observed: Part | None) -> str:
        parts = [str(first_name(identity(spec(part)))) for part in (self.space, observed) if part is not None]
        return OBSERVED.join(parts) if self.image_shape is not None and self.K > 1 else ""

    @property
    def fingerprint(self) -> str:
        """Hash of the table, to 8 significant digits because machines differ in the last bits of a logarithm."""
        rows = zip(self.index.tolist(), self.log_snr.tolist(), strict=True)
        text = ";".join(f"{t}:" + ",".join(f"{L:.8g}" for L in row) for t, row in rows) + self._layout(self.observation)
        if not self.variance_preserving:
            text += "scale " + ",".join(f"{n:.8g}" for n in self.on_cpu["scale"].flatten().tolist())
        if self.time.tolist() != self.index.tolist():
            text += "time " + ",".join(f"{t:.8g}" for t in self.time.tolist())
        return digest(text)[:16]

    def level(self, rows: Sequence[int]) -> int:
        """Return the number of components that have been dropped at these rows.

        Raises InputError for rows at which it differs: a network takes states of one shape.
        """
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
        """Return the shape (C, H, W) of state s, including the channels of an observation.

        shape: (C, H, W) of images; required if the table has no `image_shape`, else ignored.
        """
        given = self.image_shape or shape
        if given is None:
            raise InputError("the shape of the images is required: pass shape")
        c, h, w = given
        extra = self.observation.channels(c) if self.observation else 0
        return [c + extra, h >> self.levels[s], w >> self.levels[s]]

    def encode(self, x0: Tensor, item: Tensor | None = None, level: int = 0) -> Tensor:
        """Return state 0 of images (B, C, H, W), with the channels of the observation after those of the image.

        item: int64 (B,), item numbers of the images, on which an observation may depend.
        level: number of components to drop.
        """
        return self.space.encode(x0 if self.observation is None else self.observation.append(x0, item), level)

    def decode(self, x: Tensor, level: int = 0) -> Tensor:
        """Return a state as full-size images (B, C, H, W) in [-1, 1], without the observation."""
        return self.space.decode(x if self.image_shape is None else x[:, : self.image_shape[0]], level)

    def multiplier(self, c: Coefficient, x: Tensor) -> Coefficient:
        """Return coefficients c, (K,) or (B, K), in a form that multiplies a state x (B, C, H, W), in the dtype of x.

        Returns a float for a float, and for one row of a table of one column, else a tensor (.., C or 1, H or 1, W or
        1).
        """
        if not isinstance(c, Tensor):
            return c
        if c.ndim == 1 and self.K == 1:
            return float(c)
        return self.spread(c.to(x.device, x.dtype, non_blocking=True), x.shape)

    def spread(self, c: Tensor, shape: Sequence[int]) -> Tensor:
        """Return coefficients (.., K) as a tensor that multiplies a state (B, C, H, W) of this shape."""
        columns = self._buffers.get("columns")
        return c[..., None, None] if columns is None else c[..., columns[:, : shape[-2], : shape[-1]]]

    def coefficients(self, s: int | Tensor, x: Tensor | None = None) -> tuple[Coefficient, Coefficient]:
        """Return (a_s, b_s) in a form that multiplies a state x: floats for one row of a table of one column.

        s: a row 0..S, or int64 rows (B,).
        x: the state, (B, C, H, W). Without it the result is float64 (.., K, 1, 1); raises InputError for tables of
            components.
        """
        if x is None and self.image_shape is not None and not (isinstance(s, int) and self.K == 1):
            raise InputError("coefficients of components depend on the shape of the state: pass x")
        a, b = (self.on_cpu["a"][s], self.on_cpu["b"][s]) if isinstance(s, int) else (self.a[s], self.b[s])
        if x is None:
            x = torch.empty(1, 1, 1, 1, dtype=a.dtype, device=self.a.device)
        return self.multiplier(a, x), self.multiplier(b, x)

    def normalised(self, s: int | Tensor, x: Tensor) -> tuple[Tensor, Coefficient, Coefficient]:
        """Return x / n, a / n and b / n at row s, n = sqrt(a^2 + b^2): the variance-preserving state of equal SNR."""
        if self.variance_preserving:
            return x, *self.coefficients(s, x)
        a, b, n = (self.on_cpu[k][s] if isinstance(s, int) else getattr(self, k)[s] for k in ("a", "b", "scale"))
        return x / self.multiplier(n, x), self.multiplier(a / n, x), self.multiplier(b / n, x)

    def difference(self, s: int, other: "Table", r: int) -> tuple[str, list[float], list[float]] | None:
        """Return the first number in which row s differs from row r of another table: its name and both values."""
        for name in ("log_snr", "scale", "time"):
            mine, theirs = (t.double().reshape(-1).cpu() for t in (getattr(self, name)[s], getattr(other, name)[r]))
            if mine.shape != theirs.shape or not torch.allclose(mine, theirs):
                return name.replace("log_snr", "log-SNR"), mine.tolist(), theirs.tolist()
        return None

    @property
    def learned(self) -> Tensor:
        """Mask of the entries that the loss counts, bool (S+1, K)."""
        if self.image_shape is None:
            return torch.ones_like(self.log_snr, dtype=torch.bool)
        out = self.log_snr.isfinite()  # neither dropped nor free of noise
        if self.observation is not None and not self.observation.weight:
            out[:, self.image_columns :] = False
        return out

    @property
    def blocks_of_rows(self) -> list[list[int]]:
        """Maximal runs of rows whose states have one shape; one network can serve the rows of a run."""
        out: list[list[int]] = []
        for s in self.rows:
            if out and self.levels[s] == self.levels[s - 1]:
                out[-1].append(s)
            else:
                out.append([s])
        return out

    def blocks(self, owners: int) -> list[list[int]]:
        """Split rows 1..S into contiguous blocks of nearly equal size, one per owner, lowest noise first.

        See `split_rows` for the numbers of owners that are allowed.
        """
        return split_rows([len(block) for block in self.blocks_of_rows], owners)

    @abstractmethod
    def restrict(self, indices: Sequence[int]) -> "Table":
        """Return the table with these original indices alone, values unchanged; raises InputError for other indices."""

    @abstractmethod
    def truncate(self, at: int | float) -> "Table":
        """Return rows 1..at alone, values unchanged; a float up to 1.0 is a fraction of the rows (2206.05173)."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        device = fn(torch.empty(0, device=self.a.device)).device
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(device)
        return self


def split_rows(sizes: Sequence[int], owners: int) -> list[list[int]]:
    """Split rows 1.. into contiguous blocks of nearly equal size, one per owner.

    sizes: lengths of the runs of rows whose states have one shape; no block crosses the border of a run.
    owners: number of blocks: the number of rows, or a multiple of the number of runs.

    Raises InputError for other numbers.
    """
    S = sum(sizes)
    if not isinstance(owners, int) or not 1 <= owners <= S:
        raise InputError(f"experts: {owners} owners cannot share {S} rows; choose 1..{S}")
    each = [*sizes] if owners == S else [owners // len(sizes)] * len(sizes)
    if sum(each) != owners or any(n > size for n, size in zip(each, sizes, strict=True)):
        raise InputError(
            f"experts: {owners} owners cannot share the intervals of {list(sizes)} rows, as a network "
            f"cannot take states of two shapes; choose {S}, or a multiple of {len(sizes)}"
        )
    out, begin = [], 1
    for n, size in zip(each, sizes, strict=True):
        cut = [begin + round(k * size / n) for k in range(n + 1)]
        out += [list(range(lo, hi)) for lo, hi in pairwise(cut)]
        begin += size
    return out


def row_of(at: int | float, S: int) -> int:
    """Return the row in 1..S for a row number, or for a float up to 1.0: a fraction of the rows.

    Raises InputError for other values.
    """
    row = round(at * S) if isinstance(at, float) and abs(at) <= 1 else at
    if isinstance(row, bool) or not isinstance(row, (int, float)) or row not in range(1, S + 1):
        raise InputError(f"a cut at {at} is none of the rows 1..{S}, nor a share of them above 0 and up to 1")
    return int(row)


def signal(log_snr: Tensor) -> float:
    """Return the largest fraction of signal a / sqrt(a^2 + b^2) of a row."""
    return float(torch.sigmoid(log_snr).sqrt().max())


def round_up(value: float) -> float:
    """Round up to two significant digits; 0 stays 0. A bound proposed in a message is then large enough."""
    if value <= 0:
        return 0.0
    scale = 10.0 ** (1 - int(f"{value:e}".split("e")[1]))
    return -(-value * scale // 1) / scale
