"""How splits, classes and captions of raw data sets are recognised, and what is reported."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import webdataset as wds
from making import image, listing, put, shard
from PIL import Image

from lightning_tdisent.cli import main
from lightning_tdisent.data.decode import IMAGES
from lightning_tdisent.data.prepare import Options, prepare
from lightning_tdisent.data.raw import class_table, find_source
from lightning_tdisent.data.shards import load
from lightning_tdisent.errors import InputError

# Splits


def contents(source):
    """Return the first grey value of every image, in order."""
    values = []
    for i in range(len(source)):
        (content,) = [c for e, c in source[i].members.items() if e in IMAGES]
        values.append(Image.open(io.BytesIO(content)).convert("L").getpixel((0, 0)))
    return values


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train/cat", "test/cat"),
        ("Train/cat", "Test/cat"),
        ("TRAIN/cat", "TEST/cat"),
        ("training/cat", "testing/cat"),
        ("train2017/cat", "test2017/cat"),
        ("seg_train/cat", "seg_test/cat"),
        ("images/train/cat", "images/test/cat"),
        ("cat/train", "cat/test"),
        ("set/images/Training/cat", "set/images/Test/cat"),
    ],
)
def test_a_folder_of_a_split_is_recognised_by_a_word_in_any_case(train, test, tmp_path):
    for k in range(3):
        put(tmp_path / train / f"{k}.png", image(k))
        put(tmp_path / train.replace("cat", "dog") / f"{k}.png", image(10 + k))
        put(tmp_path / test / f"{k}.png", image(20 + k))
        put(tmp_path / test.replace("cat", "dog") / f"{k}.png", image(30 + k))
    for asked, expected in (("train", [0, 1, 2, 10, 11, 12]), ("test", [20, 21, 22, 30, 31, 32])):
        source = find_source(tmp_path, asked)
        assert contents(source) == expected
        assert [c for *_, c in listing(source)] == [b"0"] * 3 + [b"1"] * 3
        assert source.classes == ["cat", "dog"]
        assert f"split {asked}: " in source.notes[0]
    with pytest.raises(InputError, match="val"):
        find_source(tmp_path, "val")


@pytest.mark.parametrize("asked", ["val", "valid", "validation", "VAL", "dev", "eval"])
@pytest.mark.parametrize("folder", ["val", "Valid", "validation", "dev", "imgs-val"])
def test_names_of_the_validation_split_are_synonyms(asked, folder, tmp_path):
    put(tmp_path / folder / "0.png", image(1))
    put(tmp_path / "train" / "0.png", image(2))
    assert contents(find_source(tmp_path, asked)) == [1]


def test_classes_that_are_named_like_a_split_are_classes(tmp_path):
    for name in ("bullet train", "cat", "dog"):
        put(tmp_path / name / "0.png", image(1))
    source = find_source(tmp_path, "train")
    assert source.classes == ["bullet train", "cat", "dog"]
    put(tmp_path / "test tube" / "0.png", image(1))
    with pytest.raises(InputError, match=r"bullet train, test tube.* next to .*cat, dog.* Rename them"):
        find_source(tmp_path, "train")


@pytest.mark.parametrize("asked", ["train", "test", "val"])
@pytest.mark.parametrize(
    "names",
    [
        ("bus", "car", "train"),
        ("extra", "training_data"),
        ("bus", "test", "training set"),
        ("animals/cat", "vehicles/train"),
        ("vehicles/car", "vehicles/train", "zebras/a"),
        ("bus", "car", "test tube", "train"),
    ],
)
def test_a_split_next_to_folders_of_no_split_may_be_a_class(names, asked, tmp_path):
    for k, name in enumerate(names):
        put(tmp_path / name / "0.png", image(k))
    with pytest.raises(InputError, match=r"folders of splits \(.*\) next to folders of .* use --labels folders"):
        find_source(tmp_path, asked)
    source = find_source(tmp_path, asked, labels="folders")
    assert contents(source) == list(range(len(names)))
    assert source.classes == sorted({name.partition("/")[0] for name in names})


def test_a_split_without_a_folder_is_refused_if_a_folder_may_be_another_split(tmp_path):
    for name in ("bullet train", "cat"):
        put(tmp_path / name / "0.png", image(1))
    assert find_source(tmp_path, "train").classes == ["bullet train", "cat"]
    for asked in ("test", "val"):
        with pytest.raises(InputError, match=r"bullet train\) next to .*cat"):
            find_source(tmp_path, asked)
    assert find_source(tmp_path, "test", labels="folders").classes == ["bullet train", "cat"]
    (tmp_path / "bullet train").rename(tmp_path / "bus")
    assert find_source(tmp_path, "test").classes == ["bus", "cat"]  # no folder names a split
    assert len(find_source(tmp_path, "cat")) == 1  # a folder of exactly that name


def test_images_that_are_named_after_splits(tmp_path):
    for k in range(3):
        put(tmp_path / f"COCO_train2014_{k}.png", image(k))
        put(tmp_path / f"COCO_val2014_{k}.png", image(10 + k))
    source = find_source(tmp_path, "validation")
    assert contents(source) == [10, 11, 12]
    assert source.notes[0] == "split validation: by the names of the images; splits found: train (3), val (3)"
    assert contents(find_source(tmp_path, "train")) == [0, 1, 2]
    with pytest.raises(InputError, match=r"train \(3\), val \(3\), none after 'test'"):
        find_source(tmp_path, "test")
    put(tmp_path / "cover.png", image(9))  # now names say nothing about splits: a picture may show a train
    assert len(find_source(tmp_path, "train")) == 7


def test_files_next_to_the_folders_of_splits_are_named(tmp_path):
    for name in ("train/a", "test/a", "extra/a"):
        put(tmp_path / f"{name}.png", image(1))
    put(tmp_path / "captions.csv", b"x")
    assert "not read: captions.csv, extra (next to the folders of splits)" in find_source(tmp_path, "train").notes
    put(tmp_path / "train_2" / "a.png", image(1))
    assert len(find_source(tmp_path, "train")) == 1  # the folder of exactly that name
    (tmp_path / "train").rename(tmp_path / "train_1")
    with pytest.raises(InputError, match="several folders of train: train_1, train_2"):
        find_source(tmp_path, "train")
    assert len(find_source(tmp_path, "train_2")) == 1


def test_splits_of_shards_and_parquet_files(parquet, tmp_path):
    for name in ("imagenet-train-0", "imagenet-train-1", "imagenet-val-0"):
        shard(tmp_path / "tars" / f"{name}.tar", image(1))
    source = find_source(tmp_path / "tars", "train")
    assert len(source) == 2
    found = "train (imagenet-train-0.tar, imagenet-train-1.tar), val (imagenet-val-0.tar)"
    assert source.notes[0] == f"split train: 2 of 3 files; splits found: {found}"
    assert len(find_source(tmp_path / "tars", "validation")) == 1
    parquet("files/cifar10-train.parquet", [(image(1), 0, "x")] * 2)
    parquet("files/cifar10-test.parquet", [(image(1), 0, "x")])
    assert [len(find_source(tmp_path / "files", s)) for s in ("train", "test")] == [2, 1]
    parquet("hub/default/train/0000.parquet", [(image(1), 0, "x")] * 2)
    parquet("hub/default/test/0000.parquet", [(image(1), 0, "x")])
    assert [len(find_source(tmp_path / "hub", s)) for s in ("train", "test")] == [2, 1]
    with pytest.raises(InputError, match="no folder 'val', but has test, train"):
        find_source(tmp_path / "hub", "val")


def test_a_split_may_be_a_pattern_of_files(parquet, tmp_path):
    for k in range(4):
        shard(tmp_path / "tars" / f"cc-{k:05d}.tar", image(k))
        parquet(f"files/part-{k}.parquet", [(image(k), 0, "x")])
    assert contents(find_source(tmp_path / "tars", "cc-{00001..00002}.tar")) == [1, 2]
    assert contents(find_source(tmp_path / "tars", "*3.tar")) == [3]
    assert contents(find_source(tmp_path / "files", "part-{0,3}.parquet")) == [0, 3]
    with pytest.raises(InputError, match=r"has 1 of the 2 files of cc-\{00003..00004\}.tar; cc-00004.tar is missing"):
        find_source(tmp_path / "tars", "cc-{00003..00004}.tar")
    put(tmp_path / "images" / "a.png", image(1))
    with pytest.raises(InputError, match="is a pattern, but this is a folder of images"):
        find_source(tmp_path / "images", "*.png")


# Labels and captions next to images


def labels_of(source):
    return [source[i].members.get("cls", b"none").decode() for i in range(len(source))]


def captions_of(source):
    return [source[i].members["txt"].decode() if "txt" in source[i].members else None for i in range(len(source))]


def test_labels_of_stylegans_dataset_json(tmp_path):
    names = [f"{k // 4:05d}/img{k:08d}.png" for k in range(8)]
    for k, name in enumerate(names):
        put(tmp_path / name, image(k))
    table = tmp_path / "dataset.json"
    put(table, json.dumps({"labels": [[n, k % 3] for k, n in enumerate(names)][::-1], "name": "x"}).encode())
    source = find_source(tmp_path, "train")
    assert labels_of(source) == [str(k % 3) for k in range(8)]
    assert source.classes == []
    assert "classes: labels of dataset.json" in source.notes
    assert "not read of dataset.json: name" in source.notes
    put(table, b'{"labels": null}')
    assert labels_of(find_source(tmp_path, "train")) == ["none"] * 8
    put(table, json.dumps({"labels": [[n, 1] for n in names[:7]]}).encode())
    with pytest.raises(InputError, match=r"gives 7 of 8 images a label, but not 00001/img00000007.png"):
        find_source(tmp_path, "train")
    for bad, message in ((b"{", "cannot be read as JSON"), (b'{"labels": [1]}', "not a pair"), (
        json.dumps({"labels": [[n, [0, 1]] for n in names]}).encode(), r"is \[0, 1\], expected a number")):  # fmt: skip
        put(table, bad)
        with pytest.raises(InputError, match=message):
            find_source(tmp_path, "train")
    table.unlink()
    with pytest.raises(InputError, match=r"00000, 00001 look like parts of one set .*--labels none"):
        find_source(tmp_path, "train")
    assert labels_of(find_source(tmp_path, "train", labels="none")) == ["none"] * 8
    assert labels_of(find_source(tmp_path, "train", labels="folders")) == ["0"] * 4 + ["1"] * 4


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_captions_and_labels_of_metadata_files(kind, tmp_path):
    rows = [
        {"file_name": f"sub/{k}.png", "text": f"number {k}, say", "label": "ba"[k % 2], "width": 4} for k in range(4)
    ]
    rows.append({"file_name": "sub/gone.png", "text": "", "label": "a", "width": 4})
    for k in range(4):
        put(tmp_path / "train" / "sub" / f"{k}.png", image(k))
    if kind == "jsonl":
        content = "\ufeff" + "".join(json.dumps(row) + "\n" for row in rows)
    else:
        content = "file_name,text,label,width\r\n" + "".join(
            f'{r["file_name"]},"{r["text"]}",{r["label"]},4\r\n' for r in rows
        )
    put(tmp_path / "train" / f"metadata.{kind}", content.encode())
    source = find_source(tmp_path, "train")
    assert captions_of(source) == [f"number {k}, say" for k in range(4)]
    assert labels_of(source) == ["1", "0", "1", "0"]
    assert source.classes == ["a", "b"]
    for line in (
        f"metadata.{kind}: 4 rows, classes from label and captions from text",
        f"not read of metadata.{kind}: width",
        f"metadata.{kind}: 1 rows are of files that do not exist (sub/gone.png)",
        "captions: for 4 of 4 images",
    ):
        assert line in source.notes
    assert source.fingerprint() == find_source(tmp_path, "train").fingerprint()
    put(tmp_path / "train" / f"metadata.{kind}", content.replace("say", "cry").encode())
    assert source.fingerprint() != find_source(tmp_path, "train").fingerprint()
    put(tmp_path / "train" / f"metadata.{kind}", content.encode("utf-16"))
    with pytest.raises(InputError, match=rf"metadata.{kind} is not UTF-8"):
        find_source(tmp_path, "train")


def test_class_names_in_metadata_are_numbered_as_in_the_training_split(tmp_path):
    for split, words in (("train", "abc"), ("test", "cb")):
        for k in range(len(words)):
            put(tmp_path / split / f"{k}.png", image(k))
        rows = "".join(f'{{"file_name": "{k}.png", "label": "{w}"}}\n' for k, w in enumerate(words))
        put(tmp_path / split / "metadata.jsonl", rows.encode())
    source = find_source(tmp_path, "test")
    assert (labels_of(source), source.classes) == (["2", "1"], ["a", "b", "c"])


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_labels_of_dataset_json_may_be_a_mapping(tmp_path):
    for k in range(3):
        put(tmp_path / "sub" / f"{k}.png", image(k))
    put(tmp_path / "dataset.json", json.dumps({"labels": {f"sub/{k}.png": k + 4 for k in range(3)}}).encode())
    source = find_source(tmp_path, "train")
    assert labels_of(source) == ["4", "5", "6"]
    assert "classes: labels of dataset.json" in source.notes


@pytest.mark.parametrize("layout", ["train/{}.png", "images/train/{}.png", "train/sub/{}.png"])
def test_a_table_above_the_folders_of_splits_is_read_for_each(layout, tmp_path):
    for split in ("train", "test"):
        for k in range(3):
            put(tmp_path / layout.replace("train", split).format(k), image(k))
    rows = [
        {"file_name": layout.replace("train", split).format(k), "text": f"{split} {k}", "label": "cba"[(k + n) % 3]}
        for n, split in enumerate(("train", "test"))
        for k in range(3)
    ]
    put(tmp_path / "metadata.jsonl", lines(*rows))
    for split, labels in (("train", ["2", "1", "0"]), ("test", ["1", "0", "2"])):
        source = find_source(tmp_path, split)
        assert (labels_of(source), source.classes) == (labels, ["a", "b", "c"])
        assert captions_of(source) == [f"{split} {k}" for k in range(3)]
        assert not [note for note in source.notes if "not read: metadata" in note]
    fingerprint = find_source(tmp_path, "train").fingerprint()
    put(tmp_path / "metadata.jsonl", lines({**rows[0], "text": "new"}, *rows[1:]))
    assert find_source(tmp_path, "train").fingerprint() != fingerprint
    put(tmp_path / "metadata.jsonl", lines(*rows[3:]))  # rows of the other split only
    source = find_source(tmp_path, "train")
    assert captions_of(source) == [None] * 3
    assert any("3 rows are of files that do not exist" in note for note in source.notes)


def test_a_table_above_splits_within_class_folders_is_read(tmp_path):
    for name in ("cat/train/0.png", "dog/train/1.png", "cat/test/2.png", "dog/test/3.png"):
        put(tmp_path / name, image(0))
    put(tmp_path / "metadata.csv", b"file_name,text\ncat/train/0.png,one\ndog/train/1.png,two\n")
    source = find_source(tmp_path, "train")
    assert (captions_of(source), labels_of(source)) == (["one", "two"], ["0", "1"])


def test_names_of_a_table_may_differ_in_case_or_be_last_parts(tmp_path):
    for k, name in enumerate(("0.PNG", "Sub/1.png", "caf\u00e9.png")):
        put(tmp_path / name, image(k))
    put(tmp_path / "metadata.csv", "file_name,label\n0.png,5\nsub/1.png,6\ncafe\u0301.png,7\n".encode())
    source = find_source(tmp_path, "train")
    assert labels_of(source) == ["5", "6", "7"]
    assert "metadata.csv: 3 images found by ignoring case and Unicode form (0.png is 0.PNG)" in source.notes
    put(tmp_path / "metadata.csv", "file_name,label\n/old/0.png,5\n/old/1.png,6\n/old/caf\u00e9.png,7\n".encode())
    source = find_source(tmp_path, "train")
    assert labels_of(source) == ["5", "6", "7"]
    assert "metadata.csv: 3 images found by the last parts of the names (/old/0.png is 0.PNG)" in source.notes
    put(tmp_path / "0.png", image(1))  # the name is now ambiguous
    put(tmp_path / "metadata.csv", "file_name,label\n0.Png,5\nsub/1.png,6\ncaf\u00e9.png,7\n".encode())
    with pytest.raises(InputError, match=r"metadata.csv gives 2 of 4 images a label, but not 0.PNG"):
        find_source(tmp_path, "train")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dataset.json", b'{"labels": {"x0.png": 1, "x1.png": 2}}'),
        ("dataset.json", b'{"labels": [["x0.png", 1], ["x1.png", 2]]}'),
        ("metadata.csv", b"file_name,label\nx0.png,1\nx1.png,2\n"),
        ("metadata.jsonl", b'{"file_name": "x0.png", "text": "a"}\n{"file_name": "x1.png", "text": "b"}\n'),
    ],
)
@pytest.mark.parametrize("split", ["", "train"])
def test_a_table_that_names_no_file_is_refused(name, content, split, tmp_path):
    for k in range(2):
        put(tmp_path / split / f"{k}.png", image(k))
    put(tmp_path / name, content)
    message = rf"{name}: none of the 2 files that it names \(x0.png, ..\) exists; the images are 0.png, 1.png"
    with pytest.raises(InputError, match=message):
        find_source(tmp_path, "train")
    if b"text" not in content:  # labels are not read
        assert labels_of(find_source(tmp_path, "train", labels="none")) == ["none"] * 2


def test_one_json_file_per_image(tmp_path):
    for k in range(3):
        put(tmp_path / f"{k}.png", image(k))
        put(tmp_path / f"{k}.json", json.dumps({"label": k + 1, "caption": f"no {k}", "url": "u"}).encode())
    source = find_source(tmp_path, "train")
    assert (labels_of(source), captions_of(source)) == (["1", "2", "3"], ["no 0", "no 1", "no 2"])
    assert "not read of KEY.json: url" in source.notes
    put(tmp_path / "1.cls", b"9")
    with pytest.raises(InputError, match=r"1.png has the label 2, but 9 in|has the label 9, but 2 in"):
        find_source(tmp_path, "train")
    put(tmp_path / "1.cls", b"2")
    put(tmp_path / "2.json", b'{"label": {"a": 1}}')
    with pytest.raises(InputError, match=r"2.json: the label of 2.png is .* use --labels none"):
        find_source(tmp_path, "train")
    assert labels_of(find_source(tmp_path, "train", labels="none")) == ["none"] * 3


def test_images_with_the_same_stem_share_their_json(tmp_path):
    for name in ("a.png", "a-2.png", "a.jpg"):
        put(tmp_path / name, image(0, "jpeg" if name.endswith("jpg") else "png"))
    put(tmp_path / "a.json", b'{"label": 3, "caption": "both"}')
    put(tmp_path / "a-2.json", b'{"label": 4, "caption": "other"}')
    source = find_source(tmp_path, "train")
    assert [name for name, *_ in listing(source)] == ["a-2.png", "a.jpg", "a.png"]
    assert (labels_of(source), captions_of(source)) == (["4", "3", "3"], ["other", "both", "both"])


@pytest.mark.parametrize("labels", ["auto", "none"])
def test_json_next_to_an_image_that_is_not_an_object_is_not_read(labels, tmp_path):
    for k in range(3):
        put(tmp_path / f"{k}.png", image(k))
        put(tmp_path / f"{k}.json", (b"[1, 2]", b'"x"', b'{"caption": "c"}')[k])
    source = find_source(tmp_path, "train", labels=labels)
    assert (labels_of(source), captions_of(source)) == (["none"] * 3, [None, None, "c"])
    assert "not read: 2 .json (0.json, ..)" in source.notes
    assert "KEY.json: read of 1 images for label or caption" in source.notes


def test_caption_files_with_each_of_their_names(tmp_path):
    for k in range(7):
        put(tmp_path / f"{k}.PNG", image(k))
    for name in ("0.txt", "1.TXT", "2.caption", "3.PNG.txt", "4.png.txt", "5.txt", "5.caption", "readme.txt"):
        put(tmp_path / name, name.encode())
    source = find_source(tmp_path, "train")
    assert captions_of(source) == ["0.txt", "1.TXT", "2.caption", "3.PNG.txt", None, "5.txt", None]
    assert "captions: for 5 of 7 images; 2 have none" in source.notes
    assert "not read: 2 .txt (4.png.txt, ..), 1 .caption (5.caption)" in source.notes
    assert source[1].caption == "1.TXT"


def test_files_that_are_not_read_are_counted_by_extension(tmp_path):
    for name in (
        "a/0.png",
        "b/0.png",
        "a/notes.md",
        "a/0.pfm",
        "b/0.pfm",
        "a/.DS_Store",
        "__MACOSX/x.png",
        "labels.npy",
    ):
        put(tmp_path / name, image(0))
    source = find_source(tmp_path, "train")
    assert source.classes == ["a", "b"]
    assert source.notes[-1] == "not read: 2 .pfm (a/0.pfm, ..), 1 .md (a/notes.md), 1 .npy (labels.npy)"
    with pytest.raises(InputError, match=r"set\.zip is an archive that is not opened here: unpack it"):
        find_source(put(tmp_path / "set.zip"), "train")


# Numbers of classes


@pytest.mark.parametrize("width", [1, 3])
def test_folders_named_by_numbers_have_these_class_numbers(width, tmp_path):
    for c in (*range(12), 14):
        put(tmp_path / "train" / f"{c:0{width}d}" / "0.png", image(c))
    put(tmp_path / "val" / f"{10:0{width}d}" / "0.png", image(0))
    source = find_source(tmp_path, "train")
    assert {value: int(label) for value, label in zip(contents(source), labels_of(source), strict=True)} == {
        c: c for c in (*range(12), 14)
    }
    assert (source.classes[10], source.classes[12], len(source.classes)) == (f"{10:0{width}d}", "", 15)
    assert source.notes[1] == "classes: the numbers that name 13 folders; 2 numbers from 0 on have no folder"
    assert labels_of(find_source(tmp_path, "val")) == ["10"]
    assert class_table(source.classes).endswith(f"{11:d} {11:0{width}d}, 14 {14:0{width}d}")


def test_implausible_class_numbers_are_names(tmp_path):
    for name in ("1990", "1991"):
        put(tmp_path / name / "0.png", image(0))
    source = find_source(tmp_path, "train")
    assert labels_of(source) == ["0", "1"]
    assert "too large or not distinct to be class numbers" in source.notes[0]


def test_folders_within_class_folders_are_reported_as_no_classes(tmp_path):
    for name in ("animals/cat", "animals/dog", "plants/rose"):
        put(tmp_path / name / "0.png", image(0))
    source = find_source(tmp_path, "train")
    assert labels_of(source) == ["0", "0", "1"]
    assert source.notes == ["classes: the sorted names of 2 folders; folders in them (animals/cat) are not classes"]


def test_a_split_without_class_folders_next_to_one_with_them_names_the_remedy(tmp_path):
    for name in ("train/n01/images/0", "train/n02/images/0", "val/images/0"):  # as tiny-imagenet-200
        put(tmp_path / f"{name}.png", image(0))
    with pytest.raises(InputError, match=r"class folders images are not among the 2 of .*train.* use --labels none"):
        find_source(tmp_path, "val")
    assert labels_of(find_source(tmp_path, "val", labels="none")) == ["none"]


def test_an_empty_class_keeps_its_number(tmp_path):
    for name in ("ant", "cat"):
        put(tmp_path / name / "0.png", image(0))
    (tmp_path / "bee").mkdir()
    source = find_source(tmp_path, "train")
    assert (labels_of(source), source.classes) == (["0", "2"], ["ant", "bee", "cat"])
    assert source.notes[0] == "classes: the sorted names of 3 folders; no images in 1 bee"


def test_linked_class_folders_are_read_if_requested(tmp_path):
    for name in ("cat", "dog"):
        put(tmp_path / "pool" / name / "0.png", image(0))
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / name).symlink_to(tmp_path / "pool" / name)
    with pytest.raises(InputError, match=r"(cat|dog) is a link that leaves .* Use --follow-links"):
        find_source(tmp_path / "set", "train")
    assert labels_of(find_source(tmp_path / "set", "train", links=True)) == ["0", "1"]


def test_a_folder_that_is_skipped_is_not_read(tmp_path):
    put(tmp_path / "cat" / "0.png", image(0))
    shard(tmp_path / "out" / "train-0.tar", image(0))
    assert find_source(tmp_path, "train", skip=tmp_path / "out").classes == ["cat"]


@pytest.mark.parametrize("out", ["set/out", "elsewhere"])
def test_paths_of_images_are_not_resolved(out, tmp_path, monkeypatch):
    for k in range(50):
        put(tmp_path / "set" / "ab"[k % 2] / f"{k}.png", image(0))
    resolve, resolved = Path.resolve, []
    monkeypatch.setattr(Path, "resolve", lambda self, *more: resolved.append(self.name) or resolve(self, *more))
    assert len(find_source(tmp_path / "set", "train", skip=tmp_path / out)) == 50
    assert not [name for name in resolved if name.endswith(".png")]


# Columns


def test_columns_of_parquet_files_can_be_chosen(parquet, tmp_path):
    import pyarrow as pa

    column = pa.array([{"bytes": image(k), "path": None} for k in range(3)])
    parquet("a.parquet", [(image(9), 0, "x")] * 3, pixel_values=column, prompt=pa.array(["p", "q", "r"]))
    source = find_source(tmp_path, "train")
    assert (contents(source), captions_of(source), labels_of(source)) == ([9] * 3, ["x"] * 3, ["0"] * 3)
    assert source.notes[-2:] == [
        "columns: image from image, label from label, text from text",
        "columns not read: pixel_values, prompt",
    ]
    source = find_source(tmp_path, "train", columns={"image": "pixel_values", "text": "prompt", "label": ""})
    assert (contents(source), captions_of(source), labels_of(source)) == ([0, 1, 2], ["p", "q", "r"], ["none"] * 3)
    assert source.notes[-1] == "columns not read: image, label, text"
    chosen = [{}, {"text": "prompt"}, {"image": "pixel_values"}, {"label": ""}, {"text": ""}]
    prints = [find_source(tmp_path, "train", columns=columns).fingerprint() for columns in chosen]
    assert len(set(prints)) == len(chosen)
    assert find_source(tmp_path, "train", columns={"text": "text"}).fingerprint() == prints[0]
    for columns, message in (
        ({"image": "pixels"}, "no column for --columns image=pixels"),
        ({"caption": "text"}, "caption is not one of image, label, text"),
        ({"image": ""}, "Name the one that holds images with --columns image=NAME"),
    ):
        with pytest.raises(InputError, match=message):
            find_source(tmp_path, "train", columns=columns)


def test_parquet_labels_may_be_names_and_captions_lists(parquet, tmp_path):
    import pyarrow as pa

    def write(name, words, **more):
        rows = [(image(k), 0, "x") for k in range(len(words))]
        text = pa.array([[f"{w} 1", f"{w} 2"] for w in words[:-1]] + [[]])
        parquet(name, rows, label=pa.array(words).dictionary_encode(), text=text, **more)

    write("train.parquet", ["cat", "emu", "dog"])
    write("test.parquet", ["emu", "dog"])
    source = find_source(tmp_path, "train")
    assert (labels_of(source), source.classes) == (["0", "2", "1"], ["cat", "dog", "emu"])
    assert captions_of(source) == ["cat 1", "emu 1", None]
    assert source.notes[-1] == (
        "columns: image from image, label from label, text from text; the first caption of each list; classes are "
        "numbered in the order of their names"
    )
    assert labels_of(find_source(tmp_path, "test")) == ["2", "1"]  # numbers of the training split
    write("digits/train.parquet", ["10", "2", "10"])
    source = find_source(tmp_path / "digits", "train")
    assert (labels_of(source), source.classes) == (["10", "2", "10"], [])
    write("test.parquet", ["fly", "dog"])
    with pytest.raises(InputError, match="classes fly of label are not among those of the training split"):
        find_source(tmp_path, "test")


def test_integers_of_any_width_are_one_kind_of_column(parquet, tmp_path):
    import pyarrow as pa

    rows = [(image(0), 0, "x")]
    parquet("train-0.parquet", rows)
    parquet("train-1.parquet", rows, label=pa.array([1], pa.int32()))
    assert labels_of(find_source(tmp_path, "train")) == ["0", "1"]
    parquet("train-1.parquet", rows, label=pa.array(["cat"]))
    with pytest.raises(InputError, match=r"train-1.parquet has other columns \(label: text, there an integer\) than"):
        find_source(tmp_path, "train")


# Members of shards


def test_json_members_give_class_and_caption(tmp_path):
    table = {"caption": "a cat", "label": 3, "url": "u"}
    with wds.TarWriter(str(tmp_path / "a.tar"), encoder=False) as tar:
        for k in range(2):
            tar.write({"__key__": f"{k}", "png": image(k), "json": json.dumps(table).encode(), "seg.png": image(1)})
    source = find_source(tmp_path, "train")
    assert (labels_of(source), captions_of(source)) == (["3"] * 2, ["a cat"] * 2)
    assert source.notes == [
        "split train: no name has the word of a split, so all 1 files are used",
        "members kept as they are, not read: seg.png",
        "KEY.json: gives the class and the caption (of the first sample)",
        "not read of KEY.json: url",
    ]
    shard(tmp_path / "a.tar", image(0))
    with wds.TarWriter(str(tmp_path / "a.tar"), encoder=False) as tar:
        tar.write({"__key__": "0", "png": image(0), "json": b'{"label": "cat"}', "txt": b"t"})
    source = find_source(tmp_path, "train")
    assert labels_of(source) == ["none"]
    assert "not read: the label 'cat' of KEY.json (of the first sample), which is not a number" in source.notes
    with wds.TarWriter(str(tmp_path / "a.tar"), encoder=False) as tar:
        tar.write({"__key__": "0", "png": image(0), "weights.pt": b"x"})
    assert "not read: pickles KEY.weights.pt (1, first a.tar/0.weights.pt)" in find_source(tmp_path, "train").notes


def tar_of(file, *names):
    """Write a tar of images with these names, whose values are 0, 1, ..."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for k, name in enumerate(names):
            header = tarfile.TarInfo(name)
            header.size = len(content := image(k))
            tar.addfile(header, io.BytesIO(content))


@pytest.mark.parametrize("above", ["", "./", "set/train/"])
def test_folders_in_tars_are_classes_numbered_as_in_the_training_split(above, tmp_path):
    tar_of(tmp_path / "train.tar", *(f"{above}{name}/{k}.png" for name in ("dog", "cat", "eel") for k in range(2)))
    tar_of(tmp_path / "test.tar", *(f"{above}{name}/{k}.png" for name in ("eel", "cat") for k in range(2)))
    source = find_source(tmp_path, "train")
    assert (labels_of(source), source.classes) == (["1", "1", "0", "0", "2", "2"], ["cat", "dog", "eel"])
    assert source.shuffled  # the tar is sorted by class
    assert "classes in the tars: the sorted names of 3 folders" in source.notes
    test = find_source(tmp_path, "test")
    assert (labels_of(test), test.classes) == (["2", "2", "0", "0"], ["cat", "dog", "eel"])
    assert "classes in the tars: the sorted names of 3 folders of the training split" in test.notes
    prepare(test, "test", tmp_path / "out", Options(shuffle=False), jobs=0)
    assert load(tmp_path / "out", "test", 3).labels.tolist() == [2, 2, 0, 0]
    none = find_source(tmp_path, "train", labels="none")
    assert (labels_of(none), none.shuffled) == (["none"] * 6, False)
    tar_of(tmp_path / "test.tar", f"{above}eel/0.png", f"{above}eel/1.png")
    assert labels_of(find_source(tmp_path, "test")) == ["2", "2"]
    tar_of(tmp_path / "test.tar", f"{above}eel/0.png", f"{above}fox/0.png")
    with pytest.raises(InputError, match=r"the class folders fox are not among the 3 of train.tar"):
        find_source(tmp_path, "test")


def test_folders_in_tars_that_are_not_classes_are_named(tmp_path, capsys):
    tar_of(tmp_path / "a.tar", "cat/0.png", "dog/1.png", "2.png")
    source = find_source(tmp_path, "train")
    assert labels_of(source) == ["none"] * 3
    assert "folders in the tars (cat, dog) are not classes: 2 is in none of them" in source.notes
    with pytest.raises(InputError, match=r"--labels folders, but the images of a.tar are not in folders"):
        find_source(tmp_path, "train", labels="folders")
    for command in (["index"], ["inspect", "--out", str(tmp_path / "a.png")]):
        assert main(["data", *command, str(tmp_path)]) == 0
        said = " ".join(capsys.readouterr().out.replace("│", "").split())
        assert (
            "folders in the shards are not read as classes (cat, dog); data prepare can turn them into classes" in said
        )
    (tmp_path / "a.png").unlink()
    tar_of(tmp_path / "a.tar", "train/cat/0.png", "test/cat/1.png")
    with pytest.raises(InputError, match=r"a.tar holds folders of the splits test, train .* Unpack it"):
        find_source(tmp_path, "train")
    assert labels_of(find_source(tmp_path, "train", labels="folders")) == ["1", "0"]
    tar_of(tmp_path / "a.tar", "00000/0.png", "00001/1.png")
    with pytest.raises(InputError, match=r"00000, 00001 look like parts of one set"):
        find_source(tmp_path, "train")
    tar_of(tmp_path / "a.tar", "cat/big/0.png", "dog/1.png")
    line = "classes in the tars: the sorted names of 2 folders; folders in them (cat/big) are not classes"
    assert line in find_source(tmp_path, "train").notes
    tar_of(tmp_path / "a.tar", "set/0.png", "set/1.png")
    assert labels_of(find_source(tmp_path, "train")) == ["none"] * 2


def test_classes_in_members_take_precedence_over_folders_in_tars(tmp_path):
    with wds.TarWriter(str(tmp_path / "a.tar"), encoder=False) as tar:
        for k, name in enumerate(("cat/0", "dog/1")):
            tar.write({"__key__": name, "png": image(k), "cls": b"%d" % (7 + k)})
    assert labels_of(find_source(tmp_path, "train")) == ["7", "8"]
    assert labels_of(find_source(tmp_path, "train", labels="folders")) == ["0", "1"]
    assert labels_of(find_source(tmp_path, "train", labels="none")) == ["none"] * 2
    with wds.TarWriter(str(tmp_path / "a.tar"), encoder=False) as tar:
        for k, name in enumerate(("cat/0", "dog/1")):
            tar.write({"__key__": name, "png": image(k), "json": b'{"label": %d}' % (7 + k)})
    assert labels_of(find_source(tmp_path, "train")) == ["7", "8"]
