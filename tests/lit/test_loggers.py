"""Metrics of a training: the same points in every logger and in the run's own file, which a page is drawn from."""

import errno
import time

import lightning.pytorch as L
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from watching import Memory

from lightning_tdisent import metrics_file
from lightning_tdisent.cli import main
from lightning_tdisent.data.decode import Decoder
from lightning_tdisent.data.shards import Shards
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.evaluation.pictures import captioned
from lightning_tdisent.lit.loggers import flat
from lightning_tdisent.lit.modules import ReducedStates
from lightning_tdisent.report.figures import read_curves

STEPS = 24


@pytest.fixture
def fit(digits, tmp_path):
    def make(name, *words, steps=STEPS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        config = {
            "model": {
                "class_path": "ReducedStates",
                "init_args": {
                    "network": {
                        "class_path": "UNet",
                        "init_args": {"shape": [1, 8, 8], "channels": [8], "layers": 1, "groups": 4},
                    },
                    "states": {"S": 4},
                    "lr": 1e-3,
                },
            },
            "data": {"class_path": "ImageShards", "init_args": {"path": str(digits), "channels": 1, "batch_size": 50}},
            "trainer": {
                "max_steps": steps, "max_epochs": -1, "val_check_interval": 12, "check_val_every_n_epoch": None,
                "log_every_n_steps": 4, "num_sanity_val_steps": 0, "accelerator": "cpu", "callbacks": ["Pictures"],
            },
        }  # fmt: skip
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        run = tmp_path / name
        assert main(["fit", "--config", str(tmp_path / "config.yaml"), "--run", str(run), *words]) == 0
        return run

    return make


def events(run):
    read = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0}).Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}, read


def test_the_runs_own_file_holds_what_tensorboard_shows(fit, digits):
    run = fit("run")
    shown, read = events(run)
    own = metrics_file.read(run)
    assert own.keys() == shown.keys()
    for name, points in own.items():
        assert points == [(x, pytest.approx(value, rel=1e-6)) for x, value in shown[name]]
    assert [x for x, _ in own["train/lr"]] == [50 * step for step in (4, 8, 12, 16, 20, 24)]
    assert [value for _, value in own["train/lr"]] == [pytest.approx(1e-5 * (step + 1)) for step in range(4, 25, 4)]
    batches = -(-len(Shards.open(str(digits), "train", Decoder(1))) // 50)
    assert [value for _, value in own["train/epoch"]] == [pytest.approx(step / batches) for step in range(4, 25, 4)]
    assert all(value > 0 for _, value in own["train/images_per_second"])
    assert {"samples", "forward_strip", "reverse_strip"} <= set(read.Tags()["images"])
    assert "_hparams_/session_start_info" in read.summary_metadata
    assert "_hparams_/session_end_info" in read.summary_metadata
    assert not (run / "hparams.yaml").exists()
    last = (run / "log.txt").read_text(encoding="utf-8").splitlines()[-1]
    assert "step 24/24  loss " in last
    assert "validating" not in last


def test_any_logger_or_none_leaves_the_same_file_and_the_same_page(fit, tmp_path):
    one = {name: points for name, points in metrics_file.read(fit("one")).items() if name != "train/images_per_second"}
    for name, words in (("none", ["--trainer.logger", "false"]), ("csv", ["--trainer.logger", "CSVLogger"])):
        words += ["--trainer.logger.save_dir", str(tmp_path / "logs")] if name == "csv" else []
        run = fit(name, *words)
        found = metrics_file.read(run)
        assert {key: found[key] for key in found if key != "train/images_per_second"} == one
        assert read_curves(run).keys() == found.keys()
        assert not list(run.glob("events*"))
    table = (tmp_path / "logs/lightning_logs/version_0/metrics.csv").read_text(encoding="utf-8")
    assert table.startswith("step,train/epoch,train/gradient_norm,train/images_per_second,train/loss,train/lr")


def test_a_validation_beside_a_training_writes_no_metrics(fit):
    run = fit("run", steps=4)
    before = (run / "metrics.jsonl").read_bytes()
    assert main(["validate", "--config", str(run / "config.yaml"), "--trainer.logger=false"]) == 0
    assert (run / "metrics.jsonl").read_bytes() == before
    assert not (run / "validate" / "metrics.jsonl").exists()


def test_points_beyond_the_checkpoint_are_removed_when_a_training_goes_on(fit):
    run = fit("run", steps=12)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"images_seen": 700, "train/loss": 9.0}\n{"images_seen": 800, "tra')
    before = metrics_file.read(run)
    assert before["train/loss"][-1] == (700, 9.0)
    run = fit("run", "--trainer.max_steps", "24")
    whole, expected = metrics_file.read(run), metrics_file.read(fit("whole", "--trainer.max_steps", "24"))
    for name in expected:
        if name != "train/images_per_second":
            assert whole[name] == expected[name], name


class Sleeps(L.Callback):
    def on_validation_epoch_start(self, trainer, pl_module):
        time.sleep(2)


def test_the_speed_is_that_of_training_alone(tiny, data, trainer):
    memory = Memory()
    run = trainer(10, Sleeps(), logger=memory, val_check_interval=5, log_every_n_steps=10, limit_val_batches=1)
    begin = time.perf_counter()
    run.fit(ReducedStates(tiny(), LatentStates(S=4)), datamodule=data(batch_size=20))
    assert time.perf_counter() - begin > 4  # validated twice, the first time before the log point
    assert memory.values[200]["train/images_per_second"] > 200 / 2


def test_a_full_disk_costs_points_and_not_the_training(fit, monkeypatch):
    whole, calls = metrics_file.append, []

    def full(folder, images_seen, values):
        calls.append(images_seen)
        if images_seen in (400, 600):
            with (folder / "metrics.jsonl").open("ab") as stream:
                stream.write(b'{"images_seen": 400, "train')  # what still fitted
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(folder, images_seen, values)

    monkeypatch.setattr(metrics_file, "append", full)
    with pytest.warns(UserWarning, match=r"metrics.jsonl lacks points from now on: No space left on device") as said:
        run = fit("run")
    assert sum("lacks points" in str(one.message) for one in said) == 1
    assert (run / "model.safetensors").exists()
    assert {400, 600, 1200} <= {*calls}
    assert [x for x, _ in metrics_file.read(run)["train/loss"]] == [200, 800, 1000, 1200]


def test_a_run_of_an_earlier_version_keeps_its_event_files_as_the_only_source(fit):
    run = fit("run", steps=12)
    (run / "metrics.jsonl").unlink()
    run = fit("run", "--trainer.max_steps", "24")
    assert not (run / "metrics.jsonl").exists()
    assert [x for x, _ in read_curves(run)["train/lr"]] == [50 * step for step in (4, 8, 12, 16, 20, 24)]


def test_another_run_in_the_folder_begins_a_new_file(fit, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"images_seen": 0, "train/loss": 9.0}\n', encoding="utf-8")
    assert metrics_file.read(fit("run", steps=4))["train/loss"][0][0] == 200


def test_a_config_becomes_hyperparameters_by_name():
    config = {
        "model": {"class_path": "a.b.Reduced", "init_args": {"lr": 1e-3, "states": {"S": 4}, "warm": None}},
        "trainer": {"callbacks": [{"class_path": "c.Pictures", "init_args": {"n": 1}}], "devices": [0, 1], "on": True},
    }
    assert flat(config) == {
        "model": "Reduced", "model.lr": 1e-3, "model.states.S": 4, "trainer.callbacks": "Pictures",
        "trainer.devices": "[0, 1]", "trainer.on": True,
    }  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 40, 90), (3, 40, 700)])
def test_a_caption_stands_below_the_picture(shape):
    picture = torch.randint(0, 256, shape, dtype=torch.uint8)
    one, three = captioned(picture, "short"), captioned(picture, "word " * 60)
    for out in (one, three):
        assert out.shape[2] == max(480, shape[2])
        assert torch.equal(out[:, :40, : shape[2]], picture.expand(3, -1, -1))
        assert (out[:, 40:] < 100).any()  # black letters
    assert three.shape[1] > one.shape[1] > 40


def test_wandb_offline_gets_metrics_and_captioned_pictures(fit, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="make test-loggers installs it")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = fit("run", "--trainer.logger", "WandbLogger", "--trainer.logger.save_dir", str(tmp_path))
    wandb.finish()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert {p.name.rpartition("_")[0].rpartition("_")[0] for p in (folder / "files/media/images").iterdir()} == {
        "samples", "forward_strip", "reverse_strip"
    }  # fmt: skip
    (log,) = folder.glob("*.wandb")
    content = log.read_bytes()
    for name in metrics_file.read(run):
        assert name.encode() in content, name
    assert b"Samples of seeds 0..63 by DDIM" in content


def test_mlflow_gets_metrics_and_hyperparameters(fit, tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="make test-loggers installs it")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = fit("run", "--trainer.logger", "MLFlowLogger", "--trainer.logger.tracking_uri", f"file:{tmp_path / 'ml'}")
    (folder,) = {p.parent for p in (tmp_path / "ml").rglob("params")}
    for name, points in metrics_file.read(run).items():
        lines = (folder / "metrics" / name).read_text(encoding="utf-8").splitlines()
        assert [(int(line.split()[2]), float(line.split()[1])) for line in lines] == [
            (x, pytest.approx(value, rel=1e-6)) for x, value in points
        ]
    assert (folder / "params/model.states.S").read_text(encoding="utf-8") == "4"
