import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lightning_tdisent.errors import InputError
from lightning_tdisent.fleet.job import Job
from lightning_tdisent.fleet.local import run
from lightning_tdisent.fleet.state import Jobs
from lightning_tdisent.fleet.store import Store
from lightning_tdisent.fleet.work import Session
from lightning_tdisent.runs import RunFolder


def works(argvs, reports):
    ends = []
    for argv, report in zip(argvs, reports, strict=True):
        try:
            ends.append(work(argv, report))
        except Exception as error:
            ends.append(error)
    return ends


def work(argv, report):
    """Run a fake job that records which of its needs exist, or fails as its arguments say."""
    folder, what, *needs = argv
    report(1, 2, {})
    if what == "refuse":
        raise InputError("this cannot be trained")
    if what == "raise":
        raise RuntimeError("a bug")
    if what == "die":
        with (Path(folder) / "deaths").open("a", encoding="utf-8") as file:
            file.write("x")
        os._exit(9)
    if what == "die once" and not (Path(folder) / "deaths").exists():
        (Path(folder) / "deaths").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "sleep":
        time.sleep(0.5)
    if what == "hold":  # hold the run folder, as a training does
        with RunFolder(folder):
            time.sleep(3)
    seen = {need: (Path(need) / "model.safetensors").exists() for need in needs}
    (Path(folder) / "model.safetensors").write_text(json.dumps({"seen": seen, "pid": os.getpid()}), encoding="utf-8")
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
    results = {j.name: json.loads((j.folder / "model.safetensors").read_text(encoding="utf-8")) for j in jobs}
    assert all(results["late"]["seen"].values())
    assert len(results["late"]["seen"]) == 2
    assert results["a"]["pid"] != results["b"]["pid"]
    assert os.getpid() not in {r["pid"] for r in results.values()}


def test_jobs_held_by_other_workers_are_not_reported(tmp_path, capfd):
    jobs = [job(tmp_path, name, "hold") for name in ("a", "b")]
    go(jobs, 2)
    assert all(one.weights.exists() for one in jobs)
    assert "in use" not in capfd.readouterr().err


def test_a_job_in_use_by_another_process_is_reported_once_and_waited_for(tmp_path, capfd):
    jobs = [job(tmp_path, "a")]
    with RunFolder(jobs[0].folder):
        waiting = threading.Thread(target=go, args=(jobs,))
        waiting.start()
        said, end = "", time.monotonic() + 120
        while "in use by" not in said and time.monotonic() < end:  # the workers need time to start
            time.sleep(0.1)
            said += capfd.readouterr().err
        time.sleep(3)
        assert not jobs[0].weights.exists()
    waiting.join(120)
    assert jobs[0].weights.exists()
    assert (said + capfd.readouterr().err).count("in use by") == 1


def test_done_jobs_are_not_done_again(tmp_path):
    done = job(tmp_path, "a", "raise")
    done.folder.mkdir()
    (done.folder / "model.safetensors").write_text("kept", encoding="utf-8")
    go([done, job(tmp_path, "b", needs=("a",))])
    assert (done.folder / "model.safetensors").read_text(encoding="utf-8") == "kept"


def test_all_failures_are_named_and_the_other_jobs_finish(tmp_path):
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
    assert (tmp_path / "dead" / "deaths").read_text(encoding="utf-8") == "xx"
    assert "after: not started, it needs bug" in text
    assert jobs[3].done
    assert "Traceback" in (tmp_path / "bug" / "log.txt").read_text(encoding="utf-8")


def test_the_job_of_a_dead_process_is_resumed_by_another(tmp_path):
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
    (tmp_path / "interrupted.py").write_text(work, encoding="utf-8")
    (tmp_path / "main.py").write_text(program, encoding="utf-8")
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
