"""What several commands share: the terminal, the device, and options that many have."""

import argparse
import atexit
import importlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_tdisent.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

Run = Callable[[argparse.Namespace], None]
Commands = argparse._SubParsersAction
IMPORTED = "TDISENT_IMPORT"  # environment variable
CACHES = ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")  # what matplotlib and torch write below ~


def command(commands: Commands, name: str, run: Run, text: str) -> argparse.ArgumentParser:
    """A new command, with the option that all have which may read names of classes."""
    out = commands.add_parser(name, help=text, description=text)
    out.set_defaults(run=run)
    out._negative_number_matcher = re.compile(r"-[\d.]")  # so that -3:5 and -1,1 are values, and no options
    out.add_argument("--import", dest="imports", action="append", default=[], metavar="MODULE",
                     help="import your module first, so that files may name its classes")  # fmt: skip
    return out


def import_modules(names: Sequence[str]) -> None:
    """Import a user's modules here, and in the worker processes that this one starts (`imported_by_parent`)."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise InputError(f"--import {name}: {error}") from None
    if names:
        os.environ[IMPORTED] = ",".join(names)


def imported_by_parent() -> list[str]:
    """Return the modules that the parent of this process was told to import."""
    return [name for name in os.environ.get(IMPORTED, "").split(",") if name]


def keep_caches() -> None:
    """Give libraries a folder for their caches where there is no home folder that can be written.

    It is a temporary one ($TMPDIR), for this process and its children, and goes with it. Variables that are set count.
    """
    home = os.path.expanduser("~")
    missing = [name for name in CACHES if name not in os.environ]
    if not missing or (os.path.isdir(home) and os.access(home, os.W_OK)):
        return
    folder = tempfile.mkdtemp(prefix="lightning_tdisent-")
    atexit.register(_remove_caches, folder, os.getpid())
    os.environ.update(dict.fromkeys(missing, folder))


def _remove_caches(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # and not a process that it forked
        shutil.rmtree(folder, ignore_errors=True)


def use_device(name: str) -> None:
    """Refuse a device that torch does not have; small networks on a CPU are fastest on one thread."""
    import torch

    try:
        if torch.device(name).type == "meta":
            raise RuntimeError("a meta tensor has no values; use cpu, cuda, cuda:1 ..")
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0][:200]}") from None
    if name.startswith("cuda"):
        torch.cuda.set_device(torch.device(name).index or 0)
    if name == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))


def wide_console(least: int = 200) -> "Console":
    """Return the terminal, or, where there is none, what is at least so wide, whatever COLUMNS says: nothing is cut."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, least))


def refuse_no_page(path: Path | None, option: str) -> None:
    """Refuse, before any work, what is no name of a page to write."""
    if path is not None and (path.suffix.lower() not in (".html", ".htm") or path.is_dir()):
        raise InputError(f"{option} {path}: a page is written; name a file that ends with .html")


def cores(asked: int | None) -> int:
    """How many processes: as asked, or one per core that this one may use."""
    if asked is not None and asked < 1:
        raise InputError(f"--jobs: at least 1, got {asked}")
    return asked or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


@contextmanager
def bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
