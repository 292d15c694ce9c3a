"""The modules and callbacks in a plain script, with Lightning's Trainer, callbacks and loggers."""

import copy
import csv
import hashlib
import importlib
import pickle
import runpy
import shutil
import tarfile
import threading
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_tdisent.cli import main
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import Halted, InputError
from lightning_tdisent.lit.callbacks.checkpoint import Checkpoint
from lightning_tdisent.lit.callbacks.guard import Guard
from lightning_tdisent.lit.callbacks.losses import LossPerState
from lightning_tdisent.lit.callbacks.pictures import Pictures
from lightning_tdisent.lit.callbacks.progress import StepProgress
from lightning_tdisent.lit.callbacks.quality import SampleQuality
from lightning_tdisent.lit.callbacks.weights import EMA, Export
from lightning_tdisent.lit.command_line import LINE
from lightning_tdisent.lit.datamodule import ImageShards, Seeds
from lightning_tdisent.lit.modules import ReducedStates
from lightning_tdisent.models.card import read_card
from lightning_tdisent.models.compose import load_model
from lightning_tdisent.models.expert import weights_digest
from lightning_tdisent.runs import checkpoints_in
from lightning_tdisent.sampling.errors_by_row import x0_errors
from lightning_tdisent.sampling.sample import sample
from lightning_tdisent.sampling.sampler import DDIM

ROOT = Path(__file__).parents[2]


@pytest.fixture
def plain(tmp_path):
    """Return a factory of Trainers without any part of this project."""

    def make(*callbacks, folder=tmp_path, **options):
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
        return L.Trainer(
            accelerator="cpu",
            callbacks=[*callbacks],
            default_root_dir=folder,
            **{"logger": False, "enable_checkpointing": False, "max_steps": 4, **quiet, **options},
        )

    return make


def test_the_card_knows_the_weights_it_began_with_and_the_share_of_null_labels(tiny, data, plain, tmp_path):
    digests = []
    for k in range(3):
        if k < 2:
            torch.manual_seed(5)
        module = ReducedStates(tiny(classes=10), LatentStates(S=4), label_drop=0.0 if k else 0.1)
        trainer = plain(folder=tmp_path / str(k), max_steps=2)
        trainer.fit(module, data())
        trainer.save_checkpoint(tmp_path / f"{k}.ckpt")
        card = module.card("live")
        assert card.label_drop == module.label_drop
        assert card.initial != weights_digest(module.denoiser)
        digests.append(card.initial)
    assert digests[0] == digests[1] != digests[2]
    again = ReducedStates(tiny(classes=10), LatentStates(S=4), label_drop=0.0)
    plain(folder=tmp_path / "2", max_steps=3).fit(again, data(), ckpt_path=tmp_path / "2.ckpt")
    assert again.card("live").initial == digests[2]
    words = ["sample", str(tmp_path / "2.ckpt"), "--out", str(tmp_path / "images"), "--guidance", "2", "--seeds", "0:1"]
    assert main(words) == 2
    assert main([word.replace("2.ckpt", "0.ckpt") for word in words]) == 0


def test_validate_and_test_return_the_metrics_and_log_them_once(make, data, plain, tmp_path):
    module, shards = make(), data(val_limit=64)
    trainer = plain(logger=CSVLogger(tmp_path, "", ""))
    module.images_seen = 123
    errors = x0_errors(module.eval().denoiser, shards.held_out.images, range(64), [1, 2, 3, 4]).double().mean(1)
    for stage, run in (("val", trainer.validate), ("test", trainer.test)):
        (metrics,) = run(module, datamodule=shards, verbose=False)
        assert sum(name.startswith(f"{stage}_x0_mse/t") for name in metrics) == 4
        assert metrics[f"{stage}/x0_mse"] == pytest.approx(float(errors.mean()), rel=1e-6)
        assert [metrics[f"{stage}_x0_mse/t{t:04d}"] for t in (250, 500, 750, 1000)] == pytest.approx(errors.tolist())
        assert metrics == {name: float(value) for name, value in trainer.callback_metrics.items()}
    with (tmp_path / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["123", "123"]  # images seen, one row per stage
    assert [bool(row["val/x0_mse"]) for row in rows] == [True, False]


class Plateau(ReducedStates):
    def configure_optimizers(self):
        optimizer = torch.optim.RMSprop(self.parameters(), self.lr)  # an optimizer without ``fused``
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1e3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/x0_mse"}}


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"val_check_interval": 5, "check_val_every_n_epoch": None, "max_epochs": -1}, 5),
        (
            {"val_check_interval": 9, "check_val_every_n_epoch": None, "max_epochs": -1, "accumulate_grad_batches": 2},
            4.5,
        ),
        ({"limit_train_batches": 3, "check_val_every_n_epoch": 2, "max_epochs": -1}, 6),
        ({"val_check_interval": 4, "check_val_every_n_epoch": None, "max_epochs": -1}, 0),
        ({"limit_train_batches": 2, "check_val_every_n_epoch": 2, "max_epochs": -1}, 0),
        ({"limit_val_batches": 0}, 0),
    ],
)
def test_a_training_that_ends_before_its_first_validation_says_so(make, data, plain, capsys, options, first):
    plain(**options).fit(make(), datamodule=data(val_limit=64))
    said = f"note: the first validation would be after {first:g} steps (trainer.val_check_interval, "
    said += "trainer.check_val_every_n_epoch), and this training ends"
    assert (said in capsys.readouterr().err) == bool(first)


def test_fit_reports_what_is_not_read_of_shards_without_an_index(make, plain, digits, tmp_path, capsys):
    for split in ("train", "test"):
        shutil.copy(digits / f"{split}-0000.tar", tmp_path)
        with tarfile.open(tmp_path / f"{split}-0000.tar", "a") as tar:
            tar.addfile(tarfile.TarInfo("README.md"))
    plain().fit(make(), datamodule=ImageShards(str(tmp_path), channels=1, batch_size=32, val_limit=64))
    said = capsys.readouterr().err
    for split in ("train", "test"):
        assert f"note: {split}: not read: files of no sample (1, first {split}-0000.tar/README.md)\n" in said


def test_lightnings_callbacks_find_the_metrics(make, data, plain, tmp_path):
    best = ModelCheckpoint(tmp_path / "best", monitor="val/x0_mse", filename="{step}")
    stop = EarlyStopping("val/x0_mse", min_delta=1e3, patience=1)
    rates = LearningRateMonitor()
    options = {"max_epochs": 9, "max_steps": -1, "limit_train_batches": 2, "enable_checkpointing": True}
    trainer = plain(best, stop, rates, logger=CSVLogger(tmp_path, "", ""), log_every_n_steps=1, **options)
    trainer.fit(module := make(Plateau), datamodule=data(val_limit=64))
    assert trainer.global_step == 4  # two epochs: the second does not improve by 1000
    assert best.best_model_path == str(tmp_path / "best" / "step=4.ckpt")
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.25 * module.lr  # reduced twice
    assert rates.lrs


def test_a_training_loss_can_be_monitored(make, data, plain):
    stop = EarlyStopping("train/loss", min_delta=1e3, patience=0, check_on_train_epoch_end=True)
    trainer = plain(LossPerState(), stop, max_steps=-1, max_epochs=9, limit_train_batches=2, log_every_n_steps=2)
    trainer.fit(make(), datamodule=data(val_limit=64))
    assert trainer.global_step == 4


def test_progress_leaves_the_attributes_of_other_callbacks_alone(make, data, plain):
    class Own(L.Callback):
        last = 0.25

    told = []
    progress = StepProgress(lambda step, steps, numbers: told.append((step, dict(numbers))))
    trainer = plain(Own(), LossPerState(), progress, enable_progress_bar=True, log_every_n_steps=5, max_steps=10)
    trainer.fit(make(), datamodule=data(val_limit=64))
    assert [step for step, _ in told] == [10]
    assert told[0][1]["loss"] > 0


def test_after_fit_the_average_is_evaluated_as_in_fit(make, data, plain, tmp_path):
    shards, ema, ended = data(val_limit=64), EMA(0.9), ModelCheckpoint(tmp_path, monitor="val/x0_mse")
    options = {"max_steps": 8, "val_check_interval": 4, "limit_val_batches": 1, "enable_checkpointing": True}
    trainer = plain(ema, ended, **options)
    trainer.fit(module := make(), datamodule=shards)
    last = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val")}
    live = copy.deepcopy(module.denoiser).eval()
    average = copy.deepcopy(live)
    average.load_state_dict(ema.state(module))
    assert trainer.validate(module, datamodule=shards, verbose=False) == [last]
    (tested,) = trainer.test(module, datamodule=shards, verbose=False)
    assert {name.replace("test", "val", 1): value for name, value in tested.items()} == last
    images = torch.cat(trainer.predict(module, datamodule=Seeds(4)))
    assert torch.equal(images, torch.cat(list(sample(average, DDIM(), range(4)))))
    assert not torch.equal(images, torch.cat(list(sample(live, DDIM(), range(4)))))
    assert all(torch.equal(a, b) for a, b in zip(module.denoiser.parameters(), live.parameters(), strict=True))

    def alone(module):
        return plain(limit_val_batches=1).validate(module, datamodule=shards, verbose=False)

    other = make(ReducedStates, lr=0.1)  # the average is not used for another module, or for weights loaded since
    assert trainer.validate(other, datamodule=shards, verbose=False) == alone(other)
    module.denoiser.load_state_dict(other.denoiser.state_dict())
    assert trainer.validate(module, datamodule=shards, verbose=False) == alone(other)
    path = ended.best_model_path  # a checkpoint of this run is evaluated with the average stored in it
    expected = alone(ReducedStates.load_from_checkpoint(path))
    assert trainer.validate(module, datamodule=shards, ckpt_path=path, verbose=False) == expected


def test_an_exception_in_an_evaluation_after_fit_brings_the_live_weights_back(make, data, plain):
    class Fail(L.Callback):
        def on_test_batch_end(self, *_):
            raise RuntimeError("mine")

    trainer, shards = plain(EMA(0.9), Fail(), limit_val_batches=1), data(val_limit=64)
    trainer.fit(module := make(), datamodule=shards)
    live = copy.deepcopy(module.denoiser.state_dict())
    with pytest.raises(RuntimeError, match="mine"):
        trainer.test(module, datamodule=shards, verbose=False)
    assert all(torch.equal(tensor, live[name]) for name, tensor in module.denoiser.state_dict().items())


class Bare(ReducedStates):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)["loss"]


@pytest.mark.parametrize("cls", [ReducedStates, Bare])
def test_losses_that_are_not_finite_are_reported_without_a_guard_of_ones_own(cls, make, plain, capsys):
    images = [{"x0": torch.full((1, 8, 8), float("nan")) if i < 48 else torch.zeros(1, 8, 8)} for i in range(64)]
    loader = torch.utils.data.DataLoader(images, 16)
    before = copy.deepcopy(module := make(cls)).state_dict()
    plain(max_steps=3).fit(module, loader, loader)
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in said if "is not finite" in line] == [f"step {n}, rank 0" for n in (1, 2, 3)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    with pytest.raises(Halted, match=r"step 10, rank 0.*10 in a row"):
        plain(max_steps=30).fit(make(cls), torch.utils.data.DataLoader(images[:16] * 12, 16), loader)
    trainer = plain(Guard(patience=2), max_steps=30)  # a guard given by the user is kept
    with pytest.raises(Halted, match=r"2 in a row"):
        trainer.fit(make(cls), loader, loader)
    assert sum(isinstance(callback, Guard) for callback in trainer.callbacks) == 1


def test_a_training_step_that_returns_a_loss_alone_is_told_which_curves_are_missing(make, plain, capsys):
    loader = torch.utils.data.DataLoader([{"x0": torch.zeros(1, 8, 8)}] * 32, 16)
    plain(LossPerState(), max_steps=4, log_every_n_steps=1).fit(make(Bare), loader, loader)
    said = [line for line in capsys.readouterr().err.splitlines() if "neither train/loss" in line]
    assert said == [
        "note: Bare.training_step returns no 'losses' and 'row' per sample: neither train/loss nor losses per "
        "state are logged"
    ]


def digests(folder):
    files = [path for path in sorted(folder.rglob("*.*")) if path.name != ".lock"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("own", [lambda: Checkpoint(every=2), lambda: EMA(lengths=[0.1], snapshot_every=2)])
def test_a_second_run_does_not_remove_the_first_ones_files(own, make, data, plain, tmp_path):
    options = {"enable_checkpointing": True}
    plain(own(), **options).fit(make(), datamodule=data(val_limit=64))
    before = digests(tmp_path)
    assert len(before) >= 2
    for again in (make(), make(lr=1e-3)):
        with pytest.raises(
            InputError, match=rf"^{tmp_path}: holds \w+/step-.* of an earlier training.*default_root_dir"
        ):
            plain(own(), **options, max_steps=1).fit(again, datamodule=data(val_limit=64))
        assert digests(tmp_path) == before
    plain(own(), **options, fast_dev_run=True).fit(make(), datamodule=data(val_limit=64))  # writes nothing
    plain(own(), **options, folder=tmp_path / "other").fit(make(), datamodule=data(val_limit=64))


def test_a_run_resumes_in_its_own_folder(make, data, plain, tmp_path):
    folder = tmp_path / "checkpoints"
    trainer = plain(Checkpoint(every=2, keep=9), enable_checkpointing=True)
    trainer.fit(module := make(), datamodule=data(val_limit=64))
    trainer.fit_loop.epoch_loop.max_steps = 6
    trainer.fit(module, datamodule=data(val_limit=64))  # the same trainer continues its run
    assert [path.name[-6:-5] for path in checkpoints_in(folder)] == ["2", "4", "6"]
    again = plain(Checkpoint(every=2, keep=9), enable_checkpointing=True, max_steps=8)
    again.fit(make(), datamodule=data(val_limit=64), ckpt_path=str(checkpoints_in(folder)[-1]), weights_only=True)
    assert [path.name[-6:-5] for path in checkpoints_in(folder)] == ["2", "4", "6", "8"]
    other = checkpoints_in(folder)[-1].rename(tmp_path.with_name("elsewhere.ckpt"))
    last = plain(Checkpoint(), enable_checkpointing=True, max_steps=9)
    with pytest.raises(InputError, match=r"starts from .*elsewhere\.ckpt"):  # a checkpoint outside the folder
        last.fit(make(), datamodule=data(val_limit=64), ckpt_path=str(other), weights_only=True)


def test_a_stock_checkpoint_is_read_by_every_reader_and_called_unverified(make, data, plain, tmp_path, capsys):
    keep = ModelCheckpoint(tmp_path / "stock", monitor="val/x0_mse", filename="best")
    trainer = plain(keep, enable_checkpointing=True, val_check_interval=4, max_epochs=-1, check_val_every_n_epoch=None)
    trainer.fit(module := make(), datamodule=data(val_limit=64))
    path = tmp_path / "stock" / "best.ckpt"
    assert [file.name for file in path.parent.iterdir()] == ["best.ckpt"]
    model = load_model(path)
    (card,) = model.cards
    loaded = ReducedStates.load_from_checkpoint(path, map_location="cpu")
    for name, weight in module.denoiser.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)
        assert torch.equal(loaded.denoiser.state_dict()[name], weight)
    assert (card.images_seen, card.steps, card.weights, loaded.images_seen) == (128, 4, "live", 128)
    assert main(["sample", str(path), "--seeds", "0:2", "--out", str(tmp_path / "drawn")]) == 0
    assert capsys.readouterr().err.count(f"{path} has no manifest (best.ckpt.json): read unverified") == 1

    assert main(["sample", str(path.parent), "--seeds", "0:2", "--out", str(tmp_path / "again")]) == 2
    assert f"A checkpoint is taken by its own name, e.g. {path}" in capsys.readouterr().err
    content = torch.load(path, weights_only=True)
    torch.save({k: v for k, v in content.items() if k != "card"}, path)
    for read in (load_model, ReducedStates.load_from_checkpoint):
        with pytest.raises(InputError, match=r"best.ckpt: not a checkpoint of this project: it has no card"):
            read(path)
    path.with_name("best.ckpt.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match=r"best.ckpt: its manifest cannot be read"):
        load_model(path)


class Loader:
    """Two batches of the held-out digits, converted by ``shape``."""

    def __init__(self, images, labels, shape):
        self.batches = [shape(x, y) for x, y in zip(images.split(40), labels.split(40), strict=True)]

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def once(module, loader):
    options = {"accelerator": "cpu", "max_steps": 2, "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    L.Trainer(**options, **quiet).fit(module, loader, loader)


SHAPES = {
    "pair": lambda x, y: (x, y),
    "list": lambda x, y: [x, y.int()],
    "bare": lambda x, y: x,
    "one": lambda x, y: (x,),
    "dict": lambda x, y: {"image": x, "label": y},
    "no label": lambda x, y: {"image": x},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_batches_of_a_plain_loader_are_those_of_image_shards(shape, make, data, plain):
    shards = data(val_limit=60)
    loader = Loader(shards.held_out.images, shards.held_out.labels, SHAPES[shape])
    trainer = plain(Guard(), max_steps=2, val_check_interval=2)
    trainer.fit(module := make(), loader, loader)
    assert module.images_seen == 60
    (mine,) = trainer.validate(module, loader, verbose=False)
    (theirs,) = plain().validate(module, datamodule=shards, verbose=False)
    assert mine == pytest.approx(theirs, rel=1e-5)


def test_a_class_conditional_model_takes_labels_of_a_plain_loader(make, tiny, data):
    images, labels = data(val_limit=60).held_out.images, data(val_limit=60).held_out.labels
    classes = lambda: make(net=lambda: tiny(classes=10))  # noqa: E731
    once(classes(), Loader(images, labels, SHAPES["pair"]))
    for shape, named in {
        "bare": "network.classes is 10, but the loader gives a Tensor, without labels",
        "no label": r"the loader gives a dict with the keys \['image'\], without labels",
    }.items():
        with pytest.raises(InputError, match=named):
            once(classes(), Loader(images, labels, SHAPES[shape]))
    with pytest.raises(InputError, match=r"network.classes is 10, the loader gives labels from \d+ to 12"):
        once(classes(), Loader(images, labels + 3, SHAPES["pair"]))


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        (lambda x, y: (x, y, y), "a tuple of Tensor, Tensor, Tensor"),
        (lambda x, y: {"pixel_values": x}, r"a dict with the keys \['pixel_values'\]"),
        (lambda x, y: "text", "the loader gives a str"),
        (lambda x, y: x.movedim(1, 3), r"shape is \[1, 8, 8\], the loader gives images of shape \[40, 8, 8, 1\]"),
        (lambda x, y: x[0], r"images of shape \[1, 8, 8\]"),
        (lambda x, y: (x, y.float()), r"labels must be integers.* torch.float32 \[40\]"),
        (lambda x, y: (x, y[:, None]), r"one for each of the 40 images; the loader gives torch.int64 \[40, 1\]"),
    ],
)
def test_batches_of_another_form_are_refused(shape, named, make, data):
    held = data(val_limit=40).held_out
    with pytest.raises(InputError, match=named):
        once(make(), Loader(held.images, held.labels, shape))


@pytest.mark.parametrize("callback", [Pictures(), SampleQuality("digits")])
def test_callbacks_that_read_images_refuse_a_plain_loader(callback, make, data, plain):
    held = data(val_limit=40).held_out
    loader = Loader(held.images, held.labels, SHAPES["pair"])
    with pytest.raises(InputError, match="reads images from ImageShards, but the trainer has other data"):
        plain(callback, max_steps=2).fit(make(), loader, loader)


def test_dropout_of_any_network_is_seeded_by_step(make, tiny):
    module = make()
    assert not module.network_is_random
    module.denoiser.network.extra = torch.nn.Dropout(0.1)
    del module.network_is_random
    assert module.network_is_random


def test_seeds_and_labels_of_any_integer_type_are_taken_and_others_refused_in_one_line(make, tiny):
    model = make(net=lambda: tiny(classes=10)).eval().denoiser
    drawn = lambda seeds, label=None: torch.cat(list(sample(model, DDIM(), seeds, label=label)))  # noqa: E731
    expected = drawn(range(2), torch.tensor([3, 3]))
    for seeds, label in (
        ([0, 1], [3, 3]),
        (np.arange(2), np.array([3, 3], np.uint8)),
        (torch.arange(2), 3),
        ((0, 1), torch.tensor([3, 3], dtype=torch.int32)),
    ):
        assert torch.equal(drawn(seeds, label), expected)
    for seeds in (8, 1.5, None, "0:8", [0.5], [None]):
        with pytest.raises(InputError, match="seeds: integers, one for each image, such as range"):
            drawn(seeds)
    for label in ("cat", [3], [3.0, 3.0], torch.tensor([[3], [3]]), 3.5, [True, False], object()):
        with pytest.raises(InputError, match="label: an integer, or one for each of the 2 images, got "):
            drawn(range(2), label)
    for label in (11, -1, [3, 12]):
        with pytest.raises(InputError, match="label: 0 to 9, or 10 for none; got "):
            drawn(range(2), label)
    with pytest.raises(InputError, match="label: 3 is given to a model without classes"):
        list(sample(make().eval().denoiser, DDIM(), range(2), label=3))


def test_modules_and_data_are_copied_and_pickled_after_a_fit(make, data, plain):
    module, shards = make(), data(val_limit=64)
    plain(max_steps=2).fit(module, datamodule=shards)
    for copied, again in (
        (copy.deepcopy(module), copy.deepcopy(shards)),
        (pickle.loads(pickle.dumps(module)), pickle.loads(pickle.dumps(shards))),  # noqa: S301
    ):
        assert again.trainer is None
        assert shards.trainer is not None  # the original is unchanged
        (mine,) = plain().validate(copied, datamodule=again, verbose=False)
        (theirs,) = plain().validate(module, datamodule=data(val_limit=64), verbose=False)
        assert mine == theirs
        plain(max_steps=2).fit(copied, datamodule=again)
        assert copied.images_seen == module.images_seen + 64


def test_a_command_in_a_thread_has_its_own_arguments_and_locks(tmp_path, capsys):
    words = ["fit", "--config", "experiments/digits/reduced8.yaml", "--trainer.callbacks", "[]"]
    codes, mine = [], LINE.get()

    def fit():
        codes.append(main([*words, "--trainer.max_steps", "2", "--run", str(tmp_path)]))
        codes.append(main([*words, "--model.network.layerz", "2"]))

    thread = threading.Thread(target=fit)
    thread.start()
    thread.join()
    assert codes == [0, 2]
    assert "error: command line: --model.network.layerz: UNet has no option" in capsys.readouterr().err
    assert LINE.get() is mine  # the context of this thread is unchanged


@pytest.mark.parametrize("shown", ["false", "true", "callback"])
def test_progress_can_be_disabled_or_replaced(shown, tmp_path, capsys):
    words = ["--config", "experiments/digits/reduced8.yaml", "--trainer.max_steps", "2", "--run", str(tmp_path)]
    words += ["--trainer.callbacks", "TQDMProgressBar" if shown == "callback" else "[]"]
    words += [] if shown == "callback" else ["--trainer.enable_progress_bar", shown]
    assert main(["fit", *words]) == 0
    assert ("ReducedStates: 163,985 weights" in capsys.readouterr().out) == (shown == "true")
    assert (tmp_path / "model.safetensors").exists()


class Logs(ReducedStates):
    def training_step(self, batch, batch_idx):
        out = super().training_step(batch, batch_idx)
        self.log("mine", out["loss"])
        return out

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log_dict({"val/mine": 1.0})


def test_a_module_of_the_user_may_log_in_its_steps(tiny, data, plain):
    trainer = plain(val_check_interval=2)
    trainer.fit(module := Logs(tiny(), LatentStates(S=4)), datamodule=data(val_limit=64))
    assert {"mine", "val/mine"} <= set(trainer.callback_metrics)
    assert not {"log", "log_dict"} & set(vars(module))


def test_a_warm_start_with_plain_loaders_is_measured_before_its_first_step(make, tiny, data, plain, tmp_path):
    plain(EMA(), Export()).fit(make(), datamodule=data(val_limit=64))
    images = torch.utils.data.TensorDataset(torch.randint(256, (64, 1, 8, 8), dtype=torch.uint8))
    loader = torch.utils.data.DataLoader(images, 16)
    warm = ReducedStates(tiny(), LatentStates(S=4), warm_start=str(tmp_path))
    plain(EMA(), Export(), folder=tmp_path / "warm").fit(warm, loader, loader)
    card = read_card(tmp_path / "warm" / "model.safetensors")
    assert set(card.errors) == {"start", "ema"}


def test_the_weights_of_another_run_are_not_written_over(make, data, plain, tmp_path):
    plain(EMA(), Export()).fit(make(), datamodule=data(val_limit=64))
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"holds model.safetensors .* of an earlier training"):
        plain(EMA(), Export()).fit(make(lr=0.1), datamodule=data(val_limit=64))
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_second_ema_a_second_checkpoint_and_a_network_without_weights_to_train_are_refused(make, data, plain):
    with pytest.raises(InputError, match=r"2 EMA callbacks, of .*0\.1.* and .*0\.9999.*: only one would be validated"):
        plain(EMA(0.1), EMA(0.9999)).fit(make(), datamodule=data(val_limit=64))
    with pytest.raises(InputError, match=r"2 Checkpoint callbacks, which would remove each other's files. Keep one"):
        plain(Checkpoint(), Checkpoint(every=5), enable_checkpointing=True).fit(make(), datamodule=data(val_limit=64))
    module = make()
    module.requires_grad_(False)
    with pytest.raises(InputError, match=r"model\.network: none of its \d+ weights is trained"):
        plain().fit(module, datamodule=data(val_limit=64))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_script_of_the_readme_trains_what_load_model_reads(digits, tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    script = text.partition("```python\n")[2].partition("```")[0]
    for word, value in (("data/digits", str(digits)), ("runs/script", str(tmp_path / "run")), ("2000", "2")):
        assert word in script
        script = script.replace(word, value)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "readme_script.py").write_text(script, encoding="utf-8")
    importlib.import_module("readme_script")
    model = load_model(tmp_path / "run")
    (card,) = model.cards
    assert (card.steps, card.weights, model.rows) == (2, "ema", [*range(1, 9)])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_class_defined_in_the_running_script_is_noted(digits, tmp_path, capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    script = text.partition("```python\n")[2].partition("```")[0]
    script = (
        script.replace("data/digits", str(digits)).replace("runs/script", str(tmp_path / "run")).replace("2000", "2")
    )
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    runpy.run_path(str(tmp_path / "script.py"), run_name="__main__")
    assert "note: the class MyNet is defined in the script that runs" in capsys.readouterr().err
    assert main(["sample", str(tmp_path / "run"), "--out", str(tmp_path / "images")]) == 2
    assert "MyNet, which was defined in a script: no other program finds it" in capsys.readouterr().err
