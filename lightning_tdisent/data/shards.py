"""The shards of a split, read: any samples by number, or one after the other; verified when first read.

What cannot be used, because its bytes have changed since the index was made or because it cannot be decoded, stops the
run or is left out and counted (`Policy`), with the shard and the sample named in either case. The file is long because
all ways to read a sample, single or in a row, listed or not, are to treat a bad one alike.
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
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from lightning_tdisent.data.decode import BadSample, Decoder, Members, parse_class
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
from lightning_tdisent.distributed import rank_and_world
from lightning_tdisent.errors import Halted, InputError
from lightning_tdisent.files import expand
from lightning_tdisent.images import spaced

Sample = dict[str, Any]
READ, BAD = 1, 2  # what is known of a sample
PART = 2**20  # bytes of neighbours that are fetched from an object store at a time
MOST_SHARED = 0.01  # of the held-out samples; real sets have a few duplicates


@dataclass(frozen=True)
class Policy:
    """What to do with samples that cannot be used: ``stop`` or ``skip`` (take the next one of the split instead).

    verify: compare every sample with the index when it is first read. ceiling: share of the samples that may be
    skipped; one more stops the run, too.
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
    """The samples of a split: decoded by ``batch(numbers)`` or, undecoded, one after the other.

    Uses the index beside the shards. Without one, the headers of local shards are read instead, and nothing can be
    verified. What is known of each sample is shared with the worker processes of a loader.
    """

    def __init__(
        self, urls: Sequence[str], index: Index, decoder: Decoder, policy: Policy = Policy(), again: str = ""
    ) -> None:
        self.urls, self.index, self.decoder, self.policy = urls, index, decoder, policy
        self.again = again  # the command that makes the index anew, for messages
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
        """Those of a folder; refuses an index that does not fit them, and an empty split.

        where: the folder of the index, if it is not that of the shards; the index has to be there.
        """
        path = expand(str(path), "data.path")
        urls, file, again = find(path, split), path_of(path, split, where), index_command(path, split, where)
        _opened.cache_clear()  # of files that may have been replaced since
        try:
            index = Index.load(file, again)
        except FileNotFoundError:
            if is_remote(urls[0]) or where is not None:
                why = "as data.index says" if where else "and shards in an object store are not read without it"
                raise InputError(f"data.path: {file} is not there, {why}: {again}") from None
            index = build(urls, hashed=False)
            if len(index) > 10_000:
                said = f"takes long, and that nothing is verified; make one: {again}"
                print(f"{file} is not there, so that the start {said}", file=sys.stderr)
        else:
            urls = matched(urls, index, file, again, sizes=policy.on_bad == "stop")
        if not len(index):
            raise InputError("; ".join([f"the shards {split}-* of {path} are empty", *index.notes]))
        return cls(urls, index, decoder, policy, again)

    @property
    def where(self) -> str:
        """Their folder, for messages."""
        return self.urls[0].rpartition("/")[0]

    def name(self, number: int) -> str:
        """Shard, key and bytes of a sample, for messages."""
        return f"{self.where}/{self.index.name(number)}"

    def __len__(self) -> int:
        return len(self.index)

    def __iter__(self) -> Iterator[tuple[int, Members | BadSample]]:
        """Number and members of all samples."""
        return self.stream_shards(range(len(self.urls)))

    @cached_property
    def digest(self) -> str:
        """Short hash of names and bytes: which data a model has seen. Read from the index where there is one."""
        return self.hashed_index.digest

    @cached_property
    def hashed_index(self) -> Index:
        """The index if it was made of all bytes, else one that is made now."""
        return self.index if self.index.hashed else build(self.urls)

    @property
    def random_access(self) -> bool:
        """Whether single samples can be read."""
        return self.index.regions is not None and not any(url.endswith(".gz") for url in self.urls)

    @property
    def lost(self) -> int:
        """Samples found to be unusable so far, by this process and its workers."""
        return 0 if self.policy.on_bad == "stop" else int((self.known == BAD).sum())

    def batch(self, numbers: Sequence[int], flip: Tensor | None = None) -> Sample:
        """Read and decode these samples; see `collate`."""
        return self.collate(numbers, self.read(numbers), flip)

    def collate(self, numbers: Sequence[int], raw: Sequence[Members | BadSample], flip: Tensor | None = None) -> Sample:
        """Decode to one batch; a sample that is skipped is replaced, by the same one wherever it is needed.

        ``image`` uint8 (B, C, H, W) or ``latent`` float16 (B, 2, C, h, w), mean and standard deviation; ``label`` int64
        (B,), -1 where there is none; ``id`` int64 (B,), position in the split; ``caption``, a list of str, where there
        are any. flip: bool (B,), which ones to mirror.
        """
        samples = [self.use(n, m) or self._instead(n) for n, m in zip(numbers, raw, strict=True)]
        kind = "latent" if "latent" in samples[0] else "image"
        first = samples[0]
        for sample in samples:
            if kind not in sample or sample[kind].shape != first[kind].shape:
                raise self._unequal(first, sample)
        out: Sample = {
            kind: mirrored(torch.stack([sample[kind] for sample in samples]), flip),
            "label": torch.tensor([sample["label"] for sample in samples]),
            "id": torch.tensor([sample["id"] for sample in samples]),
        }
        if "txt" in self.index.extensions:  # and not in these samples: the parts that workers make are alike
            out["caption"] = [sample.get("caption", "") for sample in samples]
        return out

    def _instead(self, number: int) -> Sample:
        """What replaces a sample that is skipped: the next one that can be used, or the first of the split."""
        if self.random_access:
            for other in itertools.chain(range(number + 1, len(self)), range(number)):
                if self.known[other] != BAD and (sample := self.use(other, self.read([other])[0])):
                    return sample
        if self._good is None:
            raise InputError(f"{self.where}: none of {len(self):,} samples can be used")
        return self._good

    @cached_property
    def _good(self) -> Sample | None:
        return next((sample for place in self if (sample := self.use(*place))), None)

    def use(self, number: int, members: Members | BadSample) -> Sample | None:
        """Decode one sample; None if it is to be skipped."""
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
        """Members of a sample, verified if it is read for the first time."""
        known = self.known.numpy()  # of the shared memory; quicker than the tensor
        new = self.checked and known[number] != READ
        if fault := self.index.fault(number, region, crc=new):
            return BadSample(f"{self.name(number)} {fault}")
        if new and known[number] != BAD:  # it may be sound, and yet not to be decoded
            known[number] = READ
        return self.index.members(number, region)

    def read(self, numbers: Sequence[int]) -> list[Members | BadSample]:
        """Members of these samples, each by one read (of object stores, all at the same time)."""
        ranges = self._ranges(numbers)
        if is_remote(self.urls[0]):
            return self._found(numbers, Fetch(ranges).result())
        return self._found(numbers, [_pread(*place) for place in ranges])

    def read_ahead(
        self, groups: Iterable[Sequence[int]], most: int = BYTES_AHEAD
    ) -> Iterator[list[Members | BadSample]]:
        """Yield what `read` returns of groups of samples; of object stores, the next ones are fetched meanwhile."""
        if not is_remote(self.urls[0]):
            yield from map(self.read, groups)
            return
        one, other = itertools.tee(groups)
        for numbers, found in zip(one, fetched(map(self._ranges, other), most), strict=True):
            yield self._found(numbers, found)

    def _ranges(self, numbers: Sequence[int]) -> list[Range]:
        r, chosen = self.index.regions, np.asarray(numbers)
        assert r is not None
        urls = [self.urls[i] for i in (np.searchsorted(self.index.starts, chosen, "right") - 1).tolist()]
        return list(zip(urls, r.begin[chosen].tolist(), r.size[chosen].tolist(), strict=True))

    def _found(self, numbers: Sequence[int], found: Sequence[bytes | Exception]) -> list[Members | BadSample]:
        if self.policy.on_bad == "skip" and is_remote(self.urls[0]):  # a network that is down says nothing of samples
            for number, region in zip(numbers, found, strict=True):
                if isinstance(region, Exception) and may_pass(region):
                    raise Halted(f"{self.name(number)} cannot be read, asked {len(PAUSES) + 1} times: {region}")
        return [
            BadSample(f"{self.name(number)} cannot be read: {type(region).__name__}: {' '.join(str(region).split())}")
            if isinstance(region, Exception)
            else self._members(number, region)
            for number, region in zip(numbers, found, strict=True)
        ]

    def classes(self) -> Tensor:
        """int64 (N,), the class of every sample, -1 where there is none; images are not decoded."""
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
        """Number and members of the samples of shards, one after the other, from the start-th of the first on."""
        if self.random_access and is_remote(self.urls[0]):
            one, other = itertools.tee(self._parts(shards, start))
            for part, members in zip(one, self.read_ahead(other, PART), strict=True):
                yield from zip(part, members, strict=True)
            return
        for shard in shards:
            yield from self.stream(shard, start)
            start = 0

    def _parts(self, shards: Iterable[int], start: int) -> Iterator[range]:
        """Numbers of the samples of shards, as neighbours of about `PART` bytes."""
        r = self.index.regions
        assert r is not None
        for shard in shards:
            first, end = int(self.index.starts[shard]) + start, int(self.index.starts[shard + 1])
            ends = np.cumsum(r.size[first:end])
            cuts = np.flatnonzero(np.diff(ends // PART, prepend=-1))  # where a new part begins
            yield from itertools.starmap(range, itertools.pairwise([*(first + cuts).tolist(), end]))
            start = 0

    def stream(self, shard: int, start: int = 0) -> Iterator[tuple[int, Members | BadSample]]:
        """Number and members of the samples of a shard from its start-th on, one after the other: all of them.

        Where the shard cannot be read on, what is left of it is bad.
        """
        number, end = (int(n) for n in self.index.starts[shard : shard + 2])
        number += start
        try:
            for members in self._whole(shard, start) if self.index.regions is None else self._regions(shard, start):
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
        """All in memory, or ``limit`` samples, the first or evenly ``spread``; those that are skipped are left out.

        Shards may be sorted by class, of which the first samples know one alone.
        """
        wanted = len(self) if limit is None else min(limit, len(self))
        spread = spread and wanted < len(self)
        members = self._some(spaced(wanted, len(self)).tolist()) if spread else iter(self)
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
                raise self._unequal(first, sample)
            images[len(captions)] = image
            labels[len(captions)], numbers[len(captions)] = sample["label"], sample["id"]
            captions.append(sample.get("caption", ""))
        kept = len(captions)
        named = tuple(captions) if "txt" in self.index.extensions else None
        known = numbers[:kept] if self.lost or spread else None
        return ImageSet(images[:kept], labels[:kept], self.digest, named, known)

    def _some(self, chosen: Sequence[int]) -> Iterator[tuple[int, Members | BadSample]]:
        """Yield numbers and members of some samples, ascending; read all where single ones cannot be read."""
        if not self.random_access:
            wanted = set(chosen)
            yield from (at for at in self if at[0] in wanted)
            return
        groups = [chosen[i : i + 16] for i in range(0, len(chosen), 16)]
        for numbers, found in zip(groups, self.read_ahead(groups), strict=True):
            yield from zip(numbers, found, strict=True)

    def _unequal(self, one: Sample, other: Sample) -> InputError:
        shapes = [list((s["latent"] if "latent" in s else s["image"]).shape) for s in (one, other)]
        return InputError(
            f"the images differ in size: {self.name(one['id'])} has {shapes[0]}, {self.name(other['id'])} has "
            f"{shapes[1]}; prepare all at one size (data prepare --size), or give fit data.size"
        )

    def _check_room(self, n: int, image: Tensor) -> None:
        """Refuse to hold in memory what the machine does not have."""
        need = n * image.nbytes
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else need
        if need > there:
            raise InputError(
                f"data.resident: {n:,} images of {list(image.shape)} need {need / 1e9:,.0f} GB, the machine has "
                f"{there / 1e9:,.0f}; set data.resident false, or, where they are held out, hold out fewer "
                "(data.val_limit, --held-out)"
            )

    def _regions(self, shard: int, start: int) -> Iterator[Members | BadSample]:
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
        """The whole file: of gzipped shards, whose own headers belong to no sample, and where no samples are listed.

        Once per process. Nobody can say which samples are sound, so that all of the shard are bad.
        """
        if shard in self._verified:
            return
        if hash_file(self.urls[shard])[1] != self.index.shards[shard].sha256:
            raise BadSample(differences(self.urls[shard], self.index.part(shard))[0])
        self._verified.add(shard)

    def _whole(self, shard: int, start: int) -> Iterator[Members]:
        """Without regions: parsed as it comes, once the hash of the file has been compared."""
        row, url = self.index.shards[shard], self.urls[shard]
        if self.checked:
            self._verify_file(shard)
        with open_shard(url) as raw, tar_members(raw, "r|gz" if url.endswith(".gz") else "r|", url) as tar:
            n = 0
            for _, group in itertools.groupby(walk(tar, url, {}), key=itemgetter(0)):
                members = dict[str, bytes]()
                for _, extension, member in group:
                    tar.members.clear()  # type: ignore[attr-defined]  # it would keep every header
                    content = tar.extractfile(member) if n >= start else None
                    members[extension] = content.read() if content else b""
                if is_sample(members):
                    if n >= start:
                        yield members
                    n += 1
        if n != row.samples:
            raise ValueError(f"it holds {n} samples, its index says {row.samples}")


def refuse_shared(held_out: Shards, training: Shards, what: str, remedy: str) -> None:
    """Refuse held-out samples of which more than 1 % have an image that is a training image, too; print fewer.

    what: their splits, and remedy: what else to name, for messages. Images are compared by the bytes of their files.
    """
    for one in (held_out, training):
        if one.hashed_index.regions is not None and not one.hashed_index.keyed:
            print(
                f"note: the index of {one.where} is of an earlier version, by which images of {what} that are in both "
                f"are not found; make it anew: {one.again}",
                file=sys.stderr,
            )
    shared, n = held_out.hashed_index.shared(training.hashed_index), len(held_out)
    said = f"{what}: {shared:,} of {n:,} held-out samples of {held_out.where} are among the {len(training):,} training"
    if shared > MOST_SHARED * n:
        raise InputError(f"{said} samples of {training.where}, so that nothing would be held out. {remedy}")
    if shared:
        print(f"note: {said} samples of {training.where}", file=sys.stderr)


def note_classes(what: str, labels: Tensor, where: str, classes: int) -> None:
    """Print, on the first rank, which of the classes of a network no image has; nothing if there are none.

    what: the key or the model whose ``classes`` these are, and where: the images, for the message.
    """
    lacking = sorted(set(range(classes)).difference(labels.unique().tolist()))
    if lacking and int(labels.min()) >= 0 and rank_and_world()[0] == 0:
        some = ", ".join(map(str, lacking[:5])) + (f", .. ({len(lacking):,} in all)" if len(lacking) > 5 else "")
        print(
            f"note: {what} is {classes}, but {where} have none of the classes {some}; samples of all classes in "
            "turn, as sample and evaluate draw them, are of these, too",
            file=sys.stderr,
        )


class _Name:
    """A sample's name, put together only where a message needs it."""

    __slots__ = ("number", "shards")

    def __init__(self, shards: Shards, number: int) -> None:
        self.shards, self.number = shards, number

    def __str__(self) -> str:
        return self.shards.name(self.number)


class _Descriptor:
    """An open file, closed when the last user lets go."""

    def __init__(self, url: str) -> None:
        self.number = os.open(url, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


_opened = lru_cache(128)(_Descriptor)


def _pread(url: str, begin: int, size: int) -> bytes | Exception:
    try:
        file = _opened(url)  # held: another thread may have the cache let go of it
        return os.pread(file.number, size, begin)
    except OSError as error:
        return error


def mirrored(images: Tensor, flip: Tensor | None) -> Tensor:
    """Images with those marked mirrored; of latents, (B, 2, 2, C, h, w), the entry that was encoded so is taken."""
    if images.ndim == 6:
        return images[torch.arange(len(images), device=images.device), 0 if flip is None else flip.long()]
    return images if flip is None else torch.where(flip[:, None, None, None], images.flip(-1), images)


@dataclass(frozen=True)
class ImageSet:
    """Decoded images (N, C, H, W) uint8 with labels (N,) int64, and the digest of the shards they came from.

    Of pre-encoded images, the latents float16 (N, 2, 2, C, h, w): [as it is, flipped] x [mean, standard deviation].
    """

    images: Tensor
    labels: Tensor
    digest: str
    captions: tuple[str, ...] | None = None
    numbers: Tensor | None = None  # positions in the split, where some were left out

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, numbers: Tensor, flip: Tensor | None = None) -> Sample:
        """These images, as `Shards.collate` gives them."""
        kind = "latent" if self.images.ndim == 6 else "image"
        out = {kind: mirrored(self.images[numbers], flip), "label": self.labels[numbers]}
        out["id"] = numbers if self.numbers is None else self.numbers[numbers]
        if self.captions is not None:
            out["caption"] = [self.captions[n] for n in numbers.tolist()]  # type: ignore[assignment]
        return out

    def to(self, device: torch.device) -> "ImageSet":
        """The same on a device."""
        numbers = self.numbers if self.numbers is None else self.numbers.to(device)
        return ImageSet(self.images.to(device), self.labels.to(device), self.digest, self.captions, numbers)


def load(
    path: str | Path, split: str, channels: int, limit: int | None = None, size: int | None = None, spread: bool = False
) -> ImageSet:
    """Decode a split, or ``limit`` samples of it, into memory; of an .npz, whatever the split, its images.

    spread: take samples that are evenly spaced, not the first.
    """
    if is_npz(path):
        images, labels, digest = read_npz(path)
        if images.shape[1] != channels:
            raise InputError(f"{path} has images of {images.shape[1]} channels, expected {channels}")
        n = len(images) if limit is None else min(limit, len(images))
        chosen = spaced(n, len(images)) if spread else torch.arange(n)
        return ImageSet(images[chosen], labels[chosen], digest, numbers=chosen if spread else None)
    return Shards.open(path, split, Decoder(channels, size)).decoded(limit, spread)
