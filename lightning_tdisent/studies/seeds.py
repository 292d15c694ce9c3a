"""Pool repetitions of a study with different training seeds: means, standard deviations, quality over compute."""

import html
import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from urllib.parse import quote

import torch

from lightning_tdisent.errors import InputError
from lightning_tdisent.evaluation.provenance import facts, html_facts
from lightning_tdisent.files import output_path, write_whole
from lightning_tdisent.images import grid, zoomed
from lightning_tdisent.metrics.likelihood import HOW, KEYS, OF_IMAGES, REFUSED
from lightning_tdisent.report import figures
from lightning_tdisent.report.page import html_cells, html_table, marks, page
from lightning_tdisent.report.palette import Palette
from lightning_tdisent.report.table import costs, mean_eps_mse, notes, tables
from lightning_tdisent.schemas import differences
from lightning_tdisent.studies.results import Study

# fields of a row that must be equal in all repetitions of a study
SAME = (
    *("protocol", "given", "draws", "images", "sampler", "nfe", "rows", "table", "prior", "cut", "networks", "weights"),
    *("weights_kind", "recipe", "images_a_step", "training_data", HOW, "preview", "differs"),
)
OWN = ("sha256", "seeds")  # fields that must differ between repetitions
ROUNDING = 0.01  # relative tolerance of the images seen: an adaptive budget is spent in whole validations


def pool(repeats: Sequence[Sequence[dict[str, Any]]], names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Merge the rows of repeated studies: each number becomes the mean, ``NAME_sd`` the standard deviation (n - 1).

    repeats: rows of each repetition.
    names: names of the repetitions, for messages.

    Raises InputError, with all differences, for repetitions that compare different models, use different protocols, or
    share a seed or weights.
    """
    names = names or [f"repeat {i + 1}" for i in range(len(repeats))]
    measured = [{row["name"]: row for row in rows if "refused" not in row} for rows in repeats]
    kinds = measured[0]
    lines = []
    for who, rows in zip(names[1:], measured[1:], strict=True):
        lines += [f"{who} lacks {name!r}" for name in kinds.keys() - rows.keys()]
        lines += [f"{who} has {name!r} besides" for name in rows.keys() - kinds.keys()]
        for name in [name for name in kinds if name in rows]:
            first, other = kinds[name], rows[name]
            both = [key for key in SAME if key in first and key in other]
            differ = [key for key in both if _comparable(key, first[key]) != _comparable(key, other[key])]
            if "source" in first:  # a folder of generated images differs between trainings; real images do not
                differ = [key for key in differ if key != "images"]
            differ += [key for key in ("prior", "preview", "given") if (key in first) != (key in other)]
            seen, others = first.get("images_seen", 0), other.get("images_seen", 0)
            differ += ["images_seen"] * (abs(seen - others) > ROUNDING * max(seen, others))
            for key in differ:
                a, b = ({key: _comparable(key, row.get(key))} for row in (first, other))
                lines += [f"{name}: {line}" for line in differences(a, b, f"in {names[0]}", f"in {who}")]
    for i, who in enumerate(names):
        for k in range(i):
            for name in [name for name in measured[i] if name in measured[k]]:
                mine, theirs = measured[i][name], measured[k][name]
                same = [key for key in OWN if mine.get(key) and mine.get(key) == theirs.get(key)]
                what = "weights" if "sha256" in same else "seed"
                lines += [f"{name}: the same {what} in {names[k]} and {who}"] * any(same)
    if lines:
        raise InputError("these are not one study with other seeds:\n" + "\n".join(f"  - {line}" for line in lines))
    out = []
    for name in kinds:
        alike = [next(row for row in rows if row["name"] == name) for rows in repeats]
        own = ("measured", "start_note")
        lacking = _incomplete_keys(alike)
        row = {k: v for k, v in alike[0].items() if k not in (*own, *lacking, *OF_IMAGES)}
        for key, value in row.copy().items():
            if isinstance(value, float):
                values = [other[key] for other in alike]
                row |= {key: fmean(values), **({f"{key}_sd": stdev(values)} if len(values) > 1 else {})}
            elif key in ("x0_mse", "eps_mse"):
                row[key] = {state: fmean(other[key][state] for other in alike) for state in value}
                if key == "eps_mse" and len(alike) > 1:
                    row["eps_mse_sd"] = stdev(mean_eps_mse(other) for other in alike)
            elif isinstance(value, int) and all(isinstance(other.get(key), int) for other in alike):
                row[key] = round(fmean(other[key] for other in alike))
        row["repeats"] = len(alike)
        if lacking:
            repeat = dict(zip(names, alike, strict=True))
            why = [f"{who}: {other[REFUSED]}" for who, other in repeat.items() if REFUSED in other]
            why = why or [f"missing in {who}" for who, other in repeat.items() if not other.keys() >= set(lacking)]
            row["not_pooled"] = f"{', '.join(lacking)} left out, since not all trainings have them ({'; '.join(why)})"
        out.append(row)
    return out


def _incomplete_keys(alike: Sequence[dict[str, Any]]) -> list[str]:
    """Return the keys of numbers that some repetitions of a row lack.

    A mean over the others could be mistaken for a mean over all repetitions.
    """
    numbers = {k for row in alike for k, v in row.items() if isinstance(v, float) or k in ("x0_mse", "eps_mse")}
    lacking = {k for k in numbers if not all(isinstance(row.get(k), float | dict) for row in alike)}
    if any(REFUSED in row for row in alike):
        lacking |= {k for row in alike for k in row if k in KEYS}
    return sorted(lacking)


def _comparable(key: str, value: Any) -> Any:
    """Return a field without the parts that may differ between trainings.

    These are the number of averaged steps, and which rows kept their initial weights.
    """
    if key == "weights_kind":
        return ", ".join(sorted(set(str(value).split(", ")) - {"start"})) or "ema"
    if key != "recipe" or not isinstance(value, list):
        return value
    out = []
    for kind in value:
        average = kind["average"] and {k: v for k, v in kind["average"].items() if k not in ("steps", "before")}
        if (kept := kind | {"average": average}) not in out:
            out.append(kept)
    return sorted(out, key=lambda kind: json.dumps(kind, sort_keys=True))


def write_page(studies: Sequence[Study], path: Path) -> list[dict[str, Any]]:
    """Write the HTML page of repeated studies to ``path``; return its rows."""
    path = output_path(path)
    if len({study.folder.resolve() for study in studies}) < len(studies):
        raise InputError(f"a folder is given twice: {', '.join(str(study.folder) for study in studies)}")
    kept = {str(study.folder): study.rows for study in studies}
    rows = pool(list(kept.values()), list(kept))
    remarks = notes_of(kept, rows)
    numbers = "".join(html_table(alike, line) for line, alike in tables(rows))
    numbers += f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in remarks)}</ul>" if remarks else ""
    sections = {"Numbers": f"{numbers}<p>{marks(rows)}</p>"}
    models = [row for row in rows if "networks" in row]
    if models:
        palette = Palette(models)
        sections["Mean cost of the trainings"] = html_cells(costs(models)) + figures.cost(models, palette)
        curves = figures.quality_over_compute(models, palette) + figures.errors_per_state(models, palette)
        sections["Where the models are right and wrong"] = curves
    links = "".join(
        f'<li><a href="{quote(os.path.relpath(folder, path.parent))}/report.html">{html.escape(folder)}</a></li>'
        for folder in kept
    )
    sections["Samples and pages of the trainings"] = _pictures(studies) + f"<ul>{links}</ul>"
    how = {folder: facts(own) for folder, own in kept.items()}
    sections["How these numbers were obtained"] = html_facts(how)
    trained = dict.fromkeys(filter(None, (study.trained_by for study in studies)))
    said = " ".join([f"Means and standard deviations of {len(studies)} trainings: {', '.join(kept)}.", *trained])
    measured = [row for own in kept.values() for row in own]
    write_whole(path, page(studies[0].title, rows, sections, measured, said).encode())
    return rows


def _pictures(studies: Sequence[Study]) -> str:
    """Return the first samples of each model, one row of images for each training."""
    drawn = [study.images() for study in studies]
    out = ""
    for name in drawn[0]:
        rows = [own[name][:12] for own in drawn if name in own]
        if len({row.shape for row in rows}) == 1:
            tiles = grid(zoomed(torch.cat(rows), 34), len(rows[0]))
            caption = f"{html.escape(name)}: a row for each training, the same seeds"
            out += figures.picture(tiles, tiles.shape[-1], caption)
    return out


def notes_of(kept: dict[str, list[dict[str, Any]]], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the notes on pooled rows, and a note with the folder for each row that could not be measured."""
    refused = [(folder, row) for folder, own in kept.items() for row in own if "refused" in row]
    return notes(rows) + [f"{folder}: {row['name']}: {row['refused']}" for folder, row in refused]
