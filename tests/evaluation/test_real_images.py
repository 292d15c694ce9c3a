"""Images in .npz files of ADM's evaluation suite."""

import json
import pickle

import numpy as np
import pytest
import torch

from lightning_tdisent.cli import main
from lightning_tdisent.data.npz import read_npz
from lightning_tdisent.data.shards import load
from lightning_tdisent.errors import InputError
from lightning_tdisent.evaluation.real_images import image_files, real_images

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), np.uint8)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_images_and_labels_are_read_as_they_were_written(write, tmp_path):
    write(tmp_path / "a.npz", IMAGES, np.arange(6))
    images, labels, digest = read_npz(tmp_path / "a.npz")
    assert torch.equal(images, torch.from_numpy(IMAGES).permute(0, 3, 1, 2))
    assert (labels.tolist(), len(digest)) == (list(range(6)), 16)
    write(tmp_path / "b.npz", IMAGES)
    assert read_npz(tmp_path / "b.npz")[1].tolist() == [-1] * 6
    found = image_files(tmp_path / "a.npz", "any", [3, 4, 5])
    assert (found.n, found.digest) == (6, digest)
    assert torch.equal(found.take(torch.tensor([4, 1])), images[[4, 1]])
    assert torch.equal(real_images(tmp_path / "a.npz", "any", 3).take(torch.tensor([2])), images[[2]])
    data = load(tmp_path / "a.npz", "any", 3, limit=4)
    assert (len(data), data.labels.tolist(), data.digest) == (4, [0, 1, 2, 3], digest)


class Evil:
    def __reduce__(self):
        return (open, ("ran", "w"))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"arr_0": IMAGES.astype(np.float32)},
            r"arr_0 is float32 of shape \(6, 4, 5, 3\); expected arr_0: uint8 ",
        ),
        ({"arr_0": IMAGES.transpose(0, 3, 1, 2)}, r"arr_0 is uint8 of shape \(6, 3, 4, 5\)"),
        ({"arr_0": IMAGES[0]}, r"of shape \(4, 5, 3\)"),
        ({"arr_0": IMAGES[:0]}, r"of shape \(0, 4, 5, 3\)"),
        ({"arr_0": IMAGES[..., :2]}, r"of shape \(6, 4, 5, 2\)"),
        ({"mu": IMAGES, "sigma": IMAGES}, r"holds mu, sigma; expected arr_0"),
        (
            {"arr_0": IMAGES, "arr_1": np.arange(5)},
            r"arr_1 is int64 of shape \(5,\); expected a whole number for",
        ),
        ({"arr_0": IMAGES, "arr_1": np.eye(6)}, r"arr_1 is float64"),
        ({"arr_0": np.array([Evil()], object)}, r"cannot be read: Object arrays cannot be loaded"),
    ],
)
def test_other_arrays_are_refused_by_name_and_nothing_is_unpickled(arrays, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", **arrays)
    with pytest.raises(InputError, match=message):
        read_npz(tmp_path / "a.npz")
    assert not (tmp_path / "ran").exists()


def test_files_that_are_none_are_refused(tmp_path):
    file = tmp_path / "a.npz"
    np.savez(file, IMAGES)
    content = file.read_bytes()
    for bad in (b"", b"no zip", content[:300], content[:-40], pickle.dumps([1]), content[:200] + b"x" + content[201:]):
        file.write_bytes(bad)
        with pytest.raises(InputError, match=r"a\.npz"):
            read_npz(file)
    with pytest.raises(InputError, match=r"none\.npz: no such file"):
        read_npz(tmp_path / "none.npz")
    np.savez(file, IMAGES[:1])
    with pytest.raises(InputError, match=r"a.npz has 1 images of \[3, 4, 5\], expected at least two of \[3, 4, 5\]"):
        image_files(file, "any", [3, 4, 5])
    np.savez(file, IMAGES)
    with pytest.raises(InputError, match=r"a.npz has 6 images of \[3, 4, 5\], expected at least two of \[3, 8, 8\]"):
        image_files(file, "any", [3, 8, 8])
    with pytest.raises(InputError, match=r"a.npz has images of 3 channels, expected 1"):
        load(file, "test", 1)


def test_an_npz_is_scored_as_its_images_are(digits, tmp_path, monkeypatch, capsys):
    """The digits' test images as a contender and as the reference: the same numbers as those of the shards."""
    monkeypatch.setenv("TDISENT_CACHE", str(tmp_path / "cache"))
    test = load(digits, "test", 1)
    np.savez(tmp_path / "test.npz", test.images.permute(0, 2, 3, 1).numpy(), test.labels.numpy())
    train = load(digits, "train", 1)
    np.savez(tmp_path / "train.npz", train.images.permute(0, 2, 3, 1).numpy())

    def rows(out, *words):
        argv = ["evaluate", *words, "--protocol", "digits", "-n", "297", "--out", str(tmp_path / out)]
        assert main([str(word) for word in argv]) == 0, capsys.readouterr().err
        return json.loads((tmp_path / out / "results.json").read_text(encoding="utf-8"))

    of_shards = rows("a", digits, "--data", digits)
    of_files = rows("b", tmp_path / "test.npz", "--data", digits, "--reference", tmp_path / "train.npz")
    whole = rows("c", tmp_path / "test.npz", "--data", tmp_path / "train.npz")
    expected = pytest.approx(of_shards[0]["fd_digits"], rel=1e-6)
    assert of_files[0]["fd_digits"] == whole[0]["fd_digits"] == expected
    assert of_files[0]["protocol_fields"]["split"] == "train.npz"
    same = f"the reference and the held-out images are both of {tmp_path / 'train.npz'}"
    assert same in "".join(capsys.readouterr().out.split("\n"))
