"""The single rule for names of splits: a word anywhere in the name, in any case, with synonyms."""

import pytest
from making import write

from lightning_tdisent.data.splits import found, named, of_split
from lightning_tdisent.data.tars import find
from lightning_tdisent.errors import InputError


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("imagenet-train-000123.tar", ["train"]),
        ("imagenet-val-000012.tar", ["val"]),
        ("imagenet1k-validation-00.tar", ["val"]),
        ("imagenet22k-train-0001.tar.gz", ["train"]),
        ("cifar10-test.parquet", ["test"]),
        ("training", ["train"]),
        ("Testing", ["test"]),
        ("TRAIN", ["train"]),
        ("Val", ["val"]),
        ("trainA", ["train"]),
        ("train2017", ["train"]),
        ("valid_00001.tar", ["val"]),
        ("MyTrainSet", ["train"]),
        ("dev-00.tar", ["val"]),
        ("train_val_0.tar", ["train", "val"]),
        ("latest-0001.tar", []),
        ("pretrained.tar", []),
        ("contest", []),
        ("value-1.tar", []),
        ("trainval-0000.tar", []),
        ("00000.tar", []),
        ("训练-0.tar", []),
    ],
)
def test_a_split_is_a_word_of_a_name(name, expected):
    assert named(name) == expected


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["i-train-0.tar", "i-train-1.tar", "i-val-0.tar"], "train", ["i-train-0.tar", "i-train-1.tar"]),
        (["i-train-0.tar", "i-train-1.tar", "i-val-0.tar"], "val", ["i-val-0.tar"]),
        (["i-train-0.tar", "i-train-1.tar", "i-val-0.tar"], "validation", ["i-val-0.tar"]),
        (["i-train-0.tar", "i-val-0.tar"], "test", []),
        (["Train", "Val"], "train", ["Train"]),
        (["training", "testing"], "test", ["testing"]),
        (["00000.tar", "00001.tar"], "train", ["00000.tar", "00001.tar"]),
        (["00000.tar", "00001.tar"], "test", ["00000.tar", "00001.tar"]),
        (["extra-0.tar", "train-0.tar"], "extra", ["extra-0.tar"]),
        (["set-extra-0.tar", "set-train-0.tar"], "extra", ["set-extra-0.tar"]),
        (["train-0.tar", "train_val-0.tar"], "train", ["train-0.tar"]),
        (["train-0.tar", "train_val-0.tar"], "train_val", ["train_val-0.tar"]),
        (["val-0.tar", "validation-0.tar"], "validation", ["validation-0.tar"]),
        ([], "train", []),
    ],
)
def test_the_names_of_a_split(names, split, expected):
    assert of_split(names, split, "folder") == expected


def test_a_name_with_two_splits_is_refused():
    with pytest.raises(InputError, match=r"^folder: train_val_0.tar names the splits train and val\. "):
        of_split(["train_0.tar", "train_val_0.tar"], "train", "folder")
    assert found(["train_0.tar", "train_val_0.tar"]) == {"train": ["train_0.tar", "train_val_0.tar"], "val": [
        "train_val_0.tar"]}  # fmt: skip


def names(urls):
    return [url.rpartition("/")[2] for url in urls]


def test_shards_named_as_webdataset_and_timm_name_them(tmp_path):
    for name in ("imagenet-train-0", "imagenet-train-1", "imagenet-val-0"):
        write(tmp_path / f"{name}.tar", [])
    assert names(find(tmp_path, "train")) == ["imagenet-train-0.tar", "imagenet-train-1.tar"]
    assert names(find(tmp_path, "val")) == names(find(tmp_path, "validation")) == ["imagenet-val-0.tar"]
    message = r"holds no shards test-\*.*, but shards of train \(2: imagenet-train-0.tar, ..\), val \(1: imagenet-val-0"
    with pytest.raises(InputError, match=message):
        find(tmp_path, "test")
    write(tmp_path / "train-val-0.tar", [])
    with pytest.raises(InputError, match=r"train-val-0.tar names the splits train and val"):
        find(tmp_path, "train")
    assert names(find(tmp_path, "imagenet-train-*")) == ["imagenet-train-0.tar", "imagenet-train-1.tar"]


def test_shards_without_a_split_in_their_names_belong_to_any(tmp_path):
    for name in ("00000.tar", "00001.tar.gz"):
        write(tmp_path / name, [])
    assert names(find(tmp_path, "train")) == ["00000.tar", "00001.tar.gz"]
    with pytest.raises(InputError, match="no shards a-"):
        find(tmp_path, "a-*.tar")
