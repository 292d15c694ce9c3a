"""Commands around the work: list, init, doctor, clean and completion."""

import argparse
import functools
import importlib
import inspect
import os
import platform
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from lightning_tdisent import __version__
from lightning_tdisent.cli.quickstart import experiments
from lightning_tdisent.cli.terminal import Commands, command
from lightning_tdisent.cli.trainings import open_fleet
from lightning_tdisent.errors import InputError, Unavailable, nearest
from lightning_tdisent.files import typed
from lightning_tdisent.processes import cores, threads
from lightning_tdisent.runs import RunFolder

# kinds of parts: their base class, and the modules of this package that define some
PARTS = {
    "schedules": ("diffusion.schedules.NoiseSchedule", "diffusion.schedules"),
    "spaces": ("diffusion.spaces.Space", "diffusion.spaces"),
    "objectives": ("diffusion.objectives.Objective", "diffusion.objectives"),
    "weights": ("diffusion.objectives.Weight", "diffusion.objectives"),
    "operators": ("diffusion.operators.Operator", "diffusion.operators"),
    "networks": ("networks.network.Network", "networks.unet networks.dit"),
    "samplers": ("sampling.sampler.Sampler", "sampling.sampler"),
    "priors": ("priors.prior.Prior", "priors.prior priors.gaussian priors.mixture priors.flow models.model_prior"),
}
KINDS = (*PARTS, "metrics", "protocols", "overlays", "experiments")
PACKAGE = "lightning_tdisent"
CACHED = ("reference", "numbers")  # folders of the cache whose content is computed again


def add_commands(commands: Commands) -> None:
    """Add the subcommands and their options to the parser."""
    c = command(commands, "list", _list, "list what can be chosen, with a line on each")
    c.add_argument("kind", nargs="?", metavar="KIND", help=f"one of {', '.join(KINDS)} (default: all)")

    c = command(commands, "init", _init, "copy the YAML files of an experiment to a new folder, to begin from them")
    c.add_argument("folder", type=Path, help="the new folder")
    c.add_argument("--experiment", default="digits", help="experiment to copy (default digits)")

    command(commands, "doctor", _doctor, "check versions, devices, threads, disk and what is missing for which extra")

    c = command(commands, "clean", _clean, "show the disk space of runs, and remove checkpoints of finished ones")
    c.add_argument("runs", type=Path, nargs="+", help="run folders, or folders above them")
    c.add_argument("--yes", action="store_true", help="remove what is listed (without it nothing is removed)")
    c.add_argument("--cache", action="store_true", help="also the cached statistics of real images")

    c = command(commands, "completion", _completion, "print a script that completes commands and options in a shell")
    c.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="e.g. tdisent completion bash > tdisent.bash; then "
                   "source that file")  # fmt: skip


def _list(a: argparse.Namespace) -> None:
    if a.kind is not None and a.kind not in KINDS:
        raise InputError(f"list: there is no kind {a.kind!r}.{nearest(a.kind, KINDS)} Kinds: {', '.join(KINDS)}")
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000  # one line each in a file
    for kind in [a.kind] if a.kind else KINDS:
        lines = dict(_lines(kind))
        if not a.kind:
            print(f"{kind}:")
        width = max(map(len, lines), default=0)
        for name, text in lines.items():
            head = f"{'' if a.kind else '  '}{name.ljust(width)}  "
            print(textwrap.fill(text, columns, initial_indent=head, subsequent_indent=" " * len(head)) or head)


def _lines(kind: str) -> Iterator[tuple[str, str]]:
    """Yield the name of each part of a kind, and a line on it."""
    if kind in PARTS:
        base, modules = PARTS[kind]
        for module in modules.split():
            importlib.import_module(f"{PACKAGE}.{module}")
        home, _, name = base.rpartition(".")
        found = list(_subclasses(getattr(importlib.import_module(f"{PACKAGE}.{home}"), name)))
        for cls in found:
            own = cls.__module__.startswith(f"{PACKAGE}.")
            yield cls.__name__ if own else f"{cls.__module__}.{cls.__qualname__}", _sentence(cls)
    elif kind == "metrics":
        from lightning_tdisent.metrics.registry import known, named

        for metric in known():
            yield named(metric), _sentence(metric)
    elif kind == "protocols":
        from lightning_tdisent.metrics.protocol import PRESETS

        for name, preset in PRESETS.items():
            yield name, f"features {preset['features']}, n {preset.get('n', 1000):,}: {', '.join(preset['metrics'])}"
    else:
        folder = experiments() / ("ablate" if kind == "overlays" else "")
        for file in sorted(folder.glob("*.yaml" if kind == "overlays" else "*/*.yaml")):
            if kind == "overlays" or file.parent.name != "ablate":
                first = file.read_text(encoding="utf-8").splitlines()[0]
                yield str(file), first.lstrip("# ")


def _subclasses(base: type) -> Iterator[type]:
    cls: type
    for cls in base.__subclasses__():
        if not inspect.isabstract(cls):
            yield cls
        yield from _subclasses(cls)


def _sentence(cls: type) -> str:
    """Return the first sentence of a docstring."""
    text = " ".join((cls.__doc__ or "").split("\n\n")[0].split()).replace("`", "")
    return re.split(r"(?<=\.)(?<!app\.)(?<!eq\.) (?=[A-Z])", text)[0]


def _init(a: argparse.Namespace) -> None:
    from lightning_tdisent.data.digits import write

    names = sorted(f.name for f in experiments().iterdir() if any(f.glob("*.yaml")) and f.name != "ablate")
    if a.experiment not in names:
        raise InputError(
            f"--experiment {a.experiment}: not there.{nearest(a.experiment, names)} There are: {', '.join(names)}"
        )
    if a.folder.exists() and not (a.folder.is_dir() and not any(a.folder.iterdir())):
        raise InputError(f"{a.folder} is there already; name a new folder")
    place = a.folder / "experiments"
    for name in (a.experiment, "ablate"):
        for file in sorted((experiments() / name).glob("*.yaml")):
            target = place / name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    if a.experiment == "digits":
        write(a.folder / "data" / "digits")
    runs = [f for f in sorted((place / a.experiment).glob("*.yaml")) if "model:" in f.read_text(encoding="utf-8")]
    file = next((f for f in runs if f.stem.startswith("reduced")), runs[0]).relative_to(a.folder)
    print(
        f"{place / a.experiment}: {len(list((place / a.experiment).glob('*.yaml')))} files, overlays in {place}/ablate"
    )
    print(f"cd {a.folder}\n{typed('fit', '--config', file)}")
    print(f"{typed('fit', '--config', file, '--config', 'experiments/ablate/eps.yaml', '--run', 'runs/eps')}")


def _doctor(a: argparse.Namespace) -> None:
    import torch

    missing = list(_packages())
    print(f"python {platform.python_version()} ({sys.executable}), {platform.platform()}")
    print(f"cores: {cores()}; threads of sampling: {threads()} (OMP_NUM_THREADS limits them)")
    if torch.cuda.is_available():
        for k in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(k)
            bf16 = "" if torch.cuda.is_bf16_supported() else ", no bfloat16"
            print(f"GPU {k}: {p.name}, {p.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}{bf16}")
    else:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built for CPUs"
        print(f"GPU: none ({built})")
    from lightning_tdisent.metrics.weights import cache_folder

    for name, folder in (("this folder", Path.cwd()), ("cache", cache_folder())):
        place = next(p for p in (folder, *folder.parents) if p.exists())
        free = shutil.disk_usage(place).free / 1e9
        print(f"{name}: {folder}, {free:,.1f} GB free" + ("" if os.access(place, os.W_OK) else ", NOT writable"))
    print(f"experiments: {experiments()}")
    if missing:
        raise InputError(f"these packages are missing or too old: {', '.join(missing)}; install {PACKAGE} again")


def _packages() -> Iterator[str]:
    """Print the versions of all packages that are used; yield those that are required and do not fit."""
    from packaging.requirements import Requirement

    print(f"{PACKAGE} {__version__}")
    try:
        needs = requires(PACKAGE) or []
    except PackageNotFoundError:
        print("  not installed as a package: what it requires cannot be checked")
        return
    extras: dict[str, list[str]] = {}
    for text in needs:
        need = Requirement(text)
        named = re.search(r"extra == [\"'](\w+)[\"']", text)
        extra = named[1] if named else ""
        if extra in ("test", "lint", "docs"):
            continue
        try:
            found = version(need.name)
        except PackageNotFoundError:
            found = ""
        fits = bool(found) and need.specifier.contains(found, prereleases=True)
        if extra:
            extras.setdefault(extra, []).extend([] if fits else [f"{need.name} {found or 'missing'}"])
            continue
        print(f"  {need.name} {found or 'missing'}" + ("" if fits else f": NOT {need.specifier}"))
        if not fits:
            yield f"{need.name}{need.specifier}"
    for extra, lacking in extras.items():
        print(f"  extra {extra}: " + ("installed" if not lacking else f"not installed ({', '.join(lacking)})"))


def _clean(a: argparse.Namespace) -> None:
    from lightning_tdisent.metrics.weights import cache_folder
    from lightning_tdisent.models.disk import removable, runs_below

    if missing := [str(folder) for folder in a.runs if not folder.is_dir()]:
        raise InputError(f"{', '.join(missing)}: no such folder")
    found = list(dict.fromkeys(run.resolve() for folder in a.runs for run in runs_below(folder)))
    if not found:
        raise InputError(f"{', '.join(map(str, a.runs))}: no run folder is there or below")
    total = 0
    for run in found:
        files, why = removable(run)
        if files and (fleet := _unfinished_fleet(run)):
            files, why = [], f"its fleet {fleet} is not finished"
        size, freed = _size(run), sum(file.stat().st_size for file in files)
        total += freed
        what = f"{len(files)} files of checkpoints, {freed / 1e6:,.1f} MB" if files else f"nothing: {why}"
        print(f"{run}: {size / 1e6:,.1f} MB; to remove: {what}")
        if files and a.yes:
            with RunFolder(run):  # nobody may begin to train in it meanwhile
                for file in files:
                    file.unlink()
    for place in [cache_folder() / name for name in CACHED] if a.cache else ():
        if place.exists():
            total += (size := _size(place))
            print(f"{place}: {size / 1e6:,.1f} MB, computed again when needed")
            if a.yes:
                shutil.rmtree(place)
    verb = "removed" if a.yes else "would be removed; --yes removes it"
    print(f"{total / 1e6:,.1f} MB {verb}")


@functools.cache
def _finished(fleet: str) -> bool:
    work = open_fleet(fleet)
    return work.last() and all(work.done(job) for job in work.jobs())


def _unfinished_fleet(run: Path) -> Path | None:
    """Return the fleet that a run belongs to, if some of its experts are not done or wait for another round."""
    from lightning_tdisent.fleet.planned import FILE

    for folder in run.resolve().parents:
        if (folder / FILE).exists():
            return None if _finished(str(folder)) else folder
    return None


def _size(folder: Path) -> int:
    return sum(f.lstat().st_size for f in folder.rglob("*") if not f.is_dir())


def _completion(a: argparse.Namespace) -> None:
    try:
        shtab: Any = importlib.import_module("shtab")
    except ImportError:
        raise Unavailable("completion needs the package shtab: pip install 'lightning_tdisent[completion]'") from None
    from lightning_tdisent.cli import parser

    tree = parser()
    tree.prog = "tdisent"
    print(shtab.complete(tree, a.shell))
