"""Convert raw data sets to shards with an index: images are cropped, encoded again, or encoded as latents.

The order of the samples, their keys and every byte of every shard are a function of the source and the `Options`,
whatever the number of processes and however often the run was interrupted. Worker processes convert small groups of
samples. The main process writes them in order; each shard is a temporary file until it is complete, and is then
renamed. The source and the options are stored in ``{split}.prepare.json`` from the start, so that the same command
resumes and a different one is refused. The SHA-256 of each finished shard is stored in ``{split}.sha256`` and compared
at the end. The file is long because a run must survive what happens in runs of hours: bad images, kills, full disks.
"""

import bisect
import contextlib
import fcntl
import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import webdataset

from lightning_tdisent.data.decode import LATENT
from lightning_tdisent.data.held_out import MOST_SHARED
from lightning_tdisent.data.index import Index, path_of
from lightning_tdisent.data.latents import LatentEncoder
from lightning_tdisent.data.raw import Source
from lightning_tdisent.data.raw.convert import ENCODE, Convert, Made, Samples, Skipped, Task, in_order
from lightning_tdisent.data.scan import build, scan
from lightning_tdisent.data.tars import PREPARED, SUFFIXES, planned
from lightning_tdisent.digests import sha256
from lightning_tdisent.errors import Halted, InputError, nearest
from lightning_tdisent.files import is_plain, open_own, output_path, refuse_unwritable, remove_orphans, whole
from lightning_tdisent.schemas import check_format, parse_json

FORMAT = "lightning_tdisent.prepare/1"
CHUNK = 32  # samples that are sent to a process at a time

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Options:
    """Conversion and storage of images.

    size: resize and crop to the central size x size pixels, as ADM does; None leaves every image as it is. encode:
    ``keep`` the bytes of png, jpg and webp files that are not resized, and the format of those that are (other formats
    become png); or encode all images as ``png``, ``jpg`` (quality 95, 4:4:4) or ``webp`` (lossless). samples: number of
    samples per shard. shuffle: None leaves it to the source. seed: of the order. vae: folder of a diffusers
    AutoencoderKL, whose latents are stored instead of images; they are computed on ``device`` in batches of
    ``batch_size``. bad: fraction of the samples that may be left out because they cannot be decoded; at least one may
    be, unless the fraction is 0. range: the values of black and of white, for images that do not have 8 bits (see
    `decode.to_mode`).
    """

    size: int | None = None
    encode: str = "keep"
    samples: int = 10_000
    shuffle: bool | None = None
    seed: int = 0
    vae: Path | None = None
    device: str = "cpu"
    batch_size: int = 32
    bad: float = 0.001
    range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Summary:
    """Result of `prepare`: number of samples and shards, bytes of all shards, and samples left out.

    captions: number of samples with a caption, and number of those whose caption is empty. depths: number of images
    that this call wrote, by type of their values (`decode.depth`). shared: number of images that another split in the
    folder also has, by the name of that split.
    """

    samples: int
    shards: int
    bytes: int
    skipped: list[Skipped]
    captions: tuple[int, int] = (0, 0)
    depths: Counter[str] = field(default_factory=Counter, compare=False)
    shared: dict[str, int] = field(default_factory=dict)


def caption_count(count: tuple[int, int], samples: int) -> str:
    """Return, for a message, how many samples have a caption and how many of these captions are empty."""
    there, empty = count
    if not there:
        return "none"
    lack = f"; {samples - there:,} have none" if there < samples else ""
    return f"{there:,} of {samples:,} samples{lack}" + (f"; {empty:,} are empty" if empty else "")


def prepare(
    source: Source, split: str, out: str | Path, options: Options = Options(), jobs: int = 1,
    progress: Progress = lambda done, total: None,
) -> Summary:  # fmt: skip
    """Write ``{split}-0000.tar``, .. and their index into a folder, or resume a run that was interrupted.

    jobs: number of processes (0 and 1: this one only). progress: called with (done, total) numbers of samples. Raises
    `InputError` for invalid options, for a folder that contains something else, for more bad samples than
    ``options.bad``, and for images that are also in another split; `Halted` if the disk is full or a process dies.
    """
    out = output_path(out)
    _check(source, options, split, jobs)
    refuse_unwritable(out, "choose another folder for the shards")
    options = replace(options, shuffle=bool(source.shuffled if options.shuffle is None else options.shuffle))
    latents = LatentEncoder(Path(options.vae), options.device) if options.vae else None
    record = {  # everything that the bytes of the shards depend on
        "format": FORMAT, "split": split, "kind": source.kind, "fingerprint": source.fingerprint(),
        "number": len(source),
        **{name: getattr(options, name) for name in ("size", "encode", "samples", "shuffle", "seed", "range")},
        "latents": {**latents.record, "batch_size": options.batch_size} if latents else None,
        "classes": source.classes, "notes": list(source.notes),
    }  # fmt: skip
    files = [out / name for name in planned(split, len(source), options.samples)]
    try:
        with _locked(out, split, files, record):
            return _Run(source, split, files, options, latents, progress).run(jobs)
    except OSError as error:
        raise Halted(
            f"{out}: cannot be written: {error.strerror or error}. The shards that are there are complete; the same "
            "command resumes"
        ) from None
    except BrokenProcessPool:
        raise Halted(
            f"a process that decodes images died (out of memory?). The shards in {out} are complete; "
            f"the same command with fewer jobs than {jobs} resumes"
        ) from None


def is_split(name: str) -> bool:
    """Return whether a split can be written under this name: it has ASCII letters, digits and _ only."""
    return bool(re.fullmatch(r"\w+", name, re.ASCII))


def _check(source: Source, options: Options, split: str, jobs: int) -> None:
    """Raise one `InputError` for all options that are invalid."""
    odd = [ascii(name) for name in source.classes if not is_plain(name.replace("\t", " "))]
    formats, latents = ("keep", *ENCODE), options.vae is not None
    unknown = f"{options.encode!r} is not one of {', '.join(formats)}.{nearest(options.encode, formats)}"
    wrong = {
        f"the {source.kind} data set is empty": not len(source),
        f"split: {split!r} must consist of letters, digits and _": not is_split(split),
        f"size: {options.size} is not at least 1": options.size is not None and options.size < 1,
        f"encode: {unknown}": options.encode not in formats,
        f"encode: {options.encode} and vae: latents are not encoded; give only one of them": latents
        and options.encode in ENCODE,
        f"samples: {options.samples} per shard is not at least 1": options.samples < 1,
        "shuffle: gzipped shards can only be read in order; gunzip them": bool(options.shuffle)
        and source.shuffled is None,
        f"seed: {options.seed} is not in 0 .. 2^32 - 1": not 0 <= options.seed < 2**32,
        f"batch_size: {options.batch_size} is not at least 1": options.batch_size < 1,
        f"bad: {options.bad} is not a fraction in 0 .. 1": not 0 <= options.bad <= 1,
        f"range: {options.range} is not two finite numbers, the value of black and a larger one of white": options.range
        is not None
        and not -math.inf < options.range[0] < options.range[1] < math.inf,
        f"jobs: {jobs} is not at least 0": jobs < 0,
        f"classes {', '.join(odd[:3])} ({len(odd)} in all): a name of a class is UTF-8 without control characters such "
        f"as a line break; rename it in the {source.kind}": bool(odd),
    }
    if said := [message for message, is_wrong in wrong.items() if is_wrong]:
        raise InputError("; ".join(said))


@contextlib.contextmanager
def _locked(out: Path, split: str, files: list[Path], record: dict[str, Any]) -> Iterator[None]:
    """Lock a folder for this run, and remove the temporary files of a killed one.

    Raises `InputError` if another process has the lock, or if the folder has shards of this split from another source,
    from other options or of unknown origin.
    """

    def shards() -> list[str]:
        return sorted(f.name for f in out.iterdir() if f.name.startswith(f"{split}-") and f.name.endswith(SUFFIXES))

    file = out / f"{split}{PREPARED}"
    if not file.exists() and (there := shards()):
        raise InputError(f"{out} holds {there[0]}, but no {file.name}: something else wrote it. Name another folder")
    with open_own(file) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{out}: another process is preparing {split} in this folder. Wait until it ends"
            ) from None
        except OSError:  # not every file system has locks
            pass
        if there := shards():
            handle.seek(0)
            _check_same(file, handle.read(), record)
        else:  # there are no shards to resume from
            handle.truncate(0)
            handle.write(json.dumps(record, indent=1).encode() + b"\n")
            os.fsync(handle.fileno())
        if strange := sorted(set(there) - {f.name for f in files}):
            raise InputError(f"{out} holds {strange[0]}, which is not one of the shards of {file.name}. Remove it")
        remove_orphans(out, f"{split}[-.]*")
        yield


def _check_same(file: Path, content: bytes, record: dict[str, Any]) -> None:
    """Raise `InputError`, with all differences, if the shards were begun with another source or other options."""
    try:
        begun, asked = parse_json(content), json.loads(json.dumps(record))
        check_format(begun["format"], FORMAT, str(file))
        differ = [key for key in {**begun, **asked} if key != "notes" and begun.get(key) != asked.get(key)]
    except InputError:
        raise
    except (ValueError, AttributeError, KeyError, TypeError):
        raise InputError(f"{file} is damaged. Remove it and the shards, or name another folder") from None
    if differ:
        values = ((key, json.dumps(begun.get(key)), json.dumps(asked.get(key))) for key in differ)
        said = "; ".join(f"{key}: {there:.200} there, {here:.200} now" for key, there, here in values)
        raise InputError(
            f"{file.parent} was begun with another source or other options: {said}. Use the same, or name another "
            "folder"
        )


class _Run:
    """The state of a run: which shards are missing, which samples were left out so far, and its progress."""

    def __init__(
        self, source: Source, split: str, files: list[Path], options: Options, latents: LatentEncoder | None,
        progress: Progress,
    ) -> None:  # fmt: skip
        self.source, self.files, self.options, self.latents, self.progress = source, files, options, latents, progress
        out, n = files[0].parent, len(source)
        self.split, self.others = split, _other_splits(out, split)
        self.index_file, self.skipped_file = Path(path_of(out, split)), out / f"{split}.skipped.txt"
        self.digest_file = out / f"{split}.sha256"  # in the format of sha256sum
        self.missing = [k for k, file in enumerate(files) if not file.exists()]
        self.done = n - sum(len(self._numbers(k)) for k in self.missing)
        self.skipped = self._skipped_before()
        kept = {file.name for file in files} - {files[k].name for k in self.missing}
        self.digests = {name: digest for name, digest in self._digests_before() if name in kept}
        self.allowed = max(1, int(options.bad * n)) if options.bad else 0
        self.step = options.batch_size if latents else CHUNK
        self.first: Made | None = None  # the first sample that was used
        self.depths: Counter[str] = Counter()
        # RandomState, not Generator: numpy guarantees that its numbers never change
        self.order = np.random.RandomState(options.seed).permutation(n) if options.shuffle else np.arange(n)

    @property
    def _how_to_restart(self) -> str:
        """Return, for messages, what to do after a change of the source or the options."""
        there = any(file.exists() for file in self.files)
        return f"start again: remove {self.files[0].parent}/{self.split}-*.tar" if there else "run this command again"

    def _numbers(self, shard: int) -> range:
        first = shard * self.options.samples
        return range(first, min(first + self.options.samples, len(self.source)))

    def _tasks(self) -> Iterator[Task]:
        """Yield the tasks of all missing shards, in order.

        With an autoencoder, a task is one of its batches. Tasks do not depend on where a run was interrupted.
        """
        for shard in self.missing:
            numbers = self._numbers(shard)
            for first in numbers[:: self.step]:
                yield first, self.order[first : min(first + self.step, numbers.stop)]

    def run(self, jobs: int) -> Summary:
        """Write the missing shards, then the index."""
        self.progress(self.done, len(self.source))
        self._stop_if_too_many()
        mode, tasks = self.latents.mode if self.latents else None, list(self._tasks())
        convert = Convert(self.source, self.options.size, self.options.encode, mode, self.options.range)
        with in_order(convert, tasks, min(jobs, len(tasks))) as made:
            for shard, parts in itertools.groupby(made, key=lambda part: part[0] // self.options.samples):
                self._write(self.files[shard], (samples for _, samples in parts))
                if shard == self.missing[0]:
                    self._stop_if_another_split(self.files[shard])
        self._write_skipped()
        index = self._index(jobs)
        size = sum(s.bytes for s in index.shards)
        shared = {name: count for name, other in self.others.items() if (count := index.shared(other))}
        return Summary(len(index), len(self.files), size, self.skipped, index.captions, self.depths, shared)

    def _write(self, file: Path, parts: Iterable[Samples]) -> None:
        written = 0
        with whole(file) as stream:
            with webdataset.TarWriter(stream, user="", group="", mode=0o644, mtime=0, encoder=False) as tar:
                for samples in parts:
                    for bad in (s for s in samples if isinstance(s, Skipped)):
                        bisect.insort(self.skipped, bad)
                    self._stop_if_too_many()
                    good = [s for s in samples if isinstance(s, Made)]
                    if self.latents and good:
                        latents = self.latents.encode([s.pixels for s in good], [s.name for s in good])
                        good = [
                            replace(s, members={**s.members, LATENT: z}) for s, z in zip(good, latents, strict=True)
                        ]
                    for sample in good:
                        self._stop_if_mixed_classes(sample)
                        self.depths[sample.depth] += 1
                        tar.write({"__key__": _key(sample), **sample.members})
                    written += len(good)
                    self.done += len(samples)
                    self.progress(self.done, len(self.source))
            if not written:
                last = f"{self.skipped[-1].name}: {self.skipped[-1].reason}"
                raise InputError(f"{file.name} would be empty: all of its samples are bad. The last one is {last}")
            # before the shard gets its final name, so that a run that resumes knows its skipped samples and SHA-256
            self._write_skipped()
            stream.flush()
            self.digests[file.name] = sha256(stream.name)
            with whole(self.digest_file) as text:
                text.writelines(f"{digest}  {name}\n".encode() for name, digest in sorted(self.digests.items()))

    def _stop_if_too_many(self) -> None:
        if len(self.skipped) > self.allowed:
            self._write_skipped()
            first = self.skipped[0]
            raise InputError(
                f"{len(self.skipped)} of the first {self.skipped[-1].number + 1:,} samples are bad, and "
                f"bad={self.options.bad:g} allows {self.allowed} of {len(self.source):,}. The first is {first.name}: "
                f"{first.reason}. {self.skipped_file} lists them; allow more with --bad and resume, or repair them and "
                f"{self._how_to_restart}"
            )

    def _stop_if_another_split(self, file: Path) -> None:
        """Raise `InputError` early, and remove the first shard, if most of its images are also in another split.

        All images are compared at the end.
        """
        index = scan(str(file)) if self.others else None
        for name, other in self.others.items():
            if index and (shared := index.shared(other)) > len(index) / 2:
                file.unlink()
                raise InputError(
                    f"{file.parent}: {shared:,} of the first {len(index):,} images of {self.split} are images of "
                    f"{name}, too, so they are not held out. Name another split of the source, or another source "
                    "(for data toy, another --seed)"
                )

    def _stop_if_mixed_classes(self, sample: Made) -> None:
        """Raise `InputError` unless all samples have a class, or none has. The index checks it only at the end."""
        self.first = self.first or sample
        if ("cls" in sample.members) != ("cls" in self.first.members):
            with_it, without = (sample, self.first) if "cls" in sample.members else (self.first, sample)
            raise InputError(
                f"{with_it.name} has a class, but {without.name} has none. Give all samples a class, or none, "
                f"and {self._how_to_restart}"
            )

    def _skipped_before(self) -> list[Skipped]:
        """Return the samples that earlier runs left out of the shards that exist."""
        lines = self.skipped_file.read_text(encoding="utf-8").splitlines() if self.skipped_file.exists() else []
        try:
            rows = [line.split("\t", 2) for line in lines]
            found = [Skipped(int(number), name, reason) for number, name, reason in rows]
        except ValueError:
            raise InputError(f"{self.skipped_file} was changed. Remove it and all shards, and start again") from None
        return [s for s in found if s.number // self.options.samples not in self.missing]

    def _digests_before(self) -> list[tuple[str, str]]:
        """Return the names and SHA-256 of the shards that earlier runs finished."""
        lines = self.digest_file.read_text(encoding="utf-8").splitlines() if self.digest_file.exists() else []
        if wrong := [line for line in lines if not re.fullmatch(r"[0-9a-f]{64}  \S+", line)]:
            raise InputError(
                f"{self.digest_file} was changed ({wrong[0][:80]}). Remove it and all shards, and start again"
            )
        return [(line[66:], line[:64]) for line in lines]

    def _write_skipped(self) -> None:
        if not self.skipped:
            self.skipped_file.unlink(missing_ok=True)
            return
        with whole(self.skipped_file) as stream:
            stream.writelines(f"{s.number:08d}\t{s.name}\t{s.reason}\n".encode() for s in self.skipped)

    def _index(self, jobs: int) -> Index:
        """Return the index that an earlier run saved, if it fits these shards; otherwise make, check and save one."""
        if not self.missing and self.index_file.exists():
            index = Index.load(self.index_file)
            if [(s.name, s.bytes) for s in index.shards] == [(f.name, f.stat().st_size) for f in self.files]:
                return index
        index = build(self.files, jobs=max(1, jobs))
        changed = [s.name for s in index.shards if self.digests.get(s.name, s.sha256) != s.sha256]
        if changed:
            raise InputError(
                f"{self.index_file.parent}: {', '.join(changed[:5])} changed after being written: the SHA-256 is not "
                f"that of {self.digest_file.name}; no index is written. Remove the {len(changed)} changed shards; the "
                "same command writes them again"
            )
        for name, other in self.others.items():
            if (shared := index.shared(other)) > MOST_SHARED * min(len(index), len(other)):
                raise InputError(
                    f"{self.index_file.parent}: {shared:,} of the {len(index):,} images of {self.split} are images of "
                    f"{name} (which has {len(other):,}), too; no index is written. Remove {self.split}-*.tar, or the "
                    f"shards of {name}, and prepare other images"
                )
        index.save(self.index_file)
        return index


def _other_splits(out: Path, split: str) -> dict[str, Index]:
    """Return the indices of the other splits in a folder, by name."""
    files = {f.name.removesuffix(".index.safetensors"): f for f in sorted(out.glob("*.index.safetensors"))}
    indices = {name: Index.load(file) for name, file in files.items() if name != split}
    return {
        name: index
        for name, index in indices.items()
        if any((out / s.name).exists() and not s.name.startswith(f"{split}-") for s in index.shards)
    }


def _key(sample: Made) -> str:
    """Return the key of a sample: its number in the final order, and its file's stem (up to 48 characters).

    Characters of the stem other than letters, digits and - are replaced by -.
    """
    stem = re.sub(r"[^A-Za-z0-9-]", "-", PurePosixPath(sample.name).stem)[:48]
    return f"{sample.number:08d}_{stem}" if stem else f"{sample.number:08d}"
