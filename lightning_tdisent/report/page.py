"""The report: one HTML file with tables, pictures, figures, and how every number was obtained."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_tdisent.data.image_set import ImageSet
from lightning_tdisent.diffusion.table import signal
from lightning_tdisent.errors import NotFinite
from lightning_tdisent.evaluation.conditional import DRAWS
from lightning_tdisent.evaluation.observations import Observations, observed
from lightning_tdisent.evaluation.pictures import forward_strip, reverse_strip
from lightning_tdisent.evaluation.provenance import facts, html_facts
from lightning_tdisent.files import write_whole
from lightning_tdisent.images import grid, to_uint8
from lightning_tdisent.metrics.metric import Better
from lightning_tdisent.metrics.registry import columns_of
from lightning_tdisent.report import figures
from lightning_tdisent.report.table import EPS_MSE, costs, directions, table, tables
from lightning_tdisent.report.table import notes as notes_of
from lightning_tdisent.sampling.sampler import probe_rows

CSS = """
:root{--ink:#1d1d24;--soft:#66656f;--line:#e2e2e8;--paper:#fff;--accent:#3b6fb6}
body{font:16px/1.55 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1240px;margin:2.5rem auto;padding:0 1.2rem}
h1{font-size:1.7rem;margin:0 0 .3rem}h2{font-size:1.15rem;margin:2.4rem 0 .6rem;border-top:1px solid var(--line);padding-top:1.2rem}
p,figcaption,li{color:var(--soft)}figcaption{font-size:.86rem;max-width:60ch}figure{margin:.4rem 1.4rem 1rem 0;display:inline-block;vertical-align:top}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums}
th,td{padding:.38rem .7rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600;color:var(--soft);white-space:normal;vertical-align:bottom}th:first-child,td:first-child{text-align:left}
td.best{font-weight:700;color:var(--accent)}img.pixels{image-rendering:pixelated;border:1px solid var(--line)}
pre{background:#f6f6f9;padding:.8rem 1rem;overflow-x:auto;font-size:.8rem}img{max-width:100%}
"""


ARROWS: dict[Better, str] = {"lower": "↓", "higher": "↑"}


def html_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return `table` as HTML, with the best value of every quality column marked."""
    return html_cells(table(rows), sum("source" in row for row in rows), directions(rows))


def html_cells(text: Sequence[tuple[str, ...]], models: int = 0, better: Mapping[str, Better] | None = None) -> str:
    """Return a table of text as HTML.

    The best values among the first ``models`` rows below the head are marked; the row of real images is not one of
    them. better: direction of columns, by their heads.
    """
    head, *body = text
    better, best = better or {}, {}
    for column, name in enumerate(head):
        values = [row[column] for row in body[:models] if row[column]]
        if values and name in better:
            best[column] = (min if better[name] == "lower" else max)(values, key=_value)

    def cell(number: int, i: int, text: str) -> str:
        marked = best.get(i) == text and number < models and len(body) > 1
        return f"<td{' class=best' if marked else ''}>{html.escape(text)}</td>"

    lines = ["".join(cell(number, i, text) for i, text in enumerate(row)) for number, row in enumerate(body)]
    cells = "".join(f"<tr>{line}</tr>" for line in lines)
    heads = [f"{name} {ARROWS[better[name]]}" if name in better else name for name in head]
    head_cells = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    return f'<div class="scroll"><table><tr>{head_cells}</tr>{cells}</table></div>'


def _value(cell: str) -> float:
    return float(cell.partition(" ")[0])


def legend(rows: Sequence[dict[str, Any]]) -> str:
    """Return what the columns of quality are."""
    columns = {key: column for row in rows for key, column in columns_of(row).items()}
    return "".join(f"{key}: {column.label}. " for key, column in columns.items())


def side_by_side(seen: Observations, images: Tensor, items: int = 8) -> Tensor:
    """Return a picture of the original, the observation and the draws of some items, one row per item."""
    draws = DRAWS
    items = min(items, len(seen), len(images) // draws)
    y = seen.y[:items]
    y = y if y.shape[1] == images.shape[1] else y.mean(1, keepdim=True).expand(-1, images.shape[1], -1, -1)
    y = to_uint8(y)
    drawn = images[: items * draws].unflatten(0, (items, draws))
    return grid(torch.cat([seen.original[:items, None], y[:, None], drawn], 1).flatten(0, 1), 2 + draws)


def nearest(images: Tensor, training: Tensor) -> Tensor:
    """Return for each uint8 image the training image with the smallest L2 distance in pixels."""
    a, b = images.flatten(1).float(), training.flatten(1).float()
    chosen = torch.cat([torch.cdist(part, b).argmin(1) for part in a.split(256)])
    return training[chosen]


def write_report(
    path: Path,
    title: str,
    rows: Sequence[dict[str, Any]],
    images: dict[str, Tensor],
    contenders: Sequence[Any],
    real: ImageSet,
    training: Tensor | None = None,
    runs: dict[str, Path] | None = None,
    notes: str = "",
    boards: str = "",
    observations: dict[str, Observations] | None = None,
) -> Path:
    """Write the page and return its path.

    rows: of the evaluation; images: first images of each contender, by name; real: held-out images; training: images
    among which copies are looked for; runs: folders with event files; notes: text below the title; boards: HTML of the
    state of fleets; observations: input of conditional contenders.
    """
    models = [r for r in rows if "networks" in r]
    drawn = [c for c in contenders if c.sampler is not None]
    side = real.images.shape[-1]
    zoom = max(1, 34 // side)

    def wide(picture: Tensor) -> int:
        return int(picture.shape[-1]) * zoom

    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(notes)}</p>" if notes else ""]
    for line, alike in tables(rows):
        parts.append(f"<p>{html.escape(line)}</p>{html_table(alike)}")
    said = [html.escape(line) for line in notes_of(rows)]
    parts.append(f"<ul>{''.join(f'<li>{line}</li>' for line in said)}</ul>" if said else "")
    parts.append(
        f"<p>{html.escape(legend(rows))}↓: lower is better, ↑: higher is better. Numbers whose name ends with features "
        f"were taken in them; they are comparable only under the same protocol. {EPS_MSE} is the mean over the states "
        "of the smallest table, without those that have no signal. The last row scores real images that no model was "
        "trained on: what a perfect model would reach with so few. "
        "Total compute counts all experts; the longest job is the time to wait with one machine per job.</p>"
    )
    parts.append("<h2>The same seeds, every model</h2>")
    for name, pictures in images.items():
        tiles = grid(pictures[:64], 8)
        parts.append(figures.picture(tiles, wide(tiles), html.escape(name)))
    tiles = grid(real.images[:64], 8)
    parts.append(figures.picture(tiles, wide(tiles), "real images, held out"))
    if observations:
        parts.append("<h2>Observations and draws</h2>")
        for name, seen in ((name, seen) for name, seen in observations.items() if name in images):
            tiles = side_by_side(seen, images[name])
            caption = f"{html.escape(name)}: the original, what was given, and draws from it."
            parts.append(figures.picture(tiles, wide(tiles), caption))
    if models:
        parts.append("<h2>Where the models are right and wrong</h2>" + figures.errors_per_state(models))
        parts.append(figures.diffusion_time(models) + figures.bits(models))
        parts.append("<h2>What it cost</h2>" + html_cells(costs(models)) + figures.cost(models))
        parts.append(figures.quality_over_compute(models))
    if runs:
        parts.append("<h2>Training</h2>" + figures.training_curves(runs))
    parts.append(boards)
    few = real.images[:5]
    if drawn:
        parts.append("<h2>From image to noise and back</h2>")
        model = drawn[-1].load()
        shown = probe_rows(model.states.rows, 8)
        strip = forward_strip(model, few, shown)
        tiles = grid(strip.flatten(0, 1), strip.shape[1])
        levels = ", ".join(f"{signal(model.states.log_snr[s, :1]):.3g}" for s in shown)
        of = "" if model.states.K == 1 else " of the coarsest component"
        parts.append(figures.picture(tiles, wide(tiles), f"Forward: x_0, then signal coefficients a{of} = {levels}."))
    for contender in drawn:
        model = contender.load()
        given = observed(model.states, few, len(few))
        try:
            strip, at = reverse_strip(model, contender.sampler, range(len(few)), given=given)
        except NotFinite as error:
            parts.append(f"<p>Reverse, {html.escape(contender.name)}: {html.escape(str(error))}</p>")
            continue
        tiles = grid(strip.flatten(0, 1), strip.shape[1])
        caption = f"Reverse, {html.escape(contender.name)}: rows {', '.join(map(str, at))}."
        parts.append(figures.picture(tiles, wide(tiles), caption))
    if training is not None and images:
        parts.append("<h2>Are they copies?</h2>")
        name, last = list(images)[-1], list(images.values())[-1][:24]
        both = torch.stack([last, nearest(last, training)]).flatten(0, 1)
        tiles = grid(both, len(last))
        caption = f"{html.escape(name)}: samples above, the nearest training image of each below."
        parts.append(figures.picture(tiles, wide(tiles), caption))
    parts.append(html_facts(facts(rows)))
    write_whole(path, document(title, parts).encode())
    return path


def document(title: str, parts: Sequence[str]) -> str:
    """Return pieces of HTML as a page that needs no other file."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{CSS}</style><body>{''.join(parts)}</body></html>"
    )
