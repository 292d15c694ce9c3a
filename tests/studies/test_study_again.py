import json
import shutil

import pytest
import yaml

from lightning_tdisent.cli import main
from lightning_tdisent.cli.trainings import fits
from lightning_tdisent.evaluation import evaluate as evaluating
from lightning_tdisent.fleet import local

NETWORK = {"shape": [1, 8, 8], "channels": [8, 16], "layers": 1, "groups": 4, "mid_attention": False, "classes": 10}


@pytest.fixture
def study(tmp_path, digits, monkeypatch):
    """Return a function that writes a study of one class-conditional run; its jobs are trained in this process."""
    trainer = {"accelerator": "cpu", "max_steps": 2, "max_epochs": -1, "limit_val_batches": 0, "callbacks": []}
    model = {"network": {"class_path": "UNet", "init_args": NETWORK}, "states": {"S": 4}, "objective": "V"}
    data = {"class_path": "ImageShards", "init_args": {"path": str(digits), "channels": 1, "batch_size": 8}}
    config = {"trainer": trainer, "model": {"class_path": "ReducedStates", "init_args": model}, "data": data}
    (tmp_path / "a.yaml").write_text(
        "# class-conditional: the condition is a label\n" + yaml.safe_dump(config), encoding="utf-8"
    )

    def train(work, *_, **__):
        for job in [job for job in work.jobs() if not work.done(job)]:
            trained.append(job.name)
            assert fits([job.argv], [lambda *_: None]) == [None]

    def write(**changes):
        fields = {"runs": {"cls": {"configs": ["a.yaml"]}}, "contenders": {"one": {"run": "cls"}}, "n": 50}
        content = {**fields, "data": str(digits), "protocol": "digits", **changes}
        (tmp_path / "study.yaml").write_text(json.dumps(content), encoding="utf-8")
        return str(tmp_path / "study.yaml")

    write.trained = trained = []
    monkeypatch.setattr(local, "run", train)
    monkeypatch.setenv("TDISENT_CACHE", str(tmp_path / "cache"))
    return write


def test_a_killed_study_resumes_even_if_its_folder_was_moved(study, tmp_path, monkeypatch, capsys):
    out, config = tmp_path / "out", tmp_path / "a.yaml"
    whole, text, train = local.run, config.read_text(encoding="utf-8"), study.trained

    def killed(work, *_, **__):
        work.jobs()[0].folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(local, "run", killed)
    assert main(["study", "--config", study(), "--out", str(out)]) == 130
    config.write_text(text.replace("objective: V", "objective: X0"), encoding="utf-8")
    monkeypatch.setattr(local, "run", whole)
    assert main(["study", "--config", study(), "--out", str(out)]) == 2
    assert "a.yaml: model.init_args.objective: 'V' there, 'X0' now" in capsys.readouterr().err
    assert train == []
    config.write_text(text, encoding="utf-8")
    measure = evaluating._of_model

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluating, "_of_model", interrupt)
    assert main(["study", "--config", study(), "--out", str(out)]) == 130
    assert main(["report", str(out)]) == 2
    assert "keeps no finished study" in capsys.readouterr().err
    moved = tmp_path / "moved"
    out.rename(moved)
    seen = []
    monkeypatch.setattr(evaluating, "_of_model", lambda c, *rest: seen.append(c.name) or measure(c, *rest))
    assert main(["study", "--config", study(), "--out", str(moved)]) == 0  # n = 50 need not be a multiple of 4
    assert not (moved / "fleets.html").exists()
    weights, rows = (
        (moved / "cls" / "model.safetensors").read_bytes(),
        json.loads((moved / "results.json").read_text(encoding="utf-8")),
    )
    contenders = {"one": {"run": "cls"}, "cut": {"run": "cls", "prior": "cut:2"}}
    assert main(["study", "--config", study(contenders=contenders, notes="more"), "--out", str(moved)]) == 0
    assert "contenders.cut.run: nothing there, 'cls' now" in capsys.readouterr().out
    assert (train, seen) == (["cls"], ["one", "cut"])
    assert (moved / "cls" / "model.safetensors").read_bytes() == weights
    assert json.loads((moved / "results.json").read_text(encoding="utf-8"))[0] == rows[0]
    assert not out.exists()
    config.unlink()
    assert main(["report", str(moved)]) == 0
    assert main(["evaluate", str(moved / "cls"), "--data", "x", "--protocol", "digits", "--out", str(moved)]) == 2


def test_a_refused_config_is_named_with_its_run_and_file(study, tmp_path, capsys):
    text = (tmp_path / "a.yaml").read_text(encoding="utf-8") if (tmp_path / "a.yaml").exists() else ""
    (tmp_path / "a.yaml").write_text(text.replace("objective: V", "objectiv: V"), encoding="utf-8")
    assert main(["study", "--config", study(), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'study.yaml'}: runs: cls ({tmp_path / 'a.yaml'}): " in said
    assert not (tmp_path / "out").exists()


def test_all_damaged_files_are_named_at_once_and_a_damaged_composite_is_rebuilt(study, tmp_path, capsys):
    out = tmp_path / "out"
    config = yaml.safe_load((tmp_path / "a.yaml").read_text(encoding="utf-8"))
    config["model"]["class_path"] = "SingleState"
    del config["model"]["init_args"]["network"]["init_args"]["classes"]
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    runs = {"cls": {"configs": ["a.yaml"]}, "exp": {"configs": ["b.yaml"], "experts": 2}}
    todo = study(runs=runs, contenders={"one": {"run": "cls"}, "two": {"run": "exp"}})
    assert main(["study", "--config", todo, "--out", str(out)]) == 0
    numbers = json.loads((out / "results.json").read_text(encoding="utf-8"))
    rows = sorted((out / "exp_composite").glob("rows_*.safetensors"))
    shutil.copyfile(rows[0], tmp_path / "whole")
    rows[0].unlink()  # it was a hard link to the expert's file
    shutil.copyfile(tmp_path / "whole", rows[0])
    hurt = [rows[0], out / "cls" / "model.safetensors", out / "exp" / "expert_002" / "model.safetensors"]
    whole = {path: path.read_bytes() for path in hurt}
    for path, content in whole.items():
        path.unlink()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    capsys.readouterr()
    assert main(["study", "--config", todo, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert [f"{path}: damaged: sha256" in said for path in hurt] == [False, True, True]
    assert "remove it and give the command of its run again" in said
    options = ["--data", "data/digits", "--protocol", "digits", "-n", "50", "--out", str(tmp_path / "e")]
    assert main(["evaluate", *map(str, hurt[1:]), *options]) == 2
    said = capsys.readouterr().err
    assert all(f"{path}: damaged: sha256" in said for path in hurt[1:])
    for path in hurt[1:]:
        path.unlink()
    study.trained.clear()
    assert main(["study", "--config", todo, "--out", str(out)]) == 0
    assert f"{out / 'exp_composite'}: a file of it is damaged; it is composed anew" in capsys.readouterr().out
    assert study.trained == ["cls", "exp_002"]
    assert [path.read_bytes() for path in hurt] == list(whole.values())
    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == numbers


@pytest.mark.parametrize("split", ["path", "train", "val"])
def test_data_of_a_later_run_are_looked_for_before_the_first_training(study, tmp_path, split, capsys):
    wrong = {"configs": ["a.yaml"], "set": {f"data.{split}": str(tmp_path / "gone") if split == "path" else "gone"}}
    out = tmp_path / "out"
    runs = {"cls": {"configs": ["a.yaml"]}, "late": wrong}
    assert main(["study", "--config", study(runs=runs), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "runs: late (" in said
    assert "gone" in said
    assert study.trained == []
    assert not out.exists()


def test_the_page_names_the_workers_that_trained(study, tmp_path):
    out = tmp_path / "s"
    words = ["study", "--config", study(), "--out", str(out), "--device", "cpu"]
    for workers in ("1", "2"):  # the second time nothing is trained
        assert main([*words, "--workers", workers]) == 0
        assert "Trained by 1 worker process on one machine." in (out / "report.html").read_text(encoding="utf-8")
    (out / "study.json").write_text("{", encoding="utf-8")  # damaged: the number is lost, the study is not
    assert main(words) == 0
    assert "Trained by" not in (out / "report.html").read_text(encoding="utf-8")


def test_several_seeds_are_one_command_and_one_page(study, tmp_path, capsys):
    words = ["study", "--config", study(), "--out", str(tmp_path / "s"), "--device", "cpu"]
    assert main([*words, "--seeds", "3", "4"]) == 0
    said = capsys.readouterr().out
    assert [row["seeds"] for row in json.loads((tmp_path / "s_4" / "results.json").read_bytes()) if "seeds" in row] == [
        [4]
    ]
    page = (tmp_path / "s.html").read_text(encoding="utf-8")
    assert "Means and standard deviations of 2 trainings" in page
    assert 'href="s_3/report.html"' in page
    assert page.count("Trained by 1 worker process on one machine.") == 1  # one training each
    assert f"report: {tmp_path / 's.html'}" in said
    assert len(study.trained) == 2
    assert main([*words, "--seeds", "3", "4"]) == 0  # nothing is trained again
    assert len(study.trained) == 2
    for wrong in (["--seeds", "3", "3"], ["--seeds", "3", "4", "--seed", "3"]):
        assert main([*words, *wrong]) == 2
        assert "--seeds: give each seed once" in capsys.readouterr().err
