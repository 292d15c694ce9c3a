"""The numbers of an evaluation as text: a table for each protocol, a table of costs, and notes."""

import functools
import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import Any

from lightning_tdisent.errors import InputError
from lightning_tdisent.metrics.likelihood import BOUND, HOW, ODE, REFUSED
from lightning_tdisent.metrics.metric import Better, Column
from lightning_tdisent.metrics.registry import columns_of, features_of, missing


def tables(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the rows of each protocol with its line: numbers of different protocols are never in one table.

    The same holds for conditional models with different observations.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for r in rows:
        groups.setdefault((r["protocol"], r.get("given", "")), []).append(r)
    return [
        (alike[0]["protocol_line"] + (f", {alike[0]['draws']} draws each, given {given}" if given else ""), alike)
        for (_, given), alike in groups.items()
    ]


Columns = dict[str, Callable[[dict[str, Any]], str]]
EPS_MSE, BPD_IMAGES = "eps-MSE", BOUND.key(part="images")


def directions(rows: Sequence[dict[str, Any]]) -> dict[str, Better]:
    """Return which direction is better in the columns of `table`, for those that have one."""
    columns = {key: column for row in rows for key, column in columns_of(row).items()}
    return {key: column.better for key, column in columns.items() if column.better} | {EPS_MSE: "lower"}


def table(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return head and rows of text: the quality of models and images under one protocol.

    Raises InputError for rows of different protocols.
    """
    hashes = sorted({r["protocol"] for r in rows})
    if len(hashes) > 1:
        raise InputError(f"a table must not mix protocols, these rows have {hashes}; see tables()")
    metrics = {key: column for row in rows for key, column in columns_of(row).items()}
    columns: Columns = {
        "sampler": lambda r: r["sampler"].partition("(")[0],
        "states": lambda r: str(r["rows"]),
        "NFE": lambda r: str(r["nfe"]),
        **{key: functools.partial(_number, key, column) for key, column in metrics.items()},
        EPS_MSE: _eps_mse,
    }
    return _text(rows, columns)


NUMBERS = (
    "networks", "weights", "nfe", "images_seen", "images_seen_longest", "training_flops", "validation_flops",
    "total_flops", "training_seconds", "validation_seconds", "training_seconds_longest", "sampling_seconds_per_image",
    "peak_memory_bytes",
)  # fmt: skip


def refuse_texts(rows: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError for rows that have something other than a number where the pages need one."""
    for row in rows:
        values = {key: row.get(key) for key in NUMBERS}
        values |= {f"{key}[{k}]": v for key in ("x0_mse", "eps_mse") for k, v in (row.get(key) or {}).items()}
        for key, value in values.items():
            if value is not None and not (isinstance(value, (int, float)) and not isinstance(value, bool)):
                raise ValueError(f"{row['name']}: {key}: expected a number, got {value!r:.60}")


def costs(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return head and rows of text: the cost of models, total compute next to wall clock."""
    columns: Columns = {
        "networks": lambda r: str(r["networks"]),
        "weights": lambda r: f"{r['weights']:,}",
        "images seen": lambda r: f"{r['images_seen']:,}",
        "by the longest job": lambda r: f"{r['images_seen_longest']:,}",
        "training TFLOP": lambda r: three_digits(r["training_flops"] / 1e12),
        "validation TFLOP": lambda r: three_digits(r["validation_flops"] / 1e12),
        "total TFLOP": lambda r: three_digits(r["total_flops"] / 1e12),
        "training s, total": lambda r: f"{r['training_seconds']:.1f}",
        "validation s, total": lambda r: f"{r['validation_seconds']:.1f}",
        "longest job s": lambda r: f"{r['training_seconds_longest']:.1f}",
        "sampling ms/image": lambda r: f"{1000 * r['sampling_seconds_per_image']:.2f}",
        "peak memory MB": lambda r: f"{r['peak_memory_bytes'] / 1e6:,.0f}",
    }
    return _text([r for r in rows if "networks" in r], columns)


def terminal_tables(rows: Sequence[dict[str, Any]]) -> list["WideTable"]:
    """Return a table per protocol and one of costs; the features are named in the title, not again in each column."""
    out = []
    for line, alike in tables(rows):
        head, *body = table(alike)
        suffix = f"_{features_of(alike[0])}"
        out.append(WideTable(line, [tuple(name.removesuffix(suffix) for name in head), *body]))
    if len(cost := costs(rows)) > 1:
        out.append(WideTable("what it cost", cost))
    return out


Pieces = list[list[int]]


class WideTable:
    """A table for the terminal; one that is too wide is turned, or split into several, each with the first column.

    text: head and rows; left: further columns that are aligned to the left. No cell is cut: a number without its last
    digits is another number. Names in the first column are folded if they leave no room. A table is turned (rows
    across, columns down) if it takes fewer pieces then.
    """

    def __init__(self, title: str, text: Sequence[Sequence[str]], left: Sequence[str] = ()) -> None:
        self.title, self.text, self.left = title, text, left

    def __rich_console__(self, console: Any, options: Any) -> Any:
        """Yield the title and the pieces."""
        from rich.table import Table
        from rich.text import Text

        if self.title:
            yield Text(self.title, style="italic")
        turned, most = list(zip(*self.text, strict=True)), options.max_width
        ways = [(self.text, *_pieces(self.text, most)), (self.text, *_pieces(self.text, most, wrap=True))]
        if (way := _pieces(turned, most, wrap=True))[0][0] + max(way[0][1:], default=0) < most:  # no name is cut
            ways.append((turned, *way))
        text, widths, pieces = min(ways, key=lambda way: len(way[2]))  # the first of those with the fewest pieces
        left = self.left if text is self.text else ()
        head, *body = text
        for piece in pieces:
            out = Table()
            for i in (0, *piece):
                side: Any = "left" if i == 0 or head[i] in left else "right"
                width = None if i == 0 else widths[i] - 3
                out.add_column(head[i], justify=side, overflow="fold", min_width=width, max_width=width)
            for row in body:
                out.add_row(*(row[i] for i in (0, *piece)))
            yield out


def _pieces(text: Sequence[Sequence[str]], most: int, wrap: bool = False) -> tuple[list[int], Pieces]:
    """Return the widths of the columns with their borders, and the columns of each piece beside the first.

    wrap: whether a head that is wider than the cells below is wrapped between its words.
    """
    from rich.cells import cell_len

    head = text[0]
    widths = [3 + max((cell_len(row[i]) for row in text[i > 0 :]), default=0) for i in range(len(head))]
    for i in range(1, len(head)):
        words = max(map(cell_len, head[i].split()), default=0)
        widths[i] = max(widths[i], 3 + words, 3 + min(cell_len(head[i]), 16 if wrap else most))
    pieces: Pieces = [[]]
    for i in range(1, len(widths)):
        if pieces[-1] and 1 + widths[0] + widths[i] + sum(widths[k] for k in pieces[-1]) > most:
            pieces.append([])
        pieces[-1].append(i)
    return widths, pieces


def _text(rows: Sequence[dict[str, Any]], columns: Columns) -> list[tuple[str, ...]]:
    def cell(row: dict[str, Any], text: Callable[[dict[str, Any]], str]) -> str:
        try:
            return text(row)
        except KeyError:  # a row without this number: of another table, or of images without a model
            return ""

    names = [r["name"] + " (preview)" * ("preview" in r) for r in rows]
    body = [(name, *(cell(r, text) for text in columns.values())) for name, r in zip(names, rows, strict=True)]
    kept = [i for i in range(len(columns) + 1) if any(row[i] for row in body)]
    return [tuple(row[i] for i in kept) for row in [("model", *columns), *body]]


def mean_eps_mse(row: dict[str, Any]) -> float:
    """Return the mean of a row's squared errors of eps over the states."""
    return fmean(row["eps_mse"].values())


def _eps_mse(row: dict[str, Any]) -> str:
    mean, deviation = mean_eps_mse(row), row.get("eps_mse_sd")
    return f"{mean:.4f}" if deviation is None else _spread(mean, deviation)


def _spread(mean: float, deviation: float) -> str:
    """Return a mean and its standard deviation, the latter with two significant digits, with as many decimals each."""
    if not 0 < deviation < math.inf:
        return f"{mean:.3f}" + (f" ± {deviation:g}" if deviation else "")  # 0: the same images each time
    decimals = max(0, 1 - math.floor(math.log10(deviation)))
    return f"{mean:.{decimals}f} ± {deviation:.{decimals}f}"


def three_digits(number: float) -> str:
    """Return a number with three significant digits."""
    return f"{float(f'{number:.3g}'):,g}" if abs(number) < 1e6 else f"{number:.3g}"


def _number(key: str, column: Column, row: dict[str, Any]) -> str:
    if (deviation := row.get(f"{key}_sd")) is not None:
        return _spread(row[key], deviation)
    text = f"{row[key]:.3f}" if abs(row[key]) >= 0.1 else f"{row[key]:.2g}"
    low, high = (row.get(column.key(features_of(row), part)) for part in ("low", "high"))
    return text if low is None or high is None else f"{text} [{low:.3f}, {high:.3f}]"


def notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return notes to print below the tables: why numbers are missing, and how much of a distance is bias."""
    out = [f"{row['name']}: {row['refused']}" for row in rows if "refused" in row]
    for row in (row for row in rows if "preview" in row):
        filled = ", ".join(f"{s} by {what}" for s, what in row["preview"].items())
        out.append(f"{row['name']} is a preview, no result: experts are missing, and rows are filled: {filled}")
    for row in (row for row in rows if "differs" in row):
        values = "; ".join(f"{field}: {', '.join(values)}" for field, values in row["differs"].items())
        out.append(f"{row['name']} has experts that differ, as --allow-mismatch permitted: {values}")
    out += [f"{row['name']}: {row['start_note']}" for row in rows if "start_note" in row]
    out += [f"{row['name']}: {row['not_pooled']}" for row in rows if "not_pooled" in row]
    out += _bits_notes(rows)
    for _, alike in tables(rows):
        measured = [row for row in alike if "refused" not in row]
        for key, column in columns_of(measured[0]).items() if measured else ():
            if "bias" in column.parts:
                out += _bias_notes(key, column, [row for row in measured if key in row])
    for name in dict.fromkeys(name for row in rows for name in missing(row)):
        out.append(f"numbers of {name} are not shown: its module is not imported; give --import MODULE")
    return out


def _bias_notes(key: str, column: Column, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return which rows are of the reference's own images, and for which the bias is more than a twentieth."""
    n, d = rows[0]["n"], rows[0]["num_features"]
    under = f"(protocol {rows[0]['protocol']})"
    bias = rows[0][column.key(features_of(rows[0]), "bias")]
    own = [row["name"] for row in rows if row[key] < 1e-6 * bias]
    much = [row["name"] for row in rows if bias > 0.05 * row[key] and row["name"] not in own]
    out = [f"{who}: {key} is 0, these are the images of the reference itself" for who in own]
    if n <= d:
        out.append(
            f"{key} of n={n:,}: {d:,} features' covariance has no full rank; its bias is about {bias:.3f} {under}"
        )
    elif much:
        out.append(
            f"{key} of n={n:,}: about {bias:.3f} of it is the bias of so few images, more than a twentieth for "
            f"{', '.join(much)}; it is not comparable with another n {under}"
        )
    return out


def _bits_notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return how bits per dimension were measured, which start of the chain has the fewest, and why there are none."""
    out = []
    for source in dict.fromkeys(row["source"] for row in rows if "cut" in row):
        out += _best_start([row for row in rows if row.get("source") == source and BPD_IMAGES in row])
    for how in dict.fromkeys(row[HOW] for row in rows if HOW in row):
        ode = f"; {ODE.name} is an estimate, off by the error of its integration"
        pooled = any(f"{BOUND.name}_sd" in row for row in rows)
        interval = "standard deviation over trainings" if pooled else "interval of 95 %"
        some = any(ODE.name in row for row in rows)
        out.append(f"{BOUND.name} is an upper bound, with its {interval}: {how}{ode if some else ''}")
    return out + [f"{row['name']}: no bits per dimension: {row[REFUSED]}" for row in rows if REFUSED in row]


def _best_start(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return which start of the chain has the fewest bits, and which others do not differ significantly from it."""
    if len(rows) < 2:
        return []
    best = min(rows, key=lambda row: row[BOUND.name])
    alike = []
    for row in rows:
        difference = [x - y for x, y in zip(row[BPD_IMAGES], best[BPD_IMAGES], strict=True)]
        half = 1.96 * stdev(difference) / len(difference) ** 0.5
        if row is not best and fmean(difference) - half <= 0:
            alike.append(row["name"])
    others = f"; not significantly worse on these images: {', '.join(alike)}" if alike else "; all others are worse"
    low, high = (best[BOUND.key(part=part)] for part in ("low", "high"))
    return [f"fewest bits per dimension: {best['name']}, {best[BOUND.name]:.4f} [{low:.4f}, {high:.4f}]{others}"]
