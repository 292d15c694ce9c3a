"""Checkpoint files under faults: kill -9, loss of power, a full disk, flipped bits, and content that is not data.

Each fault of a file is tried on the same few checkpoints.
"""

import errno
import io
import itertools
import json
import os
import pickle
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from faulty import state

from lightning_tdisent import finite
from lightning_tdisent.errors import Halted, InputError
from lightning_tdisent.lit import checkpoints
from lightning_tdisent.lit.checkpoints import DurableIO, load, newest, non_finite, remove_orphans
from lightning_tdisent.lit.datamodule import ImageShards
from lightning_tdisent.lit.inference import Composite
from lightning_tdisent.lit.modules import Diffusion
from lightning_tdisent.runs import checkpoints_in

SMALL = 20  # kilobytes


def save(folder, step, kilobytes=SMALL):
    path = folder / f"step-{step}.ckpt"
    DurableIO().save_checkpoint(state(step, kilobytes), path)
    return path


def step_of(path):
    """Return the step of a checkpoint, after checking that all its content is of this step."""
    values = torch.cat([t.flatten() for _, t in finite.tensors(load(path))]).unique()
    assert len(values) == 1
    return int(values)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# 1. kill -9


def another_file_system(folder):
    """Return a writable folder on another file system than the given one."""
    for other in ("/dev/shm", "/run/shm", "/tmp", "/var/tmp", Path.home(), "/run", "/mnt"):  # noqa: S108
        if os.path.isdir(other) and os.access(other, os.W_OK) and os.stat(other).st_dev != os.stat(folder).st_dev:
            return other
    raise AssertionError("there is no second file system to write to: this cannot be tested here")


def test_kill_9_in_the_middle_of_saves_loses_no_finished_one(start, size, figures, tmp_path):
    rng, trials, folder = np.random.default_rng(1), size(500, 30), tmp_path / "checkpoints"
    save(folder, 0, 3000)
    begin = time.monotonic()
    for step in range(1, 6):
        save(tmp_path / "scratch", step, 3000)
    cycle = (time.monotonic() - begin) / 5
    struck = wrong = unreadable = orphans = last = 0
    with tempfile.TemporaryDirectory(dir=another_file_system(tmp_path)) as elsewhere:
        here = tmp_path / "tmp"
        here.mkdir()
        for trial in range(trials):
            tmpdir, noted = (here, Path(elsewhere))[trial % 2], tmp_path / f"noted-{trial}"
            env = {"TMPDIR": str(tmpdir)}
            process = start(call="saving", args=[str(folder), last + 1, str(noted)], env=env, fresh=False)
            time.sleep(rng.uniform(0, 3 * cycle))
            assert process.end() == -9, process.text
            finished = [int(n) for n in noted.read_text(encoding="utf-8").split()] if noted.exists() else []
            done = finished[-1] if finished else last
            path, manifest, bad = newest(folder)
            try:
                last = step_of(path)
            except InputError:
                unreadable += 1
            # a save may be finished but not recorded, and one more may lack its manifest
            wrong += not (manifest["step"] == last and last in (done, done + 1) and path.name == f"step-{last}.ckpt")
            assert all(f"step-{done + 1}.ckpt" in why for why in bad)
            half = list(folder.glob(".*.tmp"))
            struck, orphans = struck + bool(half or bad), orphans + len(half)
            remove_orphans(folder)
            assert not list(folder.glob(".*"))
            assert not any(tmpdir.iterdir())
    figures("kill9", trials=trials, struck_in_a_save=struck, wrong=wrong, unreadable=unreadable, orphans_swept=orphans)
    assert (wrong, unreadable) == (0, 0)
    assert struck >= trials // 5


# 2. loss of power


class Disk:
    """Model of a disk: bytes and names of a folder at their last fsync, and any subset of the changes since then."""

    def __init__(self, folder, monkeypatch):
        self.log, self.at = [], lambda: None
        # bytes, current names, durable names, and changes of names since these were durable
        self.files, self.names, self.kept, self.pending = {}, {}, {}, []
        self.count = itertools.count()
        real = {name: getattr(os, name) for name in ("fsync", "replace", "unlink")}
        opened = Path.open

        def fsync(fd):
            path = Path(os.readlink(f"/proc/self/fd/{fd}"))
            real["fsync"](fd)
            if path == folder:
                self.kept, self.pending = dict(self.names), []
                self.note("fsync folder")
            else:
                self.files[self.names[path.name]] = path.read_bytes()
                self.note("fsync", path)

        def replace(source, target):
            real["replace"](source, target)
            source, target = Path(source), Path(target)
            one = self.names.pop(source.name)
            self.names[target.name] = one
            self.pending.append({source.name: None, target.name: one})
            self.note("rename", source, target)

        def unlink(path, **_):
            real["unlink"](path)
            del self.names[Path(path).name]
            self.pending.append({Path(path).name: None})
            self.note("unlink", Path(path))

        def open_(path, mode="r", *args, **kwargs):
            file = opened(path, mode, *args, **kwargs)
            if "r" not in mode and path.parent == folder:
                assert "x" in mode  # never an existing file
                one = next(self.count)
                self.names[path.name], self.files[one] = one, b""
                self.pending.append({path.name: one})
                self.note("create", path)
            return file

        def never(*_, **__):
            raise AssertionError("not among the calls that are watched")

        for name, function in (("fsync", fsync), ("replace", replace), ("unlink", unlink)):
            monkeypatch.setattr(os, name, function)
        for name in ("rename", "remove", "truncate"):
            monkeypatch.setattr(os, name, never)
        monkeypatch.setattr(Path, "open", open_)

    def note(self, what, *paths):
        self.log.append((what, *(self.kind(p.name) for p in paths)))
        self.at()

    @staticmethod
    def kind(name):
        """Return checkpoint, manifest or pointer, with a star for a temporary file."""
        star = "*" * name.endswith(".tmp")
        name = name.strip(".")
        kind = "pointer" if name.startswith("newest.json") else "manifest" if ".ckpt.json" in name else "checkpoint"
        return kind + star

    def after_a_cut(self):
        """Yield all folders that a loss of power may leave: any changes of names since the last fsync may be lost."""
        for kept in itertools.product((True, False), repeat=len(self.pending)):
            found = dict(self.kept)
            for change in itertools.compress(self.pending, kept):
                found.update(change)
            yield {name: self.files[one] for name, one in found.items() if one is not None}


ORDER = [
    ("create", "checkpoint*"), ("fsync", "checkpoint*"), ("rename", "checkpoint*", "checkpoint"), ("fsync folder",),
    ("create", "manifest*"), ("fsync", "manifest*"), ("rename", "manifest*", "manifest"), ("fsync folder",),
    ("create", "pointer*"), ("fsync", "pointer*"), ("rename", "pointer*", "pointer"), ("fsync folder",),
]  # fmt: skip


def test_bytes_are_on_the_disk_before_their_name_and_the_manifest_follows_both(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        disk = Disk(tmp_path, patch)
        save(tmp_path, 1)
        assert disk.log == ORDER
        disk.log.clear()
        save(tmp_path, 1)  # over an old one: its manifest is removed before its bytes change
        assert disk.log == [*ORDER[:2], ("unlink", "manifest"), *ORDER[2:]]
        disk.log.clear()
        DurableIO().remove_checkpoint(tmp_path / "step-1.ckpt")
        assert disk.log == [("unlink", "manifest"), ("unlink", "checkpoint")]


def test_a_loss_of_power_at_any_moment_leaves_the_last_finished_checkpoint(tmp_path, monkeypatch, figures):
    folder, cuts = tmp_path / "watched", 0
    folder.mkdir()
    left = tmp_path / "left"
    finished, states = 0, {}
    with monkeypatch.context() as patch:
        disk = Disk(folder, patch)
        # the states that may be left at each moment, with the oldest step that must be found
        disk.at = lambda: states.update(
            {json.dumps({k: v.hex() for k, v in s.items()}): finished for s in disk.after_a_cut()}
        )
        for step in range(1, 11):
            save(folder, step, 1)
            finished = step
            disk.at()
            for old in checkpoints_in(folder)[:-2]:
                DurableIO().remove_checkpoint(old)
    for content, least in states.items():
        left.mkdir()
        for name, data in json.loads(content).items():
            (left / name).write_bytes(bytes.fromhex(data))
        path, manifest, _ = newest(left)
        cuts += 1
        assert least == 0 or (path is not None and step_of(path) == manifest["step"] in (least, least + 1)), names(left)
        remove_orphans(left)
        for file in left.iterdir():
            file.unlink()
        left.rmdir()
    figures("power_cut", states=cuts, lost=0)
    assert cuts > 100


# 3. a full disk


class Full(io.FileIO):
    """A file on a disk with room for a limited number of bytes."""

    room = 0

    def write(self, data):
        data = memoryview(data).cast("B")
        if not Full.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = data[: Full.room]
        Full.room -= len(part)
        return super().write(part)


def test_a_disk_that_is_full_after_any_number_of_bytes_halts_and_leaves_what_was_there(tmp_path, monkeypatch, figures):
    before = save(tmp_path, 1)
    there, size = names(tmp_path), before.stat().st_size
    opened = Path.open

    def open_(path, mode="r", *args, **kwargs):
        if "x" not in mode:
            return opened(path, mode, *args, **kwargs)
        return Full(path, mode) if kwargs.get("buffering") == 0 else io.BufferedWriter(Full(path, mode))

    rooms = [*range(0, size, 997), size - 1, size, size + 1, size + 200]  # the last two: no room for the manifest
    for room in rooms:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", open_)
            Full.room = room
            with pytest.raises(Halted, match=r"step-2.ckpt.* step 2 .*No space left on device") as halted:
                save(tmp_path, 2)
        assert "\n" not in str(halted.value)
        assert step_of(before) == 1
        assert newest(tmp_path)[0] == before
        assert names(tmp_path) == there
    figures("enospc", trials=len(rooms), lost=0)


@pytest.mark.parametrize("kilobytes", [1, 100, 3000])
def test_a_file_larger_than_its_limit_halts_and_leaves_what_was_there(kilobytes, start, tmp_path):
    before = save(tmp_path, 1)
    there = names(tmp_path)
    process = start(call="save_one", args=[str(tmp_path), 2, kilobytes], fsize=kilobytes * 900, fresh=False)
    assert process.wait() == 0
    assert process.text.startswith(
        f"Halted: {tmp_path}/step-2.ckpt: the checkpoint of step 2 cannot be written: File too"
    )
    assert process.text.count("\n") == 1
    assert names(tmp_path) == there
    assert newest(tmp_path)[0] == before
    assert step_of(before) == 1


FAILING = {"fsync": errno.EIO, "replace": errno.EROFS, "pread": errno.EIO}


@pytest.mark.parametrize("name", FAILING)
def test_a_disk_that_fails_at_any_call_halts_and_leaves_what_was_there(name, tmp_path, monkeypatch):
    before, number = save(tmp_path, 1), FAILING[name]
    for good in itertools.count():  # number of calls that succeed before one fails
        real, calls = getattr(os, name), itertools.count()

        def call(*args, real=real, calls=calls, good=good, **kwargs):
            if next(calls) == good:
                raise OSError(number, os.strerror(number))
            return real(*args, **kwargs)

        said = None
        with monkeypatch.context() as patch:
            patch.setattr(os, name, call)
            try:
                save(tmp_path, 2)
            except Halted as halted:
                said = str(halted)
        if said is None:
            break
        assert f"step-2.ckpt: the checkpoint of step 2 cannot be written: {os.strerror(number)}" in said
        assert not list(tmp_path.glob(".*"))
        assert step_of(before) == 1
        assert step_of(newest(tmp_path)[0]) in (1, 2)
        if path := next(tmp_path.glob("step-2.ckpt"), None):
            DurableIO().remove_checkpoint(path)
    assert good == {"fsync": 6, "replace": 3}.get(name, good) > 0
    assert step_of(newest(tmp_path)[0]) == 2


def test_a_disk_that_gives_back_other_bytes_halts(tmp_path, monkeypatch):
    before, real = save(tmp_path, 1), os.pread

    def pread(fd, size, at):
        data = bytearray(real(fd, size, at))
        if at > 5000 and size > 500:
            data[size // 2] ^= 4
        return bytes(data)

    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(Halted, match=r"step-2.ckpt: .*read back differ from those written"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert newest(tmp_path)[0] == before
    assert not list(tmp_path.glob(".*"))


def test_a_real_full_disk_halts_and_leaves_what_was_there(start, small_disk):
    if disk := small_disk(1_000_000):
        place, holder, seen = disk
        for step, kilobytes in ((1, 300), (2, 300), (3, 900)):
            process = start(call="save_one", args=[str(place), step, kilobytes], enter=holder, fresh=False)
            assert process.wait() == 0, process.text
            said = f"Halted: {place}/step-3.ckpt: the checkpoint of step 3 cannot be written: No space left on device"
            assert process.text.startswith(said if step == 3 else "saved")
        assert names(seen) == ["newest.json", "step-1.ckpt", "step-1.ckpt.json", "step-2.ckpt", "step-2.ckpt.json"]
        assert step_of(newest(seen)[0]) == 2


# 5. flipped bits and lost bytes


def flip(path, bit):
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (value,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([value ^ 1 << bit % 8]))


def test_every_flipped_bit_of_a_checkpoint_is_detected(tmp_path, size, figures):
    rng, trials = np.random.default_rng(5), size(1000, 100)
    save(tmp_path, 1)
    path = save(tmp_path, 2, 2400)
    bits, missed = 8 * path.stat().st_size, 0
    for _ in range(trials):
        bit = int(rng.integers(bits))
        flip(path, bit)
        found, _, bad = newest(tmp_path)
        missed += found == path
        assert missed or [why.startswith(f"{path}: damaged: sha256") for why in bad] == [True]
        flip(path, bit)
    figures("bit_flips", trials=trials, missed=missed)
    assert missed == 0
    assert step_of(newest(tmp_path)[0]) == 2


def test_every_bit_of_a_manifest_flipped_is_detected_or_means_nothing(tmp_path, figures):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    file = path.with_name("step-2.ckpt.json")
    right, bits, passed = json.loads(file.read_text(encoding="utf-8")), 8 * file.stat().st_size, 0
    for bit in range(bits):
        flip(file, bit)
        found, _, bad = newest(tmp_path)
        if found == path:
            passed += 1
            assert json.loads(file.read_bytes()) == right
        else:
            assert found.name == "step-1.ckpt"
            (why,) = bad
            assert why.startswith((f"{path}: its manifest", f"{path}: damaged", f"{file}: ")), why
        flip(file, bit)
    figures("manifest_flips", trials=bits, meaning_nothing=passed, missed=0)
    assert passed < bits // 20


def test_no_flipped_bit_of_the_pointer_leads_to_another_file(tmp_path, figures):
    save(tmp_path, 1)
    path, file = save(tmp_path, 2), tmp_path / "newest.json"
    bits = 8 * file.stat().st_size
    for bit in range(bits):
        flip(file, bit)
        assert newest(tmp_path)[::2] == (path, [])
        flip(file, bit)
    figures("pointer_flips", trials=bits, wrong=0)


def test_files_cut_short_are_detected_and_the_one_before_is_found(tmp_path, size, figures):
    rng, trials = np.random.default_rng(6), size(300, 40)
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    whole = path.read_bytes()
    card = path.with_name("step-2.ckpt.json")
    described = card.read_bytes()
    for file, content in ((path, whole), (card, described)):
        lengths = [0, 1, len(content) - 1, *(int(rng.integers(len(content))) for _ in range(trials))]
        for length in lengths:
            file.write_bytes(content[:length])
            found, _, bad = newest(tmp_path)
            assert found.name == "step-1.ckpt"
            assert len(bad) == 1
            assert bad[0].startswith(f"{path}: ")
            if file == path:
                assert f"{length} bytes, its manifest says {len(whole)}" in bad[0]
        file.write_bytes(content)
    card.unlink()
    assert newest(tmp_path)[2] == [f"{path}: has no manifest: it was cut short, or copied without it"]
    figures("cut_short", trials=2 * (trials + 3), missed=0)


def test_a_damaged_file_without_a_manifest_is_refused_by_name_or_loads(tmp_path, size, figures):
    rng, trials = np.random.default_rng(7), size(2000, 200)
    refused = loaded = 0
    path = save(tmp_path, 1, 2)
    path.with_name("step-1.ckpt.json").unlink()
    whole = path.read_bytes()
    for trial in range(trials):
        content = bytearray(whole)
        content[int(rng.integers(len(whole)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(content if trial % 4 else content[: int(rng.integers(len(whole)))])
        try:
            load(path)
            loaded += 1
        except InputError as error:
            refused += str(error).startswith(f"{path}: not loaded: ")
    figures("unlisted_damage", trials=trials, refused=refused)
    assert refused + loaded == trials
    assert refused > trials // 5


# 6. values that are not finite


PLACES = {
    "state_dict.layer1.weight": lambda s: s["state_dict"]["layer1.weight"],
    "ema.weights.layer3.weight": lambda s: s["ema"]["weights"]["layer3.weight"],
    "optimizer_states.0.state.2.exp_avg_sq": lambda s: s["optimizer_states"][0]["state"][2]["exp_avg_sq"],
}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_never_saved_and_is_named(name, value, tmp_path):
    before, content = save(tmp_path, 1), state(2, SMALL)
    PLACES[name](content)[-1] = value
    assert non_finite(content) == [name]
    with pytest.raises(Halted, match=rf"step-2.ckpt: not saved at step 2: {name} \(1 in all\)"):
        DurableIO().save_checkpoint(content, tmp_path / "step-2.ckpt")
    assert names(tmp_path) == ["newest.json", "step-1.ckpt", "step-1.ckpt.json"]
    assert step_of(before) == 1


def test_large_finite_values_are_saved(tmp_path):
    content = state(2, SMALL)
    content["state_dict"]["layer0.weight"][:] = 3e38  # their sum is not finite
    content["state_dict"]["half"] = torch.full((100,), 6e4, dtype=torch.float16)
    content["ema"]["weights"]["layer0.weight"][:2] = torch.tensor([3e38, -3e38])
    assert non_finite(content) == []
    DurableIO().save_checkpoint(content, tmp_path / "step-2.ckpt")
    assert torch.equal(load(tmp_path / "step-2.ckpt")["state_dict"]["half"], content["state_dict"]["half"])


# 10. content that is more than data, and files that are elsewhere


class Payload:
    """Create a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


LOADERS = {
    "load": load,
    "plugin": DurableIO().load_checkpoint,
    "module": Diffusion.load_from_checkpoint,
    "composite": Composite.load_from_checkpoint,
    "data": ImageShards.load_from_checkpoint,
}


@pytest.mark.parametrize("loader", LOADERS)
def test_a_malicious_pickle_is_refused_by_name_and_not_run(loader, tmp_path):
    marker = tmp_path / "marker"
    new, old = tmp_path / "new.ckpt", tmp_path / "old.ckpt"
    torch.save({"state_dict": {}, "evil": Payload(marker)}, new)
    old.write_bytes(pickle.dumps({"evil": Payload(marker)}, 2))  # a bare pickle
    torch.load(new, weights_only=False)
    marker.rmdir()  # the payload works
    for path, why in ((new, "(posix|nt|os).mkdir"), (old, "no checkpoint that torch has written")):
        with pytest.raises(InputError, match=rf"{path.name}: .*{why}"):
            LOADERS[loader](path)
        assert not marker.exists()


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("path", ["http://127.0.0.1:9/step-1.ckpt", "s3://bucket/step-1.ckpt", "file:///step-1.ckpt"])
def test_a_checkpoint_elsewhere_is_refused(loader, path):
    with pytest.raises(InputError, match="checkpoints are local files"):
        LOADERS[loader](path)


def test_what_is_pruned_between_listing_and_reading_is_listed_again(tmp_path, monkeypatch):
    paths = [save(tmp_path, step) for step in (1, 2)]
    listed, calls = checkpoints.checkpoints_in, []

    def before_the_next_save(folder):
        calls.append(folder)
        return [tmp_path / "step-0.ckpt"] if len(calls) == 1 else listed(folder)

    monkeypatch.setattr(checkpoints, "checkpoints_in", before_the_next_save)
    assert newest(tmp_path)[::2] == (paths[1], [])


def test_a_checkpoint_without_a_manifest_is_passed_over_and_loads_by_name(tmp_path):
    before, path = save(tmp_path, 1), save(tmp_path, 2)
    path.with_name("step-2.ckpt.json").unlink()
    assert newest(tmp_path)[0] == before
    assert step_of(path) == 2
