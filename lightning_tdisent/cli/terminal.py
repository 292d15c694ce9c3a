"""Helpers shared by several commands: the terminal, the device, and common options."""

import argparse
import atexit
import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lightning_tdisent.errors import InputError
from lightning_tdisent.processes import IMPORTED

if TYPE_CHECKING:
    from rich.console import Console

Run = Callable[[argparse.Namespace], None]
Commands: TypeAlias = "argparse._SubParsersAction[Any]"
DEVICE = "auto (default): the GPU if there is one, else the CPU; or cpu, cuda, cuda:1 .."
CACHES = ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")  # of matplotlib and torch, by default below ~


def command(
    commands: Commands, name: str, run: Run, text: str, parts: Sequence[str] = (), keys: str = ""
) -> argparse.ArgumentParser:
    """Add a command with the options that all commands have; parts, keys: see `options.Parser`."""
    out: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, parts=parts, keys=keys)
    out.set_defaults(run=run)
    what = "YAML of what is to be done; every key of it is an option, too: --KEY.SUBKEY VALUE" if keys else (
        "YAML with values of the options below; options of the command line count more"
    )  # fmt: skip
    out.add_argument("--config", type=Path, action="append", default=[], metavar="FILE",
                     help=f"{what}. Several files are merged from left to right")  # fmt: skip
    out.add_argument("--print_config", action="store_true", help="print what the files and options give, and exit")
    out.add_argument("--import", dest="imports", action="append", default=[], metavar="MODULE",
                     help="import this module first, so that options and files may name its classes")  # fmt: skip
    return out


def import_modules(names: Sequence[str]) -> None:
    """Import the user's modules, here and in the worker processes that this one starts (see `processes.imported`)."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise InputError(f"--import {name}: {error}") from None
    if names:
        os.environ[IMPORTED] = ",".join(names)


def keep_caches() -> None:
    """Set a temporary cache folder for libraries if the home folder is missing or not writable.

    The folder lies in $TMPDIR, serves this process and its children, and is removed when this process exits. Variables
    of `CACHES` that are set already keep their values.
    """
    home = os.path.expanduser("~")
    missing = [name for name in CACHES if name not in os.environ]
    if not missing or (os.path.isdir(home) and os.access(home, os.W_OK)):
        return
    folder = tempfile.mkdtemp(prefix="lightning_tdisent-")
    atexit.register(_remove_caches, folder, os.getpid())
    os.environ.update(dict.fromkeys(missing, folder))


def _remove_caches(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # not in a forked process
        shutil.rmtree(folder, ignore_errors=True)


def default_device() -> str:
    """Return the GPU if there is one, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def use_device(name: str) -> str:
    """Select a device of torch and return its name; ``auto`` is the GPU if there is one, else the CPU.

    On a CPU, torch uses $OMP_NUM_THREADS threads, 1 by default, since small networks are fastest on one thread;
    sampling uses the cores for different images (`sample`).

    Raises InputError if the device is not available.
    """
    import torch

    name = default_device() if name == "auto" else name
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
    return name


def wide_console(least: int = 200) -> "Console":
    """Return the console of the terminal.

    If stdout is not a terminal, it has at least ``least`` columns, whatever $COLUMNS says, so that no line is cut.
    """
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, least))


def refuse_no_page(path: Path | None, option: str) -> None:
    """Raise InputError for a path that does not end with .html or .htm, or is a folder. Call it before any work."""
    if path is not None and (path.suffix.lower() not in (".html", ".htm") or path.is_dir()):
        raise InputError(f"{option} {path}: the output is a page; name a file that ends with .html")
