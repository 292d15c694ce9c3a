"""Fleets whose workers are killed: every expert must end as if nothing had been."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import time

import pytest
import torch
import yaml
from processes import CONFIG, FULL, ROOT, TINY, alive, until
from safetensors.torch import load_file

from lightning_tdisent.fleet.lease import current, gone
from lightning_tdisent.fleet.store import Store

EXPERTS, STEPS = 4, 600 if FULL else 80  # enough for 20 kills


@pytest.fixture
def fleet(start, tmp_path):
    """Plan a fleet of 4 small experts; gives its folder."""

    def make(name, place=tmp_path, **options):
        words = dict(word.removeprefix("--").split("=", 1) for word in TINY)
        settings = {key: yaml.safe_load(value) for key, value in words.items() if key != "data.batch_size"}
        settings |= {"model.states.S": EXPERTS, "checkpoint.every": 10 if FULL else 3, "trainer.val_check_interval": 10}
        content = {"configs": [str(ROOT / CONFIG)], "set": settings, "batch": 32, "budget": EXPERTS * STEPS * 32}
        file = tmp_path / "fleet.yaml"
        file.write_text(json.dumps(content))
        planned = start("fleet", "plan", "--config", file, "--out", place / name, **options)
        assert planned.wait() == 0, planned.text
        return place / name

    return make


def processes_of(folder):
    """The processes that hold leases now."""
    names = [f"expert_{k:03d}" for k in range(1, EXPERTS + 1)]
    held = [current(Store(folder), name)[1] for name in names]
    return [content["pid"] for content in held if content and not gone(content)]


def weights(folder):
    return {k: load_file(folder / f"expert_{k:03d}" / "model.safetensors") for k in range(1, EXPERTS + 1)}


def test_a_fleet_killed_at_random_ends_as_the_unbroken_one(fleet, start, size, figures):
    trials, chance = size(20, 2), random.Random(5)  # noqa: S311
    whole, broken = fleet("whole"), fleet("broken")
    assert start("fleet", "run", whole, "--workers", 2).wait(300) == 0
    killed = {"launcher": 0, "worker": 0, "all": 0}
    running = start("fleet", "run", broken, "--workers", 2)
    while (trial := sum(killed.values())) < trials:
        until(lambda pid=running.pid: processes_of(broken) or not alive(pid))
        time.sleep(chance.uniform(0, size(6, 3)))
        holders = processes_of(broken)
        if not alive(running.pid):
            break
        if not holders:  # between two trainings
            continue
        what = ("worker", "all", "launcher")[trial % 3]
        killed[what] += 1
        if what == "worker":  # the launcher replaces it
            os.kill(chance.choice(holders), signal.SIGKILL)
            continue
        if what == "all":
            os.killpg(running.pid, signal.SIGKILL)
        running.end(signal.SIGKILL)  # its workers save and go
        running = start("fleet", "run", broken, "--workers", 2)
    given_up = 0
    while running.wait(600) and "died 5 times in a row without saving anything" in running.text and given_up < 3:
        given_up += 1  # on a slow machine kills come faster than checkpoints; who is told so, starts it again
        running = start("fleet", "run", broken, "--workers", 2)
    assert running.wait(600) == 0, running.text
    assert sum(killed.values()) == trials
    a, b = weights(whole), weights(broken)
    assert all(torch.equal(a[k][name], b[k][name]) for k in a for name in a[k])
    figures("killed_fleet", **killed, given_up=given_up, experts=EXPERTS, different=0)


def test_two_launchers_share_one_fleet_without_training_anything_twice(fleet, start):
    folder = fleet("shared")
    both = [start("fleet", "run", folder, "--workers", 1) for _ in range(2)]
    assert [one.wait(300) for one in both] == [0, 0], "".join(one.text for one in both)
    for k in range(1, EXPERTS + 1):
        log = (folder / f"expert_{k:03d}" / "log.txt").read_text()
        assert "going on" not in log
        assert current(Store(folder), f"expert_{k:03d}")[0] == 1


def test_a_real_full_disk_is_named_with_its_expert_and_loses_nothing(fleet, start, small_disk, tmp_path):
    if disk := small_disk(12_000_000):
        place, holder, seen = disk
        folder, whole = fleet("broken", place, enter=holder), fleet("whole")
        run = ("fleet", "run", folder, "--workers", 2, "--ttl", 4)
        running = start(*run, enter=holder)
        until(lambda: list((seen / "broken").glob("expert_*/checkpoints/newest.json")), running)
        with contextlib.suppress(OSError), (seen / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        assert running.wait(120) in (1, 2, 75), running.text
        assert "Traceback" not in running.stderr, running.stderr
        named = set(re.findall(r"(expert_\d+): .*No space left on device", running.stderr))
        assert named, running.stderr
        (seen / "filler").unlink()
        again = start(*run, enter=holder)
        assert again.wait(300) == 0, again.text
        assert start("fleet", "run", whole, "--workers", 2).wait(300) == 0
        shutil.copytree(seen / "broken", tmp_path / "copy")
        a, b = weights(whole), weights(tmp_path / "copy")
        assert all(torch.equal(a[k][name], b[k][name]) for k in a for name in a[k])
