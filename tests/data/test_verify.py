"""Every difference between a shard and its index is reported, sample by sample."""

import gzip
from pathlib import Path

import pytest
from making import save_index, zipped

from lightning_tdisent.data.tars import find
from lightning_tdisent.data.verify import differences


@pytest.mark.parametrize("packed", [False, True])
def test_differences_name_every_damaged_sample(packed, shards):
    raw = (shards / "train-0001.tar").read_bytes()
    if packed:
        zipped(shards)
    index = save_index(shards)
    urls = find(shards, "train")
    assert [differences(url, index.part(n)) for n, url in enumerate(urls)] == [[], [], []]
    changed = bytearray(raw)
    for sample in (11, 16):
        changed[int(index.regions.begin[sample]) + 700] ^= 32
    name = urls[1].rpartition("/")[2]
    Path(urls[1]).write_bytes(gzip.compress(changed, mtime=0) if packed else changed)
    found = differences(urls[1], index.part(1))
    assert [line.partition(" (bytes")[0] for line in found] == [f"{shards}/{name}: sample 00{n}" for n in (11, 16)]
    assert all("another CRC-32" in line for line in found)
    assert differences(urls[0], index.part(0)) == []
    Path(urls[1]).write_bytes(gzip.compress(raw, mtime=7) if packed else raw + bytes(512))
    size = index.shards[1].bytes
    (only,) = differences(urls[1], index.part(1))
    assert f"{name} has changed since its index was made, outside of any sample ({size:,} bytes" in only
    assert (f"now {size + 512:,}" in only) is not packed


def test_differences_of_missing_truncated_and_unlisted_shards(shards):
    index, rows = save_index(shards), save_index(shards, regions=False)
    url = find(shards, "train")[2]
    content = (shards / "train-0002.tar").read_bytes()
    (shards / "train-0002.tar").write_bytes(content[:5000])
    whole = int((index.regions.begin[17:] + index.regions.size[17:] <= 5000).sum())
    assert len(differences(url, index.part(2))) == 13 - whole
    (line,) = differences(url, rows.part(2))
    assert (
        f"train-0002.tar has changed since its index was made, outside of any sample ({len(content):,} bytes, " in line
    )
    (shards / "train-0002.tar").unlink()
    for one in (index, rows):
        (line,) = differences(url, one.part(2))
        assert line.startswith(f"{shards}/train-0002.tar: cannot be read: ")
