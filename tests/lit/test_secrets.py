"""Config values from environment variables: the training uses them, and no file contains them."""

import yaml

from lightning_tdisent.cli import main
from lightning_tdisent.fleet.keys import read_yaml
from lightning_tdisent.lit.command_line import UNRESOLVED
from lightning_tdisent.lit.saved_config import Dumper, without_secrets


def test_a_value_of_the_environment_is_used_and_written_nowhere(tmp_path, digits, monkeypatch, capsys):
    secret = tmp_path / "s3cr3t_pl4ce"
    secret.symlink_to(digits)
    monkeypatch.setenv("PLACE_OF_DATA", str(secret))
    (tmp_path / "data.yaml").write_text("data:\n  path: ${oc.env:PLACE_OF_DATA}\n", encoding="utf-8")
    words = ["--config", "experiments/digits/reduced8.yaml", "--config", str(tmp_path / "data.yaml")]
    words += ["--trainer.max_steps", "2", "--trainer.callbacks", "[]", "--trainer.val_check_interval", "2"]
    run = tmp_path / "run"
    assert main(["fit", *words, "--run", str(run)]) == 0
    kept = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["data"]["init_args"]
    assert kept["path"] == "${oc.env:PLACE_OF_DATA}"
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 4
    assert [path for path in files if b"s3cr3t_pl4ce" in path.read_bytes()] == []
    capsys.readouterr()
    words[words.index("--trainer.max_steps") + 1] = "3"
    assert main(["fit", *words, "--run", str(run)]) == 0
    assert "going on with" in capsys.readouterr().out
    assert main(["fit", "--config", str(run / "config.yaml"), "--trainer.max_steps", "4"]) == 0
    assert (
        yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["data"]["init_args"]["path"] == kept["path"]
    )


def test_settings_of_studies_and_fleets_keep_the_name_of_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE_OF_DATA", "s3cr3t")
    file = tmp_path / "study.yaml"
    file.write_text(
        "n: 3\ndata: ${oc.env:PLACE_OF_DATA}\nruns: {a: {set: {data.path: '${oc.env:PLACE_OF_DATA}', k: '${n}'}}}\n",
        encoding="utf-8",
    )
    variable = "${oc.env:PLACE_OF_DATA}"
    assert read_yaml(file) == {"n": 3, "data": "s3cr3t", "runs": {"a": {"set": {"data.path": variable, "k": 3}}}}
    assert read_yaml(file, secrets=False)["data"] == variable


def test_a_value_that_is_taken_from_a_secret_one_is_kept_as_it_was_given(monkeypatch):
    monkeypatch.setenv("KEY_OF_STORE", "s3cr3t")
    UNRESOLVED.set("fit: {a: '${oc.env:KEY_OF_STORE,none}', b: ['s3://${.a}/x', '${..c}'], c: 5}")
    resolved = {"a": "s3cr3t", "b": ["s3://s3cr3t/x", 5], "c": 5, "d": "new"}
    kept = {"a": "${oc.env:KEY_OF_STORE,none}", "b": ["s3://${.a}/x", 5], "c": 5, "d": "new"}
    assert without_secrets(resolved) == kept
    monkeypatch.delenv("KEY_OF_STORE")  # the default is stored, so a resumed run uses it too
    assert without_secrets(resolved | {"a": "/here/none"})["a"] == "/here/none"
    UNRESOLVED.set("")
    assert without_secrets(resolved) == resolved


def test_texts_that_look_like_numbers_are_quoted():
    kept = {"a": "1e5", "b": "12e4567890123456", "c": 1e-05, "d": "plain", "e": 3, "f": "+2E-7", "g": ["9e9", 1.5]}
    text = yaml.dump(kept, Dumper=Dumper, sort_keys=False)
    assert yaml.safe_load(text) == kept
    assert "a: '1e5'" in text
    assert "b: '12e4567890123456'" in text
    assert "d: plain" in text
