"""Raw data sets to shards with an index: cropped, encoded anew, or as the latents of an autoencoder.

The order of the samples, their keys and every byte of every shard are a function of the source and the `Options`,
whatever the number of processes and however often the work was broken off. Processes convert small runs of samples;
this one writes them in order, each shard beside its target, which is renamed when it is whole. What was asked for
stands in ``{split}.prepare.json`` from the start, so that the same command goes on and another one is refused. The
file is long because a run must survive what happens to runs of hours: bad images, kills, full disks.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from lightning_tdisent.errors import Halted, InputError, nearest
from lightning_tdisent.streaming.decode import LATENT, BadSample, adm_crop, open_image, to_mode
from lightning_tdisent.streaming.index import Index, build, path_of
from lightning_tdisent.streaming.raw import IMAGES, Item, Source, image_type
from lightning_tdisent.streaming.tars import MAX_MEMBER, SUFFIXES

FORMAT = "lightning_tdisent.prepare/1"
ENCODE: dict[str, dict[str, Any]] = {
    "png": {"format": "png"},
    "jpg": {"format": "jpeg", "quality": 95, "subsampling": 0},
    "webp": {"format": "webp", "lossless": True},
}
GREY = ("1", "L", "LA", "La", "I", "F")
CHUNK = 32  # samples that go to a process at once


@dataclass(frozen=True)
class Options:
    """What becomes of the images.

    ``size``: the middle square at size x size pixels, as ADM crops and resizes; None leaves every image as it is.
    ``encode``: ``keep`` the bytes of png, jpg and webp that are not resized, and the format of those that are (others
    become png), or encode all as png, jpg (quality 95, 4:4:4) or webp (lossless). ``samples``: per shard.
    ``shuffle``: None leaves it to the source; ``seed`` is that of the order. ``vae``: folder of a diffusers
    AutoencoderKL, whose latents are stored instead of images, computed on ``device`` in batches of ``batch_size``.
    ``bad``: the fraction of samples that may be left out because they cannot be decoded; unless it is 0, one may be.
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


@dataclass(frozen=True)
class Skipped:
    """A sample that was left out: its number in the final order, where it came from, and why."""

    number: int
    name: str
    reason: str


@dataclass(frozen=True)
class Summary:
    """What was written: numbers of samples and shards, bytes of all shards, and what was left out."""

    samples: int
    shards: int
    bytes: int
    skipped: list[Skipped]


@dataclass(frozen=True)
class _Made:
    """What became of a raw sample: its members, and its pixels (H, W, C) if they are still to be encoded, or why not.

    ``reason`` is empty for a sample that can be used.
    """

    number: int
    name: str
    members: dict[str, bytes]
    pixels: np.ndarray[Any, Any] | None = None
    reason: str = ""


@dataclass(frozen=True)
class _Task:
    """Neighbours in the final order, of one shard: number of the first one, and the numbers of all in the source."""

    shard: int
    first: int
    items: list[int]


def prepare(
    source: Source,
    split: str,
    out: str | Path,
    options: Options = Options(),
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Write ``{split}-0000.tar``, .. and their index into a folder, or go on where an earlier run was broken off.

    ``jobs`` is the number of processes (None: one per core; 0 and 1: this one alone); ``progress`` is told (done, all)
    samples. Raises `InputError` for options that cannot be met, for a folder that holds something else, and for more
    bad samples than ``options.bad``; `Halted` if the disk is full or a process dies.
    """
    _check(source, options, split, jobs)
    out, jobs = Path(out), _cores() if jobs is None else jobs
    latents = _Latents(options.vae, options.device) if options.vae else None
    record = _record(source, split, options, latents)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _held(out, split, record) as names:
            return _Work(source, split, out, options, latents, names, progress).run(jobs)
    except OSError as error:
        raise Halted(
            f"{out}: cannot be written: {error.strerror or error}. What is there is whole; the same command goes on"
        ) from None
    except BrokenProcessPool:
        raise Halted(
            f"a process that decodes images died (out of memory?). What is in {out} is whole; "
            f"the same command with fewer jobs than {jobs} goes on"
        ) from None


def _check(source: Source, options: Options, split: str, jobs: int | None) -> None:
    """Refuse what cannot be met, all of it at once."""
    formats = ("keep", *ENCODE)
    wrong = {
        f"the {source.kind} data set is empty": not len(source),
        f"split: {split!r} is to be of letters, digits and _": not re.fullmatch(r"\w+", split, re.ASCII),
        f"size: {options.size} is not at least 1": options.size is not None and options.size < 1,
        f"encode: {options.encode!r} is not one of {', '.join(formats)}.{nearest(options.encode, formats)}": (
            options.encode not in formats
        ),
        f"encode: {options.encode} and vae: {options.vae}: latents are stored instead of images; leave one of them": (
            options.vae is not None and options.encode in ENCODE
        ),
        f"samples: {options.samples} per shard is not at least 1": options.samples < 1,
        f"seed: {options.seed} is not in 0 .. 2^32 - 1": not 0 <= options.seed < 2**32,
        f"batch_size: {options.batch_size} is not at least 1": options.batch_size < 1,
        f"bad: {options.bad} is not a fraction in 0 .. 1": not 0 <= options.bad <= 1,
        f"jobs: {jobs} is not at least 0": jobs is not None and jobs < 0,
    }
    if said := [message for message, is_wrong in wrong.items() if is_wrong]:
        raise InputError("; ".join(said))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _record(source: Source, split: str, options: Options, latents: "_Latents | None") -> dict[str, Any]:
    """All that the bytes of the shards depend on."""
    return {
        "format": FORMAT,
        "split": split,
        "kind": source.kind,
        "fingerprint": source.fingerprint(),
        "number": len(source),
        "size": options.size,
        "encode": options.encode,
        "samples": options.samples,
        "shuffle": source.shuffled if options.shuffle is None else options.shuffle,
        "seed": options.seed,
        "latents": {**latents.record, "batch_size": options.batch_size} if latents else None,
        "classes": source.classes,
    }


@contextlib.contextmanager
def _held(out: Path, split: str, record: dict[str, Any]) -> Iterator[list[str]]:
    """Names of all shards of a folder that is this run's alone, cleared of the litter of a killed one."""
    count = -(-record["number"] // record["samples"])
    names = [f"{split}-{k:0{4 if count <= 10_000 else 5}d}.tar" for k in range(count)]
    file = out / f"{split}.prepare.json"
    there = sorted(f.name for f in out.iterdir() if f.name.startswith(f"{split}-") and f.name.endswith(SUFFIXES))
    if there and not (file.exists() and file.stat().st_size):
        raise InputError(f"{out} holds {there[0]}, but no {file.name}: something else wrote it. Name another folder")
    with file.open("a+b", buffering=0) as handle:
        with contextlib.suppress(ImportError):  # not every system has locks
            import fcntl

            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{out}: another process prepares {split} in there. Wait for it") from None
            except OSError:  # nor every file system
                pass
        handle.seek(0)
        _same(file, handle.read(), record, there)
        if not there:
            handle.truncate(0)
            handle.write(json.dumps(record, indent=1, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
            os.fsync(handle.fileno())
            _sync(out)
        if strange := sorted(set(there) - set(names)):
            raise InputError(f"{out} holds {strange[0]}, which {file.name} does not ask for. Remove it")
        for litter in [*out.glob(f".{split}-*.tmp"), *out.glob(f".{split}.*.tmp"), Path(f"{path_of(out, split)}.part")]:
            litter.unlink(missing_ok=True)
        yield names


def _same(file: Path, content: bytes, record: dict[str, Any], shards: list[str]) -> None:
    """Refuse to go on from shards with something else than what they were begun with; all differences are named."""
    if not shards:
        return  # killed before the first one: there is nothing to go on from
    try:
        begun = json.loads(content)
        asked = json.loads(json.dumps(record))
        differ = [key for key in {**begun, **asked} if begun.get(key) != asked.get(key)]
    except (ValueError, AttributeError, TypeError):
        raise InputError(f"{file} is damaged. Remove it and the shards, or name another folder") from None
    if differ:
        said = "; ".join(f"{key}: {_short(begun.get(key))} there, {_short(asked.get(key))} asked for" for key in differ)
        raise InputError(f"{file.parent} was begun otherwise: {said}. Ask for the same, or name another folder")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:200] + " .."


def _sync(folder: Path) -> None:
    """Make the names in a folder survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _whole(file: Path) -> Iterator[io.BufferedWriter]:
    """A file that is seen under its name when all of it is on the disk, or never."""
    beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(file)
        _sync(file.parent)
    finally:
        beside.unlink(missing_ok=True)


class _Work:
    """One run: which shards are missing, what was left out so far, and how far it is."""

    def __init__(
        self, source: Source, split: str, out: Path, options: Options, latents: "_Latents | None", names: list[str],
        progress: Callable[[int, int], None] | None,
    ) -> None:  # fmt: skip
        self.source, self.out, self.options, self.latents, self.names = source, out, options, latents, names
        self.index_file, self.skipped_file = Path(path_of(out, split)), out / f"{split}.skipped.txt"
        self.progress = progress or (lambda done, total: None)
        self.missing = [k for k, name in enumerate(names) if not (out / name).exists()]
        self.done = len(source) - sum(len(self._positions(k)) for k in self.missing)
        self.skipped = self._skipped_before()
        self.allowed = max(1, int(options.bad * len(source))) if options.bad else 0
        self.step = options.batch_size if latents else CHUNK
        self.first: _Made | None = None  # the first sample that was used
        shuffle = source.shuffled if options.shuffle is None else options.shuffle
        n = len(source)  # RandomState, and not a Generator: numpy promises that its numbers never change
        self.order = np.random.RandomState(options.seed).permutation(n) if shuffle else np.arange(n)

    def _positions(self, shard: int) -> range:
        first = shard * self.options.samples
        return range(first, min(first + self.options.samples, len(self.source)))

    def _tasks(self) -> Iterator[_Task]:
        """All that is missing, in order; a task is a batch of the autoencoder, so it never depends on a restart."""
        for shard in self.missing:
            positions = self._positions(shard)
            for first in positions[:: self.step]:
                yield _Task(shard, first, self.order[first : min(first + self.step, positions.stop)].tolist())

    def run(self, jobs: int) -> Summary:
        """Write what is missing, then the index."""
        self.progress(self.done, len(self.source))
        self._stop_if_too_many()
        convert = functools.partial(_convert, self.source, self.options, self.latents.mode if self.latents else None)
        tasks = sum(len(self._positions(k)[:: self.step]) for k in self.missing)
        with _in_order(convert, self._tasks(), min(jobs, tasks)) as made:
            for shard, parts in itertools.groupby(made, key=lambda pair: pair[0].shard):
                self._write(self.out / self.names[shard], (samples for _, samples in parts))
        self._write_skipped()
        index = self._index(jobs)
        return Summary(len(index), len(self.names), sum(s.bytes for s in index.shards), self.skipped)

    def _write(self, file: Path, parts: Iterable[list[_Made]]) -> None:
        written = 0
        with _whole(file) as stream:
            with webdataset.TarWriter(stream, user="", group="", mode=0o644, mtime=0, encoder=False) as tar:
                for samples in parts:
                    good = [s for s in samples if not s.reason]
                    bad = [Skipped(s.number, s.name, s.reason) for s in samples if s.reason]
                    self.skipped = sorted([*self.skipped, *bad], key=lambda s: s.number) if bad else self.skipped
                    self._stop_if_too_many()
                    for sample in self.latents.encode(good) if self.latents else good:
                        self._stop_if_unlike(sample)
                        tar.write({"__key__": _key(sample), **sample.members})
                    written += len(good)
                    self.done += len(samples)
                    self.progress(self.done, len(self.source))
            if not written:
                raise InputError(
                    f"{file.name} would be empty: all of its samples are bad, the last one "
                    f"{self.skipped[-1].name}: {self.skipped[-1].reason}. Put more samples into a shard"
                )
            self._write_skipped()  # before the shard has its name: a run that goes on from it knows what it lacks

    def _stop_if_too_many(self) -> None:
        if len(self.skipped) > self.allowed:
            self._write_skipped()
            first = self.skipped[0]
            raise InputError(
                f"{len(self.skipped)} of the first {self.skipped[-1].number + 1:,} samples are bad, and "
                f"bad={self.options.bad:g} allows {self.allowed} of {len(self.source):,}. The first is {first.name}: "
                f"{first.reason}. {self.skipped_file} lists them; mend them, or allow more, and go on"
            )

    def _stop_if_unlike(self, sample: _Made) -> None:
        """All samples have a class or none, which the reader of the shards asks for too, but only at the end."""
        self.first = self.first or sample
        if ("cls" in sample.members) != ("cls" in self.first.members):
            with_it, without = (sample, self.first) if "cls" in sample.members else (self.first, sample)
            raise InputError(f"{with_it.name} has a class, but {without.name} has none. Give all of them one, or none")

    def _skipped_before(self) -> list[Skipped]:
        """What the shards that are there lack."""
        missing = set(self.missing)
        try:
            lines = self.skipped_file.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        try:
            rows = [line.split("\t", 2) for line in lines]
            found = [Skipped(int(number), name, reason) for number, name, reason in rows]
        except ValueError:
            raise InputError(
                f"{self.skipped_file} has been changed. Remove it and all shards, and start anew"
            ) from None
        return [s for s in found if s.number // self.options.samples not in missing]

    def _write_skipped(self) -> None:
        lines = [f"{s.number:08d}\t{s.name}\t{s.reason}\n" for s in self.skipped]
        if not lines:
            self.skipped_file.unlink(missing_ok=True)
        elif not self.skipped_file.exists() or self.skipped_file.read_text(encoding="utf-8") != "".join(lines):
            with _whole(self.skipped_file) as stream:
                stream.write("".join(lines).encode())

    def _index(self, jobs: int) -> Index:
        """That of an earlier run if it is of these shards, or a new one."""
        files = [self.out / name for name in self.names]
        if not self.missing and self.index_file.exists():
            index = Index.load(self.index_file)
            if [(s.name, s.bytes) for s in index.shards] == [(f.name, f.stat().st_size) for f in files]:
                return index
        index = build(files, jobs=max(1, jobs))
        index.save(self.index_file)
        return index


def _key(sample: _Made) -> str:
    """Number in the final order, and what is left of the file's name where only letters, digits and - are let."""
    stem = re.sub(r"[^A-Za-z0-9-]", "-", PurePosixPath(sample.name).stem)[:48]
    return f"{sample.number:08d}_{stem}" if stem else f"{sample.number:08d}"


# Processes

_Convert = Callable[[_Task], list[_Made]]
_worker: list[_Convert] = []  # what this process converts with, if it is one of those that do


def _start(convert: _Convert) -> None:
    """Make a process ready: it leaves Ctrl-C to its parent, and ends with it, even if that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _worker[:] = [convert]


def _work(task: _Task) -> list[_Made]:
    return _worker[0](task)


@contextlib.contextmanager
def _in_order(
    convert: _Convert, tasks: Iterator[_Task], jobs: int
) -> Iterator[Iterator[tuple[_Task, list[_Made]]]]:  # fmt: skip
    """Every task with what became of it, in the order of the tasks; a few are worked on ahead."""
    if jobs < 2:
        yield ((task, convert(task)) for task in tasks)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])  # torch is imported once, not once per process
    pool = ProcessPoolExecutor(jobs, context, _start, (convert,))

    def results() -> Iterator[tuple[_Task, list[_Made]]]:
        ahead: deque[tuple[_Task, Future[list[_Made]]]] = deque()
        for task in tasks:
            ahead.append((task, pool.submit(_work, task)))
            if len(ahead) > 2 * jobs:
                first, future = ahead.popleft()
                yield first, future.result()
        for first, future in ahead:
            yield first, future.result()

    try:
        yield results()
    finally:
        pool.shutdown(cancel_futures=True)


# Images


def _convert(source: Source, options: Options, mode: str | None, task: _Task) -> list[_Made]:
    """What becomes of some raw samples; ``mode`` is that of the autoencoder's images, if there is one."""
    made = []
    for number, i in enumerate(task.items, task.first):
        item = source[i]
        name = _plain(item.name)
        try:
            made.append(_made(number, name, item, options, mode))
        except BadSample as error:
            made.append(_Made(number, name, {}, reason=_plain(str(error).removeprefix(f"{name} "))))
    return made


def _plain(text: str) -> str:
    """As one line of UTF-8, whatever a file's name is."""
    text = text.encode(errors="backslashreplace").decode()
    return "".join(c if c.isprintable() else "?" for c in text)


def _made(number: int, name: str, item: Item, options: Options, mode: str | None) -> _Made:
    found = [extension for extension in item.members if extension in IMAGES]
    if len(found) != 1:
        raise BadSample(f"{name} has {len(found)} images ({'/'.join(IMAGES)}), expected one")
    rest = {extension: content for extension, content in item.members.items() if extension not in IMAGES}
    content = item.members[found[0]]
    image = open_image(content, name)
    try:
        int(rest.get("cls", b"0"))
        rest.get("txt", b"").decode()
        if mode is not None:
            made = _Made(number, name, rest, np.asarray(_cropped(image, mode, options.size, name)))
        else:
            made = _Made(number, name, {**_encoded(image, content, options, name), **rest})
    except (OSError, ValueError) as error:  # a class that is no number, a mode or size that a format does not have
        if isinstance(error, BadSample):
            raise
        raise BadSample(f"{name} cannot be used: {error}") from None
    if large := [f"{e} of {len(c):,}" for e, c in made.members.items() if len(c) > MAX_MEMBER]:
        raise BadSample(f"{name} cannot be stored: {large[0]} bytes, more than {MAX_MEMBER:,}")
    return made


def _encoded(image: Image.Image, content: bytes, options: Options, name: str) -> dict[str, bytes]:
    """The image by its extension: the bytes that came, or new ones without anything but pixels."""
    kind = image_type(content)
    kept = kind if kind in ENCODE else "png"
    target = kept if options.encode == "keep" else options.encode
    if options.encode == "keep" and kind == kept and (not options.size or image.size == (options.size,) * 2):
        return {kept: content}
    grey = image.mode in GREY or image.mode.startswith("I;16")
    cropped = _cropped(image, "L" if grey else "RGB", options.size, name)
    out = io.BytesIO()
    Image.fromarray(np.asarray(cropped)).save(out, **ENCODE[target])  # from an array: no profile, no comment
    return {target: out.getvalue()}


def _cropped(image: Image.Image, mode: str, size: int | None, name: str) -> Image.Image:
    image = to_mode(image, mode)
    return adm_crop(image, size, name) if size is not None and image.size != (size, size) else image


# Latents


class _Latents:
    """An autoencoder of diffusers that turns images into the mean and standard deviation of their latents.

    As the models of diffusers have them: less the autoencoder's ``shift_factor``, times its ``scaling_factor``, which
    brings them to about unit variance; its ``decode`` takes ``z / scaling_factor + shift_factor``.
    """

    def __init__(self, folder: Path, device: str) -> None:
        import torch
        from diffusers import AutoencoderKL

        folder = Path(folder)
        folder = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
        try:
            self.device = torch.device(device)
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"device: {device!r} cannot be used: {str(error).splitlines()[0]}") from None
        try:
            kind = json.loads((folder / "config.json").read_text())["_class_name"]
            if kind != "AutoencoderKL":
                raise InputError(f"vae: {folder} holds the model {kind}, not an AutoencoderKL of diffusers")
            self.vae = AutoencoderKL.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            if isinstance(error, InputError):
                raise
            said = " ".join(str(error).split())[:300]
            raise InputError(
                f"vae: {folder} is no folder of an AutoencoderKL (config.json, diffusion_pytorch_model.safetensors): "
                f"{type(error).__name__}: {said}"
            ) from None
        self.vae = self.vae.float().eval().to(self.device)
        config = self.vae.config
        modes = {1: "L", 3: "RGB"}
        if config.in_channels not in modes:
            raise InputError(f"vae: {folder} takes images of {config.in_channels} channels, not 1 or 3")
        self.mode = modes[config.in_channels]
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.shape: tuple[int, ...] | None = None
        weights = hashlib.sha256()
        for name, tensor in sorted(self.vae.state_dict().items()):
            weights.update(f"{name} {tuple(tensor.shape)} ".encode() + tensor.cpu().numpy().tobytes())
        self.record = {
            "scaling_factor": config.scaling_factor,
            "shift_factor": getattr(config, "shift_factor", None),
            "channels": config.latent_channels,
            "factor": self.factor,
            "weights": weights.hexdigest(),
            "device": self.device.type,
        }

    def encode(self, samples: list[_Made]) -> list[_Made]:
        """The same samples with ``latent.npy``, float16 (2, 2, C, h, w): as it is and flipped x mean and deviation."""
        import torch

        if not samples:
            return []
        images = [s.pixels.reshape(*s.pixels.shape[:2], -1) for s in samples if s.pixels is not None]
        self.shape = self.shape or images[0].shape
        for sample, image in zip(samples, images, strict=True):
            height, width, _ = image.shape
            if image.shape != self.shape:
                raise InputError(
                    f"{sample.name} has {height} x {width} pixels, others {self.shape[0]} x {self.shape[1]}; "
                    "latents are of one size: say which size"
                )
            if height % self.factor or width % self.factor:
                raise InputError(
                    f"{sample.name} has {height} x {width} pixels, which the autoencoder cannot divide by {self.factor}"
                )
        pixels = torch.from_numpy(np.stack(images)).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with torch.inference_mode(), exact:
            found = [self.vae.encode(x.contiguous()).latent_dist for x in (pixels, pixels.flip(-1))]
            scale, shift = self.record["scaling_factor"], self.record["shift_factor"] or 0.0
            scaled = [torch.stack([(d.mean - shift) * scale, d.std * scale], 1) for d in found]
            both = torch.stack(scaled, 1).half().cpu().numpy()
        out = []
        for sample, latent in zip(samples, both, strict=True):
            if not np.isfinite(latent).all():
                raise InputError(f"{sample.name} has a latent that float16 cannot hold; is it the right autoencoder?")
            content = io.BytesIO()
            np.lib.format.write_array(content, np.ascontiguousarray(latent), (1, 0), allow_pickle=False)
            out.append(_Made(sample.number, sample.name, {**sample.members, LATENT: content.getvalue()}))
        return out
