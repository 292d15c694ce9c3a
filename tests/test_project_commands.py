"""The commands list, init, doctor, clean and completion."""

import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import lightning_tdisent
from lightning_tdisent.cli import main
from lightning_tdisent.cli.project import KINDS
from lightning_tdisent.sampling.sampler import DDIM

ROOT = Path(__file__).parents[1]


def lines(capsys, *words):
    assert main([*words]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_listed_has_a_line_of_text_each(kind, capsys):
    # without classes that other tests have defined, which are listed by their paths
    found = [line for line in lines(capsys, "list", kind) if kind in KINDS[-4:] or "." not in line.split()[0]]
    assert len(found) >= 2
    assert all(re.match(r"\S.*?  +\S", line) for line in found)


def test_all_kinds_are_listed_and_an_unknown_one_is_refused(capsys):
    found = lines(capsys, "list")
    assert [line.rstrip(":") for line in found if re.fullmatch(r"\w+:", line)] == list(KINDS)
    assert any(re.match(r"  DPMSolver +DPM-Solver", line) for line in found)
    assert any(line.startswith("  V ") and "(2202.00512, app. D): well scaled" in line for line in found)
    assert main(["list", "sampler"]) == 2
    assert "Did you mean 'samplers'" in capsys.readouterr().err


def test_parts_of_ones_own_are_listed_by_their_class_path(tmp_path, monkeypatch, capsys):
    module = types.ModuleType("own_parts")
    monkeypatch.setitem(sys.modules, "own_parts", module)

    class Mine(DDIM):
        """Take every step twice. For tests."""

    Mine.__module__, Mine.__qualname__ = "own_parts", "Mine"
    found = lines(capsys, "list", "samplers", "--import", "own_parts")
    assert any(line.startswith("own_parts.Mine") and line.endswith("Take every step twice.") for line in found)
    del Mine


@pytest.mark.parametrize("experiment", ["digits", "mnist", "own"])
def test_a_project_begins_with_the_files_of_an_experiment(experiment, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "mine"
    said = lines(capsys, "init", str(folder), "--experiment", experiment)
    copied = {f.name: f.read_bytes() for f in (folder / "experiments" / experiment).glob("*.yaml")}
    assert copied == {f.name: f.read_bytes() for f in (ROOT / "experiments" / experiment).glob("*.yaml")}
    assert (folder / "experiments" / "ablate" / "eps.yaml").exists()
    monkeypatch.chdir(folder)
    commands = [line.split()[3:] for line in said if line.startswith("python -m")]
    assert [words[0] for words in commands] == ["fit", "fit"]
    if experiment == "digits":
        quick = ["--config", "experiments/ablate/smoke.yaml", "--trainer.callbacks.init_args.n", "20"]
        for words in commands:
            assert main([*words, *quick, "--run", f"runs/{len(words)}"]) == 0
    assert main(["init", str(folder)]) == 2
    assert "is there already" in capsys.readouterr().err
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    assert main(["init", str(tmp_path / "file")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["init", str(tmp_path / "x"), "--experiment", "digit"]) == 2
    assert "Did you mean 'digits'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_doctor_names_versions_devices_and_what_is_missing(capsys, monkeypatch):
    found = "\n".join(lines(capsys, "doctor"))
    assert f"lightning_tdisent {lightning_tdisent.__version__}" in found
    assert re.search(r"  torch \d+\.\d+", found)
    assert re.search(r"GPU.*\d|GPU: none", found)
    assert "extra parquet: installed" in found
    from lightning_tdisent.cli import project

    old = project.version
    monkeypatch.setattr(project, "version", lambda name: "0.1" if name == "torchmetrics" else old(name))
    assert main(["doctor"]) == 2
    said = capsys.readouterr()
    assert "torchmetrics 0.1: NOT" in said.out
    assert "missing or too old: torchmetrics" in said.err


FIT = ["fit", "--config", "experiments/digits/reduced8.yaml", "--trainer.callbacks", "[]",
       "--trainer.accelerator", "cpu", "--model.network.channels", "[8,16]", "--model.network.groups", "4",
       "--data.val_limit", "20", "--checkpoint.every", "2", "--trainer.max_steps"]  # fmt: skip


def test_checkpoints_of_finished_runs_are_removed_when_asked(tmp_path, capsys):
    run = tmp_path / "runs" / "done"
    assert main([*FIT, "4", "--run", str(run)]) == 0
    shutil.copytree(run, tmp_path / "runs" / "unfinished")
    (tmp_path / "runs" / "unfinished" / "model.safetensors").unlink()
    found = lines(capsys, "clean", str(tmp_path / "runs"))[-3:]
    assert re.search(r"done: [\d.]+ MB; to remove: 5 files of checkpoints, [\d.]+ MB", found[0])
    assert "nothing: it is not finished" in found[1]
    assert found[2].endswith("MB would be removed; --yes removes it")
    assert len(list((run / "checkpoints").iterdir())) == 5
    assert lines(capsys, "clean", str(tmp_path / "runs"), str(run), "--yes")[-1].endswith("MB removed")
    assert not list((run / "checkpoints").iterdir())
    assert list((tmp_path / "runs" / "unfinished" / "checkpoints").iterdir())
    assert main(["sample", str(run), "--out", str(tmp_path / "images"), "--seeds", "0:2"]) == 0
    with pytest.raises(SystemExit, match="0"):  # as before, there is nothing to do
        main([*FIT, "4", "--run", str(run)])
    assert "all 4 steps are done" in capsys.readouterr().out
    before = (run / "model.safetensors").read_bytes()
    assert main([*FIT, "8", "--run", str(run)]) == 2  # it cannot go on, and does not begin again in silence
    assert "no checkpoint to resume from" in capsys.readouterr().err
    assert (run / "model.safetensors").read_bytes() == before
    assert main(["clean", str(tmp_path / "nowhere")]) == 2
    assert main(["clean", str(tmp_path / "images")]) == 2


def test_a_run_in_use_and_experts_that_wait_for_a_round_keep_their_checkpoints(tmp_path, capsys, monkeypatch):
    from lightning_tdisent.cli import project
    from lightning_tdisent.runs import RunFolder

    fleet = tmp_path / "fleet"
    run = fleet / "expert_001"
    assert main([*FIT, "4", "--run", str(run)]) == 0
    with RunFolder(run):
        assert "nothing: " in lines(capsys, "clean", str(run), "--yes")[-2]
    (fleet / "plan.yaml").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(project, "_finished", lambda folder: False)
    assert f"nothing: its fleet {fleet} is not finished" in lines(capsys, "clean", str(fleet), "--yes")[-2]
    assert len(list((run / "checkpoints").iterdir())) == 5
    monkeypatch.setattr(project, "_finished", lambda folder: True)
    assert lines(capsys, "clean", str(fleet), "--yes")[-1].endswith("removed")
    assert not list((run / "checkpoints").iterdir())


def test_the_cache_alone_is_what_is_computed_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TDISENT_CACHE", str(tmp_path / "cache"))
    for name in ("reference", "numbers", "weights"):
        (tmp_path / "cache" / name).mkdir(parents=True)
        (tmp_path / "cache" / name / "file").write_bytes(b"0" * 1000)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("{}", encoding="utf-8")
    lines(capsys, "clean", str(run), "--cache", "--yes")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["weights"]


def test_a_shell_can_read_the_completion(capsys, tmp_path):
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "tdisent.bash"
    script.write_text(capsys.readouterr().out, encoding="utf-8")
    ask = f"source {script}; COMP_WORDS=(tdisent sam); COMP_CWORD=1; _shtab_tdisent; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", ask], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.split() == ["sample"]
    assert json.dumps(done.stderr) == '""'
