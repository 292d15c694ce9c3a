"""One study repeated with other training seeds: means, their spread, and quality against total compute."""

import html
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from lightning_tdisent.errors import InputError
from lightning_tdisent.files import write_whole
from lightning_tdisent.report import figures
from lightning_tdisent.report.page import document, html_table
from lightning_tdisent.report.study import Study
from lightning_tdisent.report.table import tables


def pool(repeats: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of repeated studies as one set: every number is a mean, ``NAME_sd`` its standard deviation (of n - 1).

    Raises InputError for repeats that compare other models or measure by another protocol.
    """
    kinds = [{row["name"]: row["protocol"] for row in rows if "refused" not in row} for rows in repeats]
    if odd := [f"repeat {i + 1} has {kind}" for i, kind in enumerate(kinds) if kind != kinds[0]]:
        raise InputError(f"these are not one study with other seeds: repeat 1 has {kinds[0]}, {'; '.join(odd)}")
    out = []
    for name in kinds[0]:
        alike = [next(row for row in rows if row["name"] == name) for rows in repeats]
        row = {k: v for k, v in alike[0].items() if not k.endswith(("_images", "_terms"))}  # of one training
        for key, value in alike[0].items():
            if isinstance(value, float) and all(isinstance(other.get(key), float) for other in alike):
                values = [other[key] for other in alike]
                row |= {key: fmean(values), **({f"{key}_sd": stdev(values)} if len(values) > 1 else {})}
            elif key in ("x0_mse", "eps_mse"):
                row[key] = {state: fmean(other[key][state] for other in alike) for state in value}
            elif isinstance(value, int) and key.startswith("images_seen"):
                row[key] = round(fmean(other[key] for other in alike))
        out.append(row)
    return out


def write_page(studies: Sequence[Study], path: Path) -> list[dict[str, Any]]:
    """Write the page of repeated studies; returns its rows."""
    if len({study.folder.resolve() for study in studies}) < len(studies):
        raise InputError(f"a folder is named twice: {', '.join(str(study.folder) for study in studies)}")
    rows = pool([study.rows for study in studies])
    folders = html.escape(", ".join(str(study.folder) for study in studies))
    title = html.escape(studies[0].title)
    parts = [f"<h1>{title}</h1><p>Means and standard deviations of {len(studies)} trainings: {folders}.</p>"]
    for line, alike in tables(rows):
        parts.append(f"<p>{html.escape(line)}</p>{html_table(alike)}")
    models = [row for row in rows if "networks" in row]
    parts += [figures.quality_over_compute(models), figures.errors_per_state(models)]
    write_whole(path, document(studies[0].title, parts).encode())
    return rows
