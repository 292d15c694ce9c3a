"""Helpers that make and open shards and indices."""

import gzip
import io
import tarfile
from dataclasses import fields

import numpy as np
import webdataset as wds
from PIL import Image

from lightning_tdisent.data.decode import Decoder
from lightning_tdisent.data.index import Regions, path_of
from lightning_tdisent.data.scan import build
from lightning_tdisent.data.shards import Policy, Shards
from lightning_tdisent.data.tars import find

STOP = Policy()


def write(file, members, form=tarfile.PAX_FORMAT):
    """Write a tar of (name, content): bytes, None for a folder, or the number of another type of member."""
    with tarfile.open(file, "w", format=form) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if content is None or isinstance(content, int):
                member.type = tarfile.DIRTYPE if content is None else bytes([content])
                member.linkname = "0000.png"
            else:
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    return file


def zipped(folder):
    """Gzip all shards in a folder."""
    for file in folder.glob("*.tar"):
        (folder / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes(), mtime=0))
        file.unlink()


def save_index(folder, **options):
    """Make and write the index of the split train."""
    index = build(find(folder, "train"), **options)
    index.save(path_of(folder, "train"))
    return index


def opened(folder, policy=STOP):
    """Open the shards of the split train, as grey images."""
    return Shards.open(folder, "train", Decoder(1), policy)


def same(a, b):
    """Return whether two indices are equal."""
    if (a.shards, a.extensions, a.regions is None) != (b.shards, b.extensions, b.regions is None):
        return False
    pairs = [(getattr(a.regions, f.name), getattr(b.regions, f.name)) for f in fields(Regions)] if a.regions else []
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


def image(value, form="png", size=(4, 4), mode="L"):
    out = io.BytesIO()
    Image.new(mode, size, value).save(out, form)
    return out.getvalue()


def put(file, content=b""):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def listing(source):
    """Return (name, sorted extensions, class or None) of every item."""
    items = [source[i] for i in range(len(source))]
    return [(i.name, sorted(i.members), i.members.get("cls")) for i in items]


def shard(file, *samples):
    file.parent.mkdir(parents=True, exist_ok=True)
    with wds.TarWriter(str(file), encoder=False) as tar:
        for i, sample in enumerate(samples):
            tar.write({"__key__": f"{i}", "png": sample})
    return file
