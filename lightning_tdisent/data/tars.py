"""Shards as files: find the shards of a split, and list the members of a shard.

A folder is local or a URL that fsspec opens (``s3://bucket/set``); a shard is a plain or a gzipped tar. Nothing is
unpacked to disk. Links, devices, absolute names, names with ``..``, members over 64 MB, repeated keys, and tars
without an end mark or with data after it are refused. Hidden files, pickles and single files that belong to no sample
are not read, but counted (`Unread`).
"""

import gzip
import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

import braceexpand

from lightning_tdisent.data import splits
from lightning_tdisent.data.remote import file_system, is_remote, open_remote
from lightning_tdisent.digests import digest_of
from lightning_tdisent.errors import InputError
from lightning_tdisent.files import check_name, is_plain

SUFFIXES = (".tar", ".tar.gz")
MAX_MEMBER = 64 * 2**20
MAX_REGION = 4 * MAX_MEMBER  # bytes of a sample
MAX_END = 2**20  # bytes after the end mark
PICKLED = {"pickle", "pkl", "pyd", "pth", "pt"}
# extensions of files that are not a sample if no other file has their key
LONE = {"caption", "csv", "db", "html", "ini", "json", "jsonl", "log", "md", "parquet", "pdf", "py", "rst", "sh"}
LONE |= {"toml", "tsv", "txt", "xml", "yaml", "yml"}
VOLUME_LABEL = b"V"  # type of a member, in tars of GNU tar
KEY = re.compile(r"(?:\./)*((?:.*/|)[^./]+)[.]([^/]*)$")  # key and extension of a member's name, as in webdataset
HIDDEN = re.compile(r"(^|/)(\.(?!/|$)|__MACOSX(/|$))")  # of a file or a folder above it: ._a.jpg, .DS_Store
BLOCK = 512
MAX_SHARDS = 10**6
PREPARE = "data/README.md says how to prepare each data set."
PREPARED = ".prepare.json"  # {split}.prepare.json holds the source and the options of `data prepare`

# of a sample: first byte, key, and members {extension: (first byte, size)}
Layout = tuple[int, str, dict[str, tuple[int, int]]]
Span = tuple[int, int]  # begin and end
Unread = dict[str, list[Any]]  # {kind of file: [number of files that were not read, name of the first]}


def open_shard(url: str) -> IO[bytes]:
    """Open a shard for reading as it is stored (not unzipped). Raises OSError."""
    if not is_remote(url):
        return open(url, "rb")
    return open_remote(url)


@contextmanager
def open_tar(url: str) -> Iterator[IO[bytes]]:
    """Open the tar in a plain or gzipped shard for reading. Raises OSError."""
    with open_shard(url) as raw:
        if url.endswith(".gz"):
            with gzip.GzipFile(fileobj=raw) as plain:
                yield io.BufferedReader(plain, 2**20)
        else:
            yield raw


def expand_braces(pattern: str, where: str) -> list[str]:
    """Return the names that a pattern with braces stands for, such as ``{0000..0127}``.

    Raises InputError that begins with ``where`` for braces that do not match, and for more than `MAX_SHARDS` names.
    """
    try:
        names = list(itertools.islice(braceexpand.braceexpand(pattern), MAX_SHARDS + 1))
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    if len(names) > MAX_SHARDS:
        raise InputError(f"{where}: more than {MAX_SHARDS:,} names")
    return names


def find(path: str | Path, split: str) -> list[str]:
    """Return the sorted URLs of the shards of a split: those with its word in their names, or that match a pattern.

    See `splits` for the words. All shards of the folder belong to the split if no name has the word of a split.
    ``split`` is a pattern if it contains ``*``, ``?``, ``[..]`` or ``{000..123}``, or ends in .tar or .tar.gz. Raises
    `InputError` if the folder has no such shards, lacks shards that braces name, holds a shard twice (.tar and
    .tar.gz), or if a `data prepare` has not finished the split.
    """
    folder = str(path) if str(path).endswith("://") or str(path) == "/" else str(path).rstrip("/")
    if folder.startswith("pipe:") or split.startswith("pipe:"):
        raise InputError(
            f"data.path: {folder} {split}: pipe: runs a command; name a folder, or a URL that fsspec opens"
        )
    check_name(folder, "data.path")
    braces = re.search(r"\{[^{}]*(\.\.|,)[^{}]*\}", split)
    names = [name for name in _names(folder) if not name.startswith(".")]
    shards = [name for name in names if name.endswith(SUFFIXES)]
    if twice := sorted(set(shards).intersection(name.removesuffix(".gz") for name in shards if name.endswith(".gz"))):
        raise InputError(f"data.path: {folder} holds {twice[0]} and {twice[0]}.gz: remove one of them")
    if braces:
        wanted = set(expand_braces(split, f"data.path: {folder} {split}"))
        found = sorted(wanted.intersection(shards))
        if missing := sorted(wanted.difference(shards)):
            raise InputError(
                f"data.path: {folder} holds {len(found)} of the {len(wanted)} shards of {split}; {missing[0]} is "
                "missing"
            )
    elif re.search(r"[*?\[]", split) or split.endswith(SUFFIXES):
        found = sorted(name for name in shards if fnmatch(name, split))
    else:
        found = sorted(splits.of_split(shards, split, f"data.path: {folder}"))
        if not found and (others := splits.found(shards)):
            has = ", ".join(f"{other} ({len(files)}: {files[0]}, ..)" for other, files in others.items())
            raise InputError(
                f"data.path: {folder} holds no shards {split}-*.tar(.gz), but shards of {has}. Name one of these, "
                "or a pattern of the shards"
            )
    refuse_unfinished(folder, names, found, split)
    if not found:
        asked = split if braces or re.search(r"[*?\[.]", split) else f"{split}-*.tar(.gz)"
        raise InputError(
            f"data.path: {folder} holds no shards {asked}; it holds {', '.join(names[:5]) or 'nothing'}. {PREPARE}"
        )
    return [f"{folder}/{name}" for name in found]


def planned(split: str, number: int, samples: int) -> list[str]:
    """Return the names of the shards that `data prepare` makes of ``number`` samples, with ``samples`` per shard."""
    count = -(-number // samples)
    return [f"{split}-{k:0{4 if count <= 10_000 else 5}d}.tar" for k in range(count)]


def refuse_unfinished(folder: str, names: Iterable[str], found: Iterable[str], split: str) -> None:
    """Raise `InputError` for shards of a `data prepare` that is not finished.

    names: the files in the folder; found: the shards that were chosen, empty if the split has none yet.
    """
    there, found = {name.removesuffix(".gz") for name in names}, {name.removesuffix(".gz") for name in found}
    for file in (f"{folder}/{name}" for name in names if name.endswith(PREPARED)):
        try:
            with open_shard(file) as stream:
                record = json.loads(stream.read())
            wanted = planned(record["split"], record["number"], record["samples"])
            missing = [name for name in wanted if name not in there]
            mine = not found.isdisjoint(wanted) or (not found and record["split"] == split)
        except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):  # damaged: `prepare` reports that
            continue
        if missing and mine:
            raise InputError(
                f"data.path: {folder}: the data prepare of {record['split']} is not finished: "
                f"{len(wanted) - len(missing)} of its {len(wanted)} shards are there, {missing[0]} is not. Run the "
                f"same data prepare command again, which resumes; or remove {file} to use these shards as they are"
            )


def _names(folder: str) -> list[str]:
    if not is_remote(folder) and not Path(folder).is_dir():
        pattern = (
            "; name the folder there, and the pattern in data.train" if re.search(r"[*?\[{]|\.tar", folder) else ""
        )
        raise InputError(f"data.path: {folder} is not a folder{pattern}. {PREPARE}")
    try:
        if not is_remote(folder):
            return sorted(os.listdir(folder))
        system, path = file_system(folder)
        return sorted(name.rstrip("/").rpartition("/")[2] for name in system.ls(path, detail=False))
    except FileNotFoundError:
        raise InputError(f"data.path: there is no folder {folder}. {PREPARE}") from None
    except InputError:
        raise
    except Exception as error:  # clients of object stores raise their own types of exceptions
        raise InputError(f"data.path: {folder} cannot be read: {error}") from None


class _Header(tarfile.TarInfo):
    """A header that refuses an impossible size before any content is read, also in headers that only hold names."""

    def _proc_member(self, archive: tarfile.TarFile) -> Any:
        if not 0 <= self.size <= (MAX_MEMBER if self.isreg() else MAX_END):
            raise InputError(
                f"member {self.name} (byte {self.offset}) has a size of {self.size:,} bytes: too many, or negative"
            )
        return super()._proc_member(archive)  # type: ignore[misc]


@contextmanager
def tar_members(stream: Any, mode: Any, where: str) -> Iterator[tarfile.TarFile]:
    """Open a tar whose headers are checked as they are read.

    The message of an `InputError` that is raised inside the block begins with ``where``. Errors of tarfile pass.
    """
    try:
        with tarfile.open(fileobj=stream, mode=mode, tarinfo=_Header) as tar:
            yield tar
    except InputError as error:
        raise error if str(error).startswith(where) else error.within(where) from None


def note(unread: Unread, kind: str, name: str) -> None:
    """Count a file that is not read, and keep the name of the first one of each kind."""
    unread.setdefault(kind, [0, name])[0] += 1


def is_sample(kinds: Iterable[str]) -> bool:
    """Return whether files with the same key and these extensions are a sample (a lone README.md is not)."""
    kinds = set(kinds)
    return len(kinds) > 1 or kinds.isdisjoint(LONE)


def walk(tar: tarfile.TarFile, where: str, unread: Unread) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yield the key, extension and header of every member that may belong to a sample.

    Pickles (which could run any code), hidden files and files without an extension are counted in ``unread`` instead.
    Raises `InputError` for members that no shard should contain: links, devices, invalid names and sizes.
    """
    for member in tar:
        place = f"{where}: member {member.name} (byte {member.offset})"
        if member.isdir() or member.type == VOLUME_LABEL:
            continue
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
            raise InputError(
                f"{place} is a link, a device or the like; a shard holds plain files. tar stores links as files with "
                "--dereference --hard-dereference"
            )
        if not is_plain(member.name):
            raise InputError(f"{where}: the member at byte {member.offset} has the invalid name {member.name!a}")
        if member.name.startswith("/") or ".." in member.name.split("/"):
            raise InputError(f"{place} has an absolute name, or one with '..'")
        if not 0 <= member.size <= MAX_MEMBER:  # check again: an extended header may have changed the size
            raise InputError(f"{place} has {member.size:,} bytes, more than {MAX_MEMBER:,}, or negative")
        parts = KEY.match(member.name)
        extension = parts[2].lower() if parts else ""
        if HIDDEN.search(member.name):
            note(unread, "hidden files", member.name)
        elif parts is None:
            note(unread, "files without an extension", member.name)
        elif extension.rpartition(".")[2] in PICKLED:
            note(unread, f"pickles KEY.{extension}", member.name)
        else:
            yield parts[1], extension, member


def layout(stream: IO[bytes], where: str, unread: Unread) -> tuple[list[Layout], list[Span]]:
    """Return the samples of a tar, and the begin and end of their regions.

    A sample is its first byte, its key, and its members {extension: (first byte, size)}. Files that belong to no
    sample are counted in ``unread``. Raises `InputError` for a tar that is damaged, has data after its end mark, or
    contains what no shard should.
    """
    found: list[Layout] = []
    seen: dict[str, int] = {}
    with tar_members(stream, "r:", where) as tar:
        for key, extension, member in walk(tar, where, unread):
            if found and found[-1][1] == key:
                members = found[-1][2]
                if extension in members:
                    raise InputError(
                        f"{where}: {member.name} is there twice, at bytes {members[extension][0]} and "
                        f"{member.offset_data}"
                    )
            elif key in seen:
                raise InputError(
                    f"{where}: the sample {key} is there twice, at bytes {seen[key]} and {member.offset}; "
                    "its members must follow each other: write the tar again with `tar --sort=name`"
                )
            else:
                members = {}
                found.append((member.offset, key, members))
                seen[key] = member.offset
            members[extension] = (member.offset_data, member.size)
        end = tar.offset
    stream.seek(end)
    if (mark := stream.read(BLOCK)) != bytes(BLOCK):
        what = "a damaged header" if mark else "its end mark is missing; was it cut off?"
        raise InputError(f"{where} is damaged at byte {end}: {what}")
    end += BLOCK
    rest = stream.read(MAX_END + 1)
    if rest.strip(b"\0"):
        joined = " with another tar" if b"ustar" in rest else ""
        raise InputError(
            f"{where} continues after its end mark (byte {end}){joined}, which readers of tars ignore. Join tars with "
            "`tar --concatenate`, not with `cat`, or keep them as separate shards"
        )
    if len(rest) > MAX_END:
        raise InputError(f"{where} continues for more than {MAX_END:,} bytes after its end mark (byte {end})")
    end += len(rest)
    for _, key, members in (lone := [sample for sample in found if not is_sample(sample[2])]):
        note(unread, "files of no sample", f"{key}.{next(iter(members))}")
    if lone:
        found = [sample for sample in found if is_sample(sample[2])]
    edges = [0, *(begin for begin, *_ in found[1:]), end]  # the regions tile the tar
    spans = list(itertools.pairwise(edges)) if found else []
    for (_, key, _), (begin, stop) in zip(found, spans, strict=True):
        if stop - begin > MAX_REGION:
            raise InputError(
                f"{where}: sample {key} (byte {begin}) has {stop - begin:,} bytes, more than {MAX_REGION:,}"
            )
    return found, spans


def hash_file(url: str) -> tuple[int, str]:
    """Return the size in bytes and the SHA-256 of a shard as it is stored. Raises OSError."""
    with open_shard(url) as raw:
        total = digest_of(iter(lambda: raw.read(2**20), b""))
        return raw.tell(), total


def size_of(url: str) -> int:
    """Return the size in bytes of a shard as it is stored. Raises OSError."""
    with open_shard(url) as raw:
        return raw.seek(0, os.SEEK_END)
