import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_tdisent.errors import InputError
from lightning_tdisent.fleet.job import Job
from lightning_tdisent.fleet.local import run
from lightning_tdisent.fleet.state import Jobs
from lightning_tdisent.fleet.store import Store
from lightning_tdisent.fleet.study import plan
from lightning_tdisent.fleet.work import Session


def works(argvs, reports):
    ends = []
    for argv, report in zip(argvs, reports, strict=True):
        try:
            ends.append(work(argv, report))
        except Exception as error:
            ends.append(error)
    return ends


def work(argv, report):
    """A job that says what it saw, or fails as it is told."""
    folder, what, *needs = argv
    report(1, 2, {})
    if what == "refuse":
        raise InputError("this cannot be trained")
    if what == "raise":
        raise RuntimeError("a bug")
    if what == "die":
        with (Path(folder) / "deaths").open("a") as file:
            file.write("x")
        os._exit(9)
    if what == "die once" and not (Path(folder) / "deaths").exists():
        (Path(folder) / "deaths").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "sleep":
        time.sleep(0.5)
    seen = {need: (Path(need) / "model.safetensors").exists() for need in needs}
    (Path(folder) / "model.safetensors").write_text(json.dumps({"seen": seen, "pid": os.getpid()}))
    report(2, 2, {})


def job(tmp_path, name, what="ok", needs=()):
    folders = [str(tmp_path / need) for need in needs]
    return Job(name, [str(tmp_path / name), what, *folders], tmp_path / name, tuple(needs))


def go(jobs, workers=1, **options):
    store = Store(jobs[0].folder.parent)
    run(Jobs(store, jobs), works, workers, Session(**options), show=False)


def test_jobs_run_after_what_they_need_in_several_processes(tmp_path):
    jobs = [job(tmp_path, "late", needs=("a", "b")), job(tmp_path, "a", "sleep"), job(tmp_path, "b", "sleep")]
    go(jobs, 2)
    results = {j.name: json.loads((j.folder / "model.safetensors").read_text()) for j in jobs}
    assert all(results["late"]["seen"].values())
    assert len(results["late"]["seen"]) == 2
    assert results["a"]["pid"] != results["b"]["pid"]
    assert os.getpid() not in {r["pid"] for r in results.values()}


def test_done_jobs_are_not_done_again(tmp_path):
    done = job(tmp_path, "a", "raise")
    done.folder.mkdir()
    (done.folder / "model.safetensors").write_text("kept")
    go([done, job(tmp_path, "b", needs=("a",))])
    assert (done.folder / "model.safetensors").read_text() == "kept"


def test_failures_are_all_named_and_the_rest_is_finished(tmp_path):
    jobs = [
        job(tmp_path, "refused", "refuse"),
        job(tmp_path, "bug", "raise"),
        job(tmp_path, "dead", "die"),
        job(tmp_path, "fine"),
        job(tmp_path, "after", needs=("bug",)),
    ]
    with pytest.raises(InputError) as refusal:
        go(jobs, 1, deaths=2)
    text = str(refusal.value)
    assert "4 of 5 jobs are not done" in text
    assert "refused: this cannot be trained" in text
    assert "bug: RuntimeError: a bug" in text
    assert "dead: its process died 2 times in a row without saving anything beyond step 0" in text
    assert (tmp_path / "dead" / "deaths").read_text() == "xx"
    assert "after: not started, it needs bug" in text
    assert jobs[3].done
    assert "Traceback" in (tmp_path / "bug" / "log.txt").read_text()


def test_what_a_dead_process_had_is_taken_up_by_another(tmp_path):
    jobs = [job(tmp_path, "a", "die once"), job(tmp_path, "b", needs=("a",))]
    go(jobs, 2)
    assert all(j.done for j in jobs)
    assert (tmp_path / "a" / "deaths").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_an_interrupted_run_ends_with_all_its_processes(number, code, tmp_path):
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from lightning_tdisent.fleet.job import Job\n"
        "from lightning_tdisent.fleet.local import run\n"
        "from lightning_tdisent.fleet.store import Store\n"
        "from lightning_tdisent.fleet.state import Jobs\n"
        "import interrupted\n"
        "jobs = [Job(n, [], Path(sys.argv[1]) / n) for n in 'ab']\n"
        "if __name__ == '__main__':\n"
        "    try: run(Jobs(Store(sys.argv[1]), jobs), interrupted.wait, 2, show=False)\n"
        "    except KeyboardInterrupt: sys.exit(130)\n"
    )
    work = (
        "import os, time\n"
        "from pathlib import Path\n"
        "def wait(argvs, reports):\n"
        "    Path(__file__).with_name(f'pid_{os.getpid()}').touch()\n"
        "    for _ in range(600):\n"
        "        reports[0](1, 2, {})\n"
        "        time.sleep(0.1)\n"
    )
    (tmp_path / "interrupted.py").write_text(work)
    (tmp_path / "main.py").write_text(program)
    parent = subprocess.Popen([sys.executable, tmp_path / "main.py", tmp_path], start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("pid_*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    parent.send_signal(number)
    assert parent.wait(30) == code
    deadline = time.monotonic() + 10
    while left := [file for file in tmp_path.glob("pid_*") if Path(f"/proc/{file.name[4:]}").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


STUDY = {
    "runs": {
        "shared": {"configs": ["a.yaml"], "set": {"trainer.max_steps": 5}},
        "experts": {"configs": ["a.yaml", "b.yaml"], "experts": 3, "warm_start": "shared"},
    },
    "contenders": {"one": {"run": "shared"}, "all": {"run": "experts", "sampler": "DPMSolver"}},
    "data": "data/digits",
    "protocol": "digits",
}


@pytest.fixture
def study(tmp_path):
    def write(**changes):
        for name in ("a.yaml", "b.yaml"):
            (tmp_path / name).write_text("{}")
        file = tmp_path / "study.yaml"
        file.write_text(json.dumps({**STUDY, **changes}))
        return file

    return write


def test_a_plan_has_one_job_per_expert_with_its_needs(study, tmp_path):
    todo = plan(study(), tmp_path / "out", 7, ["experts.model.lr=0.1", "*.data.batch_size=8"])
    assert [j.name for j in todo.jobs] == ["shared", "experts_001", "experts_002", "experts_003"]
    assert len({j.folder for j in todo.jobs}) == 4
    expert = todo.jobs[2]
    assert expert.needs == ("shared",)
    words = " ".join(expert.argv)
    for part in (
        f"--config {tmp_path}/a.yaml --config {tmp_path}/b.yaml",
        "--model.expert 2 --model.experts 3",
        "--seed_everything 7",
        "--model.lr 0.1",
        "--data.batch_size 8",
        f"--model.warm_start {tmp_path}/out/shared",
    ):
        assert part in words
    assert "--trainer.max_steps 5" in " ".join(todo.jobs[0].argv)
    assert "--model.lr" not in todo.jobs[0].argv
    samplers = [c["sampler"]["class_path"] for c in todo.evaluation["contenders"]]
    assert samplers == ["lightning_tdisent.DDIM", "lightning_tdisent.DPMSolver"]
    assert todo.evaluation["contenders"][1]["source"] == str(tmp_path / "out" / "experts_composite")


def test_a_sweep_over_the_cut_is_unrolled(study, tmp_path):
    sweep = {
        "run": "shared",
        "cuts": [2, 0.6],
        "priors": {"mix": {"class_path": "Mixture", "init_args": {"components": 3}}},
    }
    todo = plan(study(diffusion_time=sweep, bits={"n": 9}), tmp_path / "out")
    names = {c["name"]: c.get("prior") for c in todo.evaluation["contenders"]}
    assert names == {
        "one": None,
        "all": None,
        "whole chain": None,
        "cut 2, N(0, I)": "cut:2",
        "cut 2, mix": str(tmp_path / "out" / "priors" / "mix_2"),
        "cut 0.6, N(0, I)": "cut:0.6",
        "cut 0.6, mix": str(tmp_path / "out" / "priors" / "mix_0.6"),
    }
    part = {"class_path": "lightning_tdisent.Mixture", "init_args": {"components": 3}}
    model = str(tmp_path / "out" / "shared")
    assert todo.priors == {
        tmp_path / "out" / "priors" / "mix_2": (model, 2, part),
        tmp_path / "out" / "priors" / "mix_0.6": (model, 0.6, part),
    }
    assert todo.evaluation["bits"] == {"n": 9}
    assert "whole chain" not in str(todo.content)  # a study is what was written, whatever it means


def test_a_folder_keeps_one_plan(study, tmp_path):
    file, out = study(), tmp_path / "out"
    first = plan(file, out)
    first.claim()
    first.jobs[0].folder.mkdir()
    (first.jobs[0].folder / "half").write_text("")
    plan(file, out).claim()  # the same plan goes on, and keeps what its jobs go on from
    assert (first.jobs[0].folder / "half").exists()
    with pytest.raises(InputError, match=r"another study \(seed: 0 there, 3 now\)"):
        plan(file, out, 3).claim()
    (tmp_path / "a.yaml").write_text("{x: 1}")
    with pytest.raises(InputError, match="configs:"):
        plan(file, out).claim()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    with pytest.raises(InputError, match="is not empty and holds no study"):
        plan(file, tmp_path / "full").claim()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runz": {}}, "unknown key 'runz'. Did you mean 'runs'"),
        ({"runs": {"a": {"config": []}}}, "runs.a: unknown key 'config'. Did you mean 'configs'"),
        ({"runs": {"a": {"configs": ["aa.yaml"]}}}, "aa.yaml is no file. Did you mean 'a.yaml'"),
        ({"runs": {"a": {"configs": ["a.yaml"], "warm_start": "b"}}}, "'b' is no run above it"),
        ({"contenders": {"x": {"run": "expert"}}}, "no run 'expert'. Did you mean 'experts'"),
        ({"features": "${nope}"}, "not valid: .*nope"),
        ({"contenders": {}}, "contenders, or diffusion_time, is missing"),
        ({"contenders": {"x": {"run": "shared", "prior": "mx"}}}, "contenders.x.prior: no prior 'mx'"),
        ({"priors": {"p": {"run": "shared", "at": 1}}}, "priors.p: prior is missing"),
        ({"priors": {"p": {"run": "share", "at": 1, "prior": "Gaussian"}}}, "no run 'share'. Did you mean 'shared'"),
        ({"diffusion_time": {"run": "shared", "cuts": 3}}, "cuts is a list of rows"),
        ({"diffusion_time": {"run": "shared", "cuts": []}}, "cuts is a list of rows"),
        ({"diffusion_time": {"run": "shared", "cuts": ["x"]}}, "cut:x: a row from 1 on, or a share .* got 'x'"),
        ({"diffusion_time": {"run": "shared", "cuts": [2], "priors": {"a": "Gausian"}}}, "Gausian"),
        ({"diffusion_time": {"run": "shared", "cuts": [2], "priors": {"a": 3}}}, "Gaussian: expected keys"),
        ({"priors": {"p": {"run": "shared", "at": "z", "prior": "Gaussian"}}}, "priors.p.at: a row from 1 on"),
        ({"priors": {"p": {"run": "shared", "at": 2, "prior": "Flow"}}}, "is trained: make it a run with PriorModule"),
        ({"diffusion_time": {"run": "shared", "cut": [3]}}, "unknown key 'cut'. Did you mean 'cuts'"),
    ],
)
def test_a_wrong_study_is_refused(changes, message, study):
    with pytest.raises(InputError, match=message):
        plan(study(**changes))


def test_wrong_overrides_are_refused(study):
    with pytest.raises(
        InputError, match=r"--set expert.x=1: expected RUN.KEY=VALUE with RUN one of \*, shared, experts"
    ):
        plan(study(), overrides=["expert.x=1"])
