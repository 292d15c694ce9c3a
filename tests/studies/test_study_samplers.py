"""A study's samplers are compared with the tables of its runs before anything is trained."""

import yaml

from lightning_tdisent.cli import main

RUN = """
trainer: {accelerator: cpu, max_steps: 1, max_epochs: -1, val_check_interval: 1, check_val_every_n_epoch: null}
model:
  class_path: ReducedStates
  init_args:
    network: {class_path: UNet, init_args: {shape: [1, 8, 8], channels: [8], layers: 1, groups: 4}}
    states: {S: 4}
data: {class_path: ImageShards, init_args: {path: %s, channels: 1}}
"""


def test_contenders_that_cannot_be_sampled_are_refused_all_at_once(tmp_path, digits, capsys):
    (tmp_path / "run.yaml").write_text(RUN % digits, encoding="utf-8")
    steps = {"class_path": "DDIM", "init_args": {"steps": 3}}
    study = {
        "out": str(tmp_path / "out"),
        "runs": {"one": {"configs": ["run.yaml"]}, "two": {"configs": ["run.yaml"], "set": {"model.states.S": 2}}},
        "priors": {"low": {"run": "one", "at": 2, "prior": "Gaussian"}},
        "contenders": {
            "right": {"run": "one", "sampler": steps},
            "wrong": {"run": "two", "sampler": steps},
            "cut": {"run": "one", "sampler": steps, "prior": "cut:2"},
            "started": {"run": "one", "sampler": steps, "prior": "low"},
        },
        "data": str(digits),
        "protocol": "digits",
        "n": 70,
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    assert main(["study", "--config", str(tmp_path / "study.yaml")]) == 2
    said = capsys.readouterr().err
    for name in ("wrong", "cut", "started"):
        assert f"contenders.{name}: sampler.steps: 3 steps on a table of 2 rows" in said
    assert "right" not in said
    assert not list((tmp_path / "out").rglob("config.yaml"))
