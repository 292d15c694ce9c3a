"""Every kind of raw data set, written as it is published, is recognised and read, or refused in one line.

The file is long because there are six kinds, each with its own writer.
"""

import gzip
import io
import os
import pickle
import struct

import numpy as np
import pytest
import webdataset as wds
from making import image, listing, put, shard
from PIL import Image

from lightning_tdisent.data.decode import IMAGES, Decoder, image_type
from lightning_tdisent.data.prepare import Options, prepare
from lightning_tdisent.data.raw import find_source
from lightning_tdisent.errors import InputError

# Folders


def test_class_folders_are_numbered_by_their_sorted_names(tmp_path):
    put(tmp_path / "zebra" / "1.PNG", image(1))
    put(tmp_path / "ant" / "b.jpeg", image(2, "jpeg"))
    put(tmp_path / "ant" / "deep" / "a.bmp", image(3, "bmp"))
    put(tmp_path / "ant" / "b.txt", b"an ant")
    put(tmp_path / "ant" / ".hidden.png", b"no")
    put(tmp_path / "ant" / "notes.md", b"no")
    source = find_source(tmp_path, "train")
    assert (source.kind, source.classes, source.shuffled) == ("folder", ["ant", "zebra"], True)
    assert listing(source) == [
        ("ant/b.jpeg", ["cls", "jpg", "txt"], b"0"),
        ("ant/deep/a.bmp", ["bmp", "cls"], b"0"),
        ("zebra/1.PNG", ["cls", "png"], b"1"),
    ]
    assert source[0].members["txt"] == b"an ant"
    assert source[2].members["png"] == image(1)


def test_a_flat_folder_has_no_classes(tmp_path):
    for name in ("b.webp", "a.png"):
        put(tmp_path / name, image(1, name[2:]))
    source = find_source(tmp_path, "train")
    assert listing(source) == [("a.png", ["png"], None), ("b.webp", ["webp"], None)]
    assert source.classes == []


def test_a_split_is_a_subfolder_and_has_the_numbers_of_train(tmp_path):
    for name in ("ant", "bee", "cat"):
        put(tmp_path / "train" / name / "0.png", image(0))
    put(tmp_path / "val" / "cat" / "1.png", image(0))
    source = find_source(tmp_path, "val")
    assert listing(source) == [("cat/1.png", ["cls", "png"], b"2")]  # 2 as in train, though val has one class
    assert source.classes == ["ant", "bee", "cat"]
    with pytest.raises(InputError, match=r"no folder 'test', but has train, val"):
        find_source(tmp_path, "test")
    put(tmp_path / "val" / "dog" / "1.png", image(0))
    with pytest.raises(InputError, match="dog are not among the 3 of"):
        find_source(tmp_path, "val")


def test_folders_that_could_mean_two_things_are_refused(tmp_path):
    put(tmp_path / "ant" / "0.png", image(0))
    put(tmp_path / "bee" / "notes.md")
    with pytest.raises(InputError, match="class folders bee hold no images, but other files"):
        find_source(tmp_path, "train")
    (tmp_path / "bee" / "notes.md").unlink()
    (tmp_path / "bee").rmdir()
    put(tmp_path / "stray.png", image(0))
    with pytest.raises(InputError, match=r"both images \(stray.png\) and folders"):
        find_source(tmp_path, "train")


def test_links_are_followed_inside_the_folder_only(tmp_path):
    secret = put(tmp_path / "secret.png", image(9))
    root = tmp_path / "set"
    inside = put(root / "ant" / "0.png", image(0))
    (root / "ant" / "1.png").symlink_to(inside)
    assert len(find_source(root, "train")) == 2
    (root / "ant" / "2.png").symlink_to(secret)
    with pytest.raises(InputError, match=r"2.png is a link that leaves .*secret.png"):
        find_source(root, "train")
    (root / "ant" / "2.png").unlink()
    (root / "ant" / "loop").symlink_to(root / "ant")
    with pytest.raises(InputError, match="link to a folder above itself"):
        find_source(root, "train")


@pytest.mark.parametrize("target", ["gone.png", "b.png"])
def test_a_link_to_nothing_is_a_bad_sample(target, tmp_path):
    root = tmp_path / "set"
    for k in range(3):
        put(root / f"{k}.png", image(k))
    (root / "b.png").symlink_to(target)
    for links in (False, True):
        source = find_source(root, "train", links=links)
        assert source[3].bad == f"is a link to {target}, which is not there"
        made = prepare(source, "train", tmp_path / f"out{links}", Options(bad=0.3), jobs=0)
        assert made.samples == 3
        assert [(s.name, s.reason) for s in made.skipped] == [("b.png", source[3].bad)]
        with pytest.raises(InputError, match=r"are bad, and bad=0 allows 0 of 4"):
            prepare(source, "train", tmp_path / "none", Options(bad=0), jobs=0)


def test_the_fingerprint_covers_names_sizes_and_classes_but_not_the_location(tmp_path):
    def written(folder, name="ant/0.png", content=b"12345"):
        put(tmp_path / folder / name, content)
        put(tmp_path / folder / "bee/0.png", b"1")
        return find_source(tmp_path / folder, "train").fingerprint()

    one = written("a")
    assert written("b") == one
    assert len({one, written("c", "ant/1.png"), written("d", content=b"123456"), written("e", "asp/0.png")}) == 4
    put(tmp_path / "a" / "ant" / "0.txt", b"caption")
    assert find_source(tmp_path / "a", "train").fingerprint() != one


# ILSVRC


@pytest.fixture
def ilsvrc(tmp_path):
    data = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    for wnid in ("n02", "n01", "n03"):
        put(data / "train" / wnid / f"{wnid}_1.JPEG", image(1, "jpeg"))
    for k in (1, 2, 3):
        put(data / "val" / f"ILSVRC2012_val_{k}.JPEG", image(k, "jpeg"))
    return tmp_path


SOLUTION = "ImageId,PredictionString\n" + "".join(
    f"ILSVRC2012_val_{k},{wnid} 1 2 3 4 {wnid} 5 6 7 8\n" for k, wnid in ((3, "n01"), (1, "n03"), (2, "n02"))
)


def test_ilsvrc_next_to_another_data_set_is_refused(ilsvrc):
    with (ilsvrc / "train-images-idx3-ubyte.gz").open("wb") as stream:
        stream.write(b"")
    with pytest.raises(InputError, match=r"can be read as .*(mnist and ilsvrc|ilsvrc and mnist)"):
        find_source(ilsvrc, "train")


@pytest.mark.parametrize("at", [".", "ILSVRC"])
def test_ilsvrc_is_numbered_by_sorted_wnids_in_both_splits(at, ilsvrc):
    train = find_source(ilsvrc / at, "train")
    assert train.kind == "ilsvrc"
    assert [c for *_, c in listing(train)] == [b"0", b"1", b"2"]
    put(ilsvrc / "LOC_val_solution.csv", SOLUTION.encode())
    val = find_source(ilsvrc / at, "val")
    assert [c for *_, c in listing(val)] == [b"2", b"1", b"0"]
    assert val.classes == train.classes == ["n01", "n02", "n03"]
    assert val[0].members["jpg"] == image(1, "jpeg")


def test_ilsvrc_val_in_class_folders(ilsvrc):
    val = ilsvrc / "ILSVRC" / "Data" / "CLS-LOC" / "val"
    for file in list(val.iterdir()):
        (val / "n03").mkdir(exist_ok=True)
        file.rename(val / "n03" / file.name)
    assert [c for *_, c in listing(find_source(ilsvrc, "val"))] == [b"2"] * 3


def test_ilsvrc_val_without_its_table_is_refused(ilsvrc):
    with pytest.raises(InputError, match=r"LOC_val_solution.csv is not next to it"):
        find_source(ilsvrc, "val")
    put(ilsvrc / "ILSVRC" / "devkit" / "data" / "ILSVRC2012_validation_ground_truth.txt", b"490\n361\n171\n")
    with pytest.raises(InputError, match=r"LOC_val_solution.*ground_truth.txt numbers the classes in another order"):
        find_source(ilsvrc, "val")
    put(ilsvrc / "LOC_val_solution.csv", SOLUTION.replace("val_2,", "val_9,").encode())
    with pytest.raises(InputError, match="no class for ILSVRC2012_val_2"):
        find_source(ilsvrc, "val")
    put(ilsvrc / "LOC_val_solution.csv", SOLUTION.replace("n03", "n07").encode())
    with pytest.raises(InputError, match="classes n07"):
        find_source(ilsvrc, "val")
    put(ilsvrc / "LOC_val_solution.csv", b"a,b\n1,2\n")
    with pytest.raises(InputError, match="has the columns a, b"):
        find_source(ilsvrc, "val")
    with pytest.raises(InputError, match=r"no split 'test' .* train and val"):
        find_source(ilsvrc, "test")


# MNIST


def idx(array):
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def digits28():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (7, 28, 28), dtype=np.uint8), rng.integers(0, 10, 7, dtype=np.uint8)


@pytest.mark.parametrize("spelling", ["-idx{}-ubyte", ".idx{}-ubyte", "-idx{}-ubyte.gz"])
@pytest.mark.parametrize(("split", "prefix"), [("train", "train"), ("test", "t10k")])
def test_mnist_has_the_pixels_and_labels_of_its_files(spelling, split, prefix, digits28, tmp_path):
    for what, array in zip(("images", "labels"), digits28, strict=True):
        pack = gzip.compress if spelling.endswith("gz") else bytes
        put(tmp_path / f"{prefix}-{what}{spelling.format(array.ndim)}", pack(idx(array)))
    source = find_source(tmp_path, split)
    assert (source.kind, len(source), source.shuffled) == ("mnist", 7, True)
    for i in range(7):
        members = source[i].members
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(members["png"]))), digits28[0][i])
        assert members["cls"] == str(digits28[1][i]).encode()
    assert pickle.loads(pickle.dumps(source)).fingerprint() == source.fingerprint()  # noqa: S301
    with pytest.raises(InputError, match="train and test, not 'val'"):
        find_source(tmp_path, "val", "mnist")


def test_mnist_files_that_do_not_match_their_headers_are_refused(digits28, tmp_path):
    images, labels = map(idx, digits28)
    files = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    put(files[0], images)
    with pytest.raises(InputError, match="has no labels of train-images"):
        find_source(tmp_path, "train")
    for changed, message in (
        ((images[:-1], labels), r"asks for 5,488 bytes, but it has 5,487"),
        ((images + b"x", labels), "but it has 5,489"),
        ((images[:10], labels), "ends within its header, after 10 bytes"),
        ((labels, labels), "begins with 00000801, not with the IDX 00000803"),
        ((images, idx(digits28[1][:6])), "7 images, but 6 labels"),
        ((struct.pack(">4I", 0x803, 2**31, 2**31, 2**31), labels), "claims the shape"),
        ((b"", labels), "begins with nothing"),
        ((idx(np.empty((7, 0, 28), np.uint8)), labels), "claims the shape"),
        ((idx(digits28[0][:0]), idx(digits28[1][:0])), "the split 'train' of this mnist data set is empty"),
    ):
        for file, content in zip(files, changed, strict=True):
            put(file, content)
        with pytest.raises(InputError, match=message):
            find_source(tmp_path, "train")
    files[0].unlink()
    put(tmp_path / "train-images-idx3-ubyte.gz", gzip.compress(images)[:-20])
    put(files[1], labels)
    with pytest.raises(InputError, match="is damaged"):
        find_source(tmp_path, "train")


# CIFAR-10


def cifar(folder, rng, per_batch=3):
    """Write five batches and the test batch of CIFAR-10; return pixels (N, 32, 32, 3) and labels of train."""
    names = [b"airplane", b"automobile", b"bird"]
    put(folder / "batches.meta", pickle.dumps({b"label_names": names, b"num_vis": 3072}, 2))
    pixels, labels = [], []
    for part in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
        data = rng.integers(0, 256, (per_batch, 3072), dtype=np.uint8)
        numbers = rng.integers(0, 3, per_batch).tolist()
        files = [f"{part}_{i}.png".encode() for i in range(per_batch)]
        put(folder / part, pickle.dumps({b"data": data, b"labels": numbers, b"filenames": files}, 2))
        pixels.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels += numbers
    return np.concatenate(pixels[:5]), labels[: 5 * per_batch]


@pytest.mark.parametrize("at", [".", "cifar-10-batches-py"])
def test_cifar_has_the_pixels_and_labels_of_its_batches(at, tmp_path):
    pixels, labels = cifar(tmp_path / "cifar-10-batches-py", np.random.default_rng(0))
    source = find_source(tmp_path / at, "train")
    assert (source.kind, len(source)) == ("cifar10", 15)
    assert source.classes == ["airplane", "automobile", "bird"]
    assert source[4].name == "data_batch_2/data_batch_2_1.png"
    for i in range(15):
        members = source[i].members
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(members["png"]))), pixels[i])
        assert members["cls"] == str(labels[i]).encode()
    assert len(find_source(tmp_path, "test")) == 3


def test_pickles_of_python_2_are_read(tmp_path):
    """They have the opcodes of Python 2: byte strings, and numpy's names of that time."""
    cifar(tmp_path, np.random.default_rng(0))
    pixels = bytes(range(256)) * 12
    content = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<i", 3072) + pixels + b"tbU\x06labels](K\x01eu."
    )  # fmt: skip
    put(tmp_path / "test_batch", content)
    source = find_source(tmp_path, "test")
    found = np.asarray(Image.open(io.BytesIO(source[0].members["png"])))
    assert np.array_equal(found.transpose(2, 0, 1).ravel(), np.frombuffer(pixels, np.uint8))
    assert source[0].members["cls"] == b"1"
    assert source[0].name == "test_batch/00000"


class Runs:
    """A pickle that would write a file when loaded."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda proof: pickle.dumps({b"data": Runs(proof)}, 2), r"asks for (posix|nt)\.mkdir"),
        (lambda proof: pickle.dumps(Runs(proof), 4), r"asks for (posix|nt)\.mkdir"),
        (lambda proof: b"cos\nsystem\n(S'mkdir " + str(proof).encode() + b"'\ntR.", r"asks for os\.system"),
        (lambda proof: b"(S'mkdir " + str(proof).encode() + b"'\nios\nsystem\n.", r"asks for os\.system"),
        (lambda proof: b"cbuiltins\neval\n.", r"asks for builtins\.eval"),
        (lambda proof: b"cnumpy\nload\n.", r"asks for numpy\.load"),
        (lambda proof: b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.", r"asks for numpy\.ndarray\.tofile"),
        (lambda proof: b"Pid\n.", "is damaged: UnpicklingError: .*persistent"),
        (lambda proof: pickle.dumps({b"data": np.array([{}], object)}, 2), "not an array of bytes"),
        (lambda proof: b"c_codecs\nencode\n(S'x'\nS'zlib'\ntR.", "encodes as"),
        (lambda proof: pickle.dumps([1], 2), "holds a list"),
        (lambda proof: b"", "is damaged: EOFError"),
        (lambda proof: pickle.dumps({b"data": 3}, 2)[:-3], "is damaged"),
        (lambda proof: pickle.dumps({b"data": 3}, 2), "not an array of bytes"),
        (lambda proof: pickle.dumps({b"data": np.zeros((2, 9), np.uint8)}, 2), r"not an array of bytes \(N, 3072\)"),
        (lambda proof: pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}, 2), "2 images, but 1"),
        (lambda proof: pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [3]}, 2), "label 3, outside"),
    ],
)
def test_a_pickle_is_refused_and_executes_nothing(content, message, tmp_path):
    proof = tmp_path / "proof"
    cifar(tmp_path / "set", np.random.default_rng(0))
    put(tmp_path / "set" / "test_batch", content(proof))
    with pytest.raises(InputError, match=message):
        find_source(tmp_path / "set", "test")
    assert not proof.exists()


def test_a_missing_batch_and_an_archive_are_named(tmp_path):
    cifar(tmp_path, np.random.default_rng(0))
    (tmp_path / "data_batch_3").unlink()
    with pytest.raises(InputError, match=r"No such file.*data_batch_3"):
        find_source(tmp_path, "train")
    archive = put(tmp_path / "other" / "cifar-10-python.tar.gz")
    for path in (archive, archive.parent):
        with pytest.raises(InputError, match="unpack it with `tar xf"):
            find_source(path, "train")


# Parquet


def test_parquet_rows_are_read_as_written(parquet, tmp_path):
    rows = [(image(i, ("png", "jpeg")[i % 2]), i % 2, f"number {i}") for i in range(8)]
    parquet("data/train-00000-of-00002.parquet", rows[:5])
    parquet("data/train-00001-of-00002.parquet", rows[5:])
    parquet("data/test-00000-of-00001.parquet", rows[:1])
    source = find_source(tmp_path, "train")
    assert (source.kind, len(source), source.classes, source.shuffled) == ("parquet", 8, ["no", "yes"], False)
    for i in (7, 0, 3, 5, 4, 1, 2, 6):
        content, label, text = rows[i]
        kind = "jpg" if i % 2 else "png"
        assert source[i].members == {kind: content, "cls": str(label).encode(), "txt": text.encode()}
    assert source[6].name == "train-00001-of-00002.parquet/00000006/1.png"
    assert len(find_source(tmp_path, "test")) == 1
    with pytest.raises(InputError, match=r"no files val\*.parquet, but others of test, train"):
        find_source(tmp_path, "val")
    one = find_source(tmp_path / "data" / "train-00001-of-00002.parquet", "anything")
    assert len(one) == 3
    assert one.fingerprint() != source.fingerprint() == pickle.loads(pickle.dumps(source)).fingerprint()  # noqa: S301


def test_parquet_without_labels_and_with_nulls(parquet, tmp_path):
    parquet("a.parquet", [(image(0), -1, None), (image(1), None, "x"), (None, 1, "y")])
    source = find_source(tmp_path, "train")
    assert source[0].members == {"png": image(0)}
    assert source[1].members == {"png": image(1), "txt": b"x"}
    assert source[2].members["png"] == b""  # prepare calls it bad
    pa = pytest.importorskip("pyarrow")
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    parquet("a.parquet", [(None, 0, "x")], image=pa.array([{"bytes": None, "path": "far/away.png"}], kind))
    with pytest.raises(InputError, match=r"row 0 of group 0 names the file far/away.png instead of holding it"):
        find_source(tmp_path, "train")[0]


def test_parquet_labels_of_text_may_be_numbers_and_none(parquet, tmp_path):
    pa, rows = pytest.importorskip("pyarrow"), [(image(i), 0, "x") for i in range(3)]
    parquet("a.parquet", rows, label=pa.array(["0", "-1", "2"]))
    source = find_source(tmp_path, "train")
    assert source.classes == []
    assert [source[i].members.get("cls") for i in range(3)] == [b"0", None, b"2"]
    parquet("a.parquet", rows, label=pa.array(["no", "-1", "yes"]))
    source = find_source(tmp_path, "train")
    assert source.classes == ["no", "yes"]
    assert [source[i].members.get("cls") for i in range(3)] == [b"0", None, b"1"]


def test_parquet_with_other_columns_is_refused(parquet, tmp_path):
    import pyarrow as pa

    rows = [(image(0), 0, "x")]
    for columns, message in (
        ({"image": None, "label": None}, r"no column image, img, jpg; it has text"),
        ({"label": pa.array([0.5])}, "column label is double, expected an integer or text"),
        ({"text": pa.array([[1, 2]])}, "column text is lists of an integer, expected text or lists of text"),
        ({"image": pa.array([3])}, "column image is an integer, expected bytes"),
    ):
        parquet("a.parquet", rows, **columns)
        with pytest.raises(InputError, match=message):
            find_source(tmp_path, "train")
    parquet("a.parquet", rows, image=pa.array([image(0)]))
    assert find_source(tmp_path, "train")[0].members["png"] == image(0)
    parquet("b.parquet", rows)
    with pytest.raises(InputError, match=r"b.parquet has other columns .* than a.parquet"):
        find_source(tmp_path, "train")
    put(tmp_path / "a.parquet", b"PAR1 no")
    with pytest.raises(InputError, match="cannot be read as a parquet file"):
        find_source(tmp_path, "train")


def test_a_missing_pyarrow_names_the_extra(parquet, tmp_path, monkeypatch):
    import sys

    parquet("a.parquet", [(image(0), 0, "x")])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r'pip install "lightning_tdisent\[parquet\]"'):
        find_source(tmp_path, "train")


# WebDataset


@pytest.mark.parametrize("zipped", [False, True])
def test_existing_shards_are_read_with_all_members(zipped, tmp_path):
    samples = [
        {"png": image(i), "cls": str(i).encode(), "json": b'{"a": %d}' % i, "txt": f"text {i}".encode()}
        for i in range(7)
    ]
    for k, part in enumerate((samples[:4], samples[4:])):
        file = tmp_path / f"train-{k:04d}.tar"
        with wds.TarWriter(str(file), encoder=False) as shard:
            for i, sample in enumerate(part):
                shard.write({"__key__": f"{k}-{i}", **sample})
        if zipped:
            put(file.with_suffix(".tar.gz"), gzip.compress(file.read_bytes()))
            file.unlink()
    source = find_source(tmp_path, "train")
    assert (source.kind, len(source), source.shuffled) == ("webdataset", 7, None if zipped else False)
    for i in (5, 0, 6, 1, 2, 3, 4):
        assert source[i].members == samples[i]
    assert source[5].name == f"train-0001.tar{'.gz' if zipped else ''}/1-1"
    assert source.fingerprint() == pickle.loads(pickle.dumps(source)).fingerprint()  # noqa: S301
    with pytest.raises(InputError, match=r"no files test\*.tar, but others of train"):
        find_source(tmp_path, "test")


def test_a_split_is_a_word_at_the_start_of_a_file_or_folder_name(tmp_path):
    for name in ("train_0", "test_0", "pretraining-0", "val/0", "val/1"):
        shard(tmp_path / f"{name}.tar", name.encode())
    source = find_source(tmp_path, "train")
    assert listing(source) == [("train_0.tar/0", ["png"], None)]
    assert "not read: 1 .tar (pretraining-0.tar)" in source.notes
    with pytest.raises(InputError, match=r"no files val\*.tar, but others of test, train"):
        find_source(tmp_path, "val")
    assert len(find_source(tmp_path / "val", "val")) == 2
    for file in tmp_path.glob("*.tar"):
        file.unlink()
    assert [find_source(tmp_path, "val")[i].members["png"] for i in (0, 1)] == [b"val/0", b"val/1"]


def test_a_gzipped_shard_is_unzipped_once_if_read_in_order(tmp_path, monkeypatch):
    whole = shard(tmp_path / "a.tar", *(bytes([i]) * 9_000 for i in range(50))).read_bytes()
    put(tmp_path / "a.tar.gz", gzip.compress(whole))
    (tmp_path / "a.tar").unlink()
    source, unzipped, read = find_source(tmp_path, "train"), 0, gzip._GzipReader.read

    def counted(self, size=-1):
        nonlocal unzipped
        found = read(self, size)
        unzipped += len(found)
        return found

    monkeypatch.setattr(gzip._GzipReader, "read", counted)
    assert all(source[i].members["png"] == bytes([i]) * 9_000 for i in range(0, 50, 3))  # one of 3 processes
    assert 0.9 * len(whole) < unzipped <= len(whole)


def test_a_shard_that_changes_while_it_is_read_is_named(tmp_path):
    file = shard(tmp_path / "a.tar", b"one", b"two")
    source = find_source(tmp_path, "train")
    file.write_bytes(file.read_bytes()[:2100])
    assert source[0].members["png"] == b"one"
    with pytest.raises(InputError, match=r"a\.tar ends within a\.tar: sample 1 .*Has it changed"):
        source[1]


# Recognition


def test_unknown_and_ambiguous_sources_are_refused(parquet, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        find_source(tmp_path / "none", "train")
    put(tmp_path / "readme.md")
    with pytest.raises(InputError, match=r"holds readme.md. Looked for ilsvrc: ILSVRC/Data/CLS-LOC; .*mnist: train-"):
        find_source(tmp_path, "train")
    with pytest.raises(InputError, match=r"'cifar' is not known; .*Did you mean 'cifar10'"):
        find_source(tmp_path, "train", "cifar")
    for kind in ("ilsvrc", "cifar10", "mnist", "parquet", "webdataset", "folder"):
        with pytest.raises(InputError, match=rf"is no {kind} data set; it holds readme.md"):
            find_source(tmp_path, "train", kind)
    put(tmp_path / "a.png", image(0))
    parquet("b.parquet", [(image(0), 0, "x")])
    with pytest.raises(InputError, match="can be read as parquet and folder"):
        find_source(tmp_path, "train")
    assert find_source(tmp_path, "train", "folder").kind == "folder"


# Formats


@pytest.mark.parametrize("form", ["png", "jpeg", "webp", "bmp", "gif", "tiff", "avif", "ppm"])
def test_images_are_recognised_by_their_first_bytes(form):
    assert image_type(image(1, form)) == {"jpeg": "jpg", "tiff": "tif"}.get(form, form)
    assert image_type(b"nothing") is image_type(b"") is None


@pytest.mark.parametrize(("extension", "form"), IMAGES.items())
def test_every_extension_is_read_from_folders_and_by_the_decoder_of_shards(extension, form, tmp_path):
    """There is a single list: a format that is read from folders may also be in shards."""
    put(tmp_path / f"a.{extension.upper()}", image(51, form))
    source = find_source(tmp_path, "train")
    (member,) = source[0].members
    assert (len(source), IMAGES[member]) == (1, form)
    for name in (member, extension):
        found = Decoder(1)({name: source[0].members[member]}, "x")["image"]
        assert found.shape == (1, 4, 4)
        assert (found.int() - 51).abs().max() <= 2  # AVIF is not exact
