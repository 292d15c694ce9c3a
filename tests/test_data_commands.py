"""The `data ..` commands, called as a user types them."""

import gzip
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from lightning_tdisent import files
from lightning_tdisent.cli import main
from lightning_tdisent.data.decode import Decoder
from lightning_tdisent.data.index import Index, path_of
from lightning_tdisent.data.orders import Shuffled
from lightning_tdisent.data.shards import Shards, load
from lightning_tdisent.data.verify import verify
from lightning_tdisent.errors import InputError
from lightning_tdisent.lit.datamodule import ImageShards


@pytest.fixture
def photographs(tmp_path):
    """Write 12 pictures of several sizes in two classes."""
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
    assert json.loads((out / "train.prepare.json").read_text(encoding="utf-8"))["classes"] == ["cat", "dog"]
    assert main(command) == 0  # nothing is left to do
    capsys.readouterr()
    assert main(["data", "verify", str(out)]) == 0
    assert capsys.readouterr().out == f"{out} (train): all 12 samples in 3 shards are good, digest {data.digest}\n"


def test_toy_pictures_have_the_shapes_and_colours_of_their_captions(tmp_path, capsys):
    out = tmp_path / "toy"
    command = ["data", "toy", str(out), "-n", "400", "--size", "64"]
    assert main(command) == 0
    assert "400 pictures in 4 shards" in capsys.readouterr().out
    data = load(out, "train", 3)
    assert data.labels.bincount(minlength=4).min() > 70
    shape = ("circle", "square", "triangle", "cross")
    assert [caption.split()[2] for caption in data.captions] == [shape[label] for label in data.labels]
    images = data.images.float()
    ground = images.flatten(2).amax(2).amax(1)  # brightness of the grey background, which is lighter than the shape
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
    assert "1 samples or shards of 12 have changed" in told.err
    assert "Traceback" not in told.err


def command_in(message):
    """Return the words of the command that a message names, without the program."""
    return shlex.split(message.strip().splitlines()[-1].partition("python -m lightning_tdisent ")[2])


@pytest.mark.parametrize("split", ["train", "test", "te*"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_command_in_a_message_repairs_the_problem(split, elsewhere, digits, tmp_path):
    shards, indices = tmp_path / "shards of mine", tmp_path / "indices"
    shutil.copytree(digits, shards)
    where = str(indices) if elsewhere else None
    (indices if elsewhere else shards).mkdir(exist_ok=True)

    def opened():
        return Shards.open(shards, split, Decoder(1), where=where)

    def cured(message):
        with pytest.raises(InputError, match=message) as refusal:
            opened() if where or "not exist" not in message else verify(shards, split)
        assert main(command_in(str(refusal.value))) == 0
        assert opened().index.hashed

    cured("does not exist")
    file = Path(path_of(shards, split, where))
    file.write_bytes(file.read_bytes()[:-5])
    cured("is damaged")
    file.write_bytes(file.read_bytes().replace(b"-0000.tar", b"-0009.tar"))
    cured("is damaged")
    (tar,) = shards.glob("te*.tar" if split == "te*" else f"{split}-*.tar")
    tar.rename(tar.with_name(tar.name.replace("0000", "0001")))
    cured("is only in the folder|is only in the index")
    again = Shards.open(shards, split, Decoder(1), where=where).again
    assert main(command_in(again)) == 0


@pytest.mark.parametrize("packed", [False, True])
def test_single_samples_can_be_read_after_following_the_advice(packed, digits, tmp_path):
    content = (digits / "train-0000.tar").read_bytes()
    file = tmp_path / ("train-0000.tar.gz" if packed else "train-0000.tar")
    file.write_bytes(gzip.compress(content, 1) if packed else content)
    if not packed:
        assert main(["data", "index", str(tmp_path), "--no-samples"]) == 0

    def batches():
        return next(iter(Shuffled(Shards.open(tmp_path, "train", Decoder(1)), 4, 0)))

    with pytest.raises(InputError, match="unpack the shards" if packed else "make the index again: ") as refusal:
        batches()
    if packed:
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
        file.unlink()
    else:
        assert main(command_in(str(refusal.value))) == 0
    assert len(batches()["image"]) == 4


def test_prepare_resumes_or_starts_again_as_its_messages_say(photographs, tmp_path, capsys):
    words = ["data", "prepare", str(photographs), str(tmp_path / "out"), "--samples", "4", "--no-shuffle"]
    bad = sorted((photographs / "train" / "dog").iterdir())[-2:]
    good = [file.read_bytes() for file in bad]
    for file in bad:
        file.write_bytes(b"no image")
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "allow more with --bad and resume, or repair them and start again: remove " in said
    for file, content in zip(bad, good, strict=True):
        file.write_bytes(content)
    assert main(words) == 2
    assert "was begun with another source or other options: fingerprint" in capsys.readouterr().err
    for shard in (tmp_path / "out").glob("train-*.tar"):
        shard.unlink()
    assert main(words) == 0


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
def test_inspect_draws_the_samples(digits, tmp_path, capsys, zipped):
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


def test_inspect_shows_latents_and_samples_that_cannot_be_decoded(tmp_path, capsys):
    import io

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
def test_invalid_requests_are_refused_in_one_line(words, message, capsys, tmp_path, monkeypatch):
    assert main(["data", *words]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def picture(file, value=7, form=None):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), value).save(file, form)


def shard_of(file, values):
    import io

    import webdataset as wds

    file.parent.mkdir(parents=True, exist_ok=True)
    with wds.TarWriter(str(file), mtime=0) as tar:
        for value in values:
            png = io.BytesIO()
            Image.new("L", (4, 4), value).save(png, "png")
            tar.write({"__key__": f"{value:04d}", "png": png.getvalue(), "seg.png": b"x"})


def test_a_class_name_may_have_a_tab_but_no_line_break(tmp_path, capsys):
    for name, code in (("tab\there", 0), ("line\nbreak", 2)):
        raw = tmp_path / f"raw{code}"
        for k, folder in enumerate((name, "plain")):
            picture(raw / folder / "0.png", k)
        assert main(["data", "prepare", str(raw), str(tmp_path / f"out{code}"), "--jobs", "1"]) == code
    said = capsys.readouterr().err
    assert "control characters such as a line break; rename it in the folder" in said


def test_inspect_exits_with_2_if_no_sample_can_be_used(tmp_path, capsys):
    with wds.TarWriter(str(tmp_path / "train-0000.tar"), mtime=0) as shard:
        shard.write({"__key__": "a", "png": b"no picture"})
    assert main(["data", "inspect", str(tmp_path), "--out", str(tmp_path / "look.png")]) == 2
    told = capsys.readouterr()
    assert "none of the 1 samples looked at can be used" in told.err
    assert "cannot be decoded" in told.out
    assert not (tmp_path / "look.png").exists()


def test_prepare_and_inspect_print_what_was_recognised(tmp_path, capsys):
    raw, out = tmp_path / "raw", tmp_path / "out"
    for k in range(3):
        picture(raw / "Training" / "ant" / f"{k}.png", k)
        picture(raw / "Training" / "cat" / f"{k}.png", 10 + k)
        picture(raw / "Test" / "cat" / f"{k}.png", 20 + k)
    (raw / "Training" / "bee").mkdir()
    (raw / "Training" / "ant" / "0.txt").write_bytes("\ufeffan ant\r\n".encode())
    (raw / "Training" / "ant" / "1.txt").write_bytes(b" ")
    (raw / "Training" / "notes.md").write_bytes(b"x")
    assert main(["data", "prepare", str(raw), str(out), "--jobs", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:6] == [
        f"{raw}: 6 samples of folder",
        "  split train: Training; splits found: Test, Training",
        "  captions: for 2 of 6 images; 4 have none",
        "  classes: the sorted names of 3 folders; no images in 1 bee",
        "  not read: 1 .md (notes.md)",
        "  class numbers: 0 ant, 1 bee, 2 cat",
    ]
    assert lines[7:] == ["  captions: 2 of 6 samples; 4 have none; 1 are empty", "  values: 6 images of 8 bits"]
    assert main(["data", "prepare", str(raw), str(out), "--split", "test", "--jobs", "1"]) == 0
    assert "3 samples" in capsys.readouterr().out
    assert load(out, "test", 1).labels.tolist() == [2, 2, 2]
    assert main(["data", "inspect", str(out), "--out", str(tmp_path / "look.png")]) == 0
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in (
        "range of values 0 to 12",
        "classes 2 of 3, with 3 to 3 (class 0) samples each",
        "class numbers 0 ant, 1 bee, 2 cat",
        "captions 2 of 6 samples; 4 have none; 1 are empty",
        "splits here test (1 shards), train (1 shards)",
        "not read: 1 .md (notes.md)",
    ):
        assert words in told


def test_prepare_accepts_patterns_and_a_name(tmp_path, capsys):
    raw, out = tmp_path / "raw", tmp_path / "out"
    for k in range(4):
        shard_of(raw / f"cc-{k:05d}.tar", [10 * k, 10 * k + 1])
    assert main(["data", "prepare", str(raw), str(out), "--split", "cc-{00001..00002}.tar"]) == 2
    assert "--split cc-{00001..00002}.tar: name the split that is written" in capsys.readouterr().err
    command = [
        "data",
        "prepare",
        str(raw),
        str(out),
        "--split",
        "cc-{00001..00002}.tar",
        "--as",
        "train",
        "--jobs",
        "1",
    ]
    assert main(command) == 0
    assert "members kept as they are, not read: seg.png" in capsys.readouterr().out
    assert load(out, "train", 1).images[:, 0, 0, 0].tolist() == [10, 11, 20, 21]
    assert main([*command[:5], "*0.tar", "--as", "val", "--jobs", "1"]) == 0
    assert load(out, "val", 1).images[:, 0, 0, 0].tolist() == [0, 1]
    assert main([*command[:5], "*.tar", "--as", "other", "--jobs", "1"]) == 2
    assert "4 of the 8 images of other are images of train (which has 4), too" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["out", "shards/a"])
def test_prepare_into_a_folder_of_its_source_runs_twice(where, tmp_path, capsys):
    for k in range(6):
        picture(tmp_path / ("cat", "dog")[k % 2] / f"{k}.png", k)
    command = ["data", "prepare", str(tmp_path), str(tmp_path / where), "--samples", "4", "--jobs", "1"]
    for _ in range(2):
        assert main(command) == 0
        assert "class numbers: 0 cat, 1 dog" in capsys.readouterr().out
    assert main(["data", "verify", str(tmp_path / where)]) == 0
    assert main([*command[:3], str(tmp_path), *command[4:]]) == 2
    assert "is the source itself. Name another folder" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--range", "-1,1"], ["--range=-1,1"], ["--range", "-.5,1"]])
def test_a_range_may_begin_below_zero(words, tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    low = float(words[-1].rpartition("=")[2].partition(",")[0])
    values = np.linspace(low, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "raw" / "0.tif")
    assert main(["data", "prepare", str(tmp_path / "raw"), str(tmp_path / "out"), "--jobs", "1", *words]) == 0
    images = load(tmp_path / "out", "train", 1).images
    assert (images.flatten().numpy() == np.rint((values.flatten().astype(np.float64) - low) / (1 - low) * 255)).all()


def test_floats_need_a_range_which_is_printed(tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    for k in range(3):
        Image.fromarray(np.full((4, 4), k / 2, np.float32)).save(tmp_path / "raw" / f"{k}.tiff")
    command = ["data", "prepare", str(tmp_path / "raw"), str(tmp_path / "out"), "--jobs", "1", "--no-shuffle"]
    assert main(command) == 2
    assert "holds floats, and the values of black and white are unknown" in capsys.readouterr().err
    assert main([*command, "--range", "0,1"]) == 0
    assert "values: 3 images of floats, 0 to 1 as 0 to 255" in capsys.readouterr().out
    assert load(tmp_path / "out", "train", 1).images[:, 0, 0, 0].tolist() == [0, 128, 255]
    picture(tmp_path / "grey" / "0.png")
    command[2:4] = [str(tmp_path / "grey"), str(tmp_path / "out2")]
    assert main([*command, "--range", "0,1"]) == 0
    assert "--range 0,1 was not used, as all images have 8 bits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--range", "1"], "--range 1: expected two numbers"),
        (["--range", "1,0"], "range: (1.0, 0.0) is not two finite numbers"),
        (["--columns", "image"], "--columns image: 'image' is not ROLE=NAME"),
        (["--columns", "image=x"], "--columns is for parquet files, this is folder"),
        (["--labels", "folder"], "labels: 'folder' is not one of auto, folders, none. Did you mean 'folders'?"),
        (["--split", "*.png"], "is a pattern, but this is a folder of images"),
        (["--as", "train-clean"], "--as train-clean: name it with letters of a to z, digits and _, as in --as train"),
        (["--as", "validé"], "--as validé: name it with letters"),
        (["--as", ""], "--as : name it with letters"),
        (["--split", "é"], "--split é: name the split that is written with letters"),
    ],
)
def test_invalid_options_of_prepare_are_refused(words, message, tmp_path, capsys):
    picture(tmp_path / "raw" / "0.png")
    assert main(["data", "prepare", str(tmp_path / "raw"), str(tmp_path / "out"), "--jobs", "1", *words]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_the_written_split_may_be_a_number(tmp_path, capsys):
    picture(tmp_path / "raw" / "0.png")
    assert main(["data", "prepare", str(tmp_path / "raw"), str(tmp_path / "out"), "--jobs", "1", "--as", "2017"]) == 0
    assert len(load(tmp_path / "out", "2017", 1)) == 1


def test_large_classes_are_counted_in_little_memory(tmp_path, capsys):
    import io

    import webdataset as wds

    png = io.BytesIO()
    Image.new("L", (4, 4), 7).save(png, "png")
    with wds.TarWriter(str(tmp_path / "train-0.tar"), mtime=0) as tar:
        for k, label in enumerate((5, 2**31 - 1)):  # counting every number up to there would take 17 GB
            tar.write({"__key__": f"{k}", "png": png.getvalue(), "cls": str(label).encode()})
    assert main(["data", "inspect", str(tmp_path), "--out", str(tmp_path / "look.png")]) == 0
    assert "2 of 2,147,483,648, with 1 to 1 (class 5) samples each" in " ".join(capsys.readouterr().out.split())


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_pictures_are_read(tmp_path, capsys, monkeypatch):
    picture(tmp_path / "raw" / "0.png", 0)

    def read_only(folder):
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(files, "check_writable", read_only)
    assert main(["data", "prepare", str(tmp_path / "raw"), str(tmp_path / "out"), "--jobs", "1"]) == 2
    assert f"{tmp_path / 'out'} cannot be written to (Permission denied): choose another" in capsys.readouterr().err


def test_an_index_of_a_folder_that_cannot_be_written_to_is_kept_elsewhere(digits, tmp_path, capsys, monkeypatch):
    folder, elsewhere = tmp_path / "shards", tmp_path / "made" / "index"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}-0000.tar").write_bytes((digits / f"{split}-0000.tar").read_bytes())

    def read_only(place):
        if place == folder:
            raise OSError(30, "Read-only file system")

    monkeypatch.setattr(files, "check_writable", read_only)
    assert main(["data", "index", str(folder)]) == 2
    assert (
        f"{folder} cannot be written to (Read-only file system): write the index to another folder"
        in capsys.readouterr().err
    )
    for split in ("train", "test"):
        assert main(["data", "index", str(folder), "--split", split, "--out", str(elsewhere)]) == 0
        assert main(["data", "verify", str(folder), "--split", split, "--index", str(elsewhere)]) == 0
    assert sorted(file.name for file in folder.iterdir()) == ["test-0000.tar", "train-0000.tar"]
    data = ImageShards(str(folder), 1, index=str(elsewhere), batch_size=8)
    data.setup("fit")
    assert data.shards.index.hashed
    assert len(data.held_out) == 297
    (folder / "train-0000.tar").write_bytes(b"x" * 1536)
    with pytest.raises(InputError, match=r"has 1,536 bytes, but its index says"):
        _ = ImageShards(str(folder), 1, index=str(elsewhere)).shards
    with pytest.raises(
        InputError, match=r"does not exist, but data.index names it; make it: .*data index .* --split train --out "
    ):
        _ = ImageShards(str(folder), 1, index=str(tmp_path)).shards
    with pytest.raises(InputError, match=r"data.index: a.safetensors is a file; name its folder"):
        ImageShards(str(folder), 1, index="a.safetensors")
    file = tmp_path / "my.safetensors"
    assert main(["data", "index", str(folder), "--split", "test", "--out", str(file)]) == 0
    assert main(["data", "verify", str(folder), "--split", "test", "--index", str(file)]) == 0


@pytest.mark.parametrize(
    ("members", "code", "message"),
    [
        (["jpg", "2.jpg"], 0, "not read: members KEY.2.jpg (3, first train-0000.tar/a0.2.jpg)"),
        (["jpg", "json"], 0, "not read: members KEY.json (3, first train-0000.tar/a0.json)"),
        (["input.jpg", "outputs.txt"], 2, "it has input.jpg, outputs.txt (the extension begins at the first dot"),
        (["v2.jpg", "v2.cls"], 2, "no sample can be used: samples that cannot be used: 3 of 3, first train-0000.tar: "),
        (["left.png", "right.png"], 2, "it has left.png, right.png"),
        (["jpg", "png"], 2, "has 2 images (png, jpg), expected one: remove the others"),
    ],
)
def test_index_and_verify_report_what_they_do_not_read(members, code, message, tmp_path, capsys):
    with wds.TarWriter(str(tmp_path / "train-0000.tar"), encoder=False) as shard:
        for k in range(3):
            shard.write({"__key__": f"a{k}", **{kind: f"{kind}{k}".encode() for kind in members}})
    assert main(["data", "index", str(tmp_path)]) == code
    said = capsys.readouterr()
    assert message in (said.err if code else said.out)
    assert (tmp_path / "train.index.safetensors").exists() == (code == 0)
    if code == 0:
        assert main(["data", "verify", str(tmp_path)]) == 0
        assert message in capsys.readouterr().out


def test_verify_reports_classes_that_fit_refuses(tmp_path, capsys):
    with wds.TarWriter(str(tmp_path / "train-0000.tar"), encoder=False) as shard:
        for k, label in enumerate((b"1", b"-5", b"cat")):
            shard.write({"__key__": f"a{k}", "png": b"%d" % k, "cls": label})
    assert main(["data", "index", str(tmp_path)]) == 0
    assert "samples that cannot be used: 2 of 3, first train-0000.tar: sample a1 " in capsys.readouterr().out
    assert main(["data", "verify", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert (
        "sample a1 (byte 4096): the class b'-5' is not a number from 0 to 2,147,483,647 (2 samples cannot be"
        in said.out
    )
    assert "have changed, or cannot be used" in said.err
