"""Look at the images of a raw data set before they are converted: their sizes, and which of them to hold out."""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from lightning_tdisent.data.decode import IMAGES
from lightning_tdisent.data.raw.source import Item, Source, hashed
from lightning_tdisent.digests import digest
from lightning_tdisent.errors import InputError


@dataclass(frozen=True, eq=False)
class Part:
    """Some samples of a source.

    source: the whole data set.
    numbers: of the samples, int64 (n,).
    note: what this part is.
    """

    source: Source
    numbers: np.ndarray[Any, Any]
    note: str

    @property
    def kind(self) -> str:
        """Kind of the source."""
        return self.source.kind

    @property
    def classes(self) -> list[str]:
        """Names of the classes by number."""
        return self.source.classes

    @property
    def shuffled(self) -> bool | None:
        """As of the source."""
        return self.source.shuffled

    @property
    def notes(self) -> list[str]:
        """Notes of the source, and what this part is."""
        return [*self.source.notes, self.note]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Item:
        return self.source[int(self.numbers[i])]

    def fingerprint(self) -> str:
        """Return a hash of the source and of the numbers."""
        return hashed([self.source.fingerprint(), self.note, *map(str, self.numbers.tolist())])


def hold_out(
    source: Source, share: float, seed: int, progress: Callable[[int, int], None] | None = None
) -> tuple[Part, Part]:
    """Return the samples to train on, and the samples held out: about ``share`` of all, at least two.

    A hash of the seed and of the image's bytes decides, so that copies of an image are in one part, whatever their
    names, and an image keeps its part when others are added.

    Raises InputError for a share that is not between 0 and 1, for a source that cannot be read at random, and if one
    part would be empty.
    """
    if not 0 < share < 1:
        raise InputError.of_value("--hold-out", share, "expected a share of the images above 0 and below 1")
    if source.shuffled is None:
        raise InputError("--hold-out: gzipped shards can only be read in order; gunzip them, or use --hold-out 0")
    keys = np.empty(len(source), np.float64)
    for i in range(len(source)):
        members = source[i].members
        content = b"".join(members[name] for name in sorted(members) if name in IMAGES) or b"%d" % i
        keys[i] = int(digest(b"%d " % seed, content)[:14], 16) / 2**56
        if progress:
            progress(i + 1, len(source))
    least = np.sort(keys)[min(1, len(keys) - 1)]  # the second smallest key: at least two are held out
    held = keys <= max(share, least)
    counts = f"{int(held.sum()):,} of {len(source):,} images"
    if held.all():
        raise InputError(f"--hold-out {share:g}: would hold out all {len(source)} images; use --hold-out 0")
    note = f"no splits were found: {counts} are held out as the split test (--hold-out {share:g})"
    return Part(source, np.flatnonzero(~held), note), Part(source, np.flatnonzero(held), note)


def sizes_of(source: Source, most: int = 64) -> set[tuple[int, int]]:
    """Return the sizes (width, height) of up to ``most`` evenly spaced images that can be read."""
    out: set[tuple[int, int]] = set()
    if source.shuffled is None:
        return out
    for i in np.unique(np.linspace(0, len(source) - 1, most).astype(int)).tolist():
        members = source[i].members
        for content in (members[name] for name in members if name in IMAGES):
            with contextlib.suppress(OSError, ValueError, SyntaxError), Image.open(io.BytesIO(content)) as image:
                out.add(image.size)
    return out
