"""Progress without a terminal: a line every 30 seconds on stderr, and in a log."""

import os
import re
import subprocess
import sys
import threading
import time

import pytest

from lightning_tdisent.progress import Progress, working


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self):
        return self.now


def test_a_line_every_thirty_seconds_with_rate_and_time_left(capsys):
    clock = Clock()
    with Progress("sample", 2400, unit="images", clock=clock) as progress:
        for clock.now in range(1, 61):
            progress.advance(20)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["sample 600/2,400  20 images/s  eta 1:30", "sample 1,200/2,400  20 images/s  eta 1:00"]


def test_the_rate_is_of_what_was_done_now_and_each_piece_of_work_has_its_own(capsys):
    clock = Clock()
    with Progress("step", 1000, 900, clock=clock, every=5) as progress:
        clock.now = 5.0
        progress.update(950, extra="loss 0.291")
        progress.begin("errors")
        clock.now = 10.0
        progress.advance(2)
        clock.now = 15.0
        progress.update(4000, 8000)
    said = capsys.readouterr().err.splitlines()
    assert said == ["step 950/1,000  loss 0.291  eta 0:05", "errors 2", "errors 4,000/8,000  eta 0:10"]


def test_work_of_unknown_length_says_that_it_goes_on(capsys):
    with working("fit Mixture", every=0.05):
        time.sleep(0.28)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 5
    assert {*lines} == {"fit Mixture: 0:00"}
    before = threading.active_count()
    with pytest.raises(KeyError), working("fit", every=60):
        raise KeyError  # ends at once, without waiting for the next line
    assert threading.active_count() == before


def test_the_log_has_the_lines_and_stderr_does_not_get_them_twice(tmp_path, capsys):
    log, clock = tmp_path / "log.txt", Clock()
    progress = Progress("step", log=log, shown=False, clock=clock)
    progress.say("what is trained")
    clock.now = 31.0
    progress.update(7)
    assert capsys.readouterr() == ("", "")
    times = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ "
    assert re.fullmatch(rf"{times}what is trained\n{times}step 7\n", log.read_text(encoding="utf-8"))
    program = (
        "import sys; from pathlib import Path; from lightning_tdisent.progress import Progress\n"
        "p = Progress('step', log=Path(sys.argv[1]), every=0); p.say('output'); p.update(7)"
    )
    for name in ("one.txt", "two.txt"):
        with (tmp_path / "one.txt").open("wb") as out:
            subprocess.run([sys.executable, "-c", program, tmp_path / name], stdout=out, stderr=out, check=True)
        lines = [line.rpartition("Z ")[2] for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]
        assert lines == ["output", "step 7"]
    assert (tmp_path / "one.txt").read_text(encoding="utf-8") == "output\nstep 7\n"


def test_a_log_that_cannot_be_written_stops_no_work(tmp_path):
    progress = Progress("step", log=tmp_path / "gone" / "log.txt", shown=False, every=0)
    progress.update(1)
    assert not os.path.exists(tmp_path / "gone")
