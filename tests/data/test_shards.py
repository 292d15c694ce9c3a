"""A folder of shards is read as it was written, or a message says what is wrong with it."""

import io
import os
import tarfile

import pytest
import torch
from making import opened, save_index, zipped
from PIL import Image

from lightning_tdisent.data import shards as streaming
from lightning_tdisent.data.shards import load
from lightning_tdisent.data.tars import find
from lightning_tdisent.errors import InputError


def add(shard, name, content):
    with tarfile.open(shard, "a") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def test_load_decodes_every_sample_as_written(shards):
    data = load(shards, "train", 1)
    assert data.labels.tolist() == list(range(30))
    assert data.images.shape == (30, 1, 4, 4)
    assert torch.equal(data.images.float().mean((1, 2, 3)).long(), data.labels)
    assert len(load(shards, "train", 1, limit=11)) == 11
    assert load(shards, "train", 3).images.shape == (30, 3, 4, 4)


def test_gzipped_shards_read_the_same(shards):
    plain = load(shards, "train", 1)
    zipped(shards)
    again = load(shards, "train", 1)
    assert torch.equal(again.images, plain.images)
    assert again.digest != plain.digest  # other bytes


def test_the_digest_changes_with_one_byte(shards):
    before = opened(shards).digest
    file = shards / "train-0001.tar"
    content = bytearray(file.read_bytes())
    content[600] ^= 1
    file.write_bytes(content)
    assert opened(shards).digest != before


def test_a_replaced_shard_is_read_again(shards):
    save_index(shards)
    assert opened(shards).batch([12])["label"].tolist() == [12]
    (shards / "train-0002.tar").replace(shards / "train-0001.tar")
    save_index(shards)
    assert opened(shards).batch([12])["label"].tolist() == [19]


def test_a_folder_without_shards_is_refused(tmp_path, shards):
    with pytest.raises(InputError, match="is not a folder"):
        find(tmp_path / "none", "train")
    with pytest.raises(InputError, match=r"no shards val-\*"):
        find(shards, "val")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="it holds nothing"):
        find(tmp_path / "empty", "train")


def test_a_truncated_shard_is_named(shards):
    file = shards / "train-0002.tar"
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(InputError, match="damaged"):
        load(shards, "train", 1)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("9999.cls", b"1")], "has 0 images"),
        ([("9999.png", b"no png"), ("9999.cls", b"1")], "cannot be decoded"),
        ([("9999.png", None), ("9999.cls", b"seven")], "cannot be decoded"),
        ([("9999.png", None), ("9999.jpg", None), ("9999.cls", b"1")], "has 2 images"),
        ([("9999.png", None)], r"1 of 14 samples have no class .* first"),
    ],
)
def test_a_bad_sample_is_named_with_its_shard(members, message, shards):
    png = io.BytesIO()
    Image.new("L", (4, 4)).save(png, "png")
    for name, content in members:
        add(shards / "train-0002.tar", name, png.getvalue() if content is None else content)
    with pytest.raises(InputError, match=message) as refusal:
        load(shards, "train", 1)
    assert "train-0002.tar: sample 9999" in str(refusal.value)


def test_images_of_two_sizes_are_refused(shards):
    png = io.BytesIO()
    Image.new("L", (5, 5)).save(png, "png")
    add(shards / "train-0002.tar", "9999.png", png.getvalue())
    add(shards / "train-0002.tar", "9999.cls", b"3")
    with pytest.raises(InputError, match=r"differ in size: .* has \[1, 4, 4\], .*sample 9999 .* has \[1, 5, 5\]"):
        load(shards, "train", 1)


def test_the_digits_are_the_scans_of_scikit_learn(digits):
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    parts = [load(digits, split, 1) for split in ("train", "test")]
    mine = torch.cat([p.images for p in parts]).flatten(1).double() * 16 / 255
    both = sorted(map(tuple, torch.cat([torch.cat([p.labels for p in parts])[:, None], mine.round()], 1).tolist()))
    assert both == sorted((float(y), *x) for x, y in zip(scans, labels, strict=True))


def test_a_file_stays_open_while_it_is_read(shards, monkeypatch):
    # another thread that opens many shards, or this shard at the same moment, evicts it from the cache
    save_index(shards)
    data, read = opened(shards), os.pread

    def late(*place):
        streaming._opened.cache_clear()
        return read(*place)

    monkeypatch.setattr(os, "pread", late)
    assert data.batch(range(30))["label"].tolist() == list(range(30))
