"""Own pictures: the commands of docs/own_pictures.md on 200 mixed files, and what data prepare holds out."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_tdisent.cli import main
from lightning_tdisent.data.index import Index
from lightning_tdisent.data.raw import find_source
from lightning_tdisent.data.raw.hold_out import hold_out

PAGE = Path(__file__).parents[1] / "docs" / "own_pictures.md"
# the sizes of a test in place of those of a training
SHORT = {
    "fit": ["--trainer.max_steps", "3", "--trainer.val_check_interval", "3", "--model.network.channels", "[8,16]",
            "--model.network.groups", "4", "--data.batch_size", "4", "--data.val_limit", "4",
            "--trainer.callbacks.samples", "2", "--trainer.callbacks.strips", "1", "--trainer.accelerator", "cpu"],
    "sample": ["--seeds", "0:3", "--steps", "2", "--device", "cpu"],
    "evaluate": ["-n", "80", "--steps", "2", "--device", "cpu", "--held-out", "5"],
}  # fmt: skip
KINDS = [("jpg", "RGB"), ("png", "L"), ("png", "RGBA"), ("webp", "RGB"), ("gif", "P"), ("bmp", "RGB"), ("tif", "RGB")]


def pictures(folder: Path, n: int, copies: int = 0, same: int = 0) -> Path:
    """Write pictures of several formats, modes and sizes in subfolders, the first ``copies`` also under other names."""
    rng = np.random.default_rng(0)
    for i in range(n):
        ending, mode = KINDS[i % len(KINDS)]
        sides = (same, same) if same else rng.integers(20, 90, 2)
        image = Image.fromarray(rng.integers(0, 256, (*sides, 3), dtype=np.uint8)).convert(mode)
        place = folder / f"holiday {i % 3}" / f"picture é {i}.{ending}"
        place.parent.mkdir(parents=True, exist_ok=True)
        image.save(place)
        if i < copies:
            (place.parent / f"copy {i}.{ending}").write_bytes(place.read_bytes())
    return folder


def commands() -> list[list[str]]:
    lines = re.findall(r"^    python -m lightning_tdisent (.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [shlex.split(line) for line in lines]


def test_every_command_of_the_page_does_what_it_says(tmp_path, monkeypatch, capsys):
    pictures(tmp_path / "pictures", 200)
    (tmp_path / "experiments").symlink_to(Path(__file__).parents[1] / "experiments")
    monkeypatch.chdir(tmp_path)
    words = commands()
    assert [w[0] for w in words] == ["data", "data", "fit", "sample", "evaluate"]
    for line in words:
        assert main([*line, *SHORT.get(line[0], [])]) == 0
    said = capsys.readouterr()
    assert "200 samples of folder" in said.out
    assert "are held out as the split test (--hold-out 0.05)" in said.out
    assert len(list((tmp_path / "runs/own/images").glob("*.png"))) == 3
    rows = json.loads((tmp_path / "runs/own/evaluation/results.json").read_bytes())
    assert rows[0]["fd_random"] > 0
    assert "step 3" in (tmp_path / "runs/own/reduced32/log.txt").read_text(encoding="utf-8")
    assert (tmp_path / "own.png").exists()


def test_a_share_is_held_out_by_content_and_copies_stay_together(tmp_path):
    source = find_source(pictures(tmp_path, 300, copies=120), "train", labels="none")
    train, test = hold_out(source, 0.1, 0)
    assert sorted([*train.numbers.tolist(), *test.numbers.tolist()]) == list(range(420))
    assert 15 < len(test) < 75
    contents = [{b"".join(part[i].members.values()) for i in range(len(part))} for part in (train, test)]
    assert not contents[0] & contents[1]
    names = {test[i].name for i in range(len(test))}
    assert names == {part[i].name for part in [hold_out(source, 0.1, 0)[1]] for i in range(len(part))}
    assert names != {part[i].name for part in [hold_out(source, 0.1, 1)[1]] for i in range(len(part))}
    assert train.fingerprint() != test.fingerprint() != source.fingerprint()
    next(tmp_path.rglob("copy 0.*")).rename(tmp_path / "a new name.jpg")  # the same picture keeps its part
    again = hold_out(find_source(tmp_path, "train", labels="none"), 0.1, 0)[1]
    assert {b"".join(again[i].members.values()) for i in range(len(again))} == contents[1]


def test_parts_are_whole_for_any_number_of_processes_and_the_command_resumes(tmp_path, capsys):
    pictures(tmp_path / "raw", 60)
    for jobs in ("1", "2"):
        words = ["data", "prepare", str(tmp_path / "raw"), str(tmp_path / jobs), "--size", "16", "--jobs", jobs]
        assert main(words) == 0
        assert main(words) == 0
    sizes = [len(Index.load(tmp_path / "1" / f"{split}.index.safetensors")) for split in ("train", "test")]
    assert sum(sizes) == 60
    assert 2 <= sizes[1] <= 10
    for file in (tmp_path / "1").glob("*.tar"):
        assert file.read_bytes() == (tmp_path / "2" / file.name).read_bytes()
    assert main(["data", "verify", str(tmp_path / "1"), "--split", "test"]) == 0


@pytest.mark.parametrize(
    ("words", "splits"),
    [(["--hold-out", "0"], {"train"}), (["--split", "train"], {"train"}), (["--hold-out", "0.5"], {"train", "test"})],
)
def test_what_is_asked_for_is_written(words, splits, tmp_path):
    pictures(tmp_path / "raw", 50)
    assert main(["data", "prepare", str(tmp_path / "raw"), str(tmp_path / "out"), "--size", "16", *words]) == 0
    assert {f.name.split(".")[0] for f in (tmp_path / "out").glob("*.index.safetensors")} == splits


def test_a_source_with_splits_or_few_pictures_is_left_as_it_is(tmp_path, capsys):
    pictures(tmp_path / "raw" / "train", 50)
    pictures(tmp_path / "raw" / "test", 6)
    assert main(["data", "prepare", str(tmp_path / "raw"), str(tmp_path / "out"), "--size", "16"]) == 0
    assert not (tmp_path / "out" / "test.index.safetensors").exists()
    words = ["data", "prepare", str(tmp_path / "raw"), str(tmp_path / "more"), "--size", "16"]
    for more, said in (
        (["--hold-out", "0.1"], "has splits of its own"),
        (["--hold-out", "0.1", "--split", "train"], "leave --split and --as out"),
        (["--hold-out", "0.1", "--as", "train"], "leave --split and --as out"),
    ):
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err
    pictures(tmp_path / "few", 8)
    assert main(["data", "prepare", str(tmp_path / "few"), str(tmp_path / "few_out"), "--size", "16"]) == 0
    assert "8 images are too few to hold some out" in capsys.readouterr().out
    for share in ("1", "-0.1", "nan"):
        assert main(["data", "prepare", str(tmp_path / "few"), str(tmp_path / "x"), "--hold-out", share]) == 2
        assert "--hold-out" in capsys.readouterr().err


def test_pictures_of_several_sizes_are_said_at_once(tmp_path, capsys):
    pictures(tmp_path / "mixed", 8)
    pictures(tmp_path / "same", 8, same=24)
    for name, said in (("mixed", True), ("same", False)):
        assert main(["data", "prepare", str(tmp_path / name), str(tmp_path / f"{name}_out"), "--jobs", "1"]) == 0
        assert ("have different sizes (such as" in capsys.readouterr().out) == said
