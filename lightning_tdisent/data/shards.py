"""Read the samples of a split from its shards: by number or sequentially. They are verified when first read.

A sample that cannot be used, because its bytes have changed since the index was made or because it cannot be decoded,
either stops the run or is left out and counted (`Policy`). In both cases a message names the shard and the sample. The
file is long because all ways to read a sample (by number or sequentially, listed in the index or not) must treat a bad
sample alike.
"""

import itertools
import os
import sys
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from lightning_tdisent.data.decode import BadSample, Decoder, Members, parse_class
from lightning_tdisent.data.image_set import ImageSet, Sample, mirrored
from lightning_tdisent.data.index import Index, index_command, path_of
from lightning_tdisent.data.npz import is_npz, read_npz
from lightning_tdisent.data.remote import BYTES_AHEAD, PAUSES, Fetch, Range, fetched, is_remote, may_pass
from lightning_tdisent.data.scan import build
from lightning_tdisent.data.tars import (
    find,
    hash_file,
    is_sample,
    open_shard,
    open_tar,
    tar_members,
    walk,
)
from lightning_tdisent.data.verify import differences, matched
from lightning_tdisent.errors import Halted, InputError
from lightning_tdisent.files import expand
from lightning_tdisent.images import spaced

READ, BAD = 1, 2  # states of a sample in `Shards.known`; 0: not read yet

PART = 2**20  # bytes of neighbouring samples that are fetched from an object store at a time


@dataclass(frozen=True)
class Policy:
    """Treatment of samples that cannot be used.

    on_bad: ``stop`` the run, or ``skip``: use the next sample of the split instead. ceiling: share of the samples, 0 to
    1, that may be skipped; the run stops when there are more. verify: compare every sample with the index when it is
    first read.
    """

    on_bad: Literal["stop", "skip"] = "stop"
    ceiling: float = 1e-3
    verify: bool = True

    def __post_init__(self) -> None:
        if self.on_bad not in ("stop", "skip"):
            raise InputError(f"data.on_bad_shard: stop or skip, got {self.on_bad}")
        if not 0 <= self.ceiling <= 1:
            raise InputError(f"data.bad_ceiling: a share of the samples, 0 to 1, got {self.ceiling}")


class Shards:
    """The samples of a split: ``batch(numbers)`` decodes them, iteration yields them undecoded.

    Uses the index next to the shards. Without one, the headers of local shards are read instead, and nothing can be
    verified. The state of each sample (read, bad) is shared with the worker processes of a loader.
    """

    def __init__(
        self, urls: Sequence[str], index: Index, decoder: Decoder, policy: Policy = Policy(), again: str = ""
    ) -> None:
        self.urls, self.index, self.decoder, self.policy = urls, index, decoder, policy
        self.again = again  # the command that makes the index again, for messages
        self.known = torch.zeros(len(index), dtype=torch.uint8).share_memory_()
        self.checked = policy.verify and index.hashed
        self._verified: set[int] = set()

    @classmethod
    def open(
        cls,
        path: str | Path,
        split: str,
        decoder: Decoder,
        policy: Policy = Policy(),
        where: str | Path | None = None,
    ) -> Self:
        """Open the shards of a split in a folder.

        where: the folder of the index, if it is not that of the shards; the index must exist then. Raises `InputError`
        for an index that does not match the shards, for remote shards without an index, and for an empty split.
        """
        path = expand(str(path), "data.path")
        urls, file, again = find(path, split), path_of(path, split, where), index_command(path, split, where)
        _opened.cache_clear()  # the files may have been replaced since they were opened
        try:
            index = Index.load(file, again)
        except FileNotFoundError:
            if is_remote(urls[0]) or where is not None:
                why = "but data.index names it" if where else "and shards in an object store cannot be read without it"
                raise InputError(f"data.path: the index {file} does not exist, {why}; make it: {again}") from None
            index = build(urls, hashed=False)
            if len(index) > 10_000:
                said = f"the start takes long, and nothing is verified; make it: {again}"
                print(f"the index {file} does not exist: {said}", file=sys.stderr)
        else:
            urls = matched(urls, index, file, again, sizes=policy.on_bad == "stop")
        if not len(index):
            raise InputError("; ".join([f"the shards {split}-* of {path} are empty", *index.notes]))
        return cls(urls, index, decoder, policy, again)

    @property
    def where(self) -> str:
        """The folder of the shards, for messages."""
        return self.urls[0].rpartition("/")[0]

    def name(self, number: int) -> str:
        """Return the shard, key and byte range of a sample, for messages."""
        return f"{self.where}/{self.index.name(number)}"

    def __len__(self) -> int:
        return len(self.index)

    def __iter__(self) -> Iterator[tuple[int, Members | BadSample]]:
        """Yield the number and the members of every sample."""
        return self.stream_shards(range(len(self.urls)))

    @cached_property
    def digest(self) -> str:
        """Short hash of names and bytes that identifies the data of a model; from the index if there is one."""
        return self.hashed_index.digest

    @cached_property
    def hashed_index(self) -> Index:
        """The index if it was made from all bytes of the shards, else one that is made now."""
        return self.index if self.index.hashed else build(self.urls)

    @property
    def random_access(self) -> bool:
        """Return whether single samples can be read."""
        return self.index.regions is not None and not any(url.endswith(".gz") for url in self.urls)

    @property
    def lost(self) -> int:
        """Number of unusable samples found so far by this process and its workers; 0 if the policy is ``stop``."""
        return 0 if self.policy.on_bad == "stop" else int((self.known == BAD).sum())

    def batch(self, numbers: Sequence[int], flip: Tensor | None = None) -> Sample:
        """Read these samples and decode them to a batch; see `collate`."""
        return self.collate(numbers, self.read(numbers), flip)

    def collate(self, numbers: Sequence[int], raw: Sequence[Members | BadSample], flip: Tensor | None = None) -> Sample:
        """Decode samples to one batch. A skipped sample is replaced, always by the same one.

        Returns ``image`` uint8 (B, C, H, W) or ``latent`` float16 (B, 2, C, h, w), mean and standard deviation;
        ``label`` int64 (B,), -1 for none; ``id`` int64 (B,), position in the split; ``caption``, a list of str, if the
        split has captions. raw: the members of each sample, or why it is bad. flip: bool (B,), which ones to mirror.
        Raises `InputError` for images of different sizes.
        """
        samples = [self.use(n, m) or self._replacement(n) for n, m in zip(numbers, raw, strict=True)]
        kind = "latent" if "latent" in samples[0] else "image"
        first = samples[0]
        for sample in samples:
            if kind not in sample or sample[kind].shape != first[kind].shape:
                raise self._size_mismatch(first, sample)
        out: Sample = {
            kind: mirrored(torch.stack([sample[kind] for sample in samples]), flip),
            "label": torch.tensor([sample["label"] for sample in samples]),
            "id": torch.tensor([sample["id"] for sample in samples]),
        }
        if "txt" in self.index.extensions:  # not of these samples only: the parts of all workers must have equal keys
            out["caption"] = [sample.get("caption", "") for sample in samples]
        return out

    def _replacement(self, number: int) -> Sample:
        """Return the replacement of a skipped sample: the next one of the split that can be used.

        It is the first such one of the split if single samples cannot be read. Raises `InputError` if there is none.
        """
        if self.random_access:
            for other in itertools.chain(range(number + 1, len(self)), range(number)):
                if self.known[other] != BAD and (sample := self.use(other, self.read([other])[0])):
                    return sample
        if self._first_usable is None:
            raise InputError(f"{self.where}: none of {len(self):,} samples can be used")
        return self._first_usable

    @cached_property
    def _first_usable(self) -> Sample | None:
        return next((sample for place in self if (sample := self.use(*place))), None)

    def use(self, number: int, members: Members | BadSample) -> Sample | None:
        """Decode one sample. Return None if it is to be skipped; raise `BadSample` if the policy is ``stop``."""
        try:
            if isinstance(members, BadSample):
                raise members
            return {**self.decoder(members, _Name(self, number)), "id": number}
        except BadSample as error:
            self._skip(number, error)
            return None

    def _skip(self, number: int, error: BadSample) -> None:
        if self.policy.on_bad == "stop":
            raise error
        if self.known[number] == BAD:
            return
        self.known[number] = BAD
        print(f"skipped: {error}", file=sys.stderr)
        if (lost := self.lost) > self.policy.ceiling * len(self):
            raise InputError(
                f"{self.where}: {lost:,} of {len(self):,} samples cannot be used, more than data.bad_ceiling "
                f"{self.policy.ceiling:g} allows; the last one: {error}"
            )

    def _members(self, number: int, region: bytes) -> Members | BadSample:
        """Return the members of a sample, verified if it is read for the first time."""
        known = self.known.numpy()  # a view of the shared memory; faster than the tensor
        new = self.checked and known[number] != READ
        if fault := self.index.fault(number, region, crc=new):
            return BadSample(f"{self.name(number)} {fault}")
        if new and known[number] != BAD:  # it stays bad: its bytes may be unchanged, and yet impossible to decode
            known[number] = READ
        return self.index.members(number, region)

    def read(self, numbers: Sequence[int]) -> list[Members | BadSample]:
        """Return the members of these samples, with one read for each (in object stores, all at the same time)."""
        ranges = self._ranges(numbers)
        if is_remote(self.urls[0]):
            return self._members_or_errors(numbers, Fetch(ranges).result())
        return self._members_or_errors(numbers, [_pread(*place) for place in ranges])

    def read_ahead(
        self, groups: Iterable[Sequence[int]], most: int = BYTES_AHEAD
    ) -> Iterator[list[Members | BadSample]]:
        """Yield what `read` returns for each group of samples; in object stores, the next groups are fetched ahead.

        most: bytes that are fetched ahead (see `fetched`).
        """
        if not is_remote(self.urls[0]):
            yield from map(self.read, groups)
            return
        one, other = itertools.tee(groups)
        for numbers, found in zip(one, fetched(map(self._ranges, other), most), strict=True):
            yield self._members_or_errors(numbers, found)

    def _ranges(self, numbers: Sequence[int]) -> list[Range]:
        r, chosen = self.index.regions, np.asarray(numbers)
        assert r is not None
        urls = [self.urls[i] for i in (np.searchsorted(self.index.starts, chosen, "right") - 1).tolist()]
        return list(zip(urls, r.begin[chosen].tolist(), r.size[chosen].tolist(), strict=True))

    def _members_or_errors(
        self, numbers: Sequence[int], found: Sequence[bytes | Exception]
    ) -> list[Members | BadSample]:
        if self.policy.on_bad == "skip" and is_remote(self.urls[0]):  # a network failure does not make samples bad
            for number, region in zip(numbers, found, strict=True):
                if isinstance(region, Exception) and may_pass(region):
                    raise Halted(f"{self.name(number)} cannot be read after {len(PAUSES) + 1} attempts: {region}")
        return [
            BadSample(f"{self.name(number)} cannot be read: {type(region).__name__}: {' '.join(str(region).split())}")
            if isinstance(region, Exception)
            else self._members(number, region)
            for number, region in zip(numbers, found, strict=True)
        ]

    def classes(self) -> Tensor:
        """Return the class of every sample, int64 (N,), -1 for none. Images are not decoded."""
        r = self.index.regions
        if "cls" not in self.index.extensions:
            return torch.full((len(self),), -1)
        if r is None or not self.random_access or is_remote(self.urls[0]):
            found = [members.get("cls", b"-1") if isinstance(members, dict) else b"-1" for _, members in self]
        else:
            kind, owner = self.index.extensions.index("cls"), np.repeat(np.arange(len(self)), np.diff(r.first))
            chosen = r.member_kind == kind
            begin, size = (r.begin[owner] + r.member_begin)[chosen], r.member_size[chosen]
            places = zip(owner[chosen].tolist(), begin.tolist(), size.tolist(), strict=True)
            found = [_pread(self.urls[self.index.place(n)[0]], b, size) for n, b, size in places]
        return torch.tensor([parse_class(content) if isinstance(content, bytes) else -1 for content in found])

    def stream_shards(self, shards: Iterable[int], start: int = 0) -> Iterator[tuple[int, Members | BadSample]]:
        """Yield number and members of the samples of shards, in order, from the start-th sample of the first on."""
        if self.random_access and is_remote(self.urls[0]):
            one, other = itertools.tee(self._parts(shards, start))
            for part, members in zip(one, self.read_ahead(other, PART), strict=True):
                yield from zip(part, members, strict=True)
            return
        for shard in shards:
            yield from self.stream(shard, start)
            start = 0

    def _parts(self, shards: Iterable[int], start: int) -> Iterator[range]:
        """Yield the numbers of the samples of shards, in ranges of neighbours with about `PART` bytes."""
        r = self.index.regions
        assert r is not None
        for shard in shards:
            first, end = int(self.index.starts[shard]) + start, int(self.index.starts[shard + 1])
            ends = np.cumsum(r.size[first:end])
            cuts = np.flatnonzero(np.diff(ends // PART, prepend=-1))  # first sample of each part
            yield from itertools.starmap(range, itertools.pairwise([*(first + cuts).tolist(), end]))
            start = 0

    def stream(self, shard: int, start: int = 0) -> Iterator[tuple[int, Members | BadSample]]:
        """Yield number and members of all samples of a shard from its start-th on, in order.

        If reading fails, all remaining samples of the shard are yielded as bad.
        """
        number, end = (int(n) for n in self.index.starts[shard : shard + 2])
        number += start
        try:
            for members in (
                self._parse_tar(shard, start) if self.index.regions is None else self._read_regions(shard, start)
            ):
                yield number, members
                number += 1
            reason = "it holds fewer samples than its index says"
        except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
            if isinstance(error, InputError) and self.policy.on_bad == "stop":
                raise
            reason = str(error)
        for lost in range(number, end):
            yield lost, BadSample(f"{self.name(lost)} cannot be read: {reason}")

    def decoded(self, limit: int | None = None, spread: bool = False) -> "ImageSet":
        """Decode all samples into memory, or ``limit`` of them. Skipped samples are left out.

        spread: take evenly spaced samples instead of the first ones. If shards are sorted by class, the first samples
        may have a single class.
        """
        wanted = len(self) if limit is None else min(limit, len(self))
        spread = spread and wanted < len(self)
        members = self._chosen_samples(spaced(wanted, len(self)).tolist()) if spread else iter(self)
        images, captions = torch.empty(0), list[str]()
        labels, numbers = torch.empty(wanted, dtype=torch.int64), torch.empty(wanted, dtype=torch.int64)
        first: Sample = {}
        for sample in itertools.islice((s for at in members if (s := self.use(*at))), wanted):
            image = sample["latent"] if "latent" in sample else sample["image"]
            if not captions:
                first = sample
                self._check_room(wanted, image)
                images = torch.empty(wanted, *image.shape, dtype=image.dtype)
            elif image.shape != images.shape[1:]:
                raise self._size_mismatch(first, sample)
            images[len(captions)] = image
            labels[len(captions)], numbers[len(captions)] = sample["label"], sample["id"]
            captions.append(sample.get("caption", ""))
        kept = len(captions)
        named = tuple(captions) if "txt" in self.index.extensions else None
        known = numbers[:kept] if self.lost or spread else None
        return ImageSet(images[:kept], labels[:kept], self.digest, named, known)

    def _chosen_samples(self, chosen: Sequence[int]) -> Iterator[tuple[int, Members | BadSample]]:
        """Yield number and members of some samples, in ascending order; read all if single ones cannot be read."""
        if not self.random_access:
            wanted = set(chosen)
            yield from (at for at in self if at[0] in wanted)
            return
        groups = [chosen[i : i + 16] for i in range(0, len(chosen), 16)]
        for numbers, found in zip(groups, self.read_ahead(groups), strict=True):
            yield from zip(numbers, found, strict=True)

    def _size_mismatch(self, one: Sample, other: Sample) -> InputError:
        shapes = [list((s["latent"] if "latent" in s else s["image"]).shape) for s in (one, other)]
        return InputError(
            f"the images differ in size: {self.name(one['id'])} has {shapes[0]}, {self.name(other['id'])} has "
            f"{shapes[1]}; prepare all of them at one size (data prepare --size), or set data.size for fit"
        )

    def _check_room(self, n: int, image: Tensor) -> None:
        """Raise `InputError` if ``n`` images do not fit into the memory of the machine."""
        need = n * image.nbytes
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else need
        if need > there:
            raise InputError(
                f"data.resident: {n:,} images of {list(image.shape)} need {need / 1e9:,.0f} GB, but the machine has "
                f"{there / 1e9:,.0f} GB; set data.resident false or, if they are held-out images, use fewer "
                "(data.val_limit, --held-out)"
            )

    def _read_regions(self, shard: int, start: int) -> Iterator[Members | BadSample]:
        r, url = self.index.regions, self.urls[shard]
        assert r is not None
        first, end = int(self.index.starts[shard]), int(self.index.starts[shard + 1])
        if first + start >= end:
            return
        if url.endswith(".gz") and self.checked and self.policy.on_bad == "stop":
            self._verify_file(shard)
        with open_tar(url) as stream:
            stream.seek(int(r.begin[first + start]))
            for number in range(first + start, end):
                yield self._members(number, stream.read(int(r.size[number])))

    def _verify_file(self, shard: int) -> None:
        """Compare the SHA-256 of a whole shard with the index, once per process.

        This is for gzipped shards, because no sample's CRC covers the gzip headers, and for shards whose samples are
        not listed. Raises `BadSample`: it is not known which samples are intact, so all of the shard count as bad.
        """
        if shard in self._verified:
            return
        if hash_file(self.urls[shard])[1] != self.index.shards[shard].sha256:
            raise BadSample(differences(self.urls[shard], self.index.part(shard))[0])
        self._verified.add(shard)

    def _parse_tar(self, shard: int, start: int) -> Iterator[Members]:
        """Yield the members of samples that are not listed: parse the tar, after its SHA-256 has been compared."""
        row, url = self.index.shards[shard], self.urls[shard]
        if self.checked:
            self._verify_file(shard)
        with open_shard(url) as raw, tar_members(raw, "r|gz" if url.endswith(".gz") else "r|", url) as tar:
            n = 0
            for _, group in itertools.groupby(walk(tar, url, {}), key=itemgetter(0)):
                members = dict[str, bytes]()
                for _, extension, member in group:
                    tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header
                    content = tar.extractfile(member) if n >= start else None
                    members[extension] = content.read() if content else b""
                if is_sample(members):
                    if n >= start:
                        yield members
                    n += 1
        if n != row.samples:
            raise ValueError(f"it holds {n} samples, but its index says {row.samples}")


class _Name:
    """The name of a sample, formatted only when a message needs it."""

    __slots__ = ("number", "shards")

    def __init__(self, shards: Shards, number: int) -> None:
        self.shards, self.number = shards, number

    def __str__(self) -> str:
        return self.shards.name(self.number)


class _Descriptor:
    """An open file descriptor, closed when the last reference to it is dropped."""

    def __init__(self, url: str) -> None:
        self.number = os.open(url, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


_opened = lru_cache(128)(_Descriptor)


def _pread(url: str, begin: int, size: int) -> bytes | Exception:
    try:
        file = _opened(url)  # the reference keeps it open: another thread may evict it from the cache
        return os.pread(file.number, size, begin)
    except OSError as error:
        return error


def load(
    path: str | Path, split: str, channels: int, limit: int | None = None, size: int | None = None, spread: bool = False
) -> ImageSet:
    """Decode a split, or ``limit`` samples of it, into memory. For an .npz file, return its images for any split.

    channels: 1 or 3. size: see `Decoder`; an .npz ignores it. spread: take evenly spaced samples instead of the first
    ones. Raises `InputError`.
    """
    if is_npz(path):
        images, labels, digest = read_npz(path)
        if images.shape[1] != channels:
            raise InputError(f"{path} has images of {images.shape[1]} channels, expected {channels}")
        n = len(images) if limit is None else min(limit, len(images))
        chosen = spaced(n, len(images)) if spread else torch.arange(n)
        return ImageSet(images[chosen], labels[chosen], digest, numbers=chosen if spread else None)
    return Shards.open(path, split, Decoder(channels, size)).decoded(limit, spread)
