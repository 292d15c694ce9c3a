import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tdisent.cli import describe, main
from lightning_tdisent.errors import InputError
from lightning_tdisent.fleet.forecast import Load, Pool, footprint, lines, loads_of, schedule, speeds
from lightning_tdisent.fleet.state import FleetWork
from lightning_tdisent.models.card import read_card

POOL = Pool(workers=4, speed=100.0, start=5.0, job=2.0, validation=0.5)


def equal(n, images=1000.0, **more):
    return [Load(f"e{k}", images, **more) for k in range(n)]


def test_equal_jobs_run_in_turns_of_all_workers():
    said = schedule(equal(10, validations=4), POOL)
    assert said.wall == pytest.approx(5 + 3 * (2 + 4 * 0.5 + 10))
    assert said.busy == pytest.approx(10 * 14)
    assert said.images == 10_000


def test_needed_jobs_run_first_and_a_chain_uses_one_worker():
    chain = [Load("a", 100, ("b",)), Load("b", 100, ("c",)), Load("c", 100)]
    said = schedule(chain, POOL)
    assert said.order == ["c", "b", "a"]
    assert said.wall == pytest.approx(5 + 3 * 3)


def test_a_round_waits_for_the_slowest_job_of_the_round_before():
    loads = [Load("long", 1000), Load("short", 100), Load("long 1", 100, round=1), Load("short 1", 100, round=1)]
    assert schedule(loads, POOL).wall == pytest.approx(5 + 12 + 3)


def test_the_longest_job_starts_first():
    loads = [Load("s", 100), Load("t", 100), Load("long", 800)]
    assert schedule(loads, Pool(2, 100.0, 0.0, 0.0)).wall == pytest.approx(8)


@settings(max_examples=60, deadline=None)
@given(images=st.lists(st.floats(1, 1e5), min_size=1, max_size=20), workers=st.integers(1, 8))
def test_no_schedule_beats_its_bounds(images, workers):
    said = schedule([Load(f"e{k}", n) for k, n in enumerate(images)], Pool(workers, 100.0, 3.0, 1.0))
    work = [1 + n / 100 for n in images]
    assert said.wall >= 3 + max(max(work), sum(work) / workers) - 1e-6
    assert said.wall <= 3 + sum(work) / workers + max(work) + 1e-6  # list scheduling
    assert said.busy == pytest.approx(sum(work))
    assert len(said.order) == len(images)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"speed": 3}, "--simulate: give the number of workers"),
        ({"workers": 3}, "--simulate: the speed is not known"),
        ({"workers": 0}, "--simulate.workers: at least 1, got 0"),
        ({"workers": 2, "sped": 3}, "--simulate.sped: no such option. Did you mean 'speed'"),
        ({"workers": 0.5}, "--simulate.workers: an integer, at least 1, got 0.5"),
        ({"workers": math.inf}, "--simulate.workers: an integer, at least 1, got inf"),
        ({"workers": "two"}, "--simulate.workers: an integer, at least 1, got two"),
        ({"workers": 2, "start": -1}, "--simulate.start: at least 0, got -1"),
        ({"workers": 2, "speed": 0}, "--simulate.speed: above 0, got 0"),
    ],
)
def test_wrong_pools_are_refused(values, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Pool.of(values, {})


def test_the_loads_of_a_fleet_match_its_plan(planned, capsys):
    shared = {"shared": {"configs": ["shared.yaml"], "images": 80}}
    fleet = planned(start=shared, budget={"images": 80 + 240, "rule": "adaptive", "rounds": 2},
                    set={"trainer.val_check_interval": 1})  # fmt: skip
    facts = fleet.check(describe)
    loads = loads_of(fleet, facts)
    top = facts[0].flops
    images = [e.images * f.flops / top for e, f in zip(fleet.experts, facts[1:], strict=True)]
    assert [load.images for load in loads[1:5]] == pytest.approx(images)
    assert sum(load.images for load in loads) == pytest.approx(320)
    assert [load.round for load in loads] == [0] * 5 + [1] * 4 + [2] * 4
    disk, memory = footprint(facts, workers=2)
    assert disk == sum(4 * f.weights * 9 for f in facts)
    assert memory == pytest.approx(2 * 450e6 + 20 * (facts[0].weights + facts[1].weights))
    said = dict(lines(fleet, facts, Pool(2, 100.0)))
    assert said["total compute"].startswith("320 images")
    assert main(["fleet", "plan", str(fleet.root), "--simulate", "3", "--simulate.speed", "1e1"]) == 0
    assert "wall clock: " in capsys.readouterr().out


def test_the_speed_is_that_of_the_finished_jobs(planned, capsys):
    fleet = planned()
    facts, work = fleet.check(describe), FleetWork(fleet, describe)
    assert speeds(work, facts) == {}
    job, fact = work.jobs()[0], facts[0]
    torch.manual_seed(0)
    assert main(["fleet", "run", str(fleet.root), "--only", job.name]) == 0
    capsys.readouterr()
    card, top = read_card(job.folder / "model.safetensors"), max(fact.flops for fact in facts)
    found = speeds(work, facts)
    assert found["speed"] == pytest.approx(card.images_seen * fact.flops / top / card.seconds)
    assert found["validation"] > 0
    assert main(["fleet", "plan", str(fleet.root), "--simulate", "2"]) == 0
    assert f"workers: 2 of {found['speed']:,.0f} images/s" in capsys.readouterr().out
