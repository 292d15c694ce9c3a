"""Existing shards of WebDataset, whose samples go through with all their members."""

import functools
import gzip
import hashlib
import zlib
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from lightning_tdisent.errors import InputError
from lightning_tdisent.streaming.index import Index
from lightning_tdisent.streaming.raw.source import Item, files_of, hashed
from lightning_tdisent.streaming.scan import build
from lightning_tdisent.streaming.tars import SUFFIXES


@dataclass(frozen=True, eq=False)
class Tars:
    """Samples of shards, read where their headers say; gzipped ones in order only, as one is unzipped as it is read."""

    files: list[Path]
    index: Index
    shuffled: bool | None
    kind: str = "webdataset"
    classes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Item:
        file, regions = self.files[self.index.place(i)[0]], self.index.regions
        assert regions is not None
        size = int(regions.size[i])
        try:
            with nullcontext(_unzipped(file)) if file.suffix == ".gz" else file.open("rb") as stream:
                stream.seek(int(regions.begin[i]))
                region = stream.read(size)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{file} cannot be read: {error}") from None
        if len(region) != size:
            raise InputError(f"{file} ends within {self.index.name(i)}. Has it changed?")
        return Item(f"{file.name}/{self.index.key(i)}", self.index.members(i, region))

    def fingerprint(self) -> str:
        """Hash of the names, sizes and keys of the shards, and of the sizes of all members."""
        regions = self.index.regions
        assert regions is not None
        sizes = hashlib.sha256(regions.member_size.tobytes() + regions.member_kind.tobytes()).hexdigest()
        rows = [f"{s.name}\0{s.bytes}\0{s.keys}" for s in self.index.shards]
        return hashed([*rows, *self.index.extensions, sizes])


@functools.lru_cache(maxsize=1)  # kept open: going on is cheap, starting anew is not
def _unzipped(file: Path) -> gzip.GzipFile:
    return gzip.GzipFile(file)


def find_tars(path: Path, split: str) -> list[Path]:
    """The shards of a split."""
    return files_of(path, split, SUFFIXES)


def open_tars(files: list[Path], split: str) -> Tars:
    """Shards with an index of their own: it is made of their headers, whatever lies beside them."""
    _unzipped.cache_clear()  # of files that may have been replaced since
    return Tars(files, build(files, hashed=False), None if any(file.suffix == ".gz" for file in files) else False)
