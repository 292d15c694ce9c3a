"""Summary of a split of shards: pictures, values and classes, as one PNG and a table for the terminal."""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from lightning_tdisent.data import splits
from lightning_tdisent.data.decode import BadSample, Decoder
from lightning_tdisent.data.image_set import Sample
from lightning_tdisent.data.prepare import caption_count
from lightning_tdisent.data.raw.source import class_table, names_in
from lightning_tdisent.data.remote import is_remote
from lightning_tdisent.data.shards import Policy, Shards
from lightning_tdisent.data.tars import PREPARED, SUFFIXES
from lightning_tdisent.report.figures import STYLE
from lightning_tdisent.report.palette import COLOURS

PICTURES = 72
BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Look:
    """Summary of ``looked`` samples spread over a split, and the classes of all samples.

    samples: those to show; sizes: number of samples of each shape (C, H, W); values: for each channel (one for grey
    images) the counts of 0 .. 255, or, for latents, of 256 bins of [-4, 4]; ends: smallest and largest value; latent:
    whether samples are latents; classes: number of samples of each class that has any, in order; bad: errors of samples
    that could not be decoded; prepared: the record of `data prepare` for the split.
    """

    split: str
    shards: Shards
    samples: list[Sample]
    looked: int
    sizes: Counter[tuple[int, ...]]
    values: Tensor
    ends: tuple[float, float]
    latent: bool
    classes: dict[int, int]
    bad: list[str]
    prepared: dict[str, Any]


def look(path: str | Path, split: str, n: int = 1000) -> Look:
    """Decode ``n`` samples spread over a split; samples that cannot be decoded are listed in ``bad``."""
    shards = Shards.open(path, split, Decoder(3), Policy("skip", 1.0))
    wanted = set(np.linspace(0, len(shards) - 1, min(n, len(shards))).astype(int).tolist())
    shown = set(sorted(wanted)[:: max(1, len(wanted) // PICTURES)])
    samples: list[Sample] = []
    bad: list[str] = []
    sizes, values, latent, looked = Counter[tuple[int, ...]](), torch.zeros(0, 256), False, 0
    ends = math.inf, -math.inf
    if shards.random_access:
        found = ((i, members) for i in sorted(wanted) for members in shards.read([i]))
    else:
        found = ((i, members) for i, members in shards if i in wanted)
    for number, members in found:
        try:
            if isinstance(members, BadSample):
                raise members
            sample = {**shards.decoder(members, shards.name(number)), "id": number}
        except BadSample as error:
            bad.append(str(error))
            continue
        looked += 1
        latent = "latent" in sample
        image, low, high = (sample["latent"][0, 0], -4, 4) if latent else (sample["image"], 0, 256)
        counts = torch.stack([torch.histc(plane.float(), 256, low, high) for plane in image])
        values = counts + (values if len(values) == len(counts) else 0)
        sizes[tuple(image.shape)] += 1
        ends = min(ends[0], float(image.min())), max(ends[1], float(image.max()))
        samples += [sample] if number in shown else []
    if sizes and not latent and all(torch.equal(counts, values[0]) for counts in values):
        values = values[:1]
    labels = shards.classes()
    numbers, counts = labels[labels >= 0].unique(return_counts=True)  # memory by samples, not by the largest number
    classes = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
    return Look(split, shards, samples, looked, sizes, values, ends, latent, classes, bad, _prepared(path, split))


def _prepared(path: str | Path, split: str) -> dict[str, Any]:
    """Return the record of `data prepare` next to the shards, empty if there is none."""
    file = Path(path) / f"{split}{PREPARED}"
    try:
        record = json.loads(file.read_text(encoding="utf-8")) if not is_remote(str(path)) and file.is_file() else {}
    except (OSError, ValueError):
        record = {}
    return record if isinstance(record, dict) else {}


def table(look: Look) -> Table:
    """Return the summary as a table for the terminal."""
    index = look.shards.index
    out = Table(title=f"{look.shards.where} ({look.split})", show_header=False, title_justify="left")
    out.add_column(no_wrap=True)
    out.add_column(overflow="fold")
    size = sum(shard.bytes for shard in index.shards)
    out.add_row("samples", f"{len(index):,} in {len(index.shards)} shards, {size / 1e6:,.1f} MB")
    out.add_row("members", ", ".join(index.extensions))
    out.add_row("digest", f"{look.shards.digest}, {'indexed' if index.hashed else 'no index: nothing can be verified'}")
    shapes = ", ".join(f"{' x '.join(map(str, shape))} ({n})" for shape, n in look.sizes.most_common(4))
    more = f" and {len(look.sizes) - 4} more" if len(look.sizes) > 4 else ""
    out.add_row(f"shapes of {look.looked:,}", shapes + more)
    for name, counts in zip(_channels(look), look.values, strict=True):
        bars = counts.view(32, 8).sum(1)
        heights = (bars / bars.max().clamp_min(1) * 8).ceil().int().tolist()
        out.add_row(f"values, {name}", "".join(BLOCKS[height] for height in heights))
    if look.looked:
        out.add_row("range of values", f"{look.ends[0]:g} to {look.ends[1]:g}")
    if look.classes:
        n = look.classes
        most = max(n, key=lambda number: n[number])
        ends = f"{min(n.values()):,} to {n[most]:,} (class {most})"
        out.add_row("classes", f"{len(n)} of {max(n) + 1:,}, with {ends} samples each")
    if names := look.prepared.get("classes"):
        out.add_row("class numbers", escape(class_table(names)))
    if index.regions is not None:
        out.add_row("captions", caption_count(index.captions, len(index)))
    if not is_remote(look.shards.where):
        found = splits.found(name for name in names_in(Path(look.shards.where)) if name.endswith(SUFFIXES))
        out.add_row(
            "splits here", ", ".join(f"{name} ({len(files)} shards)" for name, files in found.items()) or "none named"
        )
    if span := look.prepared.get("range"):
        out.add_row("prepared with", f"--range {span[0]:g},{span[1]:g}")
    if notes := look.prepared.get("notes"):
        out.add_row("when prepared", escape("\n".join(notes)))
    if notes := index.notes:
        out.add_row("shards", escape("\n".join(notes)))
    out.add_row("cannot be decoded", f"{len(look.bad)}" + "".join(f"\n{line}" for line in look.bad[:10]))
    return out


def draw(look: Look, columns: int = 12, rows: int = 6) -> Figure:
    """Draw a contact sheet with class numbers, a histogram of the values, and the number of samples per class."""
    with mpl.rc_context(STYLE):
        figure = Figure((12, 10), layout="constrained")
        upper, lower = np.asarray(figure.subfigures(2, 1, height_ratios=(rows, 3))).tolist()
        chosen = np.linspace(0, len(look.samples) - 1, min(columns * rows, len(look.samples))).astype(int)
        places = upper.subplots(rows, columns).flat
        for axes in places:
            axes.axis("off")
        for axes, i in zip(places[: len(chosen)], chosen.tolist(), strict=True):
            sample = look.samples[i]
            axes.imshow(_picture(sample), interpolation="nearest")
            axes.set_title(sample["label"] if sample["label"] >= 0 else "", fontsize=7, pad=2)
        left, right = lower.subplots(1, 2)
        at = np.linspace(-4, 4, 256) if look.latent else np.arange(256)
        names = _channels(look)
        colours = [COLOURS[5]] if names == ["grey"] else [COLOURS[1], COLOURS[2], COLOURS[0], *COLOURS[3:]]
        for n, (counts, name) in enumerate(zip(look.values, names, strict=True)):
            colour = colours[n % len(colours)]
            left.plot(at, counts / counts.sum().clamp_min(1), label=name, color=colour, lw=1)
        left.set(title=f"values of {look.looked:,} samples", xlabel="latent" if look.latent else "grey level")
        if names:
            left.legend()
        right.bar(list(look.classes), list(look.classes.values()), width=1 if len(look.classes) > 50 else 0.8)
        right.set(title="samples per class" if len(look.classes) else "no classes", xlabel="class")
        right.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.suptitle(f"{Path(look.shards.where).name}, {look.split}: {len(look.shards):,} samples")
    return figure


def _channels(look: Look) -> list[str]:
    names = {0: [], 1: ["grey"], 3: ["red", "green", "blue"]}
    n = len(look.values)
    return [f"channel {number}" for number in range(n)] if look.latent else names[n]


def _picture(sample: Sample) -> np.ndarray:
    if "image" in sample:
        image: Tensor = sample["image"]
        return image.permute(1, 2, 0).numpy()
    planes = sample["latent"][0, 0].float()
    planes = planes[: 3 if len(planes) > 2 else 1]  # the first channels of a latent
    shown: Tensor = (planes.clamp(-2, 2) + 2) / 4
    return shown.expand(3, -1, -1).permute(1, 2, 0).numpy()
