"""Stopping and resuming: the results are bit for bit those of a run that was not interrupted.

Each kind of interruption is followed by a resume and compared with an uninterrupted run.
"""

import io
import os
import shutil
import signal
import tarfile
from contextlib import nullcontext
from datetime import timedelta
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_tdisent.data.scan import build
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError
from lightning_tdisent.lit.callbacks.checkpoint import Checkpoint, Preempted
from lightning_tdisent.lit.callbacks.guard import Guard
from lightning_tdisent.lit.callbacks.losses import LossPerState
from lightning_tdisent.lit.callbacks.weights import EMA, Export
from lightning_tdisent.lit.checkpoints import DurableIO, load, newest, resolve
from lightning_tdisent.lit.entry import run
from lightning_tdisent.lit.modules import Diffusion, ReducedStates
from lightning_tdisent.lit.resume import _completed, check_config, find_checkpoint
from lightning_tdisent.runs import RunFolder, checkpoints_in

SPEED = "train/images_per_second"  # differs from run to run
EXPERT = ["fit", "--config", "experiments/digits/experts8.yaml", "--trainer.callbacks", "[]"]


class Watch(L.Callback):
    """Record every step and validation; send this process a signal after a step, or inside its validation."""

    def __init__(self, cut=None, validating=False, number=signal.SIGTERM):
        self.steps, self.validations, self.cut, self.inside, self.number = [], [], cut, validating, number

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        place = (trainer.current_epoch, batch_idx, trainer.global_step)
        self.steps.append((place, outputs["losses"].clone(), outputs["row"].clone(), batch["id"].clone()))
        if trainer.global_step == self.cut and not self.inside:
            os.kill(os.getpid(), self.number)

    def on_validation_batch_end(self, trainer, *_):
        if trainer.global_step == self.cut and self.inside:
            os.kill(os.getpid(), self.number)

    def on_validation_end(self, trainer, pl_module):
        self.validations.append((trainer.global_step, float(trainer.callback_metrics["val/eps_mse"])))


@pytest.fixture
def fit(tiny, data):
    def make(folder, watch, every=None, logged=False, told=True, checkpoint=None, **options):
        torch.manual_seed(0)
        module = ReducedStates(tiny(dropout=0.1), LatentStates(S=4))
        path, manifest, _ = newest(folder / "checkpoints")
        purge = manifest["images_seen"] if path else None
        trainer = L.Trainer(
            callbacks=[
                watch,
                EMA(lengths=[0.1, 0.05]),
                LossPerState(),
                Guard(),
                Export(),
                checkpoint or Checkpoint(every),
            ],
            plugins=[DurableIO()],
            logger=TensorBoardLogger(folder, "", "", default_hp_metric=False, purge_step=purge) if logged else False,
            **{
                "max_steps": 24,
                "max_epochs": -1,
                "val_check_interval": 10,
                "check_val_every_n_epoch": None,
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 4,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "default_root_dir": folder,
                "accelerator": "cpu",
                **options,
            },
        )
        images = data(batch_size=200, seed=3, val_limit=60)  # 7 batches per epoch
        expected = pytest.raises(Preempted, match="143") if watch.cut and told else nullcontext()
        with expected:
            trainer.fit(module, datamodule=images, ckpt_path=path, weights_only=True)

    return make


def same(a, b, where=""):
    """Assert that nested data are equal bit for bit, except for clocks; name the first difference."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {
            "seconds",
            "run",
            "_batches_that_stepped",
        }:  # the last differs by one, and is not used as an x-axis
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}.{i}")
    else:
        assert a == b, where


# epochs end at steps 7, 14, 21; validation is due after 10 and 20; a tuple is a signal inside the validation
CUTS = {
    "inside an epoch": [3],
    "at the end of an epoch": [7],
    "before a validation": [10],
    "in a validation": [(10,)],
    "three times in one epoch": [15, 17, 20],
    "again and again": [1, 7, 8, 10, (20,), 21],
    "at the last step": [24],
}
OPTIONS = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 2, "val_check_interval": 20, "max_steps": 12},
    "part of the data": {"limit_train_batches": 5},
    "by epochs": {"max_steps": -1, "max_epochs": 3},
}


@pytest.fixture
def whole(fit, tmp_path):
    def make(name):
        watch = Watch()
        fit(tmp_path / "whole", watch, **OPTIONS[name])
        return watch, load(newest(tmp_path / "whole" / "checkpoints")[0])

    return make


@pytest.mark.parametrize("option", OPTIONS)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(option, fit, whole, tmp_path):
    unbroken, end = whole(option)
    for name, cuts in CUTS.items():
        if option == "by epochs" and name == "at the last step":
            continue  # this run has 21 steps
        if option == "accumulated":
            cuts = [c for c in cuts if not isinstance(c, tuple) and c <= 12]
        folder, ran, seen = tmp_path / name, [], []
        for cut in [*cuts, None]:
            watch = Watch(*(cut, True) if isinstance(cut, tuple) else (cut, False))
            watch.cut = cut[0] if isinstance(cut, tuple) else cut
            fit(folder, watch, **OPTIONS[option])
            ran, seen = ran + watch.steps, seen + watch.validations
        same(ran, unbroken.steps, name)
        if cuts[-1:] != [24]:  # after a signal at the last step the last validation is skipped
            same(seen, unbroken.validations, name)
        same(load(newest(folder / "checkpoints")[0]), end, name)
        assert (folder / "model.safetensors").read_bytes()  # also if no step was left to train


def test_extending_a_run_equals_one_long_run(fit, tmp_path):
    unbroken, grown = Watch(), [Watch(), Watch()]
    fit(tmp_path / "whole", unbroken, max_steps=17)
    fit(tmp_path / "grown", grown[0], max_steps=10)  # validated at its end, and again when resumed
    fit(tmp_path / "grown", grown[1], max_steps=17)
    same(grown[0].steps + grown[1].steps, unbroken.steps)
    end = [load(newest(tmp_path / name / "checkpoints")[0]) for name in ("grown", "whole")]
    same(*end)


class Dead(Exception):
    """An exception after which no checkpoint is saved."""


class Die(Watch):
    def on_train_batch_end(self, trainer, *args):
        super().on_train_batch_end(trainer, *args)
        if trainer.global_step == self.cut:
            raise Dead


def curves(folder):
    """Return all scalars of a run but the speed as TensorBoard shows them: tag -> [(images seen, value)]."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"] if tag != SPEED}


def test_tensorboard_shows_one_curve_over_images_seen(fit, tmp_path):
    fit(tmp_path / "whole", Watch(), logged=True)
    watches = [Die(9), Die(11), Die(23), Watch()]  # resumed from 5 (died after 9), 10 and 20
    for watch in watches[:-1]:
        with pytest.raises(Dead):
            fit(tmp_path / "broken", watch, every=5, logged=True, told=False)
    fit(tmp_path / "broken", watches[-1], every=5, logged=True)
    whole, broken = curves(tmp_path / "whole"), curves(tmp_path / "broken")
    assert whole == broken
    assert [x for x, _ in whole["train/loss"]] == [200 * step for step in (4, 8, 12, 16, 20, 24)]
    assert [x for x, _ in whole["val/eps_mse"]] == [2000, 4000]
    assert [watch.steps[0][0][2] for watch in watches] == [1, 6, 11, 21]


def test_two_ranks_stop_at_one_step_whichever_gets_the_signal(fit, tmp_path):
    """Send a signal to one rank, three times in an epoch; both ranks end bit for bit as without signals."""

    class Write(Watch):
        def __init__(self, folder, cut=None, rank=None):
            super().__init__(cut)
            self.folder, self.rank = folder, rank

        def on_train_batch_end(self, trainer, *args):
            if trainer.global_rank != self.rank:
                self.cut = None
            super().on_train_batch_end(trainer, *args)
            torch.save(self.steps, self.folder / f"{trainer.global_rank}_{self.steps[0][0][2]:03d}.pt")

    def go(name, *told):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for cut, rank in [*told, (None, None)]:
            strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60))
            ended = torch.multiprocessing.ProcessExitedException
            with pytest.raises(ended, match="exit code 143") if cut else nullcontext():
                fit(folder, Write(folder, cut, rank), told=False, devices=2, strategy=strategy)
        ran = [[x for f in sorted(folder.glob(f"{r}_*.pt")) for x in torch.load(f)] for r in (0, 1)]
        return ran, load(newest(folder / "checkpoints")[0])

    whole = go("whole")
    assert not torch.equal(whole[0][0][0][1], whole[0][1][0][1])  # ranks have different losses
    same(go("broken", (2, 0), (4, 1), (6, 1)), whole)


@pytest.fixture
def command(tmp_path, capsys):
    """Return a function that runs `fit` of a tiny expert in a folder, in this process, and returns its output."""

    def give(*words, steps_=6, folder="run"):
        argv = [*EXPERT, "--run", str(tmp_path / folder), "--trainer.max_steps", str(steps_), *map(str, words)]
        capsys.readouterr()
        run([*argv, "--trainer.val_check_interval", "100"], [L.Callback()])
        return capsys.readouterr().out

    return give


def test_the_same_command_resumes_and_says_so(command, tmp_path):
    assert "going on" not in command(steps_=3)
    out = command(steps_=6)
    assert f"going on with {tmp_path}/run from step 3 (192 images seen)" in out
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit) as end:
        command(steps_=6)
    assert end.value.code == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    (tmp_path / "run" / "model.safetensors").unlink()  # as if killed before the export
    command(steps_=6)
    assert Diffusion.load_from_checkpoint(checkpoints_in(tmp_path / "run" / "checkpoints")[-1]).images_seen == 6 * 64
    assert (tmp_path / "run" / "model.safetensors").stat().st_size == len(before)


def test_a_run_without_a_checkpoint_starts_from_scratch(command, tmp_path):
    command(steps_=3)
    for file in (tmp_path / "run" / "checkpoints").iterdir():
        file.unlink()
    weights = tmp_path / "run" / "model.safetensors"
    before = weights.read_bytes()
    with pytest.raises(SystemExit, match="0"):  # it is done
        command(steps_=3)
    with pytest.raises(InputError, match=r"has weights of step 3 and no checkpoint to resume from"):
        command(steps_=6)
    assert weights.read_bytes() == before
    weights.unlink()
    assert "from the beginning" in command(steps_=3)


def test_a_bad_checkpoint_is_named_and_passed_over(command, tmp_path):
    command("--checkpoint.every", 2, steps_=5)
    old, new = checkpoints_in(tmp_path / "run" / "checkpoints")
    content = bytearray(new.read_bytes())
    content[len(content) // 2] ^= 1
    new.write_bytes(content)
    out = command("--checkpoint.every", 2, steps_=6)
    assert f"passed over: {new}: damaged: sha256" in out
    assert "from step 4 (256 images seen)" in out
    assert [path.name for path in checkpoints_in(tmp_path / "run" / "checkpoints")] == [old.name, "step-000000006.ckpt"]


def test_a_run_with_bad_checkpoints_alone_is_refused_with_every_reason(command, tmp_path):
    command("--checkpoint.every", 2, steps_=5)
    old, new = checkpoints_in(tmp_path / "run" / "checkpoints")
    old.write_bytes(b"")
    new.with_suffix(".ckpt.json").unlink()
    with pytest.raises(InputError, match=f"{new.name}: has no manifest.*\n.*{old.name}: damaged: 0 bytes"):
        command(steps_=6)
    assert not (tmp_path / "run" / "events").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.lr", "1"], "model.init_args.lr: 0.002 there, 1.0 now"),
        (["--model.states.S", "9"], "model.init_args.states.init_args.S: 8 there, 9 now"),
        (["--ema.decay", "0.5"], "ema.decay: 0.999 there, 0.5 now"),
        (["--seed_everything", "4"], "seed_everything: 0 there, 4 now"),
        (["--trainer.precision", "bf16-mixed"], "trainer.precision: .* there, bf16-mixed now"),
        (["--resume", "never"], "already holds a run"),
        (["--data.batch_size", "32"], "trained with 64 images a step over all ranks, this run has 32"),
        (["--ckpt_path", "LICENSE"], "does not belong to .* already holds a run"),
    ],
)
def test_another_config_is_refused_naming_both_values(words, said, command):
    command(steps_=2)
    with pytest.raises(InputError, match=said):
        command(*words, steps_=4)


def test_other_batches_or_data_are_refused_for_a_run_that_has_ended(command, digits, tmp_path):
    command(steps_=2)
    with pytest.raises(InputError, match=r"(?s)has ended, .*data.batch_size: 64 images a step there, 32 now"):
        command("--data.batch_size", 32, steps_=2)
    other, moved = tmp_path / "other", tmp_path / "moved"
    shutil.copytree(digits, moved)
    shutil.copytree(digits, other)
    (other / "train-0000.tar").unlink()
    shutil.copy(other / "test-0000.tar", other / "train-0000.tar")
    build([other / "train-0000.tar"]).save(other / "train.index.safetensors")
    with pytest.raises(
        InputError, match=r"(?s)has ended, .*data: training images [0-9a-f]{16} there, [0-9a-f]{16} now"
    ):
        command("--data.path", other, steps_=2)
    with pytest.raises(SystemExit) as end:
        command("--data.path", moved, steps_=2)
    assert end.value.code == 0


def test_what_does_not_change_the_run_may_change(command):
    command(steps_=2)
    words = ["--checkpoint.keep", 3, "--trainer.log_every_n_steps", 1, "--data.workers", 1, "--guard.patience", 3]
    assert "from step 2" in command(*words, steps_=3)


def test_two_processes_do_not_share_a_folder(command, tmp_path):
    place = RunFolder(tmp_path / "run", tidy=True)
    with place, pytest.raises(InputError, match=rf"in use by process {os.getpid()} on "):
        command()
    assert not (tmp_path / "run").exists()  # nothing was created
    command(steps_=1)


def test_a_run_can_be_branched_and_rolled_back(command, tmp_path):
    command("--checkpoint.every", 2, steps_=5)
    old = checkpoints_in(tmp_path / "run" / "checkpoints")[0]
    command("--ckpt_path", old, "--model.lr", "1e-4", folder="branch", steps_=5)
    assert "from step 4" in command("--ckpt_path", old, steps_=6)
    assert load(checkpoints_in(tmp_path / "branch" / "checkpoints")[-1])["global_step"] == 5


def test_the_config_of_a_run_must_be_readable(tmp_path):
    for text, said in (("a: [", "cannot be read"), ("", "contains no config")):
        (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=rf"config.yaml: {said}"):
            check_config(tmp_path, {})
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"model": {"class_path": "A", "init_args": {"sampler": 1}}}), encoding="utf-8"
    )
    check_config(tmp_path, _completed({"model": {"class_path": "A", "init_args": {"sampler": 2}}}))
    assert find_checkpoint(tmp_path) == (None, {}, [])


def test_checkpoints_without_their_config_are_not_written_over(command, tmp_path):
    command(steps_=2)
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(InputError, match=r"has 1 checkpoints but no config\.yaml"):
        command(steps_=3)
    assert len(checkpoints_in(tmp_path / "run" / "checkpoints")) == 1


def test_the_saved_config_resumes_from_the_newest_checkpoint(command, tmp_path):
    for count in (2, 3):
        command(steps_=count)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))["ckpt_path"] is None


def test_a_branch_takes_its_own_learning_rate(command, tmp_path):
    command(steps_=2)
    command("--ckpt_path", tmp_path / "run", "--model.lr", "1e-4", "--model.warmup", 0, folder="branch", steps_=4)
    end = load(checkpoints_in(tmp_path / "branch" / "checkpoints")[-1])
    assert end["lr_schedulers"][0]["base_lrs"] == [1e-4]
    assert end["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 1e-4


def test_fast_dev_run_writes_nothing_and_reads_nothing(command, tmp_path):
    command("--trainer.fast_dev_run", "true")
    assert not list((tmp_path / "run").glob("*.safetensors"))
    assert checkpoints_in(tmp_path / "run" / "checkpoints") == []
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_snapshots_later_than_the_resumed_checkpoint_are_deleted(command, tmp_path):
    lengths = [
        "--ema.lengths",
        "[0.05,0.1]",
        "--ema.snapshot_every",
        2,
        "--checkpoint.every",
        2,
        "--checkpoint.keep",
        9,
    ]
    command(*lengths, steps_=8)
    back = tmp_path / "run" / "checkpoints" / "step-000000002.ckpt"
    out = command(*lengths, "--ckpt_path", back, steps_=5)
    assert out.count("rolled back: ") == 3
    ends = {int(file.name[5:14]) for file in (tmp_path / "run" / "averages").iterdir()}
    assert ends == {2, 4, 5}


def test_a_signal_before_the_first_step_is_handled_after_it(fit, tmp_path):
    class Early(Watch):
        def on_fit_start(self, trainer, pl_module):
            os.kill(os.getpid(), self.number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        watch = Early(1, number=number)
        fit(tmp_path / str(number), watch)
        assert [place[2] for place, *_ in watch.steps] == [1]
        assert newest(tmp_path / str(number) / "checkpoints")[1]["step"] == 1
    assert signal.getsignal(signal.SIGUSR1) is not None


@pytest.mark.parametrize("word", ["last", "best", "nothing.ckpt", ""])
def test_a_missing_checkpoint_is_reported(word, command):
    with pytest.raises(InputError, match=rf"--ckpt_path {word}: no such file"):
        command("--ckpt_path", word)


def test_weights_and_other_files_are_not_checkpoints(command, tmp_path):
    command(steps_=1)
    torch.save({"state_dict": {}}, tmp_path / "plain.ckpt")
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6", "global_step": 1, "epoch": 0, "loops": {}},
               tmp_path / "foreign.ckpt")  # fmt: skip
    with pytest.raises(InputError, match="not a checkpoint of a training"):
        command("--ckpt_path", tmp_path / "plain.ckpt", folder="a")
    with pytest.raises(InputError, match=r"model\.safetensors: not loaded: no checkpoint that torch has written"):
        command("--ckpt_path", tmp_path / "run" / "model.safetensors", folder="b")
    with pytest.raises(InputError, match="it has no card"):
        command("--ckpt_path", tmp_path / "foreign.ckpt", folder="c")


def test_a_run_by_epochs_that_has_ended_keeps_its_curves(command, tmp_path):
    words = [
        "--model.decay",
        "constant",
        "--trainer.max_epochs",
        1,
        "--trainer.limit_train_batches",
        3,
        "--trainer.log_every_n_steps",
        1,
    ]
    command(*words, steps_=-1)
    before = curves(tmp_path / "run")
    with pytest.raises(SystemExit):
        command(*words, steps_=-1)
    assert curves(tmp_path / "run") == before
    assert len(before["train/loss"]) == 3


def test_a_signal_while_a_checkpoint_is_written_does_not_wait_for_the_validation(fit, tmp_path, monkeypatch):
    whole = DurableIO.save_checkpoint

    def told(self, *args, **options):
        whole(self, *args, **options)
        if args[1].parent.name == "checkpoints":  # not the one that the preflight saves
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(DurableIO, "save_checkpoint", told)
        watch = Watch(10)
        watch.inside = True  # it sends no signal itself
        watch.on_validation_batch_end = lambda *_: pytest.fail("a validation batch was run")
        fit(tmp_path / "run", watch, every=10)
    assert [place[2] for place, *_ in watch.steps][-1] == 10
    again = Watch()
    fit(tmp_path / "run", again)
    assert [step for step, _ in again.validations] == [10, 20]


def ids(watch):
    return [kept[3].tolist() for kept in watch.steps]


def test_overfitting_sees_the_same_batches_in_every_epoch(fit, tmp_path):
    watch = Watch()
    fit(tmp_path / "run", watch, overfit_batches=2, max_steps=6)
    first, second, *rest = ids(watch)
    assert first != second
    assert rest == [first, second] * 2


def test_a_loader_recreated_in_every_epoch_continues(fit, tmp_path):
    plain, anew = Watch(), Watch()
    fit(tmp_path / "plain", plain, max_steps=16)
    fit(tmp_path / "anew", anew, max_steps=16, reload_dataloaders_every_n_epochs=1)
    assert ids(plain) == ids(anew)
    assert len({str(batch) for batch in ids(anew)}) == 16


def test_the_bins_of_the_losses_may_change_on_the_way(command):
    command("--model.experts", 4, steps_=2)
    assert "from step 2" in command("--model.experts", 4, "--losses.bins", 1, steps_=4)


def test_the_folder_of_checkpoints_names_the_run_too(command, tmp_path):
    command(steps_=2)
    for place in (tmp_path / "run", tmp_path / "run" / "checkpoints"):
        assert resolve(str(place)).name == "step-000000002.ckpt"
    with pytest.raises(InputError, match="holds no good checkpoint"):
        resolve(str(tmp_path))


def test_an_untrained_model_is_not_exported(command, tmp_path):
    with pytest.raises(InputError, match=r"trainer.limit_train_batches: 0 trains nothing"):
        command("--trainer.limit_train_batches", 0, steps_=2)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_disabling_checkpoints_is_a_one_line_error(command):
    with pytest.raises(InputError, match=r"trainer.enable_checkpointing: false is not possible"):
        command("--trainer.enable_checkpointing", "false")


def test_a_disk_without_room_is_refused_before_anything_is_written(command, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=999_999))
    with pytest.raises(InputError, match="has 999,999 bytes free"):
        command()
    assert not (tmp_path / "run").exists()


def test_a_damaged_sample_in_a_worker_is_a_one_line_error(data, digits, tmp_path):
    shards = tmp_path / "digits"
    shutil.copytree(digits, shards)
    wrong = shards / "train-0001.tar"
    with tarfile.open(wrong, "w") as tar:
        for name, content in (("x.png", b"no image"), ("x.cls", b"1")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    loader = data(path=str(shards), resident=False, workers=1, batch_size=1501, seed=0).train_dataloader()
    with pytest.raises(InputError) as refusal:
        next(iter(loader))
    assert str(refusal.value).startswith(f"{wrong}: sample x (bytes 0 to 10239) cannot be decoded: ")
    loader.close()


class Elsewhere(Checkpoint):
    """Make this rank resume from another checkpoint, as with a folder that is not shared."""

    def on_train_start(self, trainer, pl_module):
        trainer.ckpt_path = f"step-{trainer.global_rank}.ckpt"
        super().on_train_start(trainer, pl_module)


def test_ranks_that_found_different_checkpoints_are_refused(fit, tmp_path):
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60))
    ended = torch.multiprocessing.ProcessRaisedException
    with pytest.raises(ended, match=r"different checkpoints, by rank: \[\('step-0.ckpt', 0\), \('step-1.ckpt', 0\)\]"):
        fit(tmp_path, Watch(), devices=2, strategy=strategy, checkpoint=Elsewhere())
