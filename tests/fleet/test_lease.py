import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import time

import pytest

from lightning_tdisent import processes
from lightning_tdisent.errors import Lost
from lightning_tdisent.fleet import lease
from lightning_tdisent.fleet.lease import Lease, Watch, current, gone, me, take
from lightning_tdisent.fleet.store import Store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def content_of(store, job):
    return current(store, job)[1]


def write(store, job, number, **content):
    store.write(f"leases/{job}.{number:05d}.json", json.dumps(content).encode())


def test_one_holder_at_a_time_and_the_next_after_its_release(store):
    first = take(store, "expert_001", Watch())
    assert first is not None
    assert first.held
    assert take(store, "expert_001", Watch()) is None
    other = take(store, "expert_002", Watch())
    assert other is not None
    first.release()
    second = take(store, "expert_001", Watch())
    assert second is not None
    assert second.number == first.number + 1
    assert not first.held
    assert second.deaths == 0
    for held in (second, other):
        held.release()
    assert store.names("leases") == ["expert_001.00002.json", "expert_002.00001.json"]


def _race(folder, barrier, wins):
    barrier.wait()
    for round_ in range(20):
        if take(Store(folder), f"job{round_}", Watch()) is not None:
            wins.put(round_)
    barrier.wait()  # no process ends before all have tried


def test_exactly_one_of_many_processes_gets_each_job(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, wins = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_race, args=(tmp_path, barrier, wins)) for _ in range(4)]
    for process in processes:
        process.start()
    won = sorted(wins.get(timeout=30) for _ in range(20))
    for process in processes:
        process.join(30)
    assert won == list(range(20))
    assert wins.empty()


def test_a_dead_process_of_this_machine_is_detected_at_once(store):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    began = processes.began(child.pid)
    write(store, "a", 3, **{**me(), "pid": child.pid, "began": began}, beat=5, saved=7, deaths=1, ttl=60)
    assert take(store, "a", Watch(), saved=7) is None
    child.communicate(b"\n")
    assert gone(content_of(store, "a"))
    held = take(store, "a", Watch(), saved=7)
    assert held is not None
    assert held.number == 4
    assert held.deaths == 2  # no newer checkpoint since the previous holder started
    held.release()


def test_a_new_process_with_a_reused_pid_is_not_the_holder():
    mine = me()
    assert not gone(mine)
    assert gone({**mine, "began": mine["began"] - 1})
    assert not gone({**mine, "host": "elsewhere/1234", "began": 0, "pid": 2**22 - 1})


def test_a_silent_worker_of_another_machine_is_waited_for(store):
    now = 0.0
    watch = Watch(lambda: now)
    write(
        store, "a", 1, host="elsewhere/1", pid=1, began=1, beat=0, saved=0, deaths=4, ttl=60, written=time.time() + 9e9
    )
    assert take(store, "a", watch) is None  # the clock of the other machine is ignored
    now = 50.0
    write(store, "a", 1, host="elsewhere/1", pid=1, began=1, beat=1, saved=0, deaths=4, ttl=60, written=0)
    assert take(store, "a", watch) is None
    now = 109.0
    assert take(store, "a", watch) is None
    now = 111.0
    held = take(store, "a", watch, saved=10)
    assert held is not None
    assert held.deaths == 1  # the previous holder had saved a newer checkpoint
    held.release()


@pytest.mark.parametrize("spoiled", [b"", b"{", b"[1]", b"\xff"])
def test_a_damaged_lease_expires_after_its_ttl(spoiled, store):
    now = 0.0
    watch = Watch(lambda: now)
    store.write("leases/a.00001.json", spoiled)
    assert take(store, "a", watch) is None
    now = lease.TTL + 1
    held = take(store, "a", watch)
    assert held is not None
    held.release()


def test_heartbeats_carry_progress_and_detect_a_replacement(store):
    held = take(store, "a", Watch(), ttl=0.12)
    assert held is not None
    held.progress.update(step=3, loss=0.5)
    deadline = time.monotonic() + 10
    while content_of(store, "a")["beat"] < 2 or content_of(store, "a").get("step") != 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    write(store, "a", held.number + 1, host="elsewhere/1", pid=1, beat=0)
    while not held.lost:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(Lost, match="a: another worker holds its lease by now"):
        held.check(quick=True)
    held.release()
    assert content_of(store, "a")["host"] == "elsewhere/1"  # the release does not change the new holder's lease
    assert not content_of(store, "a").get("released")


def test_a_holder_without_its_store_loses_the_lease_after_the_ttl(tmp_path):
    held = take(Store(tmp_path / "shared"), "a", Watch(), ttl=0.2)
    assert held is not None

    def fail(*_):
        raise OSError("network is unreachable")

    held.store.names = fail
    deadline = time.monotonic() + 10
    while not held.lost:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "has not been reached for 0 s (network is unreachable)" in held.lost
    held.release()


def test_a_holder_that_was_suspended_checks_before_it_writes(store):
    now = 0.0
    write(store, "a", 1, **me(), beat=0)
    held = Lease(store, "a", 1, {**me(), "beat": 0, "deaths": 0}, ttl=600, clock=lambda: now)
    held.check(quick=True)
    now = 601.0  # no other worker has taken the job
    held.check(quick=True)
    write(store, "a", 2, host="elsewhere/1", pid=1, beat=0)
    with pytest.raises(Lost, match="another worker"):
        held.check(quick=True)
    held.release()
    assert not content_of(store, "a").get("released")


def test_a_running_holder_that_asks_the_store_learns_at_once(store):
    held = take(store, "a", Watch(), ttl=600)
    held.check()
    write(store, "a", held.number + 1, host="elsewhere/1", pid=1, beat=0)
    held.check(quick=True)  # does not ask the store: the last heartbeat is less than a ttl ago
    with pytest.raises(Lost, match="another worker"):
        held.check()
    with pytest.raises(Lost, match="another worker"):
        held.check(quick=True)
    held.release()


def test_a_lease_with_the_same_number_and_another_token_belongs_to_another_worker(store):
    held = take(store, "a", Watch(), ttl=600)
    write(store, "a", held.number, **me(), beat=0, token="f" * 16)
    with pytest.raises(Lost, match="another worker"):
        held.check()
    held.release()


def test_a_removed_folder_of_a_store_is_not_created_again(tmp_path):
    place = Store(tmp_path / "fleet")
    place.write("plan", b"1")
    (tmp_path / "fleet").rename(tmp_path / "moved")
    for act in (place.write, place.create):
        with pytest.raises(Lost, match="fleet: no longer exists: it was removed or moved"):
            act("leases/a", b"2")
    assert not (tmp_path / "fleet").exists()
    assert place.read("plan") is None


def test_a_job_counts_as_held_for_the_ttl_if_the_store_does_not_answer(store):
    now = 0.0
    held = Lease(store, "a", 1, {**me(), "beat": 0, "deaths": 0}, ttl=600, clock=lambda: now)

    def fail(*_):
        raise OSError("timed out")

    store.names = fail
    held.check()
    now = 601.0
    with pytest.raises(Lost, match=r"not been reached for 600 s \(timed out"):
        held.check()
    held.release()


@pytest.mark.parametrize("arrived", [True, False])
def test_a_worker_disconnected_while_it_takes_a_lease_does_not_wait_for_itself(arrived, store, monkeypatch):
    watch, create = Watch(), store.create

    def cut(name, content):
        if arrived:
            create(name, content)
        raise OSError("connection reset")

    monkeypatch.setattr(store, "create", cut)
    with pytest.raises(OSError, match="reset"):
        take(store, "a", watch)
    monkeypatch.setattr(store, "create", create)
    held = take(store, "a", watch)
    assert held is not None
    assert held.number == 1
    assert take(store, "a", watch) is None
    held.release()


def test_a_request_that_the_client_repeated_is_not_another_worker_s(store, monkeypatch):
    create = store.create
    monkeypatch.setattr(store, "create", lambda *args: create(*args) and create(*args))
    held = take(store, "a", Watch())
    assert held is not None
    held.release()


def test_an_outdated_listing_cannot_take_an_old_number(store, monkeypatch):
    write(store, "a", 5, **me(), beat=0, ttl=60)
    answers = itertools.chain([(3, {"released": True})], itertools.repeat(None))
    true = lease.current

    def stale(*args):
        return next(answers) or true(*args)

    monkeypatch.setattr(lease, "current", stale)
    assert take(store, "a", Watch()) is None
    assert store.names("leases") == ["a.00005.json"]


def test_jobs_whose_names_start_alike_have_separate_leases(store):
    write(store, "expert_1", 4, **me(), beat=0)
    write(store, "expert_1.2", 9, **me(), beat=0)
    assert current(store, "expert_1")[0] == 4
    assert current(store, "expert_1.2")[0] == 9
    assert current(store, "expert") == (0, None)
    assert os.getpid() == current(store, "expert_1")[1]["pid"]
