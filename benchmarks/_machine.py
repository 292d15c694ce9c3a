"""Helpers shared by all benchmarks: size options, description of the machine, timing, and quartiles."""

import argparse
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

import lightning_tdisent
from lightning_tdisent.evaluation.provenance import commit, processor

Size = TypeVar("Size")


def add_sizes(parser: argparse.ArgumentParser, quick: str) -> None:
    """Add the options --quick and --toy; quick: help text of ``--quick``."""
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--toy", action="store_true", help="tiny run for the tests, seconds; its numbers mean nothing")


def of_size(args: argparse.Namespace, toy: Size, quick: Size, full: Size) -> Size:
    """Return the value for the size chosen by --toy, --quick or neither."""
    return toy if args.toy else quick if args.quick else full


def describe(*packages: str, **hardware: str) -> None:
    """Print hardware, versions (of torch, ``packages`` and this package), commit and command."""
    load = next(iter(lines("/proc/loadavg")), "unknown").split()[0]
    more = "".join(f", {name} {value}" for name, value in hardware.items())
    print(
        f"hardware: {processor() or platform.machine()}, {os.cpu_count()} cores{more}, "
        f"threads {torch.get_num_threads()}, load {load}\n"
        f"versions: python {platform.python_version()}, "
        f"{', '.join(f'{name} {version(name)}' for name in ('torch', *packages))}, "
        f"lightning_tdisent {lightning_tdisent.__version__}\n"
        f"commit: {commit() or 'unknown'}, {time.strftime('%Y-%m-%d')}\n"
        f"command: python benchmarks/{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}"
    )


def lines(path: str) -> list[str]:
    """Return the lines of a system file; an empty list if there is no such file."""
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def timed(work: Callable[[], Any]) -> float:
    """Return the wall-clock seconds that ``work`` takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def quartiles(values: list[float]) -> str:
    """Return the median with the lower and upper quartile, as text."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"
