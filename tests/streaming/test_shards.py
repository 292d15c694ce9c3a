import io
import itertools
import tarfile

import pytest
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader

from lightning_tdisent.errors import InputError
from lightning_tdisent.streaming.shards import Resident, Streamed, digest, find, load


@pytest.fixture
def shards(tmp_path):
    """Three shards of 10, 7 and 13 images whose pixels are their number, which is their label too."""
    number = 0
    for k, count in enumerate((10, 7, 13)):
        with wds.TarWriter(str(tmp_path / f"train-{k:04d}.tar"), mtime=0) as shard:
            for _ in range(count):
                png = io.BytesIO()
                Image.new("L", (4, 4), number).save(png, "png")
                shard.write({"__key__": f"{number:04d}", "png": png.getvalue(), "cls": str(number).encode()})
                number += 1
    return tmp_path


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


def test_gzipped_shards_read_the_same(shards, tmp_path):
    import gzip

    plain = load(shards, "train", 1)
    for file in find(shards, "train"):
        (shards / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    again = load(shards, "train", 1)
    assert torch.equal(again.images, plain.images)
    assert again.digest != plain.digest  # other bytes


def test_the_digest_sees_one_byte(shards):
    before = digest(find(shards, "train"))
    file = shards / "train-0001.tar"
    content = bytearray(file.read_bytes())
    content[600] ^= 1
    file.write_bytes(content)
    assert digest(find(shards, "train")) != before


def order(dataset_of, world, workers, epoch):
    """Labels in the order of global batches."""
    streams = []
    for rank in range(world):
        dataset = dataset_of(rank, world)
        dataset.first = epoch * len(dataset)
        batches = DataLoader(dataset, batch_size=None, num_workers=workers) if workers else dataset
        streams.append([b["label"].tolist() for b in itertools.islice(batches, len(dataset))])
    assert len({len(s) for s in streams}) == 1  # every rank takes the same number of steps
    return [label for step in zip(*streams, strict=True) for batch in step for label in batch]


@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_the_order_is_a_function_of_seed_and_epoch_alone(kind, shards):
    data = load(shards, "train", 1)

    def make(total):
        def dataset(rank, world):
            if kind == "resident":
                return Resident(data, total // world, 5, rank, world)
            return Streamed(shards, "train", 1, total // world, 5, 8, rank, world)

        return dataset

    one = order(make(4), 1, 0, 3)
    assert len(one) == 28  # 30 = 7 x 4 + 2: the incomplete batch is left out
    assert len(set(one)) == 28
    for world, workers in ((1, 2), (2, 0), (4, 0), (2, 2)):
        assert order(make(4), world, workers if kind == "streamed" else 0, 3) == one
    assert order(make(4), 1, 0, 4) != one
    assert order(make(4), 1, 0, 3) == one


def test_more_ranks_than_shards(shards):
    labels = order(lambda r, w: Streamed(shards, "train", 1, 1, 0, 1, r, w), 5, 0, 0)
    assert sorted(labels) == list(range(30))


def test_fewer_images_than_a_batch_are_refused_in_both_forms(shards):
    with pytest.raises(InputError, match=r"batch_size: 31 .* more than the 30"):
        Resident(load(shards, "train", 1), 31, 0)
    with pytest.raises(InputError, match=r"batch_size: 31 .* more than the 30"):
        list(Streamed(shards, "train", 1, 31, 0))


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
        ([("9999.png", None), ("9999.jpg", None)], "has 2 images"),
    ],
)
def test_a_bad_sample_is_named_with_its_shard(members, message, shards):
    png = io.BytesIO()
    Image.new("L", (4, 4)).save(png, "png")
    for name, content in members:
        add(shards / "train-0002.tar", name, png.getvalue() if content is None else content)
    with pytest.raises(InputError, match=f"train-0002.tar: sample 9999.*{message}"):
        load(shards, "train", 1)


def test_images_of_two_sizes_are_refused(shards):
    png = io.BytesIO()
    Image.new("L", (5, 5)).save(png, "png")
    add(shards / "train-0002.tar", "9999.png", png.getvalue())
    with pytest.raises(InputError, match=r"differ in size: \[\(1, 4, 4\), \(1, 5, 5\)\]"):
        load(shards, "train", 1)


def test_the_digits_are_the_scans_of_scikit_learn(digits):
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    parts = [load(digits, split, 1) for split in ("train", "test")]
    mine = torch.cat([p.images for p in parts]).flatten(1).double() * 16 / 255
    both = sorted(map(tuple, torch.cat([torch.cat([p.labels for p in parts])[:, None], mine.round()], 1).tolist()))
    assert both == sorted((float(y), *x) for x, y in zip(scans, labels, strict=True))
