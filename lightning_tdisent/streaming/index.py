"""What is in the shards of a split, and what their bytes were.

An index lies beside the shards as ``{split}.index.safetensors``. Every byte of a tar belongs to one sample: the region
of a sample goes from its first header to that of the next one. The index has the place, length and CRC-32 of every
region (any one flipped bit changes it) and the places of its members, so that a sample is one read; and per shard
its name, bytes, SHA-256, number of samples and a hash of its keys. Without the regions (``regions=False``) it is one
row per shard, for a corpus whose samples are too many to list.
"""

import hashlib
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from lightning_tdisent.errors import Halted, InputError
from lightning_tdisent.files import write_whole
from lightning_tdisent.streaming.tars import (
    MAX_REGION,
    checksums,
    file_system,
    hash_file,
    is_remote,
    layout,
    open_tar,
    size_of,
    store_errors,
)

FORMAT = "lightning_tdisent.index/1"
MAX_EXTENSIONS = 256

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Shard:
    """A row of an index: what a shard is. The SHA-256 is of the file as it lies there, empty if it was not read."""

    name: str
    bytes: int
    sha256: str
    samples: int
    keys: str


@dataclass(frozen=True)
class Regions:
    """What every sample of some shards is: N samples with M members in all; offsets are within the (unzipped) tar."""

    begin: Array  # (N,) int64
    size: Array  # (N,) int64
    crc: Array  # (N,) uint32, or (0,) if the bytes were not read
    first: Array  # (N + 1,) int64: members first[i] .. first[i + 1] - 1 are those of sample i
    member_begin: Array  # (M,) int64, within the region
    member_size: Array  # (M,) int64
    member_kind: Array  # (M,) uint8, number of the extension
    key_end: Array  # (N,) int64, in keys
    keys: Array  # (..,) uint8, all keys in UTF-8, one after the other


@dataclass(frozen=True)
class Index:
    """The shards of a split, and the regions of all samples unless they are too many to list."""

    shards: tuple[Shard, ...]
    extensions: tuple[str, ...]
    regions: Regions | None

    @cached_property
    def starts(self) -> Array:
        """(shards + 1,) int64: number of the first sample of each shard, and the number of all."""
        return np.concatenate([[0], np.cumsum([shard.samples for shard in self.shards])]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def hashed(self) -> bool:
        """Whether the bytes were read when the index was made."""
        return all(shard.sha256 for shard in self.shards)

    @property
    def digest(self) -> str:
        """Short hash of the names and bytes of the shards: which data a model has seen."""
        total = hashlib.sha256()
        for shard in self.shards:
            total.update(shard.name.encode() + bytes.fromhex(shard.sha256))
        return total.hexdigest()[:16]

    def part(self, shard: int) -> Self:
        """The index of one shard alone."""
        row, r = self.shards[shard : shard + 1], self.regions
        if r is None:
            return type(self)(row, self.extensions, None)
        chosen = slice(int(self.starts[shard]), int(self.starts[shard + 1]))
        first = r.first[chosen.start : chosen.stop + 1]
        members = slice(int(first[0]), int(first[-1]))
        before = int(r.key_end[chosen.start - 1]) if chosen.start else 0
        ends = r.key_end[chosen] - before
        regions = Regions(
            begin=r.begin[chosen],
            size=r.size[chosen],
            crc=r.crc[chosen],
            first=first - first[0],
            member_begin=r.member_begin[members],
            member_size=r.member_size[members],
            member_kind=r.member_kind[members],
            key_end=ends,
            keys=r.keys[before : before + (int(ends[-1]) if len(ends) else 0)],
        )
        return type(self)(row, self.extensions, regions)

    def place(self, sample: int) -> tuple[int, int]:
        """Number of its shard, and its number in there."""
        shard = int(np.searchsorted(self.starts, sample, "right")) - 1
        return shard, sample - int(self.starts[shard])

    def name(self, sample: int) -> str:
        """Shard, key and bytes, for messages."""
        shard, number = self.place(sample)
        r = self.regions
        if r is None:
            return f"{self.shards[shard].name}: sample {number}"
        begin, size = int(r.begin[sample]), int(r.size[sample])
        return f"{self.shards[shard].name}: sample {self.key(sample)} (bytes {begin} to {begin + size - 1})"

    def key(self, sample: int) -> str:
        """As the shard has it."""
        r = self.regions
        assert r is not None
        return r.keys[int(r.key_end[sample - 1]) if sample else 0 : int(r.key_end[sample])].tobytes().decode()

    def members(self, sample: int, region: bytes) -> dict[str, bytes]:
        """Content by extension, cut from the region of a sample."""
        r = self.regions
        assert r is not None
        chosen = slice(r.first[sample], r.first[sample + 1])
        members = zip(r.member_kind[chosen], r.member_begin[chosen], r.member_size[chosen], strict=True)
        return {self.extensions[kind]: region[begin : begin + size] for kind, begin, size in members}

    def save(self, path: str | Path) -> None:
        """Write the file: safetensors, whose metadata holds the rows of the shards and a hash of all else.

        Raises `Halted` if it cannot be written.
        """
        arrays = asdict(self.regions) if self.regions else {"none": np.zeros(0, np.uint8)}
        table = json.dumps({"shards": [asdict(s) for s in self.shards], "extensions": self.extensions})
        about = {"format": FORMAT, "table": table, "sha256": _hash(table, arrays)}
        content = save_arrays(arrays, {"index": json.dumps(about)})  # one key: their order is not kept
        if is_remote(str(path)):
            system, inside = file_system(str(path))
            try:
                with store_errors():
                    system.pipe_file(inside, content)
            except OSError as error:
                raise Halted(f"{path}: cannot be written: {error.strerror or error}") from None
        else:
            write_whole(path, content)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read the file; raises FileNotFoundError, or `InputError` if it is damaged or of another format."""
        try:
            if is_remote(str(path)):
                system, inside = file_system(str(path))
                with store_errors():
                    content = system.cat_file(inside)
            else:
                content = Path(path).read_bytes()
            size = int.from_bytes(content[:8], "little")
            metadata = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["index"])
            if metadata["format"] != FORMAT:
                raise InputError(f"{path} has the format {metadata['format']}, expected {FORMAT}: make it anew")
            arrays, table = load_arrays(content), json.loads(metadata["table"])
            if _hash(metadata["table"], arrays) != metadata["sha256"]:
                raise ValueError("its hash is another")
            shards = tuple(Shard(**row) for row in table["shards"])
            index = cls(shards, tuple(table["extensions"]), None if "none" in arrays else Regions(**arrays))
            if wrong := _misfit(index):
                raise ValueError(wrong)
            return index
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
            SafetensorError,
        ) as error:
            if isinstance(error, InputError):
                raise
            folder = str(path).rpartition("/")[0]
            raise InputError(
                f"{path} is damaged ({error}); make it anew: python -m lightning_tdisent data index {folder}"
            ) from None
        except FileNotFoundError:
            raise
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def _misfit(index: Index) -> str:
    """What in a file that says it is an index cannot be; empty if nothing."""
    for s in index.shards:
        numbers = isinstance(s.bytes, int) and isinstance(s.samples, int) and s.bytes >= 0 and s.samples >= 0
        if not numbers or not isinstance(s.name, str) or not re.fullmatch("([0-9a-f]{64})?", s.sha256):
            return f"the shard {s.name!r}"
    r, n = index.regions, len(index)
    if r is None:
        return ""
    kinds = {name: np.uint8 if name in ("member_kind", "keys") else np.int64 for name in asdict(r)} | {"crc": np.uint32}
    if bad := [k for k, kind in kinds.items() if getattr(r, k).dtype != kind or getattr(r, k).ndim != 1]:
        return f"the type of {bad[0]}"
    m = len(r.member_kind)
    lengths = {"begin": n, "size": n, "first": n + 1, "key_end": n, "member_begin": m, "member_size": m}
    if bad := [k for k, length in lengths.items() if len(getattr(r, k)) != length]:
        return f"the length of {bad[0]}"
    if len(r.crc) not in (0, n) or (index.hashed and len(r.crc) != n):
        return "the length of crc"
    owner = np.repeat(np.arange(n), np.diff(r.first)) if (np.diff(r.first) >= 0).all() else np.zeros(0)
    fits = len(owner) == m and r.first[0] == 0 and (np.diff(r.key_end, prepend=0) >= 0).all()
    fits = fits and (r.key_end[-1] if n else 0) == len(r.keys) and (r.member_kind < len(index.extensions)).all()
    fits = fits and (r.begin >= 0).all() and (r.size >= 0).all() and (r.size <= MAX_REGION).all()
    fits = fits and (r.member_begin >= 0).all() and (r.member_size >= 0).all()
    fits = fits and bool((r.member_begin + r.member_size <= r.size[owner]).all())
    try:
        r.keys.tobytes().decode()
    except UnicodeDecodeError:
        fits = False
    return "" if fits else "its numbers do not fit together"


def _hash(table: str, arrays: dict[str, Array]) -> str:
    total = hashlib.sha256(table.encode())
    for name in sorted(arrays):
        total.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        total.update(arrays[name].tobytes())
    return total.hexdigest()


def path_of(folder: str | Path, split: str) -> str:
    """File of the index of a split."""
    return f"{str(folder).rstrip('/')}/{re.sub(r'[^A-Za-z0-9_.-]+', '_', split)}.index.safetensors"


def scan(url: str, hashed: bool = True, regions: bool = True) -> Index:
    """The index of one shard. Not ``hashed``, only headers are read, so that a plain tar costs little."""
    name = url.rpartition("/")[2]
    try:
        with open_tar(url) as stream:
            found, end = layout(stream, name)
            crc = checksums(stream, [begin for begin, *_ in found], end) if hashed and regions else []
        size, sha256 = hash_file(url) if hashed else (size_of(url), "")
    except (tarfile.TarError, EOFError, OSError, zlib.error, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{url} is damaged: {error}") from None
    keys = [key for _, key, _ in found]
    shard = Shard(name, size, sha256, len(found), hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16])
    extensions = sorted({kind for *_, members in found for kind in members})
    bare = [(key, begin) for begin, key, members in found if "cls" not in members]
    if 0 < len(bare) < len(found):
        raise InputError(
            f"{len(bare):,} of {len(found):,} samples have no class (KEY.cls), first {name}: sample {bare[0][0]} (byte "
            f"{bare[0][1]})"
        )
    if not regions or len(extensions) > MAX_EXTENSIONS:  # which `join` refuses
        return Index((shard,), tuple(extensions), None)
    begins = [begin for begin, *_ in found]
    begin = np.array(begins, np.int64)
    begin[:1] = 0
    members = [(at - begin[n], size, kind) for n, (*_, m) in enumerate(found) for kind, (at, size) in m.items()]
    encoded, kinds = [key.encode() for key in keys], {kind: number for number, kind in enumerate(extensions)}
    return Index(
        (shard,),
        tuple(extensions),
        Regions(
            begin=begin,
            size=np.diff(np.append(begin, end)).astype(np.int64) if found else np.zeros(0, np.int64),
            crc=np.array(crc, np.uint32),
            first=np.cumsum([0, *(len(m) for *_, m in found)]).astype(np.int64),
            member_begin=np.array([m[0] for m in members], np.int64),
            member_size=np.array([m[1] for m in members], np.int64),
            member_kind=np.array([kinds[m[2]] for m in members], np.uint8),
            key_end=np.cumsum([len(key) for key in encoded], dtype=np.int64),
            keys=np.frombuffer(b"".join(encoded), np.uint8),
        ),
    )


def join(parts: Sequence[Index]) -> Index:
    """One index of several shards; refuses one that is there twice, and samples with and without a class."""
    extensions = tuple(sorted({name for part in parts for name in part.extensions}))
    shards = tuple(shard for part in parts for shard in part.shards)
    if len(extensions) > MAX_EXTENSIONS:
        raise InputError(
            f"the samples have {len(extensions)} kinds of members, more than {MAX_EXTENSIONS}; do keys have dots?"
        )
    tables = [part.regions for part in parts]
    _check(parts)
    if any(table is None for table in tables):
        return Index(shards, extensions, None)
    kept = [
        replace(t, member_kind=_renumber(t.member_kind, p.extensions, extensions))
        for t, p in zip(tables, parts, strict=True)
        if t
    ]

    def chained(name: str) -> Array:
        return np.concatenate([getattr(table, name) for table in kept])

    def summed(name: str, first: bool) -> Array:
        """Running ends, which begin anew in every part."""
        out: list[Array] = []
        before = 0
        for table in kept:
            ends = getattr(table, name)
            out.append(ends[first and bool(out) :] + before)
            before = int(out[-1][-1]) if len(out[-1]) else before
        return np.concatenate(out)

    plain = ("begin", "size", "crc", "member_begin", "member_size", "member_kind", "keys")
    regions = Regions(**{k: chained(k) for k in plain}, first=summed("first", True), key_end=summed("key_end", False))
    return Index(shards, extensions, regions)


def _renumber(kinds: Array, old: Sequence[str], new: Sequence[str]) -> Array:
    return np.array([new.index(name) for name in old] or [0], np.uint8)[kinds]


def _check(parts: Sequence[Index]) -> None:
    """Refuse one shard twice, and shards with beside shards without classes."""
    seen: dict[str, str] = {}
    labelled: dict[bool, str] = {}
    for part in parts:
        shard = part.shards[0]
        if shard.samples:
            labelled.setdefault("cls" in part.extensions, shard.name)
            if shard.sha256 and (other := seen.setdefault(shard.sha256, shard.name)) != shard.name:
                raise InputError(f"{other} and {shard.name} are the same, byte for byte: remove one of them")
    if len(labelled) > 1:
        raise InputError(
            f"the samples of {labelled[False]} have no class (KEY.cls), those of {labelled[True]} have one"
        )


def build(
    files: Sequence[str | Path],
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
    hashed: bool = True,
    regions: bool = True,
) -> Index:
    """The index of these shards, in this order, scanned by so many processes."""
    urls = [str(file) for file in files]
    work = partial(scan, hashed=hashed, regions=regions)
    parts = []
    if jobs > 1 and len(urls) > 1:
        with ProcessPoolExecutor(min(jobs, len(urls)), mp_context=get_context("forkserver")) as pool:
            for part in pool.map(work, urls):
                parts.append(part)
                if progress:
                    progress(len(parts), len(urls))
    else:
        for url in urls:
            parts.append(work(url))
            if progress:
                progress(len(parts), len(urls))
    return join(parts)
