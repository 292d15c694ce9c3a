"""Compare shards with their index: which shards there are, their sizes, and every byte of them."""

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from lightning_tdisent.data.index import Index, index_command, path_of
from lightning_tdisent.data.remote import is_remote
from lightning_tdisent.data.scan import Progress, scan, spread
from lightning_tdisent.data.tars import find, hash_file, open_tar, size_of
from lightning_tdisent.errors import InputError


def matched(urls: Sequence[str], index: Index, file: str, again: str, sizes: bool) -> list[str]:
    """Return the URLs of the shards in the order of their index.

    file: the index, and again: the command that makes it again, for messages. sizes: compare the sizes of local files.
    Raises `InputError` if the index lists other shards than the folder holds, or if the size of a shard differs.
    """
    again = f"make the index again: {again}"
    there, listed = {url.rpartition("/")[2]: url for url in urls}, {shard.name for shard in index.shards}
    if listed != there.keys():
        other = min(listed ^ there.keys())
        raise InputError(
            f"{file} lists {len(listed)} shards, but the folder holds {len(there)}: {other} is only in the "
            f"{'index' if other in listed else 'folder'}. If that is right, {again}"
        )
    for shard in index.shards if sizes and not is_remote(urls[0]) else ():
        try:
            size = size_of(there[shard.name])
        except OSError as error:
            raise InputError(f"{there[shard.name]} cannot be read: {error.strerror or error}") from None
        if size != shard.bytes:
            raise InputError(
                f"{there[shard.name]} has {size:,} bytes, but its index says {shard.bytes:,}. If that is right, {again}"
            )
    return [there[shard.name] for shard in index.shards]


def differences(url: str, index: Index) -> list[str]:
    """Return what is wrong with a shard, sample by sample; empty if nothing is. index: that of this shard alone.

    Even if no byte has changed, the shard may contain what no shard should, or classes that are not numbers.
    """
    (row,), folder = index.shards, url.rpartition("/")[0]
    try:
        size, sha256 = hash_file(url)
    except OSError as error:
        return [f"{url}: cannot be read: {error}"]
    if sha256 == row.sha256:
        if not is_remote(url):  # an index of an earlier version lacks this; reading a remote shard again is expensive
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
    """Yield the samples of a shard that have changed, as far as its index lists samples, and how they differ."""
    sample, sizes = 0, index.regions.size.tolist() if index.regions else []
    try:
        with open_tar(url) as stream:
            for sample, size in enumerate(sizes):
                if fault := index.fault(sample, stream.read(size)):
                    yield sample, fault
    except (EOFError, OSError, zlib.error) as error:  # nothing after this sample can be read
        yield from ((lost, f"cannot be read: {error}") for lost in range(sample, len(sizes)))


def verify(
    path: str | Path, split: str, jobs: int = 1, progress: Progress | None = None, where: str | Path | None = None
) -> tuple[Index, list[str]]:
    """Read every byte of a split. Return its index, and what is wrong, by shard and sample.

    where: folder of the index, if it is not that of the shards. Raises `InputError` if there is no index, or if it
    lists other shards.
    """
    urls, file, again = find(path, split), path_of(path, split, where), index_command(path, split, where)
    try:
        index = Index.load(file, again)
    except FileNotFoundError:
        raise InputError(
            f"{file} does not exist, so there is nothing to compare the shards with. If they are good, make it: {again}"
        ) from None
    urls = matched(urls, index, file, again, sizes=False)
    parts = (index.part(number) for number in range(len(urls)))
    return index, [line for lines in spread(differences, urls, parts, jobs=jobs, progress=progress) for line in lines]
