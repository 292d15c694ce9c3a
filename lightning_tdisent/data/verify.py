"""Shards against their index: which there are, their lengths, every byte of them."""

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from lightning_tdisent.data.index import Index, index_command, path_of
from lightning_tdisent.data.remote import is_remote
from lightning_tdisent.data.scan import Progress, scan, spread
from lightning_tdisent.data.tars import find, hash_file, open_tar, size_of
from lightning_tdisent.errors import InputError


def matched(urls: Sequence[str], index: Index, file: str, again: str, sizes: bool) -> list[str]:
    """The shards in the order of their index; refuses others, and, by name, those of another length.

    again: the command that makes the index anew, for messages.
    """
    again = f"make the index anew: {again}"
    there, listed = {url.rpartition("/")[2]: url for url in urls}, {shard.name for shard in index.shards}
    if listed != there.keys():
        other = min(listed ^ there.keys())
        raise InputError(
            f"{file} names {len(listed)} shards, the folder holds {len(there)}: {other} is only in the "
            f"{'index' if other in listed else 'folder'}. If that is right, {again}"
        )
    for shard in index.shards if sizes and not is_remote(urls[0]) else ():
        try:
            size = size_of(there[shard.name])
        except OSError as error:
            raise InputError(f"{there[shard.name]} cannot be read: {error.strerror or error}") from None
        if size != shard.bytes:
            raise InputError(
                f"{there[shard.name]} has {size:,} bytes, its index says {shard.bytes:,}. If that is right, {again}"
            )
    return [there[shard.name] for shard in index.shards]


def differences(url: str, index: Index) -> list[str]:
    """What is wrong with a shard, sample by sample, against the index of it alone; empty if nothing is.

    The bytes may be what they were, and yet hold what no shard should, or classes that are no numbers.
    """
    (row,), folder = index.shards, url.rpartition("/")[0]
    try:
        size, sha256 = hash_file(url)
    except OSError as error:
        return [f"{url}: cannot be read: {error}"]
    if sha256 == row.sha256:
        if not is_remote(url):  # an index of before does not say; reading an object store once more is dear
            try:
                (row,) = scan(url).shards
            except InputError as error:
                return [f"{folder}/{error}"]
        count, first = row.unusable
        return [f"{folder}/{first}" + (f" ({count:,} samples cannot be used)" if count > 1 else "")] if count else []
    found = [f"{folder}/{index.name(sample)} {fault}" for sample, fault in _faults(url, index)]
    was = f"{row.bytes:,} bytes, now {size:,}" if size != row.bytes else f"{size:,} bytes"
    return found or [f"{url} has changed since its index was made, outside of any sample ({was}): another SHA-256"]


def _faults(url: str, index: Index) -> Iterator[tuple[int, str]]:
    """Samples of a shard that are not what they were, as far as its index lists them, and why."""
    sample, sizes = 0, index.regions.size.tolist() if index.regions else []
    try:
        with open_tar(url) as stream:
            for sample, size in enumerate(sizes):
                if fault := index.fault(sample, stream.read(size)):
                    yield sample, fault
    except (EOFError, OSError, zlib.error) as error:  # nothing can be read on from here
        yield from ((lost, f"cannot be read: {error}") for lost in range(sample, len(sizes)))


def verify(
    path: str | Path, split: str, jobs: int = 1, progress: Progress | None = None, where: str | Path | None = None
) -> tuple[Index, list[str]]:
    """Read every byte of a split; its index (in the folder ``where``), and what is wrong by shard and sample."""
    urls, file, again = find(path, split), path_of(path, split, where), index_command(path, split, where)
    try:
        index = Index.load(file, again)
    except FileNotFoundError:
        raise InputError(
            f"{file} is not there, so that nothing says what the shards were. If they are good, make it: {again}"
        ) from None
    urls = matched(urls, index, file, again, sizes=False)
    parts = (index.part(number) for number in range(len(urls)))
    return index, [line for lines in spread(differences, urls, parts, jobs=jobs, progress=progress) for line in lines]
