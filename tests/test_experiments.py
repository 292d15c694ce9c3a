from pathlib import Path

import pytest
import yaml

from lightning_tdisent.cli import describe, main
from lightning_tdisent.fleet.draft import draft
from lightning_tdisent.lit.entry import parse
from lightning_tdisent.studies.plan import plan

FOLDER = Path(__file__).parents[1] / "experiments"
ALL = sorted(f for f in FOLDER.rglob("*.yaml"))
STUDIES = [f for f in ALL if "runs" in yaml.safe_load(f.read_text(encoding="utf-8"))]
OVERLAYS = sorted((FOLDER / "ablate").glob("*.yaml"))
FLEETS = [f for f in ALL if "budget" in yaml.safe_load(f.read_text(encoding="utf-8"))]
OPTIONS = [f for f in ALL if "seeds" in yaml.safe_load(f.read_text(encoding="utf-8"))]  # of sample: test_options.py
RUNS = [f for f in ALL if not any(f in kind for kind in (STUDIES, OVERLAYS, FLEETS, OPTIONS))]


def test_the_five_kinds_are_all_there_is():
    assert len(STUDIES) + len(OVERLAYS) + len(RUNS) + len(FLEETS) + len(OPTIONS) == len(ALL)
    assert {f.stem for f in RUNS if f.parent.name == "mnist"} >= {"baseline", "reduced10", "native10", "experts10"}


@pytest.mark.parametrize("file", RUNS, ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_every_run_parses_and_builds(file):
    module = parse(["fit", "--config", str(file)]).model
    assert module.rows


@pytest.mark.parametrize("file", STUDIES, ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_every_study_is_a_plan_whose_jobs_parse(file, tmp_path):
    todo = plan(file, tmp_path / "out")
    for job in {tuple(j.argv[1:4]): j for j in todo.jobs}.values():
        parse(job.argv)
    for name, (config, changes) in todo.fleets.items():
        fleet = draft(config, describe, tmp_path / name, todo.seed, changes=changes)
        fleet.check(describe, fleet.names[:2])


@pytest.mark.parametrize("file", FLEETS, ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_every_fleet_is_a_plan_whose_trainings_parse(file, tmp_path):
    fleet = draft(file, describe, tmp_path / "fleet")
    assert len(fleet.check(describe)) == len(fleet.jobs())


# what each overlay must change, read from the built module
CHANGES = {
    "cosine": lambda m: type(m.states.schedule).__name__ == "Cosine",
    "sigmoid": lambda m: type(m.states.schedule).__name__ == "Sigmoid",
    "scaled_linear": lambda m: type(m.states.schedule).__name__ == "ScaledLinear",
    "native": lambda m: m.states.kind == "native",
    "trailing": lambda m: m.states.spacing == "trailing",
    "log_snr": lambda m: m.states.spacing == "log_snr",
    "eps": lambda m: m.objective.prediction == "eps",
    "x0": lambda m: m.objective.prediction == "x0",
    "min_snr": lambda m: type(m.objective.weight).__name__ == "MinSNR",
    "p2": lambda m: type(m.objective.weight).__name__ == "P2",
    "likelihood": lambda m: type(m.objective.weight).__name__ == "Likelihood",
    "iid": lambda m: m.draw == "iid",
    "agnostic": lambda m: not m.network.sees_state,
    "conditioned": lambda m: m.network.sees_state and len(m.rows) == 1,
    "classes": lambda m: m.network.classes == 10,
    "dit": lambda m: type(m.network).__name__ == "DiT",
    "ddim": lambda m: type(m.sampler).__name__ == "DDIM",
    "smoke": lambda m: True,
}


@pytest.mark.parametrize("file", OVERLAYS, ids=lambda f: f.stem)
def test_every_overlay_is_short_changes_what_it_says_and_trains(file, tmp_path):
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert 1 <= len(lines) <= 3
    base = FOLDER / "digits" / ("experts8.yaml" if file.stem == "conditioned" else "reduced8.yaml")
    configs = [base, file, FOLDER / "ablate" / "smoke.yaml"]
    argv = ["fit", *(w for c in configs for w in ("--config", str(c)))]
    assert CHANGES[file.stem](parse(argv).model)
    quick = ["--trainer.callbacks.init_args.n", "20"] if file.stem != "conditioned" else []
    assert main([*argv, *quick, "--run", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert list((tmp_path / "run" / "pictures").glob("*.png"))


@pytest.mark.parametrize("name", ["baseline", "reduced8", "experts8"])
def test_every_digits_run_runs_shows_and_validates(name, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    argv = ["--config", f"experiments/digits/{name}.yaml", "--config", "experiments/ablate/smoke.yaml"]
    run = tmp_path / "run"
    assert main(["fit", *argv, "--run", str(run)]) == 0
    events = EventAccumulator(str(run))
    events.Reload()
    tags = events.Tags()
    pictures = {"forward_strip", "estimate"} if name == "experts8" else {"forward_strip", "reverse_strip", "samples"}
    assert pictures == set(tags["images"])
    assert {"train/loss", "train/gradient_norm", "val/eps_mse", "val/x0_mse"} <= set(tags["scalars"])
    assert any(t.startswith("train_loss/t") for t in tags["scalars"])
    assert any(t.startswith("val_eps_mse/t") for t in tags["scalars"])
    measured = {t.split("/")[1] for t in tags["scalars"] if t.startswith("quality/")}
    kinds = ["fd", "fd_bias", "is", "kid", "precision", "recall", "density", "coverage"]
    assert measured == (set() if name == "experts8" else {f"{kind}_digits" for kind in kinds})
    if name == "reduced8":  # the saved config reproduces the run, and the other commands load the checkpoint
        again = ["--config", str(run / "config.yaml"), "--run", str(tmp_path / "again")]
        assert main(["fit", *again]) == 0
        assert (tmp_path / "again" / "model.safetensors").read_bytes()[-1000:] == (
            run / "model.safetensors"
        ).read_bytes()[-1000:]
        last = ["--ckpt_path", str(run)]
        assert main(["validate", *argv, *last, "--run", str(tmp_path / "v")]) == 0
        assert main(["test", *argv, *last, "--run", str(tmp_path / "t")]) == 0
        seeds = ["--data", "Seeds", "--data.n", "3"]
        assert main(["predict", *argv, *last, *seeds, "--run", str(tmp_path / "p")]) == 0
        assert len(list((tmp_path / "p" / "images").glob("*.png"))) == 3
