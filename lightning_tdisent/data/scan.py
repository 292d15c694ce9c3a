"""Make the index of shards: scan each shard separately, then join the parts."""

import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from lightning_tdisent.data.decode import class_of, picked
from lightning_tdisent.data.index import Array, Index, Regions, Shard
from lightning_tdisent.data.tars import Layout, Span, Unread, hash_file, layout, note, open_tar, size_of
from lightning_tdisent.digests import digest, key64
from lightning_tdisent.errors import InputError

MAX_EXTENSIONS = 256

Made = TypeVar("Made")
Progress = Callable[[int, int], None]


def scan(url: str, hashed: bool = True, regions: bool = True) -> Index:
    """Return the index of one shard.

    hashed: read all bytes, for checksums; otherwise only headers are read, which is cheap for a plain tar. regions:
    list the samples. Raises `InputError` if the shard is damaged or only some of its samples have a class.
    """
    name = url.rpartition("/")[2]
    try:
        unread: Unread = {}
        with open_tar(url) as stream:
            found, places = layout(stream, name, unread)
            read = list(_read_samples(stream, found, places)) if hashed else []
        size, sha256 = hash_file(url) if hashed else (size_of(url), "")
    except (tarfile.TarError, EOFError, OSError, zlib.error, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{url} is damaged: {error}") from None
    keys = [key for _, key, _ in found]
    unusable = _unusable(name, found, [wrong for *_, wrong in read], unread)
    hashed_keys = digest("\n".join(keys))[:16]
    shard = Shard(name, size, sha256, len(found), hashed_keys, unread, unusable)
    extensions = sorted({kind for *_, members in found for kind in members})
    bare = [sample for sample in found if "cls" not in sample[2]]
    if 0 < len(bare) < len(found):
        begin, key, there = bare[0]
        raise InputError(
            f"{len(bare):,} of {len(found):,} samples have no class (KEY.cls), first {name}: sample {key} (byte {begin}"
            f"; it has {', '.join(sorted(there)[:6])})"
        )
    if not regions or len(extensions) > MAX_EXTENSIONS:  # `join` refuses that many extensions
        return Index((shard,), tuple(extensions), None)
    members = [
        (at - begin, size, kind)
        for (begin, _), (*_, m) in zip(places, found, strict=True)
        for kind, (at, size) in m.items()
    ]
    encoded, kinds = [key.encode() for key in keys], {kind: number for number, kind in enumerate(extensions)}
    return Index(
        (shard,),
        tuple(extensions),
        Regions(
            begin=np.array([begin for begin, _ in places], np.int64),
            size=np.array([end - begin for begin, end in places], np.int64),
            crc=np.array([crc for crc, *_ in read], np.uint32),
            first=np.cumsum([0, *(len(m) for *_, m in found)]).astype(np.int64),
            member_begin=np.array([m[0] for m in members], np.int64),
            member_size=np.array([m[1] for m in members], np.int64),
            member_kind=np.array([kinds[m[2]] for m in members], np.uint8),
            key_end=np.cumsum([len(key) for key in encoded], dtype=np.int64),
            keys=np.frombuffer(b"".join(encoded), np.uint8),
            images=np.array([image for _, image, _ in read], np.uint64),
        ),
    )


def _read_samples(stream: IO[bytes], found: Sequence[Layout], places: Sequence[Span]) -> Iterator[tuple[int, int, str]]:
    """Yield for each sample its CRC-32, the key of its image (0 for none), and what is wrong with its class."""
    stream.seek(0)
    for (_, _, members), (begin, end) in zip(found, places, strict=True):
        region = memoryview(stream.read(end - begin))
        if len(region) < end - begin:
            raise EOFError("it ends early")
        part = {kind: region[at - begin : at - begin + size] for kind, (at, size) in members.items()}
        image, wrong = 0, ""
        with suppress(ValueError):  # it has no image, or several: `_unusable` reports that
            image = key64(part[picked(part)])
        try:
            class_of(bytes(part.get("cls", b"-1")))
        except ValueError as error:
            wrong = str(error)
        yield zlib.crc32(region), image, wrong


def _unusable(name: str, found: Sequence[Layout], wrong: Sequence[str], unread: Unread) -> list[Any]:
    """Return [number of samples that cannot be used, what is wrong with the first].

    Members that are not read are counted in ``unread``. wrong: what is wrong with the class of each sample, if known.
    """
    out: list[Any] = [0, ""]
    for number, (begin, key, members) in enumerate(found):
        said, image = wrong[number] if wrong else "", ""
        try:
            image = picked(members)
        except ValueError as error:
            said = str(error)
        for kind in members.keys() - {image, "cls", "txt"}:
            note(unread, f"members KEY.{kind}", f"{key}.{kind}")
        if said:
            out = [out[0] + 1, out[1] or f"{name}: sample {key} (byte {begin}): {said}"]
    return out


def join(parts: Sequence[Index]) -> Index:
    """Join the indices of single shards to one index.

    Raises `InputError` if a shard is there twice, if only some shards have classes, and for too many extensions. If
    any part does not list its samples, the joined index does not either.
    """
    extensions = tuple(sorted({name for part in parts for name in part.extensions}))
    shards = tuple(shard for part in parts for shard in part.shards)
    if len(extensions) > MAX_EXTENSIONS:
        raise InputError(
            f"the samples have {len(extensions)} kinds of members, more than {MAX_EXTENSIONS}; do their keys contain "
            "dots?"
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
        """Concatenate running totals, which start at 0 in each part. first: they include the initial 0; keep one."""
        out: list[Array] = []
        before = 0
        for table in kept:
            ends = getattr(table, name)
            out.append(ends[first and bool(out) :] + before)
            before = int(out[-1][-1]) if len(out[-1]) else before
        return np.concatenate(out)

    plain = ("begin", "size", "crc", "member_begin", "member_size", "member_kind", "keys", "images")
    regions = Regions(**{k: chained(k) for k in plain}, first=summed("first", True), key_end=summed("key_end", False))
    return Index(shards, extensions, regions)


def _renumber(kinds: Array, old: Sequence[str], new: Sequence[str]) -> Array:
    return np.array([new.index(name) for name in old] or [0], np.uint8)[kinds]


def _check(parts: Sequence[Index]) -> None:
    """Raise `InputError` if a shard is there twice, or if only some shards have classes."""
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
    progress: Progress | None = None,
    hashed: bool = True,
    regions: bool = True,
) -> Index:
    """Return the index of these shards, in this order, scanned by ``jobs`` processes. See `scan` for the options."""
    work = partial(scan, hashed=hashed, regions=regions)
    return join(spread(work, [str(file) for file in files], jobs=jobs, progress=progress))


def spread(
    work: Callable[..., Made], items: Sequence[Any], *more: Iterable[Any], jobs: int, progress: Progress | None
) -> list[Made]:
    """Apply a function to every item, in ``jobs`` processes, and return the results in order.

    more: further arguments of the function, one iterable each, as for ``map``. ``progress`` is called with (done,
    total).
    """
    jobs, out = min(jobs, len(items)), list[Made]()
    with ProcessPoolExecutor(jobs, get_context("forkserver")) if jobs > 1 else nullcontext() as pool:
        for made in (pool.map if pool else map)(work, items, *more):
            out.append(made)
            if progress:
                progress(len(out), len(items))
    return out
