"""The report: one HTML file with tables, pictures, figures, and how every number was obtained."""

import html
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

from lightning_tdisent.data.image_set import ImageSet
from lightning_tdisent.diffusion.process import nonzero
from lightning_tdisent.diffusion.table import signal
from lightning_tdisent.errors import NotFinite
from lightning_tdisent.evaluation.conditional import DRAWS
from lightning_tdisent.evaluation.observations import Observations, observed
from lightning_tdisent.evaluation.pictures import forward_strip, reverse_strip
from lightning_tdisent.evaluation.provenance import facts, html_facts, summary
from lightning_tdisent.files import write_whole
from lightning_tdisent.images import grid, to_uint8
from lightning_tdisent.metrics.metric import Better
from lightning_tdisent.metrics.registry import columns_of
from lightning_tdisent.report import figures
from lightning_tdisent.report.palette import Palette
from lightning_tdisent.report.table import EPS_MSE, costs, directions, table, tables
from lightning_tdisent.report.table import notes as notes_of
from lightning_tdisent.report.verdict import best, verdicts
from lightning_tdisent.sampling.sampler import probe_rows

CSS = """
:root{--ink:#1d1d24;--soft:#5d5c66;--line:#e2e2e8;--paper:#fff;--accent:#2f62a8;--pale:#f6f6f9;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--ink:#e8e8ee;--soft:#a9a8b3;--line:#3a3a44;--paper:#17171c;--accent:#8ab4f0;--pale:#22222a}
img.figure{background:#fff;border-radius:4px;padding:4px}}
body{font:16px/1.55 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1240px;margin:2.5rem auto;padding:0 1.2rem}
h1{font-size:1.7rem;margin:0 0 .3rem}h2{font-size:1.15rem;margin:2.4rem 0 .6rem;border-top:1px solid var(--line);padding-top:1.2rem}
p,figcaption,li,caption{color:var(--soft)}p.verdict{color:var(--ink);font-size:1.05rem;max-width:75ch}p.how{font-size:.86rem}
figcaption{font-size:.86rem;max-width:60ch}figure{margin:.4rem 1.4rem 1rem 0;display:inline-block;vertical-align:top;max-width:100%}
a{color:var(--accent)}nav{font-size:.92rem}nav a{margin-right:1.1em}
.scroll{overflow-x:auto;background:linear-gradient(to right,var(--paper) 30%,transparent),linear-gradient(to left,var(--paper) 30%,transparent),
linear-gradient(to right,#8886,transparent),linear-gradient(to left,#8886,transparent);background-position:left,right,left,right;
background-repeat:no-repeat;background-size:40px 100%,40px 100%,14px 100%,14px 100%;background-attachment:local,local,scroll,scroll}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums}caption{text-align:left;padding:.3rem 0 .5rem}
th,td{padding:.38rem .7rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
thead th{font-weight:600;color:var(--soft);white-space:normal;vertical-align:bottom}
th:first-child{text-align:left}tbody th{font-weight:400;text-align:left}
td.best{font-weight:700;color:var(--accent)}img.pixels{image-rendering:pixelated;border:1px solid var(--line)}
pre{background:var(--pale);padding:.8rem 1rem;overflow-x:auto;font-size:.8rem}img{max-width:100%;height:auto}
@media(max-width:600px){body{margin:1rem auto;padding:0 .8rem}figure{display:block;margin-right:0}th,td{padding:.3rem .45rem}tbody th{white-space:normal}}
"""


ARROWS: dict[Better, str] = {"lower": "↓", "higher": "↑"}


def html_table(rows: Sequence[dict[str, Any]], caption: str = "") -> str:
    """Return `table` as HTML; a value that is better than all others beyond the interval is marked."""
    better = directions(rows)
    return html_cells(table(rows), best(rows, better), better, caption)


def html_cells(
    text: Sequence[tuple[str, ...]], marked: Mapping[str, int] | None = None,
    better: Mapping[str, Better] | None = None, caption: str = "",
) -> str:  # fmt: skip
    """Return a table of text as HTML.

    marked: number of the row that is marked in a column, by its head. better: direction of columns, by their heads.
    """
    head, *body = text
    better, marked = better or {}, marked or {}

    def cell(number: int, i: int, text: str) -> str:
        if i == 0:
            return f'<th scope="row">{html.escape(text)}</th>'
        return f"<td{' class=best' if marked.get(head[i]) == number else ''}>{html.escape(text)}</td>"

    lines = ["".join(cell(number, i, text) for i, text in enumerate(row)) for number, row in enumerate(body)]
    heads = [f"{name} {ARROWS[better[name]]}" if name in better else name for name in head]
    head_cells = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in heads)
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    body_rows = "".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<div class="scroll" tabindex="0"><table>{title}<thead><tr>{head_cells}</tr></thead>'
        f"<tbody>{body_rows}</tbody></table></div>"
    )


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

    palette = Palette(models, runs or ())
    sections: dict[str, str] = {}
    tables_of = "".join(html_table(alike, line) for line, alike in tables(rows))
    said = [html.escape(line) for line in notes_of(rows)]
    tables_of += f"<ul>{''.join(f'<li>{line}</li>' for line in said)}</ul>" if said else ""
    sections["Numbers"] = tables_of + (
        f"<p>{html.escape(legend(rows))}↓: lower is better, ↑: higher is better. {marks(rows)} Numbers whose name ends "
        f"with features were taken in them; they are comparable only under the same protocol. {EPS_MSE} is the mean "
        "over the states of the smallest table, without those that have no signal. The last row scores real images that "
        "no model was trained on: what a perfect model would reach with so few. Total compute counts all experts; the "
        "longest job is the time to wait with one machine per job.</p>"
    )
    strips, noisy = _strips(drawn, real.images[:5], wide)
    pictures = "".join(
        figures.picture(tiles := grid(some[:64], 8), wide(tiles), html.escape(name)) for name, some in images.items()
    )
    tiles = grid(real.images[:64], 8)
    pictures += figures.picture(tiles, wide(tiles), "real images, held out")
    own = f" These draw noise at every step, too, so that their images are others: {'; '.join(noisy)}." if noisy else ""
    sections["Samples"] = f"<p>Image i of every model is drawn from seed i.{html.escape(own)}</p>{pictures}"
    if observations:
        shown = [
            figures.picture(
                tiles := side_by_side(seen, images[name]),
                wide(tiles),
                f"{html.escape(name)}: the original, what was given, and draws from it.",
            )
            for name, seen in observations.items()
            if name in images
        ]
        sections["Observations and draws"] = "".join(shown)
    if models:
        errors = figures.errors_per_state(models, palette) + figures.diffusion_time(models) + figures.bits(models)
        sections["Where the models are right and wrong"] = errors
        cost = html_cells(costs(models)) + figures.cost(models, palette)
        sections["What it cost"] = cost + figures.quality_over_compute(models, palette)
    if runs:
        links = ", ".join(_link(name, folder, path.parent) for name, folder in runs.items())
        sections["Training"] = figures.training_curves(runs, palette) + f"<p>Run folders: {links}.</p>"
    if boards:
        sections["Fleets"] = boards
    if strips:
        sections["From image to noise and back"] = strips
    if training is not None and images:
        name, last = list(images)[-1], list(images.values())[-1][:24]
        both = torch.stack([last, nearest(last, training)]).flatten(0, 1)
        tiles = grid(both, len(last))
        caption = f"{html.escape(name)}: samples above, the nearest training image of each below."
        sections["Are they copies?"] = figures.picture(tiles, wide(tiles), caption)
    sections["How these numbers were obtained"] = html_facts(facts(rows))
    write_whole(path, page(title, rows, sections, rows, notes).encode())
    return path


def _strips(contenders: Sequence[Any], few: Tensor, wide: Callable[[Tensor], int]) -> tuple[str, list[str]]:
    """Return the forward process and the reverse process of each model, and the names of those that draw noise."""
    out, noisy = "", []
    for contender in contenders:
        model, sampler = contender.load(), contender.sampler
        states = model.states
        if contender is contenders[0]:
            at = probe_rows(states.rows, 8)
            strip = forward_strip(model, few, at)
            tiles = grid(strip.flatten(0, 1), strip.shape[1])
            levels = ", ".join(f"{signal(states.log_snr[s, :1]):.3g}" for s in at)
            of = "" if states.K == 1 else " of the coarsest component"
            out += figures.picture(tiles, wide(tiles), f"Forward: x_0, then signal coefficients a{of} = {levels}.")
        if any(nonzero(terms.z) for terms in sampler.plan(states, [*sampler.rows(states), 0])):
            noisy.append(contender.name)
        given = observed(states, few, len(few))
        try:
            strip, at = reverse_strip(model, sampler, range(len(few)), given=given)
        except NotFinite as error:
            out += f"<p>Reverse, {html.escape(contender.name)}: {html.escape(str(error))}</p>"
            continue
        tiles = grid(strip.flatten(0, 1), strip.shape[1])
        caption = f"Reverse, {html.escape(contender.name)}: rows {', '.join(map(str, at))}."
        out += figures.picture(tiles, wide(tiles), caption)
    return out, noisy


def _link(name: str, folder: Path, start: Path) -> str:
    place = quote(os.path.relpath(folder, start))
    return f'<a href="{place}/">{html.escape(name)}</a>'


def marks(rows: Sequence[dict[str, Any]]) -> str:
    """Return what a marked value is, and why none is marked if there are no intervals."""
    n = max((row.get("repeats", 1) for row in rows), default=1)
    if n > 1:
        return f"Bold: better than all others beyond the 95 % interval of the difference over {n} trainings."
    return "Bold: better than all others beyond its 95 % interval; numbers of one training without one are not marked."


def page(
    title: str, rows: Sequence[dict[str, Any]], sections: Mapping[str, str], measured: Sequence[dict[str, Any]],
    notes: str = "",
) -> str:  # fmt: skip
    """Return a page: title, verdict, how it was measured, contents, and sections by their titles.

    rows: of the verdict. measured: rows as they were measured, which are those of all repetitions if they are pooled.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(notes)}</p>" if notes else ""]
    parts += [f'<p class="verdict">{html.escape(text)}</p>' for text in verdicts(rows)]
    parts += [f'<p class="how">{html.escape(line)}</p>' for line in summary(measured)]
    ids = {name: re.sub(r"\W+", "-", name.lower()).strip("-") for name in sections}
    links = [f'<a href="#{ids[name]}">{html.escape(name)}</a>' for name in sections]
    parts.append(f"<nav>{''.join(links)}</nav>")
    parts += [f'<h2 id="{ids[name]}">{html.escape(name)}</h2>{content}' for name, content in sections.items()]
    return document(title, parts)


def document(title: str, parts: Sequence[str]) -> str:
    """Return pieces of HTML as a page that needs no other file."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{CSS}</style><body>{''.join(parts)}</body></html>"
    )
