import json

import pytest
import yaml

from lightning_tdisent.cli import main
from lightning_tdisent.cli.trainings import fits
from lightning_tdisent.fleet import local
from lightning_tdisent.report import evaluate as evaluating

NETWORK = {"shape": [1, 8, 8], "channels": [8, 16], "layers": 1, "groups": 4, "mid_attention": False, "classes": 10}


@pytest.fixture
def study(tmp_path, digits, monkeypatch):
    """Write a study of one class-conditional run; its jobs are trained in this process."""
    trainer = {"accelerator": "cpu", "max_steps": 2, "max_epochs": -1, "limit_val_batches": 0, "callbacks": []}
    model = {"network": {"class_path": "UNet", "init_args": NETWORK}, "states": {"S": 4}, "objective": "V"}
    data = {"class_path": "ImageShards", "init_args": {"path": str(digits), "channels": 1, "batch_size": 8}}
    config = {"trainer": trainer, "model": {"class_path": "ReducedStates", "init_args": model}, "data": data}
    (tmp_path / "a.yaml").write_text("# class-conditional: the condition is a label\n" + yaml.safe_dump(config))

    def train(work, *_, **__):
        for job in [job for job in work.jobs() if not work.done(job)]:
            trained.append(job.name)
            assert fits([job.argv], [lambda *_: None]) == [None]

    def write(**changes):
        fields = {"runs": {"cls": {"configs": ["a.yaml"]}}, "contenders": {"one": {"run": "cls"}}, "n": 50}
        content = {**fields, "data": str(digits), "protocol": "digits", **changes}
        (tmp_path / "study.yaml").write_text(json.dumps(content))
        return str(tmp_path / "study.yaml")

    write.trained = trained = []
    monkeypatch.setattr(local, "run", train)
    monkeypatch.setenv("TDISENT_CACHE", str(tmp_path / "cache"))
    return write


def test_a_study_goes_on_where_it_was_killed_wherever_it_lies(study, tmp_path, monkeypatch, capsys):
    out, config = tmp_path / "out", tmp_path / "a.yaml"
    whole, text, train = local.run, config.read_text(), study.trained

    def killed(work, *_, **__):
        work.jobs()[0].folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(local, "run", killed)
    assert main(["study", study(), "--out", str(out)]) == 130
    config.write_text(text.replace("objective: V", "objective: X0"))
    monkeypatch.setattr(local, "run", whole)
    assert main(["study", study(), "--out", str(out)]) == 2
    assert "a.yaml: model.init_args.objective: 'V' there, 'X0' now" in capsys.readouterr().err
    assert train == []
    config.write_text(text)
    measure = evaluating._of_model

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluating, "_of_model", interrupt)
    assert main(["study", study(), "--out", str(out)]) == 130
    assert main(["report", str(out)]) == 2
    assert "keeps no finished study" in capsys.readouterr().err
    moved = tmp_path / "moved"
    out.rename(moved)
    seen = []
    monkeypatch.setattr(evaluating, "_of_model", lambda c, *rest: seen.append(c.name) or measure(c, *rest))
    assert main(["study", study(), "--out", str(moved)]) == 0  # n = 50 is no multiple of 4, and need not be
    assert not (moved / "fleets.html").exists()
    weights, rows = (moved / "cls" / "model.safetensors").read_bytes(), json.loads((moved / "results.json").read_text())
    contenders = {"one": {"run": "cls"}, "cut": {"run": "cls", "prior": "cut:2"}}
    assert main(["study", study(contenders=contenders, notes="more"), "--out", str(moved)]) == 0
    assert "contenders.cut.run: nothing there, 'cls' now" in capsys.readouterr().out
    assert (train, seen) == (["cls"], ["one", "cut"])
    assert (moved / "cls" / "model.safetensors").read_bytes() == weights
    assert json.loads((moved / "results.json").read_text())[0] == rows[0]
    assert not out.exists()
    config.unlink()
    assert main(["report", str(moved)]) == 0
    assert main(["evaluate", str(moved / "cls"), "--data", "x", "--protocol", "digits", "--out", str(moved)]) == 2


def test_a_refusal_of_a_config_names_its_run_and_file(study, tmp_path, capsys):
    text = (tmp_path / "a.yaml").read_text() if (tmp_path / "a.yaml").exists() else ""
    (tmp_path / "a.yaml").write_text(text.replace("objective: V", "objectiv: V"))
    assert main(["study", study(), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'study.yaml'}: runs: cls ({tmp_path / 'a.yaml'}): " in said
    assert not (tmp_path / "out").exists()
