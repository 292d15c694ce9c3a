"""Follow the advice in error messages and check that the error no longer occurs."""

import re
import shlex
import shutil

import pytest
import yaml

from lightning_tdisent.cli import main
from lightning_tdisent.diffusion.spec import build
from lightning_tdisent.errors import InputError
from lightning_tdisent.networks.network import Network

TRAINER = {"max_steps": 2, "max_epochs": -1, "accelerator": "cpu", "num_sanity_val_steps": 0, "limit_val_batches": 0}
NETWORK = {"shape": [1, 8, 8], "channels": [8, 16], "layers": 1, "groups": 4, "mid_attention": False}


@pytest.fixture
def fit(tmp_path, digits, capsys):
    """Train for two steps with more arguments, in a folder with a space in its name; return exit code and output."""
    model = {"network": {"class_path": "UNet", "init_args": NETWORK}, "states": {"S": 4}, "warmup": 1}
    data = {"class_path": "ImageShards", "init_args": {"path": str(digits), "channels": 1, "batch_size": 4}}
    content = {"trainer": TRAINER, "model": {"class_path": "ReducedStates", "init_args": model}, "data": data}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump({"seed_everything": 1, **content}), encoding="utf-8")

    def train(*words, run="a run"):
        capsys.readouterr()
        code = main(["fit", "--config", str(tmp_path / "one.yaml"), "--run", str(tmp_path / run), *words])
        return code, capsys.readouterr().err

    return train


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        (["--model.lr", "0.02"], "--ckpt_path"),
        (["--model.clip_norm", "0.5"], "--model.warm_start"),
        (["--model.lr", "0.02", "--ema.decay", "0.9"], "--model.warm_start"),
        (["--model.network.channels", "[8,8]"], None),
        (["--model.states.S", "5"], None),
    ],
)
def test_another_config_may_begin_elsewhere_with_what_was_learned(change, advice, fit):
    assert fit()[0] == 0
    code, said = fit(*change)
    assert code == 2
    found = re.search(r"with --run; (.*) beside that begins there", said)
    assert (shlex.split(found[1])[0] if found else None) == advice
    code, said = fit(*change, *(shlex.split(found[1]) if found else []), run="another")
    assert code == 0, said


@pytest.mark.parametrize("lost", ["checkpoints", "config.yaml"])
def test_a_run_begins_anew_when_what_is_named_is_removed(lost, fit, tmp_path):
    assert fit("--ema.lengths", "[0.1]")[0] == 0
    if lost == "checkpoints":
        for file in (tmp_path / "a run" / "checkpoints").glob("*.ckpt"):
            file.write_bytes(file.read_bytes()[:-9])
    else:
        (tmp_path / "a run" / lost).unlink()
    code, said = fit("--ema.lengths", "[0.1]")
    assert code == 2
    for path in re.search(r"[Rr]emove (.*?)(?: to begin anew)?, or choose another", said)[1].split(" and "):
        shutil.rmtree(path) if path.endswith(("checkpoints", "averages")) else (tmp_path / path).unlink()
    assert fit("--ema.lengths", "[0.1]") == (0, "")


def test_a_checkpoint_is_exported_before_it_is_composed(fit, tmp_path, capsys):
    assert fit()[0] == 0
    (checkpoint,) = (tmp_path / "a run" / "checkpoints").glob("*2.ckpt")
    assert main(["compose", str(checkpoint), "--out", str(tmp_path / "both")]) == 2
    words = shlex.split(capsys.readouterr().err.partition("python -m lightning_tdisent ")[2])
    folder = str(tmp_path / "exported")
    assert main([folder if word == "FOLDER" else word for word in words]) == 0
    assert main(["compose", folder, "--out", str(tmp_path / "both")]) == 0
    words = shlex.split(capsys.readouterr().out.rpartition("python -m lightning_tdisent ")[2])
    assert main([*words, "--seeds", "0:1"]) == 0


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "s3://bucket/run", "--out", "images"],
        ["export", "s3://bucket/run", "--out", "folder"],
        ["evaluate", "s3://bucket/run", "--data", "digits", "--protocol", "digits"],
        ["study", "--config", "s3://bucket/run"],
        ["report", "s3://bucket/run"],
    ],
)
def test_the_url_of_what_is_read_from_a_disk_is_named_whole(words, capsys):
    assert main(words) == 2
    assert "s3://bucket/run: is read from a disk of this machine; copy it here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--lr", "--model.lr"), ("--batch_size=8", "--data.batch_size"), ("--states.S", "--model.states.S"),
        ("--network.channels", "--model.network.channels"), ("--max_step", "--trainer.max_steps"), ("--out", None),
    ],
)  # fmt: skip
def test_an_option_without_its_first_part_is_understood(word, meant, fit):
    code, said = fit(word, "1")
    assert code == 2
    assert said.strip().partition("no such option.")[2] == (f" Did you mean {meant!r}?" if meant else "")


def test_a_class_of_a_script_is_said_to_be_one():
    with pytest.raises(InputError, match=r"__main__.Mine, which was defined in a script: .* Put Mine into a module"):
        build({"class_path": "__main__.Mine", "init_args": {}}, Network)
