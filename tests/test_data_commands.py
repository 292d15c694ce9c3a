"""The commands `data ..`, as a user types them."""

import json

import numpy as np
import pytest
from PIL import Image

from lightning_tdisent.cli import main
from lightning_tdisent.streaming.index import Index, path_of
from lightning_tdisent.streaming.shards import load


@pytest.fixture
def photographs(tmp_path):
    """Two classes, 12 pictures of several sizes."""
    rng = np.random.default_rng(0)
    for i in range(12):
        folder = tmp_path / "raw" / "train" / ("cat", "dog")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "raw"


def test_from_a_folder_of_images_to_verified_shards(photographs, tmp_path, capsys):
    out = tmp_path / "shards"
    command = ["data", "prepare", str(photographs), str(out), "--size", "32", "--samples", "5", "--jobs", "2"]
    assert main(command) == 0
    assert "12 samples in 3 shards" in capsys.readouterr().out
    data = load(out, "train", 3)
    assert data.images.shape == (12, 3, 32, 32)
    assert sorted(data.labels.tolist()) == [0] * 6 + [1] * 6
    assert json.loads((out / "train.prepare.json").read_text())["classes"] == ["cat", "dog"]
    assert main(command) == 0  # nothing is left to do
    capsys.readouterr()
    assert main(["data", "verify", str(out)]) == 0
    assert capsys.readouterr().out == f"{out} (train): all 12 samples in 3 shards are good, digest {data.digest}\n"


def test_toy_pictures_have_the_shapes_and_colours_that_they_are_said_to_have(tmp_path, capsys):
    out = tmp_path / "toy"
    command = ["data", "toy", str(out), "-n", "400", "--size", "64"]
    assert main(command) == 0
    assert "400 pictures in 4 shards" in capsys.readouterr().out
    data = load(out, "train", 3)
    assert data.labels.bincount(minlength=4).min() > 70
    shape = ("circle", "square", "triangle", "cross")
    assert [caption.split()[2] for caption in data.captions] == [shape[label] for label in data.labels]
    images = data.images.float()
    ground = images.flatten(2).amax(2).amax(1)  # of shape and grey ground, the ground is the lighter
    inside = (images.amax(1) - images.amin(1)) > 20  # grey has no colour
    share = {name: inside[data.labels == k].float().mean().item() for k, name in enumerate(shape)}
    assert share["square"] > share["circle"] > share["cross"] > 0
    assert share["circle"] / share["square"] == pytest.approx(np.pi / 4, abs=0.12)
    assert share["triangle"] / share["square"] == pytest.approx(1 / 2, abs=0.12)
    red = [i for i, caption in enumerate(data.captions) if " red " in caption]
    strongest = (images * inside[:, None]).sum((2, 3)).argmax(1)
    assert set(strongest[red].tolist()) == {0}
    assert ground.min() >= 150
    assert main(["data", "toy", str(tmp_path / "again"), "-n", "400", "--size", "64", "--jobs", "1"]) == 0
    assert load(tmp_path / "again", "train", 3).digest == data.digest
    assert main(["data", "toy", str(out), "-n", "40", "--split", "test", "--seed", "1"]) == 0
    assert len(load(out, "test", 3)) == 40


def test_verify_names_what_has_changed(photographs, tmp_path, capsys):
    out = tmp_path / "shards"
    main(["data", "prepare", str(photographs), str(out), "--samples", "5"])
    index = Index.load(path_of(out, "train"))
    content = bytearray((out / "train-0001.tar").read_bytes())
    content[600] ^= 1
    (out / "train-0001.tar").write_bytes(content)
    capsys.readouterr()
    assert main(["data", "verify", str(out)]) == 1
    told = capsys.readouterr()
    assert index.name(5) in told.out
    assert "1 samples or shards of 12 are not what they were" in told.err
    assert "Traceback" not in told.err


def test_shards_without_an_index_get_one(digits, tmp_path, capsys):
    for split in ("train", "test"):
        (tmp_path / f"{split}-0000.tar").write_bytes((digits / f"{split}-0000.tar").read_bytes())
    assert main(["data", "verify", str(tmp_path)]) == 2
    assert f"data index {tmp_path} --split train" in capsys.readouterr().err
    assert main(["data", "index", str(tmp_path)]) == 0
    assert "1,500 samples in 1 shards" in capsys.readouterr().out
    assert main(["data", "verify", str(tmp_path)]) == 0
    assert main(["data", "index", str(tmp_path), "--split", "test", "--no-samples"]) == 0
    index = Index.load(path_of(tmp_path, "test"))
    assert (len(index), index.regions) == (297, None)
    assert main(["data", "verify", str(tmp_path), "--split", "test"]) == 0


@pytest.mark.parametrize("zipped", [False, True])
def test_inspect_draws_what_is_there(digits, tmp_path, capsys, zipped):
    import gzip

    content = (digits / "test-0000.tar").read_bytes()
    (tmp_path / f"test-0000.tar{'.gz' if zipped else ''}").write_bytes(gzip.compress(content) if zipped else content)
    picture = tmp_path / "look.png"
    assert main(["data", "inspect", str(tmp_path), "--split", "test", "-n", "100", "--out", str(picture)]) == 0
    told = capsys.readouterr().out
    labels = load(digits, "test", 1).labels.bincount()
    for words in (
        "297 in 1 shards",
        "3 x 8 x 8 (100)",
        "values, grey",
        f"10 of 10, with {int(labels.min())} to {int(labels.max())} (class {int(labels.argmax())}) samples each",
        "no index: nothing can be verified",
    ):
        assert words in told
    with Image.open(picture) as image:
        assert len(set(image.convert("L").resize((60, 50)).tobytes())) > 50


def test_inspect_shows_latents_and_what_cannot_be_decoded(tmp_path, capsys):
    import io

    import webdataset as wds

    with wds.TarWriter(str(tmp_path / "train-0000.tar"), mtime=0) as shard:
        for i in range(5):
            content = io.BytesIO()
            np.save(content, np.random.default_rng(i).normal(size=(2, 2, 4, 8, 8)).astype(np.float16))
            shard.write({"__key__": f"{i}", "latent.npy": content.getvalue() if i else b"no array"})
    picture = tmp_path / "look.png"
    assert main(["data", "inspect", str(tmp_path), "--out", str(picture)]) == 0
    told = capsys.readouterr().out
    assert "4 x 8 x 8 (4)" in told
    assert "values, channel 3" in told
    assert "cannot be decoded │ 1" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prepare", "/nowhere", "out"], "/nowhere"),
        (["inspect", "/nowhere"], "/nowhere is not a folder"),
        (["verify", "pipe:cat x"], "pipe: runs a command"),
        (["index", "data/digits", "--jobs", "0"], "--jobs: at least 1, got 0"),
        (["index", "data/digits", "--split", "dev"], r"no shards dev-*.tar(.gz)"),
    ],
)
def test_what_cannot_be_done_is_answered_in_a_line(words, message, capsys, tmp_path, monkeypatch):
    assert main(["data", *words]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
