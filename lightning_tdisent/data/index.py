"""The index of a split: what its shards contain, with checksums.

An index is stored next to the shards as ``{split}.index.safetensors``. Every byte of a tar belongs to exactly one
sample: the region of a sample extends from its first header to the first header of the next sample. For each region,
the index stores the offset, the length, the CRC-32 (which changes with any single flipped bit) and the offsets of the
members, so that a sample is read with a single request. For each shard it stores the name, size in bytes, SHA-256,
number of samples and a hash of the keys. Without regions (``regions=False``) it has one row per shard only, for a
corpus with too many samples to list.
"""

import itertools
import json
import posixpath
import re
import zlib
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from lightning_tdisent.data.decode import IMAGES
from lightning_tdisent.data.remote import file_system, is_remote, store_errors
from lightning_tdisent.data.tars import MAX_REGION
from lightning_tdisent.digests import digest_of
from lightning_tdisent.errors import Halted, InputError
from lightning_tdisent.files import typed, write_whole
from lightning_tdisent.schemas import check_format, parse_json

FORMAT = "lightning_tdisent.index/2"  # version 1 had weaker image keys, in an array called content

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Shard:
    """One shard, as a row of an index.

    bytes: size of the file. sha256: of the file as stored (not unzipped); empty if the file was not read. samples:
    number of samples. keys: hash of their keys. unread: files that no decoder reads, as {kind: [count, first name]}.
    unusable: [number of samples that cannot be used, as far as the names of their members and their classes tell; what
    is wrong with the first].
    """

    name: str
    bytes: int
    sha256: str
    samples: int
    keys: str
    unread: dict[str, list[Any]] = field(default_factory=dict)
    unusable: list[Any] = field(default_factory=lambda: [0, ""])


@dataclass(frozen=True)
class Regions:
    """Location and checksum of N samples with M members in total. Offsets are within the (unzipped) tar."""

    begin: Array  # (N,) int64
    size: Array  # (N,) int64
    crc: Array  # (N,) uint32, or (0,) if the bytes were not read
    first: Array  # (N + 1,) int64: members first[i] .. first[i + 1] - 1 belong to sample i
    member_begin: Array  # (M,) int64, offset within the region
    member_size: Array  # (M,) int64
    member_kind: Array  # (M,) uint8, number of the extension in `Index.extensions`
    key_end: Array  # (N,) int64, end of each key in keys
    keys: Array  # (..,) uint8, all keys in UTF-8, concatenated
    # (N,) uint64, `digests.key64` of each image or latent, 0 for none; (0,) if the bytes were not read, or in an index
    # that an earlier version made
    images: Array = field(default_factory=lambda: np.zeros(0, np.uint64))


@dataclass(frozen=True)
class Index:
    """The shards of a split, and the regions of all samples unless there are too many to list."""

    shards: tuple[Shard, ...]
    extensions: tuple[str, ...]
    regions: Regions | None

    @cached_property
    def starts(self) -> Array:
        """Number of the first sample of each shard, followed by the total number: (shards + 1,) int64."""
        return np.concatenate([[0], np.cumsum([shard.samples for shard in self.shards])]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def hashed(self) -> bool:
        """Return whether the bytes of the shards were read when the index was made."""
        return all(shard.sha256 for shard in self.shards)

    @property
    def keyed(self) -> bool:
        """Return whether the index has image keys: it lists samples, and was not made by an earlier version."""
        return self.regions is not None and len(self.regions.images) == len(self)

    @property
    def captions(self) -> tuple[int, int]:
        """Return the number of samples with a caption (KEY.txt) and of those whose caption is empty.

        (0, 0) if the index does not list samples.
        """
        if self.regions is None or "txt" not in self.extensions:
            return 0, 0
        sizes = self.regions.member_size[self.regions.member_kind == self.extensions.index("txt")]
        return len(sizes), int((sizes == 0).sum())

    @property
    def digest(self) -> str:
        """Short hash of the names and bytes of the shards. It identifies the data that a model was trained on."""
        return digest_of(shard.name.encode() + bytes.fromhex(shard.sha256) for shard in self.shards)[:16]

    @cached_property
    def folders(self) -> list[str]:
        """Return the subfolder of each sample: its folder directly below the deepest folder that contains all images.

        The subfolder is "" for samples in that deepest folder itself and for samples without an image. The list is
        empty if there are no subfolders, or if the index does not list samples.
        """
        r, kinds = self.regions, [k for k, name in enumerate(self.extensions) if name in IMAGES]
        if r is None or not (r.keys == ord("/")).any():
            return []
        keys = (r.keys[a:b].tobytes().decode() for a, b in itertools.pairwise([0, *r.key_end.tolist()]))
        shown = np.zeros(len(self), bool)
        shown[np.repeat(np.arange(len(self)), np.diff(r.first))[np.isin(r.member_kind, kinds)]] = True
        above = [key.rpartition("/")[0] if image else None for key, image in zip(keys, shown.tolist(), strict=True)]
        root = posixpath.commonpath(places) if (places := {place for place in above if place is not None}) else ""
        out = ["" if p is None else p[len(root) :].lstrip("/").partition("/")[0] for p in above]
        return out if any(out) else []

    @property
    def unread(self) -> dict[str, tuple[int, str]]:
        """Return the files in the shards that are not read, as {kind: (count, first name)}."""
        out: dict[str, tuple[int, str]] = {}
        for shard in self.shards:
            for kind, (count, name) in shard.unread.items():
                before, first = out.get(kind, (0, f"{shard.name}/{name}"))
                out[kind] = before + count, first
        return out

    @property
    def unusable(self) -> tuple[int, str]:
        """Return how many samples cannot be used, as far as the index tells, and what is wrong with the first."""
        said = [shard.unusable[1] for shard in self.shards if shard.unusable[0]]
        return sum(shard.unusable[0] for shard in self.shards), said[0] if said else ""

    @property
    def notes(self) -> list[str]:
        """Return messages, one line each, about content of the shards that will not be read or cannot be used."""
        out = [f"not read: {kind} ({n:,}, first {name})" for kind, (n, name) in sorted(self.unread.items())]
        if names := sorted(set(self.folders) - {""}) if "cls" not in self.extensions else []:
            more = f", .. ({len(names):,} in all)" if len(names) > 5 else ""
            said = f"folders in the shards are not read as classes ({', '.join(names[:5])}{more})"
            out.append(f"{said}; data prepare can turn them into classes")
        count, first = self.unusable
        return [*out, f"samples that cannot be used: {count:,} of {len(self):,}, first {first}"] if count else out

    def shared(self, other: "Index") -> int:
        """Return how many samples have an image that is also in ``other``, byte for byte.

        If either index has no image keys (see ``keyed``), return how many samples are in shards that both indices have
        (by SHA-256). Samples without an image, whose key is 0, are not counted.
        """
        mine, theirs = self.regions, other.regions
        if mine is None or theirs is None or not (self.keyed and other.keyed):
            there = {shard.sha256 for shard in other.shards} - {""}
            return sum(shard.samples for shard in self.shards if shard.sha256 in there)
        one, two = (r.images[r.images != 0] for r in (mine, theirs))
        if not (len(one) and len(two)):
            return 0
        ordered = np.unique(one)  # sort this one, not `other`, which may be much larger
        place = np.searchsorted(ordered, two).clip(0, len(ordered) - 1)
        return int(np.isin(one, two[ordered[place] == two]).sum())

    def part(self, shard: int) -> Self:
        """Return the index of a single shard."""
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
            images=r.images[chosen],
        )
        return type(self)(row, self.extensions, regions)

    def place(self, sample: int) -> tuple[int, int]:
        """Return the number of a sample's shard, and the number of the sample within that shard."""
        shard = int(np.searchsorted(self.starts, sample, "right")) - 1
        return shard, sample - int(self.starts[shard])

    def name(self, sample: int) -> str:
        """Return the shard, key and byte range of a sample, for messages."""
        shard, number = self.place(sample)
        r = self.regions
        if r is None:
            return f"{self.shards[shard].name}: sample {number}"
        begin, size = int(r.begin[sample]), int(r.size[sample])
        return f"{self.shards[shard].name}: sample {self.key(sample)} (bytes {begin} to {begin + size - 1})"

    def key(self, sample: int) -> str:
        """Return the key of a sample as it is written in the shard."""
        r = self.regions
        assert r is not None
        return r.keys[int(r.key_end[sample - 1]) if sample else 0 : int(r.key_end[sample])].tobytes().decode()

    def fault(self, sample: int, region: bytes, crc: bool = True) -> str:
        """Return what is wrong with the bytes of a sample; empty if nothing is.

        Compares the length and, if ``crc``, the CRC-32.
        """
        r = self.regions
        assert r is not None
        if len(region) != r.size[sample]:
            return f"is cut off after {len(region)} bytes"
        if crc and len(r.crc) and zlib.crc32(region) != r.crc[sample]:
            return "has changed since the index was made: another CRC-32"
        return ""

    def members(self, sample: int, region: bytes) -> dict[str, bytes]:
        """Return the members of a sample, {extension: content}, cut from the bytes of its region."""
        r = self.regions
        assert r is not None
        chosen = slice(r.first[sample], r.first[sample + 1])
        members = zip(r.member_kind[chosen], r.member_begin[chosen], r.member_size[chosen], strict=True)
        return {self.extensions[kind]: region[begin : begin + size] for kind, begin, size in members}

    def save(self, path: str | Path) -> None:
        """Write the index to a safetensors file, whose metadata holds the rows of the shards and a hash of everything.

        Raises `Halted` if the file cannot be written.
        """
        arrays = asdict(self.regions) if self.regions else {"none": np.zeros(0, np.uint8)}
        table = json.dumps({"shards": [asdict(s) for s in self.shards], "extensions": self.extensions})
        about = {"format": FORMAT, "table": table, "sha256": _hash(table, arrays)}
        content = save_arrays(arrays, {"index": json.dumps(about)})  # a single key: the order of several is not kept
        if is_remote(str(path)):
            system, inside = file_system(str(path))
            try:
                with store_errors():
                    system.pipe_file(inside, content)
            except OSError as error:
                raise Halted(f"{path}: cannot be written: {error.strerror or error}; {ELSEWHERE}") from None
        else:
            write_whole(path, content)

    @classmethod
    def load(cls, path: str | Path, again: str = "") -> Self:
        """Read an index file.

        again: the command that makes the index again, for messages; by default the one for shards next to the file.
        Raises FileNotFoundError, or `InputError` if the file is damaged, cannot be read or has another format.
        """
        try:
            if is_remote(str(path)):
                system, inside = file_system(str(path))
                with store_errors():
                    content = system.cat_file(inside)
            else:
                content = Path(path).read_bytes()
            size = int.from_bytes(content[:8], "little")
            metadata = parse_json(parse_json(content[8 : 8 + size])["__metadata__"]["index"])
            check_format(metadata["format"], FORMAT, str(path), oldest=1)
            arrays, table = load_arrays(content), parse_json(metadata["table"])
            if _hash(metadata["table"], arrays) != metadata["sha256"]:
                raise ValueError("its hash does not match")
            arrays.pop("content", None)
            shards = tuple(Shard(**row) for row in table["shards"])
            index = cls(shards, tuple(table["extensions"]), None if "none" in arrays else Regions(**arrays))
            if wrong := _inconsistency(index):
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
            folder, _, name = str(path).rpartition("/")
            again = again or index_command(folder, name.removesuffix(".index.safetensors"))
            raise InputError(f"{path} is damaged ({error}); make it again: {again}") from None
        except FileNotFoundError:
            raise
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def _inconsistency(index: Index) -> str:
    """Return what is inconsistent in an index that was read from a file; empty if nothing is."""
    for s in index.shards:
        numbers = all(isinstance(number, int) and number >= 0 for number in (s.bytes, s.samples, s.unusable[0]))
        numbers = numbers and all(isinstance(row[0], int) and isinstance(row[1], str) for row in s.unread.values())
        if not numbers or not isinstance(s.name, str) or not re.fullmatch("([0-9a-f]{64})?", s.sha256):
            return f"invalid row of the shard {s.name!r}"
    r, n = index.regions, len(index)
    if r is None:
        return ""
    kinds = {name: np.uint8 if name in ("member_kind", "keys") else np.int64 for name in asdict(r)} | {
        "crc": np.uint32,
        "images": np.uint64,
    }
    if bad := [k for k, kind in kinds.items() if getattr(r, k).dtype != kind or getattr(r, k).ndim != 1]:
        return f"wrong type of {bad[0]}"
    m = len(r.member_kind)
    lengths = {"begin": n, "size": n, "first": n + 1, "key_end": n, "member_begin": m, "member_size": m}
    if bad := [k for k, length in lengths.items() if len(getattr(r, k)) != length]:
        return f"wrong length of {bad[0]}"
    if len(r.crc) not in (0, n) or (index.hashed and len(r.crc) != n):
        return "wrong length of crc"
    if len(r.images) not in (0, n):
        return "wrong length of images"
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
    return "" if fits else "its numbers are inconsistent"


def _hash(table: str, arrays: dict[str, Array]) -> str:
    described = ((f"{name} {a.dtype} {a.shape}".encode(), a.tobytes()) for name, a in sorted(arrays.items()))
    return digest_of(itertools.chain([table.encode()], itertools.chain.from_iterable(described)))


ELSEWHERE = (
    "write the index to another folder with --out FOLDER, and give that folder to fit as data.index, to verify as "
    "--index; other commands need the index next to the shards"
)


def index_command(folder: str | Path, split: str, index: str | Path | None = None) -> str:
    """Return the command that makes the index of a split, for messages. The arguments are those of `path_of`."""
    return typed("data", "index", folder, "--split", split, *([] if index is None else ["--out", index]))


def path_of(folder: str | Path, split: str, index: str | Path | None = None) -> str:
    """Return the path or URL of the index of a split: next to the shards in ``folder``, or in the folder ``index``.

    If ``index`` ends in .safetensors, it is the index file itself.
    """
    if index is not None and str(index).endswith(".safetensors"):
        return str(index)
    folder = folder if index is None else index
    return f"{str(folder).rstrip('/')}/{re.sub(r'[^A-Za-z0-9_.-]+', '_', split)}.index.safetensors"
