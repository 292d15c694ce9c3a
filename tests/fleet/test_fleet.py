"""Complete fleets of small real trainings; tests/faults runs them in other processes."""

import io
import json
import math
from dataclasses import replace

import fsspec
import pytest
import torch
from places import Careless, Shared
from rich.console import Console
from rich.live import Live
from safetensors.torch import load_file

from lightning_tdisent.cli import describe, fits, main
from lightning_tdisent.digests import sha256
from lightning_tdisent.errors import Crashed, Halted, InputError
from lightning_tdisent.fleet import lease
from lightning_tdisent.fleet.local import refuse_undone, run
from lightning_tdisent.fleet.mirror import Mirror
from lightning_tdisent.fleet.plan import Fleet
from lightning_tdisent.fleet.rounds import advance
from lightning_tdisent.fleet.state import FleetWork
from lightning_tdisent.fleet.status import Board, Tile, page, summary, tiles
from lightning_tdisent.fleet.store import Store
from lightning_tdisent.fleet.work import Session, work_through
from lightning_tdisent.models.card import read_card


def train(fleet, *only, **options):
    session = Session(only, **options)
    work = FleetWork(fleet, describe)
    work_through(work, fits, session)
    refuse_undone(work, session)
    return work


def by_hand(configs, folder, *words, config="expert"):
    argv = ["fit", "--config", configs / f"{config}.yaml", "--run", folder, *words]
    assert main([str(word) for word in argv]) == 0


def test_experts_are_equal_trained_by_hand_one_at_a_time_or_by_local_workers(planned, configs, tmp_path, same_weights):
    fleet = planned()
    assert main(["fleet", "run", str(fleet.root), "--only", "2"]) == 0
    assert [e.name for e in fleet.experts if (fleet.root / e.name / "model.safetensors").exists()] == ["expert_002"]
    run(FleetWork(fleet, describe), fits, 2, show=False)
    for k in range(1, 5):
        by_hand(configs, tmp_path / f"{k}", "--model.expert", k)
        same_weights(fleet.root / f"expert_{k:03d}", tmp_path / f"{k}")
    found = tiles(FleetWork(fleet, describe))
    assert summary(found) == "4 jobs: 4 done, 128 of 128 images (100%)"
    assert all(tile.x0 for tile in found)
    assert main(["compose", *(str(fleet.root / e.name) for e in fleet.experts), "--out", str(tmp_path / "all")]) == 0


def test_a_worker_may_train_several_at_a_time(planned, same_weights):
    alone, beside = planned(budget=4 * 16), planned(budget=4 * 16)
    train(alone)
    assert main(["fleet", "run", str(beside.root), "--workers", "1", "--together", "3"]) == 0
    for e in alone.experts:
        same_weights(alone.root / e.name, beside.root / e.name)
    assert "trained together with expert_001" in (beside.root / "expert_003" / "log.txt").read_text(encoding="utf-8")


def test_one_expert_of_all_rows_equals_the_reduced_model(planned, configs, tmp_path, same_weights):
    fleet = planned(experts=1, budget=32)
    train(fleet)
    by_hand(configs, tmp_path / "reduced", config="shared")
    same_weights(fleet.root / "expert_001", tmp_path / "reduced")


def test_experts_start_from_a_shared_model_trained_first(planned):
    fleet = planned(start={"shared": {"configs": ["shared.yaml"], "images": 32}}, budget=32 + 4 * 16)
    with pytest.raises(InputError, match="expert_001: not started, it needs shared"):
        train(fleet, "expert_001")
    train(fleet)
    card = read_card(fleet.root / "expert_003" / "model.safetensors")
    assert (card.images_seen, [p["images_seen"] for p in card.parents]) == (16, [32])


def test_initial_weights_of_other_rows_are_refused_before_training(planned, configs):
    fleet = planned(start="neighbour", rows=[[1], [2], [3, 4]], budget=3 * 16)  # a block sees its state
    with pytest.raises(InputError, match=r"expert_002 \(rows \[2\]\) starts from expert_003 \(rows \[3, 4\]\)"):
        fleet.check(describe)
    conditioned = {"model.network.conditioning": "state"}
    with pytest.raises(InputError, match=r"expert_003 \(rows \[3\]\) starts from expert_004"):
        planned(start="neighbour", budget=4 * 16, set=conditioned).check(describe)
    chain = planned(start="neighbour", budget=4 * 16)
    chain.check(describe)
    train(chain, "expert_004")
    start = str(chain.root / "expert_004")
    planned(start=start, budget=4 * 16).check(describe)  # time-agnostic, as they are
    with pytest.raises(InputError, match=r"expert_001: warm_start: .* was trained at indices \[1000\], not at \[250"):
        planned(start=start, experts=2, budget=4 * 16).check(describe)
    with pytest.raises(InputError, match=r"expert_001: warm_start: .* holds another network"):
        planned(start=start, budget=4 * 16, set={"model.network.layers": 2}).check(describe)
    with pytest.raises(InputError, match=r"expert_001: warm_start: .* predicts v, this model eps"):
        planned(start=start, budget=4 * 16, set={"model.objective": "Eps"}).check(describe)


def test_a_chain_of_neighbours_starts_with_the_noisiest_rows(planned):
    fleet = planned(start="neighbour", budget=4 * 16)
    train(fleet)
    card = read_card(fleet.root / "expert_001" / "model.safetensors")
    assert [p["images_seen"] for p in card.parents] == [16, 16, 16]
    assert card.parents[-1]["sha256"] == sha256(fleet.root / "expert_002" / "model.safetensors")


def test_rounds_of_an_adaptive_budget_do_not_depend_on_the_worker_that_decides(planned):
    budget = {"images": 240, "rule": "adaptive", "first": 0.8, "rounds": 2}
    fleets = [planned(budget=budget, rows=[[1], [2, 3, 4]], set={"trainer.val_check_interval": 1}) for _ in range(2)]
    train(fleets[0])
    for name in ("expert_002", "expert_001", ""):  # in another order
        train(fleets[1], *[name] * bool(name))
    assert not advance(fleets[0], 2)
    assert advance(fleets[0], 1)  # already decided by another worker
    assert fleets[0].store.names("rounds") == ["0001.json", "0002.json"]
    decided = [(f.root / "rounds" / "0002.json").read_bytes() for f in fleets]
    assert decided[0] == decided[1]
    images = json.loads(decided[0])["images"]
    assert 240 - 8 < sum(images.values()) <= 240
    assert images["expert_001"] != images["expert_002"]
    at_end = [tile.predicted / tile.x0 for tile in tiles(FleetWork(fleets[0], describe))]
    assert all(0.3 < ratio < 3 for ratio in at_end)  # predicted and measured errors have the same scale
    cards = {name: read_card(fleets[0].root / name / "model.safetensors") for name in images}
    assert {name: card.images_seen for name, card in cards.items()} == images


def test_a_fleet_in_an_object_store_resumes_on_another_machine(planned, configs, tmp_path, same_weights):
    fsspec.register_implementation("shared", Shared, clobber=True)
    where = f"shared:/{tmp_path}/store"
    fleet = planned(where, experts=2, start={"shared": {"configs": ["shared.yaml"], "images": 16}}, budget=16 + 64)

    def on(machine):
        return replace(Fleet.load(where), scratch=tmp_path / machine)

    train(on("one"), "shared")

    def die(argvs, reports):  # after the checkpoint of step 2
        fits([[*argvs[0], "--trainer.max_steps", "2"]], reports)
        return [InputError("interrupted")]

    session, work = Session(("expert_001",)), FleetWork(on("one"), describe)
    assert work_through(work, die, session) == {"expert_001": "interrupted"}
    assert Store(where).names("expert_001/checkpoints") == [
        "newest.json",
        "step-000000002.ckpt",
        "step-000000002.ckpt.json",
    ]
    train(on("two"))
    assert (tmp_path / "two" / "expert_001" / "model.safetensors").exists()
    plain = planned(experts=2, start={"shared": {"configs": ["shared.yaml"], "images": 16}}, budget=16 + 64)
    train(plain)
    for name in ("expert_001", "expert_002"):
        same_weights(tmp_path / "two" / name, plain.root / name)
        assert Store(where).names(name).count("model.safetensors") == 1
    assert summary(tiles(FleetWork(on("three"), describe))) == "3 jobs: 3 done, 80 of 80 images (100%)"
    assert fleet.store.remote
    assert main(["compose", where, "--out", str(tmp_path / "from_store")]) == 0
    for k in (1, 2):
        name = f"rows_{2 * k - 1:04d}-{2 * k:04d}.safetensors"
        mine, theirs = tmp_path / "from_store" / name, plain.root / f"expert_00{k}" / "model.safetensors"
        assert load_file(mine).keys() == load_file(theirs).keys()
        assert all(torch.equal(tensor, load_file(theirs)[key]) for key, tensor in load_file(mine).items())


class Failing(Store):
    """A store whose first ``calls`` calls of some kinds for names that contain ``name`` time out."""

    def __init__(self, where, calls, name, *kinds):
        super().__init__(where)
        self.calls, self.name, self.kinds, self.failed = calls, name, kinds, 0

    def _away(self, kind, name):
        if kind in self.kinds and self.name in name and self.failed < self.calls:
            self.failed += 1
            raise TimeoutError(110, "Connection timed out", name)

    def read(self, name, *options, **more):
        self._away("read", name)
        return super().read(name, *options, **more)

    def names(self, folder):
        self._away("names", folder)
        return super().names(folder)

    def write(self, name, content, *options):
        self._away("write", name)
        super().write(name, content, *options)

    def create(self, name, content):
        self._away("create", name)
        return super().create(name, content)


@pytest.mark.parametrize(
    ("name", "kinds"), [("leases", ("names",)), ("leases", ("create",)), ("begun", ("create",)), ("failed", ("names",))]
)
def test_a_store_that_is_unavailable_for_a_while_is_waited_for(name, kinds, planned, monkeypatch):
    monkeypatch.setattr("lightning_tdisent.fleet.work.POLL", 0.05)
    fleet = planned(experts=1, budget=32)
    away = replace(fleet, store=Failing(fleet.root, 3, name, *kinds))
    assert work_through(FleetWork(away, describe), fits, Session(ttl=30.0)) == {}
    assert away.store.failed == 3
    assert FleetWork(fleet, describe).done(fleet.jobs()[0])


def test_a_training_finished_during_an_outage_is_recorded_after_it(planned, configs, tmp_path):
    fsspec.register_implementation("shared", Shared, clobber=True)
    fleet = planned(f"shared:/{tmp_path}/store", experts=1, budget=32)
    store = Failing(fleet.store.where, 2, "done/", "write")
    work = FleetWork(replace(fleet, store=store, scratch=tmp_path / "here"), describe)
    tried = []

    def train(argvs, reports):
        tried.append(argvs)
        return fits(argvs, reports)

    assert work_through(work, train, Session(ttl=30.0)) == {}
    assert (store.failed, len(tried)) == (2, 3)  # the later two have nothing left to train
    assert summary(tiles(FleetWork(fleet, describe))) == "1 jobs: 1 done, 32 of 32 images (100%)"


def test_a_fault_in_the_folder_of_one_expert_stops_no_other(planned):
    fleet = planned()
    (fleet.root / "expert_001").write_text("a file where a folder should be", encoding="utf-8")
    with pytest.raises(InputError, match=r"(?s)1 of 4 jobs are not done:.*expert_001: FileExistsError"):
        train(fleet)
    assert [tile.state for tile in tiles(FleetWork(fleet, describe))] == ["failed", "done", "done", "done"]


def test_a_store_that_stays_unavailable_is_named_with_its_error(planned):
    fleet = planned(experts=1, budget=32)
    away = replace(fleet, store=Failing(fleet.root, 10**9, "leases", "names"))
    with pytest.raises(Halted, match=r"fleet0: has been failing for 1 s: .*Connection timed out.*Run the fleet again"):
        work_through(FleetWork(away, describe), fits, Session(ttl=1.0))


def test_an_unexpected_error_may_be_retried_and_a_refusal_not(planned):
    fleet = planned(experts=1, budget=32)
    for error, kind, code in ((RuntimeError("CUDA error"), Crashed, 70), (InputError("no"), InputError, 2)):
        session, work = Session(), FleetWork(fleet, describe)
        work_through(work, lambda argvs, reports, error=error: [error], session)
        with pytest.raises(InputError, match=r"1 of 1 jobs are not done:\n  - expert_001: ") as ended:
            refuse_undone(work, session)
        assert (type(ended.value), ended.value.code) == (kind, code)


def test_a_failure_that_cannot_be_recorded_is_not_retried_forever(planned):
    fleet, tried = planned(experts=1, budget=32), []
    full = replace(fleet, store=Failing(fleet.root, 10**9, "failed", "write"))

    def fail(argvs, reports):
        tried.append(argvs)
        return [InputError("disk full")]

    session = Session()
    assert work_through(FleetWork(full, describe), fail, session) == {"expert_001": "disk full"}
    assert len(tried) == 1
    with pytest.raises(InputError, match="expert_001: disk full"):
        refuse_undone(FleetWork(full, describe), session)


def test_a_store_without_exclusive_creation_is_refused():
    fsspec.register_implementation("careless", Careless, clobber=True)
    with pytest.raises(InputError, match="cannot create a file only if it is not there"):
        Store("careless://tmp/fleet").check()
    with pytest.raises(InputError, match="cannot be opened"):
        Store("nosuch://fleet").check()


def test_weights_of_another_training_in_an_experts_folder_are_named(planned, tmp_path):
    fleet = planned()
    train(fleet, "expert_002")
    (fleet.root / "expert_001").mkdir()
    weights = fleet.root / "expert_002" / "model.safetensors"
    (fleet.root / "expert_001" / "model.safetensors").write_bytes(weights.read_bytes())
    (fleet.root / "expert_003").mkdir()
    (fleet.root / "expert_003" / "model.safetensors").write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError) as refusal:
        train(fleet)
    text = str(refusal.value)
    assert "2 of 4 jobs are not done" in text
    assert (
        "expert_001/model.safetensors belongs to another training: it has rows [2], not [1]. Move it elsewhere" in text
    )
    assert "expert_003/model.safetensors: not an expert written by this project" in text
    states = {tile.name: tile.state for tile in tiles(FleetWork(fleet, describe))}
    assert states == {"expert_001": "failed", "expert_002": "done", "expert_003": "failed", "expert_004": "done"}


def test_a_refused_config_fails_only_its_expert(planned):
    fleet = planned()
    broken = Fleet.load(fleet.root, ["--data.path", "nowhere"])
    with pytest.raises(InputError, match=r"expert_001: .*nowhere"):
        train(broken, "expert_001")
    failed = tiles(FleetWork(fleet, describe))[0]
    assert failed.state == "failed"
    assert "nowhere" in failed.note
    train(fleet, "expert_001")  # corrected, it is tried again
    assert tiles(FleetWork(fleet, describe))[0].state == "done"


def test_a_round_is_decided_once_its_targets_are_reached(planned):
    fleet = planned(budget={"images": 240, "rule": "adaptive"}, rows=[[1], [2, 3, 4]])
    for e in fleet.experts:
        curve = {"variances": [1.0], "points": [[8 * k, [1 / k] * len(e.rows)] for k in range(1, 9)]}
        fleet.store.write(f"{e.name}/curve.json", json.dumps(curve).encode())
    assert [advance(fleet, 0) for _ in range(3)] == [True] * 3
    assert fleet.store.names("rounds") == ["0001.json"]


def test_a_held_out_error_that_is_not_finite_is_refused(planned):
    fleet = planned(budget={"images": 240, "rule": "adaptive"}, rows=[[1], [2, 3, 4]])
    for e in fleet.experts:
        points = [[8 * k, [math.nan if (e.rows, k) == ([1], 3) else 1 / k] * len(e.rows)] for k in range(1, 9)]
        fleet.store.write(f"{e.name}/curve.json", json.dumps({"variances": [1.0], "points": points}).encode())
    with pytest.raises(InputError, match="expert_001: its held-out error after 24 images is not finite"):
        advance(fleet, 0)
    assert fleet.store.names("rounds") == []


def test_experts_wait_between_rounds_and_need_no_other_after_the_first(planned):
    fleet = planned(
        budget={"images": 512, "rule": "adaptive", "first": 0.25, "rounds": 1},
        start="neighbour",
        set={"trainer.val_check_interval": 1},
    )
    work = FleetWork(fleet, describe)
    assert [job.needs for job in work.jobs()] == [("expert_002",), ("expert_003",), ("expert_004",), ()]
    train(fleet, *fleet.names)  # experts that are named also continue with the next round
    assert (work.round(), work.last()) == (1, True)
    assert [job.needs for job in work.jobs()] == [()] * 4
    assert {tile.state for tile in tiles(work)} == {"done"}
    fleet.store.remove("rounds/0001.json")
    assert not work.last()
    assert {(tile.state, tile.note) for tile in tiles(work)} == {("waiting", "for the next round")}


def test_an_unfinished_fleet_is_composed_with_a_note(planned, tmp_path, capsys):
    fleet = planned()
    train(fleet, "expert_001", "expert_003")
    words = ["compose", f"file://{fleet.root}", "--out", str(tmp_path / "composite")]
    assert main(words) == 2
    assert main(["fleet", "run", str(fleet.root), "--scratch", str(tmp_path / "here")]) == 2
    assert f"{fleet.root} is a folder, in which its runs are trained. Leave --scratch" in capsys.readouterr().err
    assert not (tmp_path / "here").exists()
    assert main([*words, "--fill", "nearest"]) == 0
    assert "is not finished: expert_002, none of 32 images; expert_004, none of 32" in capsys.readouterr().out


def test_a_failure_is_not_retried_by_its_session_after_another_session_failed(planned):
    fleet, tried = planned(experts=1, budget=32), []

    def fail(argvs, reports):
        tried.append(argvs)
        return [InputError("no")]

    one, other = Session(), Session()
    work = FleetWork(fleet, describe)
    for session in (one, other, one, other):
        assert work_through(work, fail, session) == {"expert_001": "no"}
    assert len(tried) == 2


def test_a_failed_upload_is_repeated(tmp_path):
    store, here = Store(tmp_path / "store"), tmp_path / "here"
    pointer = b'{"step": 9, "file": "step-9.ckpt"}'
    for name in ("checkpoints/step-9.ckpt", "checkpoints/step-9.ckpt.json"):
        Store(here).write(name, b"9")
    for name, content in (("checkpoints/newest.json", pointer), ("model.safetensors", b"mine")):
        Store(here).write(name, content)
        store.write(f"e/{name}", b'{"step": 4}' if name.endswith("json") else b"old")
    mirror = Mirror(store, "e", here)
    mirror.pull()
    assert (here / "model.safetensors").read_bytes() == b"mine"
    mirror.push(lambda quick: None)
    assert (store.read("e/model.safetensors"), store.read("e/checkpoints/newest.json")) == (b"mine", pointer)
    behind = tmp_path / "behind"
    Store(behind).write("model.safetensors", b"older")
    Mirror(store, "e", behind).pull()
    assert (behind / "model.safetensors").read_bytes() == b"mine"


def test_unknown_experts_are_refused(planned):
    with pytest.raises(InputError, match="--only expert_009: no such expert; there are expert_001"):
        train(planned(), "expert_009")


def test_a_board_has_a_line_for_each_job_and_higher_than_the_terminal_failed_jobs_first():
    states = ["done"] * 40 + ["training", "failed", "silent", "waiting"]
    found = [Tile(f"expert_{k:03d}", state, [k], 5, 10) for k, state in enumerate(states)]
    for height, whole in ((500, True), (24, False)):
        stream = io.StringIO()
        console = Console(file=stream, width=80, height=height, force_terminal=True, color_system=None)
        with Live(Board(found, "t"), console=console, auto_refresh=False):
            pass
        text = stream.getvalue()
        assert ("expert_039" in text) == whole
        assert all(f"expert_{k:03d}" in text for k in range(40, 44))
        assert ("and 24 done" in text) != whole
        assert "44 jobs: 40 done, 1 training, 1 silent, 1 waiting, 1 failed" in text


def test_the_board_distinguishes_training_silent_waiting_and_dead_jobs(planned):
    fleet = planned(start="neighbour")

    def hold(name, **content):
        base = {
            "beat": 4,
            "ttl": 60,
            "images": 16,
            "rate": 8.0,
            "loss": 0.25,
            "x0_mse": 0.5,
            "step": 2,
            "written": 1000.0,
        }
        fleet.store.write(f"leases/{name}.00002.json", json.dumps(base | content).encode())

    hold("expert_004", host="far/1", pid=77)
    hold("expert_003", host="far/1", pid=78, written=800.0)
    hold("expert_002", **{**lease.me(), "pid": 2**22 - 1, "began": 0})
    found = {tile.name: tile for tile in tiles(FleetWork(fleet, describe), now=1010.0)}
    assert {name: tile.state for name, tile in found.items()} == {
        "expert_004": "training", "expert_003": "silent", "expert_002": "waiting", "expert_001": "waiting"
    }  # fmt: skip
    assert found["expert_004"].eta == 2.0
    assert found["expert_004"].words() == (
        "expert_004",
        "training",
        "row 4",
        "16/32 images",
        "8/s",
        "eta 2 s",
        "loss 0.25 x0 0.5",
        "process 77 on far",
    )
    assert summary(list(found.values())).endswith(", 8 images/s, eta 10 s")
    assert "silent for 3 min 30 s" in found["expert_003"].note
    assert "died at step 2" in found["expert_002"].note
    assert found["expert_001"].note == "for expert_002"
    console = Console(file=(stream := io.StringIO()), width=120)
    console.print(Board(list(found.values())))
    assert "expert_004  training  row 4  16/32 images  8/s  eta 2 s  loss 0.25 x0 0.5" in stream.getvalue()
    text = page(list(found.values()), "A <fleet>")
    assert "A &lt;fleet&gt;" in text
    assert text.count("<b>expert_") == 4
    assert "width:50.0%" in text


def test_a_fleet_without_finished_experts_is_not_composed(planned, tmp_path, capsys):
    fleet = planned()
    for more in ([], ["--merge", "2"]):
        assert main(["compose", str(fleet.root), "--out", str(tmp_path / "out"), *more]) == 2
        assert "no finished expert to compose" in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["local", "slurm", "ray"])
def test_an_unknown_expert_is_refused_by_every_engine(planned, capsys, engine):
    fleet = planned(budget=64)
    assert main(["fleet", "run", str(fleet.root), "--engine", engine, "--only", "99"]) == 2
    assert "--only expert_099: no such expert" in capsys.readouterr().err


def test_a_summary_of_jobs_without_a_plan_of_images_has_what_is_known():
    jobs = [Tile("a", "done", seen=100), Tile("b", "training", seen=50, rate=25.0), Tile("c", "waiting")]
    assert summary(jobs) == "3 jobs: 1 done, 1 training, 1 waiting, 150 images, 25 images/s"
    planned = [Tile("b", "training", seen=50, images=200, rate=25.0)]
    assert summary(planned) == "1 jobs: 1 training, 50 of 200 images (25%), 25 images/s, eta 6 s"


def test_more_workers_than_jobs_that_are_asked_for_are_refused(planned, capsys):
    assert main(["fleet", "run", str(planned(budget=64).root), "--only", "2", "--workers", "2"]) == 2
    assert "--workers 2: --only expert_002 is one job, which one worker trains" in capsys.readouterr().err


@pytest.mark.parametrize(("between", "halts"), [(100.0, False), (1.0, True)])
def test_failures_before_and_after_a_training_are_not_one_outage(monkeypatch, between, halts):
    """A poll that lasts longer than the ttl has trained: the store has answered in between."""
    clock, polls = [0.0], iter([OSError("away"), OSError("away"), OSError("away"), {}])

    class Waiting:
        store = type("AStore", (), {"wait_for": lambda self, seconds: None, "__str__": lambda self: "store"})()

    def poll(*_):
        clock[0] += between if between > 30 else 20.0
        if isinstance(outcome := next(polls), OSError):
            raise outcome
        return outcome

    monkeypatch.setattr("lightning_tdisent.fleet.work._poll_once", poll)
    monkeypatch.setattr("lightning_tdisent.fleet.work.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("lightning_tdisent.fleet.work.time.sleep", lambda seconds: None)
    if halts:
        with pytest.raises(Halted, match="has been failing for 30 s"):
            work_through(Waiting(), fits, Session(ttl=30))
    else:
        assert work_through(Waiting(), fits, Session(ttl=30)) == {}
