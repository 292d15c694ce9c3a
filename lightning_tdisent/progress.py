"""Show how far a long piece of work has come: a bar on a terminal, and without one a line every 30 seconds.

Both go to stderr, so that they do not mix with the output of a command, which goes to stdout.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TextIO

from lightning_tdisent.files import open_own

EVERY = 30.0  # seconds between two lines


def _minutes(seconds: float) -> str:
    """Return seconds as M:SS, or H:MM:SS from an hour on."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Context manager that shows the progress of one piece of work after another.

    text: name of the work.
    total: how much there is to do, None if that is not known.
    done: how much of it is done already.
    unit: what is counted; shown as a rate if given.
    log: file that gets the lines as well, whether or not there is a terminal; errors of its disk are ignored.
    shown: False shows nothing, but still writes the log.
    every: seconds between two lines.
    """

    def __init__(
        self,
        text: str,
        total: float | None = None,
        done: float = 0,
        unit: str = "",
        *,
        log: Path | None = None,
        shown: bool = True,
        every: float = EVERY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._unit, self._log, self._shown, self._every, self._clock = unit, log, shown, every, clock
        self._bar: Any = None
        self._set(text, total, done)

    def _set(self, text: str, total: float | None, done: float) -> None:
        self.text, self.total, self.done, self._extra = text, total, done, ""
        self._first = self._clock(), done
        self._said = self._clock()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Show the bar, if stderr is a terminal."""
        from rich.console import Console

        console = Console(stderr=True)
        if self._shown and console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
            self._bar = Bar(
                *columns, TextColumn("{task.fields[extra]}"), console=console, transient=True,
                redirect_stdout=sys.stdout.isatty(),  # a stdout that is no terminal must get its own lines
            )  # fmt: skip
            self._task = self._bar.add_task(self.text, total=self.total, completed=self.done, extra="")
            self._bar.start()

    @property
    def drawn(self) -> bool:
        """Return whether a bar is shown."""
        return self._bar is not None

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def begin(self, text: str, total: float | None = None, done: float = 0) -> None:
        """Show the next piece of work."""
        self._set(text, total, done)
        if self._bar is not None:
            self._bar.reset(self._task, description=text, total=total, completed=int(done), extra="")

    def advance(self, count: float = 1) -> None:
        """Add to what is done."""
        self.update(self.done + count)

    def update(self, done: float, total: float | None = None, extra: str = "") -> None:
        """Set what is done; total: how much there is, if that is known only now; extra: text beside it."""
        self.done, self.total, self._extra = done, self.total if total is None else total, extra
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self.total, extra=self._beside())
        now = self._clock()
        if now - self._said >= self._every:
            self._said = now
            self.append(self.line)
            if self._shown and self._bar is None and not _same_file(sys.stderr, self._log):
                print(self.line, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Print a line of output to stdout, and append it to the log."""
        self.append(text)
        if self._shown and not _same_file(sys.stdout, self._log):
            print(text, flush=True)

    def append(self, text: str) -> None:
        """Append a line with the time (UTC) to the log; errors of its disk are ignored."""
        if self._log is None:
            return
        with contextlib.suppress(OSError), open_own(self._log) as file:
            file.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}Z {text}\n".encode(errors="replace"))

    @property
    def line(self) -> str:
        """The state as one line, such as ``step 1,200/2,400  loss 0.291  307 images/s  eta 1:07``."""
        of = f"/{self.total:,.0f}" if self.total else ""
        return "  ".join(filter(None, (f"{self.text} {self.done:,.0f}{of}", self._beside())))

    def _beside(self) -> str:
        start, first = self._first
        spent, made = self._clock() - start, self.done - first
        if spent <= 0 or made <= 0:
            return self._extra
        rate = made / spent
        speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        words = [self._extra, f"{speed} {self._unit}/s" if self._unit else ""]
        words.append(f"eta {_minutes((self.total - self.done) / rate)}" if self.total else "")
        return "  ".join(filter(None, words))


@contextlib.contextmanager
def working(text: str, every: float = EVERY) -> Iterator[None]:
    """Show that a piece of work goes on whose share is not known: a moving bar, or a line with the time spent."""
    ended, began = threading.Event(), time.monotonic()

    def say() -> None:
        while not ended.wait(every):
            if not progress.drawn:  # a bar moves by itself
                print(f"{text}: {_minutes(time.monotonic() - began)}", file=sys.stderr, flush=True)

    with Progress(text) as progress:
        lines = threading.Thread(target=say, daemon=True)
        lines.start()
        try:
            yield
        finally:
            ended.set()
            lines.join()


def _same_file(stream: TextIO, path: Path | None) -> bool:
    """Return whether a stream writes to this file, so that a line is not written to it twice."""
    try:
        return path is not None and os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except (OSError, ValueError):
        return False
