"""A look at a split of shards: pictures, values and classes, as one PNG and a table for the terminal."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table
from torch import Tensor

from lightning_tdisent.report.figures import COLOURS, STYLE
from lightning_tdisent.streaming.decode import BadSample, Decoder
from lightning_tdisent.streaming.shards import Policy, Sample, Shards

PICTURES = 72
BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Look:
    """What ``looked`` samples spread over a split look like, some of them decoded, and the classes of all.

    sizes: how often each shape (C, H, W); values: for each channel, of grey images for one, the counts of 0 .. 255, or
    of latents in 256 bins of [-4, 4]; classes: number of samples of class 0, 1, ..; bad: what could not be decoded.
    """

    split: str
    shards: Shards
    samples: list[Sample]
    looked: int
    sizes: Counter[tuple[int, ...]]
    values: Tensor
    latent: bool
    classes: Tensor
    bad: list[str]


def look(path: str | Path, split: str, n: int = 1000) -> Look:
    """Decode ``n`` samples spread over a split; nothing that is bad stops it."""
    shards = Shards.open(path, split, Decoder(3), Policy("skip", 1.0))
    wanted = set(np.linspace(0, len(shards) - 1, min(n, len(shards))).astype(int).tolist())
    shown = set(sorted(wanted)[:: max(1, len(wanted) // PICTURES)])
    samples: list[Sample] = []
    bad: list[str] = []
    sizes, values, latent, looked = Counter[tuple[int, ...]](), torch.zeros(0, 256), False, 0
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
        samples += [sample] if number in shown else []
    if sizes and not latent and all(torch.equal(counts, values[0]) for counts in values):
        values = values[:1]
    labels = shards.classes()
    classes = torch.bincount(labels[labels >= 0]) if bool((labels >= 0).any()) else torch.empty(0, dtype=torch.int64)
    return Look(split, shards, samples, looked, sizes, values, latent, classes, bad)


def table(look: Look) -> Table:
    """For the terminal."""
    index = look.shards.index
    out = Table(title=f"{look.shards.where} ({look.split})", show_header=False, title_justify="left")
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
    if len(look.classes):
        n, there = look.classes, int((look.classes > 0).sum())
        ends = f"{int(n[n > 0].min()):,} to {int(n.max()):,} (class {int(n.argmax())})"
        out.add_row("classes", f"{there} of {len(n)}, with {ends} samples each")
    out.add_row("cannot be decoded", f"{len(look.bad)}" + "".join(f"\n{line}" for line in look.bad[:10]))
    return out


def draw(look: Look, columns: int = 12, rows: int = 6) -> Figure:
    """Contact sheet with class numbers, histogram of the values, samples per class."""
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
        right.bar(range(len(look.classes)), look.classes.tolist(), width=1 if len(look.classes) > 50 else 0.8)
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
        return sample["image"].permute(1, 2, 0).numpy()
    planes = sample["latent"][0, 0].float()
    planes = planes[: 3 if len(planes) > 2 else 1]  # of a latent, its first channels
    return ((planes.clamp(-2, 2) + 2) / 4).expand(3, -1, -1).permute(1, 2, 0).numpy()
