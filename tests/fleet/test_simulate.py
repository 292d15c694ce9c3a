import math
import re
import time
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_tdisent.cli import describe, main
from lightning_tdisent.errors import InputError
from lightning_tdisent.files import write_whole
from lightning_tdisent.fleet.simulate import Load, Pool, footprint, lines, loads_of, rehearse, simulate

POOL = Pool(workers=4, speed=100.0, start=5.0, job=2.0, validation=0.5)


def equal(n, images=1000.0, **more):
    return [Load(f"e{k}", images, **more) for k in range(n)]


def test_equal_jobs_run_in_turns_of_all_workers():
    said = simulate(equal(10, validations=4), POOL)
    assert said.wall == pytest.approx(5 + 3 * (2 + 4 * 0.5 + 10))
    assert said.busy == pytest.approx(10 * 14)
    assert (said.images, said.failures, said.repeated) == (10_000, 0, 0)


def test_needed_jobs_run_first_and_a_chain_uses_one_worker():
    chain = [Load("a", 100, ("b",)), Load("b", 100, ("c",)), Load("c", 100)]
    said = simulate(chain, POOL)
    assert said.order == ["c", "b", "a"]
    assert said.wall == pytest.approx(5 + 3 * 3)


def test_a_round_waits_for_the_slowest_job_of_the_round_before():
    loads = [Load("long", 1000), Load("short", 100), Load("long 1", 100, round=1), Load("short 1", 100, round=1)]
    assert simulate(loads, POOL).wall == pytest.approx(5 + 12 + 3)


def test_the_longest_job_starts_first():
    loads = [Load("s", 100), Load("t", 100), Load("long", 800)]
    assert simulate(loads, Pool(2, 100.0, 0.0, 0.0)).wall == pytest.approx(8)


@settings(max_examples=60, deadline=None)
@given(
    images=st.lists(st.floats(1, 1e5), min_size=1, max_size=20), workers=st.integers(1, 8),
    failures=st.sampled_from([0.0, 5.0, 60.0]), seed=st.integers(0, 9),
)  # fmt: skip
def test_no_schedule_beats_its_bounds(images, workers, failures, seed):
    pool = Pool(workers, 100.0, 3.0, 1.0, checkpoint=60.0, failures=failures, seed=seed)
    said = simulate([Load(f"e{k}", n) for k, n in enumerate(images)], pool)
    assume(not said.given_up)
    work = [1 + n / 100 for n in images]
    assert said.wall >= 3 + max(max(work), sum(work) / workers) - 1e-6
    assert said.busy == pytest.approx(sum(work) + said.repeated / 100)
    assert len(said.order) == len(images)
    if not failures:
        assert said.wall <= 3 + sum(work) / workers + max(work) + 1e-6  # list scheduling


def test_failures_repeat_the_progress_that_was_not_saved():
    loads = equal(40, 36_000.0)
    pool = Pool(1, 100.0, 0.0, 0.0, checkpoint=60.0, failures=20.0)
    said = simulate(loads, pool)
    assert said.failures == pytest.approx(80, rel=0.3)  # 4 hours with 20 failures each, and the repeated work
    assert said.repeated / 100 / said.failures == pytest.approx(30, rel=0.35)  # half a checkpoint's time each
    hopeless = simulate([Load("e", 36_000.0), Load("f", 0.1)], Pool(1, 10, 0.0, 0.0, failures=3600))
    assert hopeless.given_up == ["e"]
    never = simulate(loads, Pool(1, 100.0, 0.0, 0.0, checkpoint=0.0, failures=20.0))
    assert never.repeated == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"speed": 3}, "--simulate: give the number of workers"),
        ({"workers": 0}, "--simulate.workers: at least 1, got 0"),
        ({"workers": 2, "sped": 3}, "--simulate.sped: no such option. Did you mean 'speed'"),
        ({"workers": 0.5}, "--simulate.workers: an integer, at least 1, got 0.5"),
        ({"workers": math.inf}, "--simulate.workers: an integer, at least 1, got inf"),
        ({"workers": "two"}, "--simulate.workers: an integer, at least 1, got two"),
        ({"workers": 2, "failures": -1}, "--simulate.failures: at least 0, got -1"),
        ({"workers": 2, "speed": 0}, "--simulate.speed: above 0, got 0"),
    ],
)
def test_wrong_pools_are_refused(values, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Pool.of(values)


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


def sleep(argvs, reports):
    """Stand for a training that takes 0.2 s, 0.01 s per step and 0.1 s per validation."""
    word = dict(zip(argvs[0][1::2], argvs[0][2::2], strict=False))
    steps, every = int(word["--trainer.max_steps"]), int(word["--trainer.val_check_interval"])
    time.sleep(0.2 + 0.01 * steps + 0.1 * (steps // every))
    write_whole(Path(word["--run"]) / "model.safetensors", b"")
    return [None]


def test_a_rehearsal_measures_the_three_times(planned):
    pool = rehearse(planned(), sleep, 1)
    assert pool.speed == pytest.approx(8 / 0.01, rel=0.2)
    assert pool.job == pytest.approx(0.2, abs=0.1)
    assert pool.validation == pytest.approx(0.1, abs=0.05)
    assert 0 <= pool.start < 60
    assert not math.isnan(pool.start)
