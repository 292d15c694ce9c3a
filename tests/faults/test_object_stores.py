"""Faults of object stores: ignored conditions, slow, silent and cut connections."""

import json
import re
import time
from pathlib import Path

import fsspec
import pytest
import s3fs
import yaml
from fsspec.implementations.memory import MemoryFileSystem
from object_store import BUCKET, Network, client
from processes import CONFIG, FULL, ROOT, TINY, alive, until

from lightning_tdisent.cli import main
from lightning_tdisent.cli.trainings import open_fleet
from lightning_tdisent.errors import InputError, Lost
from lightning_tdisent.files import guarded
from lightning_tdisent.fleet import lease
from lightning_tdisent.fleet.lease import Watch, current, take
from lightning_tdisent.fleet.mirror import POINTER, Mirror
from lightning_tdisent.fleet.store import Store

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # connections that a test has cut


@pytest.fixture
def networks(monkeypatch):
    """Return a function that opens networks to one empty bucket; the first is used by this process."""
    made = []

    def make():
        made.append(Network())
        return made[-1]

    first = make()
    client(first).create_bucket(Bucket=BUCKET)
    for key, value in first.env.items():
        monkeypatch.setenv(key, value)
    s3fs.S3FileSystem.clear_instance_cache()
    yield first, make
    first.silent.clear()
    s3 = client(first)
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
        for entry in page.get("Contents", []):
            s3.delete_object(Bucket=BUCKET, Key=entry["Key"])
    s3.delete_bucket(Bucket=BUCKET)
    for network in made:
        network.close()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def network(networks):
    return networks[0]


@pytest.fixture
def store(network):
    return Store(f"s3://{BUCKET}/fleet")


def test_a_store_does_as_a_folder_does(store, tmp_path):
    for place in (Store(tmp_path / "folder"), store):
        place.check()
        assert place.names("leases") == []
        assert place.read("leases/a") is None
        assert place.create("leases/a", b"1")
        assert not place.create("leases/a", b"2")
        place.write("leases/b", b"3")
        assert place.names("leases") == ["a", "b"]
        assert (place.read("leases/a"), place.read("leases/b", large=True)) == (b"1", b"3")
        place.remove("leases/a")
        place.remove("leases/a")
        assert place.names("leases") == ["b"]
        assert place.names("") == []  # the check leaves nothing


def test_a_store_that_ignores_create_if_absent_is_refused(network, store):
    store.check()
    network.careless = True
    with pytest.raises(InputError, match=rf"s3://{BUCKET}/fleet: this store cannot create a file only if it is not"):
        store.check()
    assert store.names("") == []


def test_a_first_put_whose_answer_is_lost_is_no_other_worker_s(network, store):
    network.cut = [".writable"]
    store.check()
    assert network.cut == []


def test_what_other_processes_do_not_see_is_refused(network):
    fsspec.register_implementation("memory", MemoryFileSystem, clobber=True)
    for where, why in (
        ("memory://fleet", "is the memory of one process"),
        (f"simplecache::s3://{BUCKET}/fleet", "others would not see what is cached here"),
        (f"dir::s3://{BUCKET}/fleet", "others would not see what is cached here"),
        (f"{network.url}/{BUCKET}/fleet", "cannot be written: ClientResponseError: 403"),
    ):
        with pytest.raises(InputError, match=why):
            Store(where).check()


def test_a_url_that_a_path_has_taken_a_slash_of_makes_no_folder():
    with pytest.raises(InputError, match=r"s3:/bucket/fleet: not a URL: it has lost a slash"):
        Store(Path("s3://bucket/fleet"))


def test_a_fleet_is_not_planned_where_it_could_not_be_run(network, tmp_path, capsys):
    network.careless = True
    file = tmp_path / "fleet.yaml"
    file.write_text(json.dumps({"configs": [str(ROOT / CONFIG)], "batch": 32, "budget": 64}), encoding="utf-8")
    assert main(["fleet", "plan", "--config", str(file), "--out", f"s3://{BUCKET}/fleet"]) == 2
    assert re.fullmatch(rf"error: s3://{BUCKET}/fleet: this store cannot create .*\n", capsys.readouterr().err)
    assert Store(f"s3://{BUCKET}/fleet").names("") == []


@pytest.mark.parametrize(
    "ask",
    [
        lambda store: store.names("leases"),
        lambda store: store.read("a"),
        lambda store: store.read("a", large=True),
        lambda store: store.write("a", b"1"),
        lambda store: store.create("b", b"1"),
        lambda store: store.remove("a"),
    ],
)
def test_a_silent_network_is_an_error_soon(ask, network, store):
    store.write("a", b"0")
    store.patience = 0.3
    network.silent.set()
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=rf"no answer from s3://{BUCKET}/fleet in 0 s"):
        ask(store)
    assert time.monotonic() - begun < 2
    network.silent.clear()
    store.patience = 10
    assert store.read("a") == b"0"


def test_a_large_file_has_longer(network, store, monkeypatch):
    monkeypatch.setattr("lightning_tdisent.fleet.store.SLOWEST", 1000)
    store.write("a", b"0")
    store.patience, network.delay = 0.3, 0.6
    store.write("a", bytes(10_000))
    with pytest.raises(TimeoutError):
        store.write("b", b"0")


def test_what_is_being_sent_ends_with_the_lease(networks):
    mine, make = networks
    store, other = Store(f"s3://{BUCKET}/fleet"), client(make())
    held = take(store, "a", Watch(), ttl=2.0)
    held.check()
    store.wait_for(held.ttl / lease.BEATS)
    mine.silent.set()
    begun = time.monotonic()
    with pytest.raises(Lost, match=r"s3://bucket/fleet has not been reached for 2 s"):
        store.write("a/checkpoints/newest.json", bytes(2**24), check=held.check)  # its size allows a minute
    assert 1 < time.monotonic() - begun < 6
    content = json.dumps({"beat": 0, "host": "elsewhere/1"}).encode()
    other.put_object(Bucket=BUCKET, Key="fleet/leases/a.00002.json", Body=content)
    mine.silent.clear()
    with pytest.raises(Lost):
        held.check()
    held.release()
    assert store.read("a/checkpoints/newest.json") is None
    assert current(store, "a") == (2, json.loads(content))  # releasing did not change it


def test_what_is_being_brought_ends_with_the_lease(network, store, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_tdisent.fleet.store.SLOWEST", 1)  # 100 bytes may take 100 s
    training = Training(tmp_path / "e")
    training.save()
    Mirror(store, "e", tmp_path / "e").push(lambda quick: None)
    held = take(store, "a", Watch(), ttl=2.0)
    store.wait_for(held.ttl / lease.BEATS)

    def fall_silent(method, path):
        if (method, path[-5:]) == ("GET", ".ckpt"):
            network.silent.set()
            until(lambda: not network.silent.is_set())

    network.seen, begun = fall_silent, time.monotonic()
    with guarded(tmp_path / "b", held.check), pytest.raises(Lost, match="has not been reached for 2 s"):
        Mirror(store, "e", tmp_path / "b").pull()
    assert 1 < time.monotonic() - begun < 10
    assert not (tmp_path / "b" / POINTER).exists()
    network.silent.clear()
    held.release()


@pytest.mark.parametrize("times", [1, 20])
def test_a_cut_right_after_taking_a_lease_lets_nobody_wait(times, network, store):
    network.cut = ["leases/"] * times  # 20 are more than the retries of a client
    store.patience, watch, held = 2.0, Watch(), None
    for _ in range(times):
        try:
            held = take(store, "a", watch, ttl=60)
        except OSError:
            continue
        break
    assert held is not None
    assert held.number == 1
    store.patience, network.cut = 10.0, []
    assert take(store, "a", Watch(), ttl=60) is None
    held.release()
    assert take(store, "a", Watch(), ttl=60).number == 2


class Training:
    """A run folder whose checkpoints are written and removed."""

    def __init__(self, folder, keep=2):
        self.store, self.keep, self.steps = Store(folder), keep, []

    def save(self):
        step = len(self.steps) + 1
        self.steps.append(step)
        name = f"checkpoints/step-{step:09d}.ckpt"
        self.store.write(name, b"%d" % step * 100)
        self.store.write(f"{name}.json", b"{}")
        self.store.write(POINTER, json.dumps({"file": f"step-{step:09d}.ckpt", "step": step}).encode())
        for old in self.steps[: -self.keep]:
            self.store.remove(f"checkpoints/step-{old:09d}.ckpt.json")
            self.store.remove(f"checkpoints/step-{old:09d}.ckpt")


def pointed(s3):
    """Return the step of the pointer in the bucket, 0 if it has none; check that what it names exists."""
    keys = {entry["Key"] for entry in s3.list_objects_v2(Bucket=BUCKET).get("Contents", [])}
    if f"fleet/e/{POINTER}" not in keys:
        return 0
    pointer = json.loads(s3.get_object(Bucket=BUCKET, Key=f"fleet/e/{POINTER}")["Body"].read())
    checkpoint = f"fleet/e/checkpoints/{pointer['file']}"
    assert {checkpoint, f"{checkpoint}.json"} <= keys
    assert s3.get_object(Bucket=BUCKET, Key=checkpoint)["Body"].read() == b"%d" % pointer["step"] * 100
    return pointer["step"]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_store_slower_than_checkpoints_never_has_a_pointer_to_none(keep, networks, tmp_path):
    mine, make = networks
    other, training, seen = client(make()), Training(tmp_path / "e", keep), []

    def save_two(method, path):
        if method in ("PUT", "DELETE"):
            seen.append(pointed(other))
            if path.endswith(".ckpt") and method == "PUT":
                training.save()
                training.save()

    training.save()
    mine.seen = save_two
    mirror = Mirror(Store(f"s3://{BUCKET}/fleet"), "e", tmp_path / "e")
    for k in range(3):
        mirror.push(lambda quick: None)
        assert pointed(other) == 2 * k + 1  # the newest checkpoint when it began
    assert seen == sorted(seen)
    mine.seen = lambda method, path: None
    training.store.write("model.safetensors", b"weights")
    mirror.push(lambda quick: None)
    mirror.push(lambda quick: None)
    assert pointed(other) == 7
    kept = [f"checkpoints/step-{step:09d}.ckpt" for step in training.steps[-1:]]
    names = mirror.store.names("e/checkpoints")
    assert [f"checkpoints/{name}" for name in names if name.endswith(".ckpt")] == kept
    assert mirror.store.names("e") == ["model.safetensors"]


def test_a_checkpoint_whose_put_was_given_up_is_removed_once_another_is_there(network, tmp_path):
    training, store = Training(tmp_path / "e"), Store(f"s3://{BUCKET}/fleet")
    mirror = Mirror(store, "e", tmp_path / "e")
    training.save()
    store.patience, network.cut = 100.0, ["step-000000001.ckpt"] * 100

    def give_up(quick):
        if len(network.cut) < 100:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        mirror.push(give_up)
    network.cut = []
    assert store.names("e/checkpoints") == ["step-000000001.ckpt"]  # it has arrived
    for _ in range(3):
        training.save()
    mirror.push(lambda quick: None)
    assert store.names("e/checkpoints") == ["newest.json", "step-000000004.ckpt", "step-000000004.ckpt.json"]


def test_a_folder_that_was_removed_takes_nothing_from_the_store(network, tmp_path):
    training, store = Training(tmp_path / "e"), Store(f"s3://{BUCKET}/fleet")
    mirror = Mirror(store, "e", tmp_path / "e")
    training.save()
    training.store.write("config.yaml", b"{}")
    mirror.push(lambda quick: None)
    (tmp_path / "e").rename(tmp_path / "away")
    mirror.push(lambda quick: None)
    assert store.names("e") == ["config.yaml"]
    assert len(store.names("e/checkpoints")) == 3


def test_a_bucket_that_is_gone_is_an_error(tmp_path, network):
    training = Training(tmp_path / "e")
    training.save()
    with pytest.raises(FileNotFoundError):
        Mirror(Store("s3://nowhere/fleet"), "e", tmp_path / "e").push(lambda quick: None)


def test_a_new_machine_brings_what_the_store_has(network, tmp_path):
    training, store = Training(tmp_path / "e"), Store(f"s3://{BUCKET}/fleet")
    training.save()
    Mirror(store, "e", tmp_path / "e").push(lambda quick: None)
    mirror = Mirror(store, "e", tmp_path / "other")
    mirror.pull()
    assert (tmp_path / "other" / "checkpoints" / "step-000000001.ckpt").read_bytes() == b"1" * 100
    puts = []
    network.seen = lambda method, path: puts.append(path) if method == "PUT" else None
    mirror.push(lambda quick: None)
    assert puts == []


def planned(tmp_path, steps, every):
    words = dict(word.removeprefix("--").split("=", 1) for word in TINY)
    settings = {key: yaml.safe_load(value) for key, value in words.items() if key != "data.batch_size"}
    settings |= {"model.states.S": 2, "checkpoint.every": every, "trainer.val_check_interval": steps}
    content = {"configs": [str(ROOT / CONFIG)], "set": settings, "batch": 32, "budget": 2 * steps * 32}
    file, where = tmp_path / "fleet.yaml", f"s3://{BUCKET}/fleet"
    file.write_text(json.dumps(content), encoding="utf-8")
    assert main(["fleet", "plan", "--config", str(file), "--out", where]) == 0
    return where


def test_a_fleet_is_not_run_where_conditions_are_ignored(network, tmp_path, capsys):
    where = planned(tmp_path, 4, 2)
    capsys.readouterr()
    network.careless = True
    assert main(["fleet", "run", where, "--scratch", str(tmp_path / "here")]) == 2
    assert re.fullmatch(rf"error: {where}: this store cannot create a file only if .*\n", capsys.readouterr().err)
    assert Store(where).names("leases") == []
    assert not (tmp_path / "here").exists()


def test_a_fleet_planned_anew_at_a_url_takes_over_no_run_of_the_one_before(network, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TDISENT_CACHE", str(tmp_path / "cache"))
    where = planned(tmp_path, 100, 20)
    first, given = open_fleet(where).fleet.root, tmp_path / "given"
    assert open_fleet(where).fleet.root == first
    assert open_fleet(where, scratch=given).fleet.root == given
    planned(tmp_path, 100, 20)  # the same plan gives the same fleet
    assert open_fleet(where).fleet.root == first
    assert open_fleet(where, scratch=given).fleet.root == given
    Store(where).fs.rm(where, recursive=True)
    planned(tmp_path, 100, 20)
    assert open_fleet(where).fleet.root != first
    assert main(["fleet", "run", where, "--scratch", str(given)]) == 2
    assert f"--scratch {given}: holds runs of {where}, planned earlier or elsewhere" in capsys.readouterr().err


def test_a_run_that_began_here_and_another_that_went_on_elsewhere_do_not_mix(network, tmp_path, capsys):
    store = Store(f"s3://{BUCKET}/fleet")
    store.write("e/config.yaml", b"id: bbbb000011112222")
    store.write("e/checkpoints/step-000000200.ckpt", b"theirs")
    (tmp_path / "e" / "checkpoints").mkdir(parents=True)
    (tmp_path / "e" / "config.yaml").write_text("id: aaaa000011112222", encoding="utf-8")
    (tmp_path / "e" / "checkpoints" / "step-000000100.ckpt").write_bytes(b"mine")
    Mirror(store, "e", tmp_path / "e").pull()
    assert [p.name for p in (tmp_path / "e" / "checkpoints").iterdir()] == ["step-000000200.ckpt"]
    aside = tmp_path / ".e.aaaa000011112222"
    assert (aside / "checkpoints" / "step-000000100.ckpt").read_bytes() == b"mine"
    assert f"moved to {aside}" in capsys.readouterr().err
    Mirror(store, "e", tmp_path / "e").pull()
    assert len(list(tmp_path.glob(".e.*"))) == 1


@pytest.mark.skipif(not FULL, reason="takes a minute: make faults")
def test_two_launchers_train_each_expert_once(networks, start, figures, tmp_path):
    where, begun = planned(tmp_path, 100, 20), time.monotonic()
    words = ["fleet", "run", where, "--workers", 1, "--ttl", 30, "--scratch"]
    launchers = [start(*words, tmp_path / name, env=networks[1]().env) for name in "ab"]
    assert [launcher.wait(400) for launcher in launchers] == [0, 0], [launcher.text for launcher in launchers]
    for name in ("expert_001", "expert_002"):
        weights = [place for place in "ab" if (tmp_path / place / name / "model.safetensors").exists()]
        assert len(weights) == 1
        assert current(Store(where), name)[0] == 1
        content = (tmp_path / weights[0] / name / "model.safetensors").read_bytes()
        assert Store(where).read(f"{name}/model.safetensors", large=True) == content
    figures("two_launchers_of_a_store", experts=2, trained=2, seconds=round(time.monotonic() - begun))


@pytest.mark.skipif(not FULL, reason="takes a minute: make faults")
def test_a_holder_behind_a_silent_network_ends_and_leaves_its_successor_alone(networks, start, figures, tmp_path):
    mine, make = networks
    where, ttl, far = planned(tmp_path, 400, 20), 10, make()
    store, pointer = Store(where), f"expert_001/{POINTER}"
    words = ["fleet", "run", where, "--only", 1, "--ttl", ttl, "--scratch"]

    def step(content):
        return json.loads(content or b"{}").get("step", 0)

    holder = start(*words, tmp_path / "a", env=far.env)
    until(lambda: step(store.read(pointer)), holder, 200)
    far.silent.set()
    silent, before = time.monotonic(), step(store.read(pointer))
    successor = start(*words, tmp_path / "b", env=mine.env)
    assert holder.wait(120) == 1, holder.text
    took = time.monotonic() - silent
    assert "has not been reached for 10 s" in holder.text
    until(lambda: current(store, "expert_001")[0] == 2, successor, 120)
    far.silent.clear()
    steps = [before]
    while alive(successor.pid):
        steps.append(step(store.read(pointer)))
        time.sleep(0.2)
    assert successor.wait(10) == 0, successor.text
    steps.append(step(store.read(pointer)))
    assert steps == sorted(steps)
    assert steps[-1] == 400
    names = store.names("expert_001/checkpoints")
    assert {"newest.json", "step-000000400.ckpt", "step-000000400.ckpt.json"} <= set(names)
    figures("holder_behind_a_silent_network", ttl=ttl, ended_after=round(took), pointer_turned_back=0)
