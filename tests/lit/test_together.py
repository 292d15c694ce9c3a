"""Co-training: each fit equals the fit alone bit for bit; if stacked, up to the last digits.

The comparison covers everything from the decoder to the curves on disk.
"""

import io
import json
import os
import random
import signal
import tarfile
import time
from collections import Counter
from contextlib import suppress

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_tdisent.data.decode import Decoder
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import Busy, InputError
from lightning_tdisent.images import from_uint8
from lightning_tdisent.lit.callbacks.checkpoint import STATUS, Preempted
from lightning_tdisent.lit.callbacks.progress import StepProgress
from lightning_tdisent.lit.checkpoints import load, newest
from lightning_tdisent.lit.entry import run
from lightning_tdisent.lit.modules import ReducedStates
from lightning_tdisent.lit.shared import WINDOW, Shared
from lightning_tdisent.lit.together import RECORD, Group, Member, together
from lightning_tdisent.models.expert import load_expert
from lightning_tdisent.networks.network import Network
from lightning_tdisent.runs import RunFolder

TRAIN, TEST = 24, 6


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, n in (("train", TRAIN), ("test", TEST)):
        with tarfile.open(folder / f"{split}-0000.tar", "w") as tar:
            for i, image in enumerate(rng.integers(0, 256, (n, 4, 4), dtype=np.uint8)):
                png = io.BytesIO()
                Image.fromarray(image).save(png, "png")
                for suffix, content in (("png", png.getvalue()), ("cls", b"0")):
                    info = tarfile.TarInfo(f"{i:04d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


@pytest.fixture(scope="module")
def argv(images):
    """Return the command line of expert k of 4: a tiny network, batches of 4, a validation every 3 steps."""
    network = {"shape": [1, 4, 4], "channels": [4], "layers": 1, "groups": 2, "mid_attention": False}

    def make(folder, k, steps, *more, net="UNet", **options):
        network_ = {"class_path": net, "init_args": {**(network if net == "UNet" else {"shape": [1, 4, 4]}), **options}}
        model = {"class_path": "SingleState", "init_args": {"expert": k, "network": network_, "states": {"S": 4}}}
        model["init_args"] |= {"lr": 0.01, "warmup": 2}
        data = {"class_path": "ImageShards", "init_args": {"path": str(images), "channels": 1, "batch_size": 4}}
        trainer = {"max_steps": steps, "val_check_interval": 3, "log_every_n_steps": 2, "accelerator": "cpu"}
        trainer |= {"max_epochs": -1, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
        words = ["fit", "--seed_everything", str(k), "--model", json.dumps(model), "--data", json.dumps(data)]
        words += [f"--trainer.{name}={value if value is not None else 'null'}" for name, value in trainer.items()]
        return [*words, "--run", str(folder / str(k)), *map(str, more)]

    return make


def quiet(*more):
    return [StepProgress(lambda *_: None), *more]


class Draws(L.Callback):
    """Draw from all global random generators at every step, and log the draws."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        drawn = {"torch": float(torch.rand(()))}
        drawn |= {"numpy": float(np.random.rand()), "python": random.random()}  # noqa: NPY002, S311
        trainer.logger.log_metrics({f"drawn/{k}": v for k, v in drawn.items()}, pl_module.images_seen)


class Tells(L.Callback):
    """Send this process a signal after a step, and wait until it has arrived."""

    def __init__(self, step, number=signal.SIGTERM, validating=False):
        self.step, self.number, self.validating = step, number, validating

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.step and not self.validating:
            self._tell(trainer)

    def on_validation_batch_start(self, trainer, *_):
        if trainer.global_step == self.step and self.validating:
            self._tell(trainer)

    def _tell(self, trainer):
        os.kill(os.getpid(), self.number)
        member = next((c for c in trainer.callbacks if isinstance(c, Member)), None)
        while member and not member.group.told:
            time.sleep(0.001)


def contents(folder):
    """Return the content of a run folder, without clocks and the names of files that contain a time."""
    path, manifest, bad = newest(folder / "checkpoints")
    assert not bad
    curves = EventAccumulator(str(folder)).Reload()
    return {
        "steps": manifest["step"],
        "checkpoint": load(path),
        "weights": load_expert(folder / "model.safetensors")[0].state_dict(),
        "card": {
            k: v for k, v in vars(load_expert(folder / "model.safetensors")[1]).items() if k not in ("seconds", "run")
        },
        "curves": {
            tag: [(e.step, e.value) for e in curves.Scalars(tag)]
            for tag in curves.Tags()["scalars"]
            if "per_second" not in tag
        },
        "pictures": {p.name: p.read_bytes() for p in sorted((folder / "pictures").glob("*"))},
    }


def same(a, b, where="", near=None):
    """Assert that nested data are equal, bit for bit unless ``near``, except for clocks; name the first difference."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        close = torch.equal(a, b) if near is None else torch.allclose(a.double(), b.double(), rtol=near, atol=near)
        assert close, where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), (where, a.keys() ^ b.keys())
        for key in a.keys() - {"seconds", "run", "_batches_that_stepped"}:
            same(a[key], b[key], f"{where}.{key}", near)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}.{i}", near)
    else:
        assert a == b if near is None or not isinstance(a, float) else a == pytest.approx(b, near, near), where


MORE = {  # how experts of one group may differ; expert 3 is ahead of the others from the start
    1: (7, (), {"dropout": 0.2}),
    2: (4, ("--trainer.callbacks", "[Pictures]", "--ema.lengths", "[0.1]"), {}),
    3: (9, ("--checkpoint.every", 2, "--trainer.callbacks", "[Pictures]"), {"layers": 2}),
}


def lines(argv, folder):
    return [argv(folder, k, steps, *more, **options) for k, (steps, more, options) in MORE.items()]


@pytest.fixture(scope="module")
def alone(argv, tmp_path_factory):
    """Return what each of these fits writes when it runs alone."""
    folder = tmp_path_factory.mktemp("alone")
    for line in lines(argv, folder):
        run(line, quiet(Draws()))
    return {k: contents(folder / str(k)) for k in MORE}


def test_each_fit_is_bitwise_what_it_is_alone(argv, alone, tmp_path):
    assert together(lines(argv, tmp_path), [quiet(Draws()) for _ in MORE]) == [None] * 3
    for k, (steps, *_) in MORE.items():
        there = contents(tmp_path / str(k))
        assert there["steps"] == steps
        same(there, alone[k], str(k))
    assert len(there["pictures"]) == 6
    assert len(there["curves"]["drawn/numpy"]) == 9


def test_a_group_stopped_by_a_signal_resumes_from_different_steps(argv, alone, tmp_path):
    ahead = lines(argv, tmp_path)[2]
    with pytest.raises(Preempted):
        run(ahead, quiet(Tells(4)))
    before = {number: signal.getsignal(number) for number in STATUS}
    with pytest.raises(Preempted, match="143"):
        together(lines(argv, tmp_path), [quiet(), quiet(Tells(2, signal.SIGUSR1)), quiet()])
    assert {number: signal.getsignal(number) for number in before} == before
    assert [newest(tmp_path / str(k) / "checkpoints")[1]["step"] for k in MORE] == [3, 2, 6]
    assert together(lines(argv, tmp_path)) == [None] * 3
    for k in MORE:
        curves = {tag: values for tag, values in alone[k]["curves"].items() if not tag.startswith("drawn")}
        same(contents(tmp_path / str(k)), alone[k] | {"curves": curves}, str(k))


def test_a_validation_of_one_fit_does_not_delay_the_stop_of_the_group(argv, tmp_path):
    fits = [argv(tmp_path, k, 9) for k in (1, 2, 3)]
    with pytest.raises(Preempted, match="130"):
        together(fits, [quiet(), quiet(Tells(3, signal.SIGINT, validating=True)), quiet()])
    assert [newest(tmp_path / k / "checkpoints")[1]["step"] for k in "123"] == [4, 3, 3]
    seen = {k: EventAccumulator(str(tmp_path / k)).Reload().Tags()["scalars"] for k in "123"}
    assert ["val/x0_mse" in seen[k] for k in "123"] == [True, False, False]


def test_fits_that_have_not_started_do_not_start_after_a_signal(argv, tmp_path):
    class Early(Tells):
        def setup(self, trainer, pl_module, stage):  # before the group knows this fit
            self._tell(trainer)

    with pytest.raises(Preempted, match="143"):
        together([argv(tmp_path, 1, 5), argv(tmp_path, 2, 5)], [quiet(Early(0)), quiet()])
    assert newest(tmp_path / "1" / "checkpoints")[1]["step"] == 1
    assert not (tmp_path / "2").exists()


class Fails(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 2:
            raise RuntimeError("of its own")


def test_a_fit_that_fails_leaves_the_others_alone(argv, tmp_path):
    good, again = argv(tmp_path, 1, 4), argv(tmp_path, 1, 4)
    ends = together(
        [argv(tmp_path, 9, 4), good, again, argv(tmp_path, 2, 4), argv(tmp_path, 3, 3), argv(tmp_path, 4, 3, "--no")],
        [quiet(), quiet(), quiet(), quiet(Fails()), quiet(), quiet()],
        stacked=True,
    )
    assert [type(end) for end in ends] == [InputError, type(None), Busy, RuntimeError, type(None), InputError]
    assert "model.expert: 9 is not among" in str(ends[0])
    assert "in use by process" in str(ends[2])
    assert [newest(tmp_path / k / "checkpoints")[1]["step"] for k in "13"] == [4, 3]
    assert together([good]) == [None]  # already complete, which is not a failure
    assert together([]) == []


def test_several_devices_are_refused(argv, tmp_path, monkeypatch):
    monkeypatch.setattr(L.Trainer, "world_size", property(lambda _: 2))
    (end,) = together([argv(tmp_path, 1, 2)])
    assert isinstance(end, InputError)
    assert "co-trained fits use one device, this one has 2" in str(end)


def test_ctrl_c_given_twice_ends_all_at_once(argv, tmp_path):
    class Twice(Tells):
        def _tell(self, trainer):
            super()._tell(trainer)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)  # until it has arrived

    with pytest.raises(KeyboardInterrupt):
        together([argv(tmp_path, k, 50) for k in (1, 2)], [quiet(), quiet(Twice(2, signal.SIGINT, validating=False))])
    for _ in range(1000):
        with suppress(InputError), RunFolder(tmp_path / "1"):
            break
        time.sleep(0.01)
    assert not newest(tmp_path / "1" / "checkpoints")[0]  # it was not its turn, and it gets no other


@pytest.fixture
def decoded(monkeypatch):
    """Count how often each image, identified by its bytes, is decoded."""
    count, plain = Counter(), Decoder.__call__

    def counted(self, members, where):
        count[members["png"]] += 1
        return plain(self, members, where)

    monkeypatch.setattr(Decoder, "__call__", counted)
    return count


def test_images_that_stay_in_memory_are_decoded_once(decoded, argv, tmp_path):
    fits = [argv(tmp_path, k, 2) for k in (1, 2, 3)]
    assert together([*fits, argv(tmp_path, 4, 2, "--data.val_limit", 2)]) == [None] * 4
    assert sorted(decoded.values()) == [1] * (TRAIN + TEST - 2) + [2] * 2


@pytest.mark.parametrize("access", ["random", "sequential"])
def test_images_read_as_they_are_needed_are_decoded_once_for_fits_in_step(access, decoded, argv, tmp_path):
    words = ["--seed_everything", 5, "--data.resident", "false", "--data.access", access, "--data.flip", "true"]
    words += ["--trainer.val_check_interval", 9]
    run(argv(tmp_path / "alone", 1, 5, *words), quiet())
    one = decoded.total()
    decoded.clear()
    fits = [argv(tmp_path, 1, 5, *words), argv(tmp_path, 2, 5, *words), argv(tmp_path, 3, 5, *words)]
    assert together(fits) == [None] * 3
    assert decoded.total() == one
    same(contents(tmp_path / "1"), contents(tmp_path / "alone" / "1"))


def test_samples_that_may_be_skipped_are_read_by_each(decoded, argv, tmp_path):
    words = ["--seed_everything", 5, "--data.resident", "false", "--data.on_bad_shard", "skip"]
    run(argv(tmp_path / "alone", 1, 2, *words), quiet())
    one = decoded.total() - TEST
    decoded.clear()
    assert together([argv(tmp_path, k, 2, *words) for k in (1, 2)]) == [None] * 2
    assert decoded.total() == 2 * one + TEST


@given(
    starts=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    turns=st.lists(st.integers(0, 3), max_size=40),
    breaks=st.integers(0, 12),
)
@settings(max_examples=60, deadline=None)
def test_all_users_get_the_batches_of_the_order_whoever_reads_them(starts, turns, breaks):
    opened, closed, reads = [], [], Counter()

    class Loader:
        def __init__(self, first):
            self.next = first
            opened.append(self)

        def __iter__(self):
            for _ in range(3):  # batches per epoch
                if len(opened) == 1 and self.next == breaks:
                    raise InputError("damaged")
                reads[self.next] += 1
                self.next += 1
                yield {"id": self.next - 1}

        def close(self):
            closed.append(self)

    shared, expected, failed = Shared(), list(starts), set()
    users = [shared.batches("order", first, user, Loader) for user, first in enumerate(starts)]
    for user in turns:
        if user < len(users) and user not in failed:
            try:
                batch = next(users[user])
            except InputError:
                failed.add(user)
                continue
            assert batch == {"id": expected[user]}
            batch["id"] = None  # the dict belongs to the user
            expected[user] += 1
    if len(set(starts)) == 1 and not failed and turns == sorted(turns) == list(range(len(starts))):
        assert set(reads.values()) == {1}
    for user in range(len(users)):
        shared.leave(user)
    assert set(map(id, opened)) == set(map(id, closed))
    assert len(failed) <= 1  # later users open another reader


def test_a_loader_without_users_is_closed():
    closed = []

    class Loader:
        def __init__(self, first):
            self.first = first

        def __iter__(self):
            return iter([{"id": n} for n in range(self.first, 50)])

        def close(self):
            closed.append(self.first)

    shared = Shared()
    ahead, behind = (shared.batches("order", first, user, Loader) for user, first in enumerate((5, 3)))
    assert [next(user)["id"] for user in (ahead, behind, behind)] == [5, 3, 4]
    assert closed == []
    assert [next(behind)["id"] for _ in range(3)] == [5, 6, 7]
    assert closed == [3]
    assert next(ahead)["id"] == 6
    shared.leave(0)
    assert closed == [3]
    shared.leave(1)
    assert closed == [3, 5]


def test_users_in_step_share_one_loader_and_few_batches_are_kept():
    loaders = []

    def start(first):
        loaders.append(first)
        loader = iter([{"id": n} for n in range(first, first + 50)])
        return type("Loader", (), {"__iter__": lambda _: loader, "close": lambda _: None})()

    shared = Shared()
    users = [shared.batches("order", 0, user, start) for user in range(3)]
    for _ in range(20):
        for user in users:
            next(user)
    assert loaders == [0]
    (reader,) = shared._readers["order"]
    assert len(reader._recent) == WINDOW
    next(shared.batches("another", 7, 3, start))
    late = shared.batches("order", 20 - WINDOW, 4, start)
    assert [next(late)["id"] for _ in range(WINDOW + 1)] == list(range(20 - WINDOW, 21))
    assert loaders == [0, 7]
    next(shared.batches("order", 20 - WINDOW, 5, start))  # no longer kept
    assert loaders == [0, 7, 20 - WINDOW]


CLOSE = 1e-4  # tolerance for weights of about 1 that AdamW changes by 0.01 per step


class Plain(Network):
    """A network without normalisation.

    The gradient of a bias before a normalisation is only rounding error, which AdamW turns into a full step.
    """

    def __init__(self, shape, classes=None, conditioning=None, width=3, dropout=0.0):
        super().__init__(shape, classes, conditioning)
        self.width, self.dropout = width, dropout
        self.layers = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, x, index=None, label=None):
        return nn.functional.dropout(self.layers(x), self.dropout, self.training)


class Mixing(Plain):
    """A network whose samples depend on each other in training mode, as with batch normalisation."""

    def forward(self, x, index=None, label=None):
        return super().forward(x - x.mean(0, keepdim=True) if self.training else x)


PLAIN, MIXING = {"net": f"{__name__}.Plain"}, {"net": f"{__name__}.Mixing"}


def near(there, here, where, near=CLOSE):
    for name in ("checkpoint", "weights", "curves"):
        same(there[name], here[name], f"{where}.{name}", near)


def test_stacked_fits_are_those_alone_up_to_rounding_and_go_on_alone(argv, tmp_path, capsys):
    budgets = {1: 5, 2: 3, 3: 5}
    more = ["--model.weight_decay", 0.1, "--model.clip_norm", 0.5, "--trainer.callbacks", "[Pictures]"]
    for k, steps in budgets.items():
        run(argv(tmp_path / "alone", k, steps, *more, **PLAIN), quiet())
    assert (
        together([argv(tmp_path / "group", k, n, *more, **PLAIN) for k, n in budgets.items()], stacked=True)
        == [None] * 3
    )
    assert "stacked: 3 experts in one call, gradients within" in capsys.readouterr().out
    for k in budgets:
        record = json.loads((tmp_path / "group" / str(k) / RECORD).read_text(encoding="utf-8"))
        assert len(record["experts"]) == (3 if k == 2 else 2)  # after 2 had ended, the others formed a new stack
        assert 0 < record["relative_difference"] < 1e-5
        assert not (tmp_path / "alone" / str(k) / RECORD).exists()
        one, other = contents(tmp_path / "alone" / str(k)), contents(tmp_path / "group" / str(k))
        near(other, one, k)
        for state in (other["checkpoint"]["state_dict"], other["checkpoint"]["optimizer_states"][0]["state"][0]):
            assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in state.values())
    run(argv(tmp_path / "group", 1, 8, *more, **PLAIN), quiet())  # each resumes in the other mode
    run(argv(tmp_path / "alone", 3, 8, *more, **PLAIN), quiet())
    longer = [argv(tmp_path / way, k, 8, *more, **PLAIN) for way, k in (("alone", 1), ("group", 3))]
    assert together(longer, stacked=True) == [None] * 2
    for k in "13":
        near(*(contents(tmp_path / way / k) for way in ("group", "alone")), k)


def test_experts_of_one_configuration_are_stacked_and_the_others_run_as_alone(argv, tmp_path, capsys):
    kinds = {1: {}, 2: {"width": 5}, 3: {"dropout": 0.2}, 4: {}}
    exact = ["--trainer.precision", "64-true"]
    fits = [(k, [], kind, f"{way}") for k, kind in kinds.items() for way in "ab"] + [(1, exact, {}, "c")]
    assert together([argv(tmp_path / w, k, 3, *m, **PLAIN, **o) for k, m, o, w in fits], stacked=True) == [None] * 9
    said = capsys.readouterr().err
    assert said.count("not stacked, its network draws random numbers (dropout)") == 2
    assert said.count("not stacked, trainer.precision is 64-true, not 32-true or bf16-mixed") == 1
    for k in "124":
        experts = json.loads((tmp_path / "a" / k / RECORD).read_text(encoding="utf-8"))["experts"]
        assert {e[-3:] for e in experts} == ({"a/2", "b/2"} if k == "2" else {"a/1", "b/1", "a/4", "b/4"})
    for k, more, kind, way in fits[::2]:
        run(argv(tmp_path / "alone" / way, k, 3, *more, **PLAIN, **kind), quiet())
        here, there = (contents(folder / way / str(k)) for folder in (tmp_path, tmp_path / "alone"))
        if kind == {"dropout": 0.2} or more:
            same(here, there, str(k))
        else:
            near(here, there, k)


class Spoils(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx in (0, 2):
            batch["x0"] = from_uint8(batch["image"])
            batch["x0"][1, 0, 1, 1] = float("nan")


@pytest.mark.parametrize("spoils", [[], [Spoils()]])
def test_networks_whose_samples_depend_on_each_other_are_not_stacked(spoils, argv, tmp_path, capsys):
    run(argv(tmp_path / "alone", 2, 3, **MIXING), quiet())
    fits = [argv(tmp_path, k, 3, **MIXING) for k in (1, 2)]
    assert together(fits, [quiet(*spoils), quiet()], stacked=True) == [None] * 2
    assert capsys.readouterr().err.count("not stacked, its output for one sample depends on the others") == 2
    near(contents(tmp_path / "2"), contents(tmp_path / "alone" / "2"), "")
    assert not (tmp_path / "2" / RECORD).exists()


def test_an_overridden_training_step_is_not_stacked(tiny):
    class Weighted(ReducedStates):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx)

    member = Member(Group(1, stacked=True), 0)
    assert "Weighted has a training_step of its own" in member._obstacle(None, Weighted(tiny(), LatentStates(S=4)))


def test_a_loss_that_is_not_finite_is_skipped_by_its_own_expert_only(argv, tmp_path, capsys):
    ends = together([argv(tmp_path, k, 5, **PLAIN) for k in (1, 2)], [quiet(Spoils()), quiet()], stacked=True)
    assert ends == [None] * 2
    assert capsys.readouterr().err.count("the loss is not finite, the step was skipped. Samples: ") == 2
    assert (tmp_path / "1" / RECORD).exists()
    for k, spoils in ((1, [Spoils()]), (2, [])):
        run(argv(tmp_path / "alone", k, 5, **PLAIN), quiet(*spoils))
        near(contents(tmp_path / str(k)), contents(tmp_path / "alone" / str(k)), k)


@pytest.mark.parametrize(
    ("words", "close"),
    [
        (["--trainer.accumulate_grad_batches", 2, "--data.batch_size", 3], CLOSE),
        (["--trainer.precision", "bf16-mixed"], 0.02),
    ],
)
def test_accumulated_gradients_and_bfloat16_are_stacked(words, close, argv, tmp_path):
    run(argv(tmp_path / "alone", 1, 3, *words, **PLAIN), quiet())
    assert together([argv(tmp_path, k, 3, *words, **PLAIN) for k in (1, 2)], stacked=True) == [None] * 2
    assert (tmp_path / "1" / RECORD).exists()
    near(contents(tmp_path / "1"), contents(tmp_path / "alone" / "1"), "", near=close)
