"""Locales with encodings other than UTF-8, and unusual names: the same bytes, or one line that says why not."""

import io
import os
import shutil
import subprocess
import sys

import pytest
from PIL import Image
from processes import ROOT, TINY

from lightning_tdisent.cli import main
from lightning_tdisent.data.prepare import prepare
from lightning_tdisent.data.raw import find_source
from lightning_tdisent.data.tars import find
from lightning_tdisent.errors import InputError
from lightning_tdisent.files import check_name, expand_all, is_plain, write_whole
from lightning_tdisent.models.compose import compose
from lightning_tdisent.models.export import export

ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
PLAIN = ["Hündchen 🐶", "猫 Größe", "İstanbul ılık", "👩‍🚀", "a\u00a0b"]
ODD = ["a\nb", "a\tb", "a\x1b[31m", "a\u2028b", "a\udcffb", "a\x7f"]
REDUCED = "experiments/digits/reduced8.yaml"


@pytest.fixture(scope="module")
def latin(tmp_path_factory):
    """Return the environment of a German locale in ISO-8859-1, which is made for these tests."""
    place = tmp_path_factory.mktemp("locales")
    if not shutil.which("localedef"):
        pytest.skip("there is no localedef to make a locale with")
    words = ["localedef", "-i", "de_DE", "-f", "ISO-8859-1", str(place / "de_DE.ISO-8859-1")]
    if subprocess.run(words, capture_output=True, check=False).returncode > 1:
        pytest.skip("localedef has no sources of locales")
    return {"LOCPATH": str(place), "LC_ALL": "de_DE.ISO-8859-1", "PYTHONUTF8": "0"}


@pytest.fixture
def images(tmp_path):
    """Return a folder of images in classes with non-ASCII names."""
    folder = tmp_path / "Bilder für"
    for k, name in enumerate(PLAIN):
        (folder / name).mkdir(parents=True)
        for i in range(2):
            Image.new("L", (8, 8), 40 * k + i).save(folder / name / f"ä {i} 👩‍🚀.png")
    return folder


def python(code, *words, **env):
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, capture_output=True, check=False, cwd=ROOT, env={**os.environ, **env})


def fit(*words):
    tiny = ["--config", REDUCED, *TINY, "--trainer.max_steps=1", "--trainer.limit_val_batches=1"]
    try:
        return main(["fit", *tiny, *words])
    except SystemExit as end:
        return end.code


def bytes_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# other encodings


def test_a_command_in_a_locale_of_ascii_does_what_it_does_in_utf8(images, start, tmp_path):
    assert main(["data", "prepare", str(images), str(tmp_path / "Satz ü"), "--jobs", "1"]) == 0
    process = start("data", "prepare", images, tmp_path / "Satz ö", "--jobs", 1, env=ASCII, fresh=True)
    assert process.wait() == 0, process.text
    assert bytes_of(tmp_path / "Satz ö") == bytes_of(tmp_path / "Satz ü")
    assert process.out.read_bytes().isascii()  # output uses the encoding of the terminal
    assert "class numbers: 0 H\\xfcndchen \\U0001f436" in process.text


def test_a_training_in_a_locale_of_latin_1_writes_what_it_writes_in_utf8(latin, start, tmp_path):
    config = tmp_path / "Größe 🐶.yaml"
    config.write_text("# Größe\nmodel: {init_args: {lr: 0.001}}\n", encoding="utf-8")
    words = ["--config", str(config), "--data.path=data/digits"]
    assert fit(*words, "--run", str(tmp_path / "Lauf ü")) == 0
    argv = ["fit", "--config", REDUCED, *TINY, "--trainer.max_steps=1", "--trainer.limit_val_batches=1", *words]
    process = start(*argv, "--run", tmp_path / "Lauf ö", env=latin, fresh=True)
    assert process.wait() == 0, process.text
    for name in ("config.yaml", "model.safetensors"):
        one, two = ((tmp_path / run / name) for run in ("Lauf ü", "Lauf ö"))
        assert len(one.read_bytes()) == len(two.read_bytes())
    texts = [(tmp_path / run / "config.yaml").read_bytes().splitlines() for run in ("Lauf ü", "Lauf ö")]
    one, two = ([line for line in text if not line.startswith(b"id: ")] for text in texts)
    assert one == two
    assert len(one) < len(texts[0])
    assert "Lauf \u00f6/model.safetensors".encode("latin-1") in process.out.read_bytes()


LIBRARY = """
import sys
from lightning_tdisent.errors import InputError
from lightning_tdisent.lit.entry import run
from lightning_tdisent.files import write_whole
from lightning_tdisent.data.tars import find
from lightning_tdisent.cli import main
for call in (lambda: write_whole("/nowhere/\\xfc", b""), lambda: find("/nowhere/\\xfc", "train"),
             lambda: run(["fit", "--config", sys.argv[1]])):
    try:
        call()
    except InputError as error:
        print(ascii(str(error)))
"""


def test_a_program_of_ones_own_in_another_locale_is_told_how_to_start_python(tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("# Größe\nrun: ü\n", encoding="utf-8")
    done = python(LIBRARY, str(config), **ASCII)
    lines = done.stdout.decode().splitlines()
    assert len(lines) == 3, done.stderr.decode()
    assert all("are UTF-8, but this Python takes them for ascii. Start it with -X utf8" in line for line in lines)


def test_letters_that_a_terminal_does_not_have_are_escaped_and_the_code_stays(images, tmp_path, monkeypatch):
    said = io.BytesIO()
    with monkeypatch.context() as patch:
        terminal = io.TextIOWrapper(said, "latin-1")
        patch.setattr(sys, "stdout", terminal)
        assert main(["data", "prepare", str(images), str(tmp_path / "set"), "--jobs", "1"]) == 0
        assert main(["data", "inspect", str(tmp_path / "set"), "--out", str(tmp_path / "look.png")]) == 0
        terminal.flush()
    assert "0 H\u00fcndchen \\U0001f436".encode("latin-1") in said.getvalue()


# names


def test_names_beyond_ascii_go_through_all_commands(images, tmp_path, capsys):
    set_, run, made = tmp_path / "Satz ü 🐶", tmp_path / "Lauf ü 🐶", tmp_path / "Verbund ü 🐶"
    assert main(["data", "prepare", str(images), str(set_), "--jobs", "1", "--as", "train"]) == 0
    other = tmp_path / "andere"
    shutil.copytree(images, other)
    for file in other.rglob("*.png"):
        Image.new("L", (8, 8), 255).save(file)
    (next(other.rglob("*.png"))).unlink()
    assert main(["data", "prepare", str(other), str(set_), "--jobs", "1", "--as", "test"]) == 0
    assert fit("--data.path", str(set_), "--data.batch_size=4", "--run", str(run)) == 0
    assert main(["compose", str(run), "--out", str(made)]) == 0
    shown = capsys.readouterr().out  # quoted for a shell
    assert f"sample '{made}' --out '{made}_images'" in shown
    assert main(["sample", str(made), "--out", str(tmp_path / "Muster ü 🐶"), "--seeds", "0:2"]) == 0
    assert main(["export", str(made), "--out", str(tmp_path / "Ausfuhr ü 🐶")]) == 0
    assert f"path: {set_}" in (run / "config.yaml").read_text(encoding="utf-8")
    assert len(list((tmp_path / "Muster ü 🐶").glob("*.png"))) == 2


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31m", "a\udcffb"])
def test_a_path_with_a_control_character_or_of_no_utf8_is_refused_in_one_line_before_work(name, tmp_path, capsys):
    path = tmp_path / name
    commands = [
        ["fit", "--config", REDUCED, "--run", str(path)], ["fit", "--config", REDUCED, f"--data.path={path}"],
        ["fit", "--config", str(path)], ["data", "toy", str(path)], ["data", "index", str(path)],
        ["data", "prepare", str(tmp_path), str(path)], ["compose", "x", "--out", str(path)],
        ["sample", "x", "--out", str(path)], ["export", "x", "--out", str(path)], ["report", str(path)],
        ["evaluate", "x", "--data", "x", "--protocol", "digits", "--out", str(path)],
    ]  # fmt: skip
    for words in commands:
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr().err
        assert (code, said.count("\n")) == (2, 1), (words, said)
        assert ascii(name)[1:-1] in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ODD)
def test_such_paths_are_refused_from_python(name, tmp_path):
    path, source = tmp_path / name, tmp_path / "images"
    source.mkdir()
    Image.new("L", (8, 8)).save(source / "a.png")
    calls = [
        lambda: write_whole(path, b""), lambda: find(path, "train"), lambda: compose(["x"], path),
        lambda: export("x", path), lambda: prepare(find_source(source, "train"), "train", path),
        lambda: expand_all({"data": {"path": str(path)}}, "file"),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(InputError, match=r"a path is UTF-8 without control characters") as refused:
            call()
        assert str(refused.value).isprintable()
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("name", ["a\nb", "a\x1bb", b"a\xffb"])
def test_a_class_with_a_control_character_or_of_no_utf8_is_refused_before_work(name, tmp_path, capsys):
    folder = tmp_path / "images"
    for part in (name, "b"):
        (folder / os.fsdecode(part)).mkdir(parents=True)
        Image.new("L", (8, 8)).save(folder / os.fsdecode(part) / "0.png")
    assert main(["data", "prepare", str(folder), str(tmp_path / "set")]) == 2
    assert f"classes {os.fsdecode(name)!a} (1 in all): a name of a class is UTF-8" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_what_is_plain():
    assert all(map(is_plain, PLAIN))
    assert not any(map(is_plain, ODD))
    for name in PLAIN:
        check_name(f"/x/{name}")
    assert expand_all({"title": "a\nb", "notes": "a\nb", "text": "a\nb"}) == dict.fromkeys(
        ("title", "notes", "text"), "a\nb"
    )


def test_case_rules_of_turkish_change_no_key(tmp_path):
    """Python's case rules do not depend on the locale: I and i are one letter, also in a Turkish locale."""
    if not shutil.which("localedef"):
        pytest.skip("there is no localedef to make a locale with")
    words = ["localedef", "-i", "tr_TR", "-f", "UTF-8", str(tmp_path / "tr_TR.UTF-8")]
    if subprocess.run(words, capture_output=True, check=False).returncode > 1:
        pytest.skip("localedef has no sources of locales")
    code = (
        "import locale, sys; locale.setlocale(locale.LC_ALL, ''); from lightning_tdisent.cli import main; "
        "sys.exit(main(['data', 'toy', sys.argv[1], '-n', '8', '--size', '8', '--split', 'VALIDATION', '--jobs', '1'])"
        " or main(['data', 'inspect', sys.argv[1], '--split', 'validation', '--out', sys.argv[1] + '/look.png']))"
    )
    done = python(code, str(tmp_path / "toy"), LOCPATH=str(tmp_path), LC_ALL="tr_TR.UTF-8")
    assert done.returncode == 0, done.stderr.decode()
