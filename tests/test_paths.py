"""A path means the same in arguments, in files, in moved folders, and from another working directory."""

import argparse
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from lightning_tdisent import ImageShards, LatentStates, ReducedStates, UNet, compose, load_model
from lightning_tdisent.cli import main
from lightning_tdisent.data.decode import Decoder
from lightning_tdisent.data.prepare import prepare
from lightning_tdisent.data.shards import Shards
from lightning_tdisent.data.toy import Toy
from lightning_tdisent.errors import InputError
from lightning_tdisent.evaluation.pictures import save_png
from lightning_tdisent.files import absolute_paths, expand, expand_all, expand_words, output_path, write_whole
from lightning_tdisent.fleet.keys import read_yaml
from lightning_tdisent.lit import entry
from lightning_tdisent.lit.command_line import configs_first
from lightning_tdisent.models.averages import reconstruct
from lightning_tdisent.models.expert import load_expert
from lightning_tdisent.models.export import export
from lightning_tdisent.models.merge import merge
from lightning_tdisent.runs import RunFolder
from lightning_tdisent.studies.results import Study

ROOT = Path(__file__).parents[1]
TINY = [
    "--config", f"{ROOT}/experiments/digits/reduced8.yaml", "--data.path", f"{ROOT}/data/digits",
    "--data.val_limit", 64, "--model.decay", "constant", "--model.network.channels", "[8, 16]",
    "--model.network.groups", 4, "--model.network.layers", 1, "--trainer.callbacks", "[]",
    "--trainer.val_check_interval", 4, "--trainer.max_steps",
]  # fmt: skip


def run(*words: object) -> int:
    try:
        return main([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """Change to an empty working directory, with a home folder and $SCRATCH below it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("NOWHERE", raising=False)
    return tmp_path / "home"


def test_home_and_variables_are_expanded_in_words(home):
    up = home.parent
    known = {
        "~": f"{home}", "~/y": f"{home}/y", "--run=~/y": f"--run={home}/y",
        "--set.data.path=~/y": f"--set.data.path={home}/y",
        "--runs.*.set.data.path=$SCRATCH": f"--runs.*.set.data.path={up}/scratch",
        "$SCRATCH/v": f"{up}/scratch/v", "/a/$SCRATCH": f"/a/{up}/scratch", "shared:~/y": f"shared:{home}/y",
        "file:///a/b": "/a/b", "--out=file:///a": "--out=/a", "--path=file://~/y": f"--path={home}/y",
        "zz_$SCRATCH": f"zz_{up}/scratch", "zz_${SCRATCH}_b/x": f"zz_{up}/scratch_b/x", "--out=a/${SCRATCH}":
        f"--out=a/{up}/scratch", "--set.n=${SCRATCH}": "--set.n=${SCRATCH}", "--a.n=${NOWHERE}": "--a.n=${NOWHERE}",
    }  # fmt: skip
    assert dict(zip(known, expand_words(list(known)), strict=True)) == known
    words = ["--set.n", "${SCRATCH}", "${SCRATCH}", "--out", "${SCRATCH}"]
    assert expand_words(words) == ["--set.n", "${SCRATCH}", f"{up}/scratch", "--out", f"{up}/scratch"]
    for same in (
        "a$ b",
        "a$",
        "$5",
        "${data.path}",
        "a~b",
        "US$ 5",
        "",
        "-n",
        "memory://~/x",
        "x.y=1",
        "~approximately",
    ):
        assert expand_words([same]) == [same]
    Path("~").mkdir()  # a path that exists is used as it is
    assert expand("~") == "~"
    Path("o_$NOWHERE").mkdir()  # also if only its leading part exists
    assert expand("o_$NOWHERE/x/$SCRATCH") == f"o_$NOWHERE/x/{up}/scratch"
    assert expand_words(["--run=a_${NOWHERE}"], braces=False) == ["--run=a_${NOWHERE}"]  # left to OmegaConf
    unset = ("$NOWHERE/x", "zz_$NOWHERE", "a/zz_${NOWHERE}/x", "s3://a/b$NOWHERE")
    for bad, said in (*((text, "NOWHERE is not set") for text in unset), ("~nobody-of-this-name/x", "no home folder")):
        with pytest.raises(InputError, match=said):
            expand(bad)


def test_home_and_variables_are_expanded_in_files(home):
    namespace = argparse.Namespace(run="~/y", model=argparse.Namespace(mask="$SCRATCH/m.png", lr=1e-3))
    assert vars(expand_all(namespace).model) == {"mask": f"{home.parent}/scratch/m.png", "lr": 1e-3}
    assert namespace.run == f"{home}/y"
    text = "title: ~/is prose\nout: ~/out\nruns: {a: {configs: [$SCRATCH/a.yaml], set: {n: 3}}}\n"
    Path("study.yaml").write_text(text, encoding="utf-8")
    assert read_yaml(Path("study.yaml")) == {
        "title": "~/is prose", "out": f"{home}/out",
        "runs": {"a": {"configs": [f"{home.parent}/scratch/a.yaml"], "set": {"n": 3}}},
    }  # fmt: skip
    Path("bad.yaml").write_text("runs: {a: {configs: [$NOWHERE/a.yaml]}}\n", encoding="utf-8")
    said = r"^bad.yaml: runs.a.configs: \$NOWHERE/a.yaml: the environment variable NOWHERE"
    with pytest.raises(InputError, match=said):
        read_yaml(Path("bad.yaml"))


def test_only_keys_that_name_files_are_made_absolute(home):
    Path("train").mkdir()
    data = {"path": "train", "train": "train", "masks": ["train"], "index_file": "train", "weights": "none", "n": 3}
    assert absolute_paths(data) == {**data, "path": f"{home.parent}/train", "index_file": f"{home.parent}/train"}


def test_a_run_below_the_home_folder_is_one_run(home, capsys):
    """An earlier version wrote to the expanded path, while lock, config check and resume used the literal path."""
    assert run("fit", *TINY, 4, "--run=~/y") == 0
    assert not Path("~").exists()
    before = (home / "y" / "model.safetensors").read_bytes()
    assert run("fit", *TINY, 4, "--run", "~/y", "--resume", "never") == 2
    assert run("fit", *TINY, 4, "--run=~/y", "--model.objective", "Eps") == 2
    assert "holds a run of another config" in capsys.readouterr().err
    Path("here.yaml").write_text("run: ~/y\n", encoding="utf-8")
    assert run("fit", *TINY, 4, "--config", "here.yaml") == 0
    assert "all 4 steps are done" in capsys.readouterr().out
    assert (home / "y" / "model.safetensors").read_bytes() == before
    assert run("fit", *TINY, 4, "--run=$NOWHERE/y") == 2
    assert run("fit", *TINY, 4, "--run=zz_$NOWHERE") == 2
    assert run("fit", *TINY, 4, "--run=zz_${NOWHERE}/y") == 2
    assert run("data", "toy", "zz_${NOWHERE}/y") == 2
    assert not list(Path().glob("zz*"))
    assert run("sample", home / "y", "--out=~/images", "--seeds", "0:1") == 0
    assert (home / "images" / "000000.png").exists()


def test_a_run_that_moved_goes_on_where_it_lies(home, capsys, monkeypatch):
    """An earlier version trained from scratch in the old place and resolved relative paths of the config from here."""
    shutil.copytree(ROOT / "data" / "digits", "digits")
    assert run("fit", *TINY, 4, "--data.path", "digits", "--run", "old") == 0
    assert run("fit", *TINY, 8, "--data.path", "digits", "--run", "unbroken") == 0
    Path("old").rename("new")
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert run("fit", "--config", "../new/config.yaml", "--trainer.max_steps", 8) == 0
    assert "going on with ../new from step 4" in capsys.readouterr().out
    assert not Path("../old").exists()
    assert not list(Path().iterdir())
    here, there = (load_expert(f"../{name}/model.safetensors")[0].state_dict() for name in ("new", "unbroken"))
    assert all(torch.equal(here[k], there[k]) for k in there)
    kept = yaml.safe_load(Path("../new/config.yaml").read_text(encoding="utf-8"))
    assert "run" not in kept
    assert kept["data"]["init_args"]["path"] == str(home.parent / "digits")
    # an overlay and the command line still decide where another run is written
    assert run("fit", "--config", "../new/config.yaml", "--trainer.max_steps", 4, "--run", "copy") == 0
    assert Path("copy/model.safetensors").exists()


def test_commands_take_the_weights_of_the_run_and_write_beside_them(home, capsys):
    """`validate` and `predict` once used an untrained network and wrote images into the folder of the finished run."""
    assert run("fit", *TINY, 4, "--run", "a") == 0
    before = {path: path.read_bytes() for path in Path("a").rglob("*") if path.is_file()}
    config = ["--config", "a/config.yaml"]
    found = entry.run(["validate", *config]).trainer.callback_metrics["val/x0_mse"]
    named = entry.run(["validate", *config, "--ckpt_path", "a", "--run", "b"]).trainer.callback_metrics["val/x0_mse"]
    assert found == named
    assert run("predict", *config, "--data", "Seeds", "--data.n", 2) == 0
    said = capsys.readouterr().out
    assert "weights: a/checkpoints/step-000000004.ckpt" in said
    assert "images: a/predict/images" in said
    assert run("predict", *config, "--data", "Seeds", "--data.n", 2) == 2
    assert "already holds images" in capsys.readouterr().err
    assert all(path.read_bytes() == content for path, content in before.items())
    new = {path.parts[1] for path in Path("a").rglob("*") if path.is_file() and path not in before}
    assert new == {"validate", "predict"}
    assert run("sample", "a", "--out", "images", "--seeds", "0:2", "--sampler", "dpm") == 0
    for name in ("000000.png", "000001.png"):
        assert Path("images", name).read_bytes() == Path("a/predict/images", name).read_bytes()


def test_an_untrained_network_is_not_validated(home, capsys):
    assert run("validate", *TINY, 4, "--run", "nothing") == 2
    assert "nothing holds no checkpoint, and an untrained network says nothing" in capsys.readouterr().err
    assert run("fit", *TINY, 4, "--run", "a") == 0
    shutil.rmtree("a/checkpoints")
    assert run("test", "--config", "a/config.yaml") == 2
    assert "--model Composite --model.path a" in capsys.readouterr().err


def test_options_count_before_a_config_as_after_it(home):
    words = [str(word) for word in ["fit", "--run", "x", "--trainer.max_steps=3", *TINY, 4]]
    assert configs_first(words)[1].startswith("--config=")
    cli = entry.parse([*words[:4], *words[4:-2]])
    assert cli.trainer.max_steps == 3


def test_another_root_folder_than_that_of_the_run_is_refused(home, capsys):
    assert run("fit", *TINY, 4, "--trainer.default_root_dir", "x", "--run", "y") == 2
    assert "give the folder as --run" in capsys.readouterr().err


URL = "s3://bucket/x"
REFUSED = rf"{URL}: this output is written to a disk of this machine, not to a URL\. Name a local folder or file"


@pytest.mark.parametrize(
    "argv",
    [
        ("data", "prepare", "pictures", URL),
        ("data", "toy", URL),
        ("data", "inspect", "data/digits", "--out", f"{URL}.png"),
        ("sample", "model", "--out", URL),
        ("compose", "model", "--out", URL),
        ("compose", "a", "b", "--merge", "1", "--out", URL),
        ("export", "model", "--out", URL),
        ("average", "run", "--sigma-rel", "0.1", "--out", f"{URL}.safetensors"),
        ("evaluate", "model", "--data", "data/digits", "--protocol", "digits", "--out", URL),
        ("prior", "model", "--at", "1", "--data", "data/digits", "--out", URL),
        ("report", "a", "b", "--out", f"{URL}.html"),
        ("study", "--config", "experiments/digits/quickstart.yaml", "--out", URL),
        ("fleet", "status", "fleet", "--html", f"{URL}.html"),
        ("fleet", "run", URL, "--scratch", URL),
        ("fit", "--config", "experiments/digits/experts8.yaml", "--run", URL),
        ("validate", "--config", "experiments/digits/experts8.yaml", "--run", URL),
        ("data", "toy", "gs://bucket/x"),
        ("data", "toy", "memory://x"),
        ("data", "toy", "simplecache::s3://bucket/x"),
    ],
)  # fmt: skip
def test_an_output_that_is_a_url_is_refused_before_any_work(argv, tmp_path, capsys, monkeypatch):
    for name in ("experiments", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    assert main(list(argv)) == 2
    said = capsys.readouterr()
    assert "not to a URL" in said.err
    assert len(said.err.splitlines()) == 1
    assert said.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "experiments"]


def test_a_study_whose_yaml_names_a_url_is_refused(tmp_path, capsys):
    file = tmp_path / "study.yaml"
    text = (ROOT / "experiments/digits/quickstart.yaml").read_text(encoding="utf-8")
    file.write_text(re.sub(r"(?m)^out:.*\n", "", text) + f"\nout: {URL}\n", encoding="utf-8")
    assert main(["study", "--config", str(file)]) == 2
    assert re.match(rf"error: {re.escape(str(file))}: out: {REFUSED}", capsys.readouterr().err)


@pytest.mark.parametrize(
    "write",
    [
        lambda out: prepare(Toy(4, 8), "train", out),
        lambda out: compose([], out),
        lambda out: merge([], out, 1),
        lambda out: export("nothing", out),
        lambda out: reconstruct(Path("nothing"), 0.1, out),
        lambda out: save_png(torch.zeros(3, 4, 4, dtype=torch.uint8), Path(out)),
        lambda out: write_whole(out, b""),
        lambda out: RunFolder(out),
        lambda out: Study(out, "", [], "data/digits", "digits").folder,
    ],
)
@pytest.mark.parametrize("form", [str, Path])
def test_python_refuses_an_output_that_is_a_url_too(write, form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=REFUSED):
        write(form(URL))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a:b", "s3:", "x/s3:/y", "C:/x", "a::b/c", "été/ü", "./s3:/x"])
def test_names_with_colons_are_no_urls(name):
    path = name if name != "a::b/c" else "./a::b/c"
    assert output_path(path) == Path(path)
    assert output_path(f"file:///{name}") == Path(f"/{name}")


def test_paths_have_this_meaning_in_a_script_too(home, digits, monkeypatch):
    shutil.copytree(digits, home / "digits")
    monkeypatch.setenv("SCRATCH", str(home))
    names = ["~/digits", "$SCRATCH/digits", "${SCRATCH}/digits", f"file://{home}/digits"]
    for name in names:
        assert ImageShards(name, channels=1).path == str(home / "digits")
        assert len(Shards.open(name, "train", Decoder(1))) == 1500
    with pytest.raises(InputError, match=r"data\.path: \$NOWHERE/x: the environment variable NOWHERE is not set"):
        ImageShards("$NOWHERE/x")
    network = UNet(shape=[1, 8, 8], channels=[8, 16], layers=1, groups=4)
    ReducedStates(network, LatentStates(S=4)).export(home / "run" / "model.safetensors")
    for name in [name.replace("digits", "run") for name in names]:
        assert load_model(name).cards[0].rows == [1, 2, 3, 4]
    compose(["~/run"], "~/both")
    assert load_model("~/both").shape == [1, 8, 8]
    with pytest.raises(InputError, match=r"^s3://bucket/run: weights are read from local files"):
        load_model("s3://bucket/run")


def test_a_mistake_in_a_config_that_is_named_by_a_relative_path_is_explained(tmp_path, monkeypatch, capsys):
    """The parser changes to the folder of a config while it reads it."""
    text = (ROOT / "experiments/digits/reduced8.yaml").read_text(encoding="utf-8")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "bad.yaml").write_text(text.replace("lr: 2.0e-3", "lr: abc"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for name in ("sub/bad.yaml", "./sub/../sub/bad.yaml"):
        assert main(["fit", "--config", name, "--run", "run"]) == 2
        said = capsys.readouterr().err
        assert re.search(r"bad.yaml:\d+: model.lr: expected float or null, got 'abc'", said)
        assert "Traceback" not in said
