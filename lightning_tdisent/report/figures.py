"""Figures of the report, from results and event files, as HTML that needs no other file."""

import base64
import html
import io
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from lightning_tdisent import metrics_file
from lightning_tdisent.evaluation.pictures import png
from lightning_tdisent.metrics.features import known_features
from lightning_tdisent.metrics.likelihood import BOUND
from lightning_tdisent.metrics.registry import columns, columns_of
from lightning_tdisent.report.palette import COLOURS, Palette, group_of
from lightning_tdisent.runs import METRICS, identity_of

BPD_TERMS = BOUND.key(part="terms")
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=COLOURS),
    "font.size": 10,
    "legend.frameon": False,
    "axes.grid": True,
    "grid.color": "#e6e6ea",
    "svg.fonttype": "none",
}


def picture(image: Tensor, width: int, caption: str = "") -> str:
    """Return HTML of a uint8 picture (C, H, W), ``width`` CSS pixels wide, without interpolation; caption is HTML."""
    data = base64.b64encode(png(image)).decode()
    return (
        f'<figure><img class="pixels" style="width:{width}px" alt="{html.escape(caption)}" '
        f'src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def drawing(figure: Figure, caption: str) -> str:
    """Return HTML of a matplotlib figure as SVG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    data = base64.b64encode(buffer.getvalue()).decode()
    alt = html.escape(caption)
    image = f'<img class="figure" alt="{alt}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def errors_per_state(rows: Sequence[dict[str, Any]], palette: Palette) -> str:
    """Draw held-out x0-MSE against the original index, absolute and relative to the first model, a curve per model."""
    models: dict[str, dict[str, Any]] = {}
    for r in rows:  # one curve per model, also if it is sampled in several ways
        if "x0_mse" in r:
            models.setdefault(r["source"], r)
    shown = list(models.values())
    if not shown:
        return "<p>No errors per state: the models do not share their states.</p>"
    with mpl.rc_context(STYLE):
        figure = Figure((10, 3.4))
        axes = figure.subplots(1, 2)
        reference = shown[0]["x0_mse"]
        for row in shown:
            t, style = [int(index) for index in row["x0_mse"]], {"color": palette.colour(row), "ms": 4}
            axes[0].plot(t, list(row["x0_mse"].values()), "o-", label=palette.label(row), **style)
            relative = [100 * (row["x0_mse"][k] / reference[k] - 1) for k in row["x0_mse"]]
            axes[1].plot(t, relative, "o-", label=palette.label(row), **style)
        axes[0].set(yscale="log", xlabel="index t of the state (right: pure noise)", title="held-out error of x0")
        axes[1].set(xlabel="index t of the state", title=f"the same, % above {palette.label(shown[0])}")
        axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return drawing(
        figure,
        "Mean squared error of x0_hat on held-out images per state, on the same noise for every model; times the SNR "
        "it is the error of eps (of tables of one column), relative errors are equal. Below zero is better.",
    )


def _distance(rows: Sequence[dict[str, Any]]) -> str | None:
    """Return the key of the first distance to the real images in the first row that has one."""
    return next((key for row in rows for key, column in columns_of(row).items() if column.distance), None)


def cost(rows: Sequence[dict[str, Any]], palette: Palette) -> str:
    """Draw the distance reached, total compute and the longest job as bars."""
    first = _distance(rows)
    metric = first if first and all(first in r for r in rows) else None
    with mpl.rc_context(STYLE):
        figure = Figure((9, 0.5 + 0.42 * len(rows)))
        axes = figure.subplots(1, 3 if metric else 2, sharey=True)
        names = [r["name"] for r in rows][::-1]
        panels = [(metric, [r[metric] for r in rows])] if metric else []
        panels += [
            ("total TFLOP, validation included", [_compute(r) / 1e12 for r in rows]),
            ("training seconds of the longest job", [r["training_seconds_longest"] for r in rows]),
        ]
        for axis, (title, values) in zip(axes, panels, strict=True):
            bars = axis.barh(names, values[::-1], color=[palette.colour(r) for r in rows][::-1])
            axis.bar_label(bars, fmt="%.3g", padding=2, fontsize=9)
            axis.set_title(title, fontsize=10)
            axis.margins(x=0.2)
    return drawing(figure, "Quality (lower is nearer to the real images), total cost, and time to wait.")


def _compute(row: dict[str, Any]) -> float:
    """Return the floating point operations of training and validation; older results have only the former."""
    return float(row["training_flops"] + row.get("validation_flops", 0.0))


def quality_over_compute(rows: Sequence[dict[str, Any]], palette: Palette) -> str:
    """Draw the distance against the compute of all jobs, validation included, with its spread over repeated trainings.

    Models called NAME and "NAME, .." that differ in compute are joined by a line. Return "" if all cost the same.
    """
    metric = _distance(rows)
    shown = [r for r in rows if metric in r and _compute(r)]
    if metric is None or not shown or len({round(_compute(r) / _compute(shown[0]), 1) for r in shown}) < 2:
        return ""
    families: dict[str, list[dict[str, Any]]] = {}
    lines: list[list[dict[str, Any]]] = []
    for row in sorted(shown, key=lambda r: (_compute(r), "," in r["name"])):
        line = families.get(row["name"].partition(",")[0])
        if line is None or _compute(row) < 1.1 * _compute(line[-1]):
            lines.append([row])
            families.setdefault(row["name"].partition(",")[0], lines[-1])
        else:
            line.append(row)
    names = {row["name"] for line in lines if len(line) == 1 for row in line}
    with mpl.rc_context(STYLE):
        figure = Figure((8, 4.2))
        axes = figure.subplots()
        for line in lines:
            colour, name, head = palette.colour(line[0]), line[0]["name"], line[0]["name"].partition(",")[0]
            label = name if len(line) == 1 else f"{head}, .." if head in names else head
            x, y = [_compute(r) / 1e12 for r in line], [r[metric] for r in line]
            spread = [r.get(f"{metric}_sd", 0.0) for r in line]
            axes.errorbar(x, y, spread, fmt="o-" if len(line) > 1 else "s", ms=5, capsize=3, color=colour, label=label)
        axes.set(xlabel="TFLOP of all jobs, validation included", ylabel=metric)
        _scale(axes.xaxis, [_compute(r) / 1e12 for r in shown])
        _scale(axes.yaxis, [r[metric] for r in shown])
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return drawing(figure, "Quality against total compute (lower left is better).")


def _scale(axis: Any, values: Sequence[float]) -> None:
    """Make an axis logarithmic if its values span more than a factor of 2, with few numbers and no exponents."""
    span = max(values) / max(min(values), 1e-300)
    if span <= 2:
        return
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if span < 100 else (1.0,), numticks=8))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def bits(rows: Sequence[dict[str, Any]]) -> str:
    """Draw the terms of bits per dimension: the decoder, the rows in at most six groups of neighbours, the prior."""
    shown = [row for row in rows if BPD_TERMS in row]
    if not shown:
        return ""
    with mpl.rc_context(STYLE):
        figure = Figure((9, 0.8 + 0.36 * len(shown)))
        axes = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        names, left = [row["name"] for row in shown], [0.0] * len(shown)
        most = max((row[BPD_TERMS]["rows"] for row in shown), key=len)
        groups = [[str(t) for t in part] for part in _groups(list(most), 6)]
        parts = [("decoder", [row[BPD_TERMS]["decoder"] for row in shown])]
        for group in groups:
            values = [sum(row[BPD_TERMS]["rows"].get(s, 0.0) for s in group) for row in shown]
            parts.append((f"rows {group[0]}..{group[-1]}" if len(group) > 1 else f"row {group[0]}", values))
        parts.append(("prior", [row[BPD_TERMS]["prior"] for row in shown]))
        for (label, values), colour in zip(parts, COLOURS, strict=False):
            axes[0].barh(names, values, left=left, label=label, color=colour)
            left = [x + y for x, y in zip(left, values, strict=True)]
        axes[0].bar_label(axes[0].containers[-1], [f"{row[BOUND.name]:.3f}" for row in shown], padding=3, fontsize=9)
        axes[0].set(title="bits per dimension", xlim=(None, 1.12 * max(left)))
        axes[0].invert_yaxis()
        axes[1].barh(names, parts[-1][1], color=COLOURS[len(parts) - 1])
        axes[1].bar_label(axes[1].containers[-1], fmt="%.2g", padding=3, fontsize=9)
        axes[1].set(title="of which the prior")
        axes[1].margins(x=0.2)
        axes[0].legend(ncols=4, loc="upper center", bbox_to_anchor=(0.8, -0.15))
    return drawing(figure, "Terms of the bits per dimension: the decoder, groups of rows of the chain, and the prior.")


def _groups(items: list[str], most: int) -> list[list[str]]:
    """Split a list into at most ``most`` groups of neighbours of nearly equal size."""
    cut = [round(k * len(items) / min(most, len(items))) for k in range(min(most, len(items)) + 1)] if items else [0]
    return [items[a:b] for a, b in pairwise(cut)]


def diffusion_time(rows: Sequence[dict[str, Any]]) -> str:
    """Draw the distance and the bits against the row that the chain starts from, one line for each kind of prior."""
    cut = [row for row in rows if "cut" in row]
    metric = _distance(cut)
    if len({row["cut"] for row in cut}) < 2:
        return ""
    whole = next((row for row in rows if row["source"] == cut[0]["source"] and "cut" not in row), None)
    with mpl.rc_context(STYLE):
        figure = Figure((9, 3.4))
        panels = [k for k in (metric, BOUND.name) if k and any(k in row for row in cut)]
        if not panels:
            return ""
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        kinds = dict.fromkeys(row["name"].partition(", ")[2] or row["prior"] for row in cut)
        for axis, key in zip(axes, panels, strict=True):
            for kind, colour in zip(kinds, COLOURS * len(kinds), strict=False):
                line = [row for row in cut if (row["name"].partition(", ")[2] or row["prior"]) == kind]
                line = sorted((row for row in line if key in row), key=lambda row: row["cut"])
                axis.plot(
                    [row["cut"] for row in line], [row[key] for row in line], "o-", ms=4, color=colour, label=kind
                )
            if whole is not None and key in whole:
                axis.axhline(whole[key], color=COLOURS[5], ls="--", label="whole chain")
            axis.set(xlabel="row that the chain starts from", title=key)
        axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return drawing(figure, "How much diffusion time is enough: quality and likelihood of one model, cut off at a row.")


def read_curves(folder: Path) -> Mapping[str, Sequence[tuple[float, float]]]:
    """Return what a run logged by name, as (images seen, value), from its ``metrics.jsonl``.

    Runs of versions before that file are read from their event files. If a folder has event files of several runs, only
    those are read whose names end with the id of its ``config.yaml``.
    """
    if (folder / METRICS).exists():
        return metrics_file.read(folder)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns about every resumed run
    with _own_events(folder) as place:
        events = EventAccumulator(str(place), size_guidance={"scalars": 0})
        events.Reload()
        tags = events.Tags()["scalars"]
        return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


@contextmanager
def _own_events(folder: Path) -> Iterator[Path]:
    """Yield a folder without the event files of other runs; files of early versions name no run, and are included."""
    files, run = sorted(folder.glob("events.out.tfevents.*")), identity_of(folder)
    named = [re.search(r"\.([0-9a-f]{16})$", file.name) for file in files]
    own = [file for file, match in zip(files, named, strict=True) if not run or match is None or match[1] == run]
    if len(own) == len(files):
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        for file in own:
            (Path(place) / file.name).symlink_to(file.resolve())
        yield Path(place)


def training_curves(folders: dict[str, Path], palette: Palette) -> str:
    """Draw training loss and, if it was measured, a distance against images seen by the job."""
    logged = {name: read_curves(folder) for name, folder in folders.items()}
    distances = [key for name in known_features() for key, column in columns(name).items() if column.distance]
    drawn = [tag for key in distances for c in logged.values() for tag in c if tag.split("/")[:2] == ["quality", key]]
    distance = sorted(dict.fromkeys(drawn), key=lambda tag: -drawn.count(tag))[
        :1
    ]  # one protocol: others are not comparable
    with mpl.rc_context(STYLE):
        figure = Figure((9, 3.2))
        axes = figure.subplots(1, 2)
        groups: dict[str, list[str]] = {}
        for name in logged:
            groups.setdefault(group_of(name), []).append(name)
        for group, names in groups.items():
            style: dict[str, Any] = {
                "color": palette.of_group(group),
                **({"alpha": 0.5, "lw": 1} if len(names) > 1 else {}),
            }
            for i, name in enumerate(names):
                label = name if len(names) == 1 else f"{group} ({len(names)} jobs)" if i == 0 else None
                points = logged[name].get("train/loss", [])
                dots = "o" if len(points) < 3 else None  # a line needs two points, and a short one is not seen
                axes[0].plot([x for x, _ in points], [y for _, y in points], label=label, marker=dots, ms=3, **style)
                for tag in distance:
                    if points := logged[name].get(tag, []):
                        axes[1].plot([x for x, _ in points], [y for _, y in points], "o-", ms=4, **style)
        axes[0].set(yscale="log", xlabel="images seen by the job", title="training loss (of each job's states)")
        axes[1].set(
            xlabel="images seen by the job", title=", ".join(distance).replace("quality/", "") or "no distance logged"
        )
        if distance:
            axes[1].set(yscale="log")
        figure.legend(loc="center left", bbox_to_anchor=(0.92, 0.5))
    return drawing(figure, "During training. Losses of different states are not comparable.")
