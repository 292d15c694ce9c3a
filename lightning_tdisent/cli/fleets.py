"""The commands `fleet plan`, `fleet run` and `fleet status`."""

import argparse
import inspect
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_tdisent.cli.options import print_merged
from lightning_tdisent.cli.terminal import Commands, command, refuse_no_page, use_device, wide_console
from lightning_tdisent.cli.trainings import describe, fits, open_fleet
from lightning_tdisent.errors import InputError, nearest
from lightning_tdisent.processes import cores

if TYPE_CHECKING:
    from lightning_tdisent.fleet.plan import Fleet
    from lightning_tdisent.fleet.planned import Facts
    from lightning_tdisent.fleet.state import FleetWork

TEXTS = ("memory", "address", "sbatch", "resources")  # engine options that are not numbers
TEXT = "plan, run and watch the trainings of many independent experts"


def add_commands(commands: Commands) -> None:
    """Add the command `fleet` with its subcommands and their options."""
    commands = commands.add_parser("fleet", help=TEXT, description=TEXT).add_subparsers(
        dest="fleet_command", metavar="COMMAND", required=True
    )
    p = command(
        commands, "plan", _fleet_plan, "expand the YAML file of a fleet into a plan, or check an existing plan",
        ("simulate",), "lightning_tdisent.fleet.draft",
    )  # fmt: skip
    p.epilog = "Other options are keys of the YAML, e.g. --budget.images 300000 --set.trainer.val_check_interval 100"
    p.add_argument("folder", nargs="?", help="folder or URL of an existing fleet: check its plan, including edits")
    p.add_argument("--out", help="folder or URL of the fleet (default: out of the YAML file)")
    p.add_argument("--seed", type=int, help="seed of all trainings (default: seed of the YAML file)")
    p.add_argument("--simulate", type=int, metavar="WORKERS", help="predict time and compute of WORKERS workers; "
                   "--simulate.speed: images/s of one (default: as the finished jobs of the fleet)")  # fmt: skip

    r = command(
        commands,
        "run",
        _fleet_run,
        "train all experts that are not done; repeat the command to resume, or run it on several machines",
        ("set", "option"),
    )
    r.add_argument("folder", help="folder or URL of the fleet")
    r.add_argument("--only", action="append", default=[], metavar="EXPERT",
                   help="number or name, or several with commas; a single one is trained in this process")  # fmt: skip
    r.add_argument("--workers", type=int, help="worker processes (default: one per GPU, or per core without a GPU)")
    r.add_argument("--threads", type=int, help="threads per worker; 0: cores divided by workers (default 1)")
    r.add_argument("--together", type=int, metavar="M",
                   help="experts that each worker trains at a time; images are decoded only once")  # fmt: skip
    r.add_argument("--stacked", action="store_true",
                   help="with --together: compute steps of like experts jointly; faster, last bits differ")  # fmt: skip
    r.add_argument("--gpus", help="values for CUDA_VISIBLE_DEVICES, separated by commas, e.g. 0,1; assigned to the "
                   "workers in turn, one each (default: all GPUs; none: no GPU)")  # fmt: skip
    r.add_argument("--engine", choices=("local", "ray", "slurm"), default="local",
                   help="where workers run: this machine, a Ray cluster, or SLURM (default local)")  # fmt: skip
    r.epilog = (
        "--option.KEY VALUE: option of ray or slurm, e.g. --option.cpus 4 --option.gpus 1 --option.memory 16G "
        "--option.retries 3 --option.address HOST:PORT --option.sbatch.partition gpu --option.sbatch.time 8:00:00. "
        "--set.KEY VALUE: set a config key of the trainings on this machine only, e.g. --set.data.path /data/digits"
    )
    r.add_argument("--detach", action="store_true", help="with slurm: submit the jobs, and do not wait for them")
    r.add_argument("--scratch", type=Path, help="local folder for runs of a fleet in an object store (default: cache)")
    r.add_argument(
        "--ttl", type=float, default=60.0, help="seconds without a heartbeat until a worker counts as dead (default 60)"
    )

    s = command(commands, "status", _fleet_status, "show the status of every expert")
    s.add_argument("folder", help="folder or URL of the fleet")
    s.add_argument("--watch", action="store_true", help="update it until all experts are done or failed, or Ctrl-C")
    s.add_argument("--html", type=Path, help="also write it to this HTML file")


def _fleet_plan(a: argparse.Namespace) -> None:
    from lightning_tdisent.fleet.draft import draft
    from lightning_tdisent.fleet.forecast import Pool, lines, speeds

    if (a.folder is None) == (not a.config):
        raise InputError("fleet plan: give either --config FILE for a new fleet, or the folder of an existing fleet")
    if a.folder and (a.out or a.seed is not None or a.assigned):
        raise InputError(
            "--out, --seed and keys of the YAML require --config; edit plan.yaml to change an existing fleet"
        )
    if a.print_config:
        print_merged(a)
        return
    pool: dict[str, Any] = {**({} if a.simulate is None else {"workers": a.simulate}), **a.dotted["simulate"]}
    if pool:
        Pool.of(pool, {} if a.config else {"speed": 1.0})  # refuses what is wrong before a plan is written
    facts: list[Facts] = []

    def check(fleet: "Fleet") -> None:
        if not fleet.store.remote:  # the configs of a fleet in an object store are downloaded first, below
            facts[:] = fleet.check(describe)

    where = a.folder
    if a.config:
        where = str(draft(a.config, describe, a.out, a.seed, a.assigned, check=check).store)
    work = open_fleet(where)
    work.fetch_configs()
    fleet = work.fleet
    fleet.refuse_late()
    work.refuse_fewer()
    facts = facts or fleet.check(describe)
    wide_console().print(_plan_table(fleet, facts), highlight=False)
    if fleet.budget.rule == "adaptive":
        first = fleet.shared_cost + sum(e.cost * e.images for e in fleet.experts)
        print(
            f"this is the first round: {first:,.0f} of the budget of {fleet.budget.images:,} images (of the largest "
            f"expert network); the other {fleet.budget.images - first:,.0f} follow from the error curves, in "
            f"{fleet.budget.rounds} more rounds"
        )
    if pool:
        for name, text in lines(fleet, facts, Pool.of(pool, speeds(work, facts))):
            print(f"{name}: {text}")
    from lightning_tdisent.files import typed

    print(f"plan: {fleet.store}/plan.yaml\nrun it: {typed('fleet', 'run', str(fleet.store))}")


def _plan_table(fleet: "Fleet", facts: Sequence["Facts"]) -> Any:
    from lightning_tdisent.report.table import WideTable, three_digits

    out: list[Sequence[str]] = [("job", "rows", "t", "images", "batch", "steps", "start", "weights", "TFLOP")]
    total = [0.0, 0.0]
    starts = {e.name: e.start for e in fleet.experts}
    for job, fact in zip(fleet.jobs(), facts, strict=True):
        rows = job.expect.get("rows", list(range(1, fact.S + 1)))
        span = [f"{v[0]}..{v[-1]}" if len(v) > 1 else str(v[0]) for v in (rows, [fact.index[s - 1] for s in rows])]
        batch = f"{fact.batch} x {fact.parts}" if fact.parts > 1 else str(fact.batch)
        images, flop = job.images or 0, 3e-12 * fact.flops * (job.images or 0)
        total = [total[0] + images, total[1] + flop]
        out.append((
            job.name, *span, f"{images:,}", batch, f"{fact.max_steps:,}", starts.get(job.name, "scratch"),
            f"{fact.weights:,}", three_digits(flop),
        ))  # fmt: skip
    adaptive = fleet.budget.rule == "adaptive"
    name = "all, first round" if adaptive else "all"
    out.append((name, "", "", f"{total[0]:,.0f}", "", "", "", "", three_digits(total[1])))
    title = f"{fleet.title}: {fleet.budget.rule} budget, table {fleet.table['fingerprint']}"
    return WideTable(title, out, left=("job", "start"))


def _fleet_run(a: argparse.Namespace) -> None:
    from lightning_tdisent.fleet.engines import SRUN
    from lightning_tdisent.fleet.local import refuse_undone, run
    from lightning_tdisent.fleet.status import summary, tiles
    from lightning_tdisent.fleet.work import Session, work_through

    local = {"--workers": a.workers, "--threads": a.threads, "--together": a.together, "--gpus": a.gpus}
    invalid = [name for name, given in {**local, "--stacked": a.stacked or None}.items() if given is not None]
    if invalid and a.engine != "local":
        raise InputError(
            f"{', '.join(invalid)}: only for --engine local; for {a.engine} use --option.cpus, --option.gpus, .."
        )
    workers, threads, together = a.workers or 0, 1 if a.threads is None else a.threads, a.together or 1
    if a.ttl <= 0 or workers < 0 or threads < 0 or together < 1 or (a.stacked and together == 1):
        raise InputError(
            f"--ttl {a.ttl:g} --workers {workers} --together {together}: --ttl must be above 0, --workers and "
            "--threads not negative, and --together at least 1 (2 with --stacked)"
        )
    work = open_fleet(a.folder, a.dotted["set"], a.scratch)
    work.store.check()
    names = [name for words in a.only for name in words.split(",")]
    only = [f"expert_{int(name):03d}" if name.isdigit() else name for name in names]
    unknown = [name for name in only if name not in work.fleet.names]
    if unknown:
        raise InputError(f"--only {', '.join(unknown)}: no such expert; there are {', '.join(work.fleet.names)}")
    work.fleet.refuse_late(only)  # only these jobs: a single worker need not read the files of all the others
    work.refuse_fewer(only)
    if a.engine != "local":
        _launch(a, work, only)
        print(summary(tiles(work)))
        return
    if a.dotted["option"] or a.detach:
        raise InputError("--option.KEY and --detach require --engine ray or slurm")
    here = len(only) == 1
    if here and workers > 1:
        raise InputError(f"--workers {workers}: --only {only[0]} is one job, which one worker trains; leave it out")
    session, train = Session(only, a.ttl, together=together, quiet=not here), partial(fits, stacked=a.stacked)
    if here:
        for name in SRUN:  # in a user's own batch script, Lightning would assume that srun started this process
            os.environ.pop(name, None)
        if a.gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = "" if a.gpus == "none" else a.gpus
        os.environ["OMP_NUM_THREADS"] = str(threads or cores())
        use_device("cpu")
        work_through(work, train, session)
        refuse_undone(work, session)
    else:
        gpus = [g for g in a.gpus.split(",") if g not in ("", "none")] if a.gpus else None
        if gpus == []:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        run(work, train, workers, session, threads=threads, gpus=gpus, title=work.fleet.title)
    print(summary(tiles(work)))


def _launch(a: argparse.Namespace, work: "FleetWork", only: Sequence[str]) -> None:
    """Let a cluster run `fleet run --only` for each expert; with an adaptive budget once per round."""
    import sys

    from lightning_tdisent.fleet.engines import ray, slurm
    from lightning_tdisent.fleet.keys import value_of
    from lightning_tdisent.fleet.local import told_to_go
    from lightning_tdisent.fleet.plan import word_of

    if work.store.remote and a.engine == "slurm":
        raise InputError(f"{a.folder}: --engine slurm requires a folder that all nodes share")
    place = a.folder if work.store.remote else str(Path(a.folder).resolve())
    logs = (Path(work.fleet.root) if work.store.remote else Path(place)) / "logs"
    options: dict[str, Any] = {}
    for key, text in a.dotted["option"].items():
        group, _, name = key.rpartition(".")
        plain = group == "sbatch" or key in ("memory", "address") or not isinstance(text, str)
        value = text if plain else value_of(text, f"--option.{key}")
        if group:
            options.setdefault(group, {})[name] = value
        else:
            options[key] = value
    common = [word for name in a.imports for word in ("--import", name)]
    common += [word for key, value in a.dotted["set"].items() for word in (f"--set.{key}", word_of(value))]
    common += ["--ttl", f"{a.ttl:g}", *(["--scratch", str(a.scratch)] if a.scratch else [])]

    def command(job: Any) -> list[str]:
        return [sys.executable, "-m", "lightning_tdisent", "fleet", "run", place, "--only", job.name, *common]

    launch = ray.launch if a.engine == "ray" else slurm.submit if a.detach else slurm.launch
    known: list[Any] = [ray.launch] if a.engine == "ray" else [slurm.submit, slurm.launch]
    taken = [p.name for f in known for p in inspect.signature(f).parameters.values() if p.kind is p.KEYWORD_ONLY]
    taken.remove("say")
    invalid = [
        f"{k}={v}" for k, v in options.items() if k in taken and k not in TEXTS and not isinstance(v, (int, float))
    ]
    if invalid:
        raise InputError(f"--option.{invalid[0]}: expected a number")
    if invalid := [key for key in options if key not in taken]:
        raise InputError(
            f"--option.{invalid[0]}: unknown for --engine {a.engine}.{nearest(invalid[0], taken)} Known: "
            f"{', '.join(taken)}"
        )
    if a.detach and (a.engine == "ray" or work.fleet.budget.rule == "adaptive"):
        raise InputError(
            "--detach requires --engine slurm and a budget that is not adaptive: the rounds of an adaptive budget are "
            "decided during the training"
        )
    while True:
        number = work.round()
        jobs = [job for job in work.jobs() if (not only or job.name in only) and not work.done(job)]
        if a.detach:
            print(launch(jobs, command, logs, **options).words)  # type: ignore[union-attr]
            return
        with told_to_go():
            failed: Any = launch(jobs, command, logs, **options) if jobs else {}
        if failed:
            raise InputError(
                f"{len(failed)} jobs are not done:\n" + "\n".join(f"  - {n}: {why}" for n, why in failed.items())
            )
        if only or not work.more(number):
            return


def _fleet_status(a: argparse.Namespace) -> None:
    import time

    from rich.live import Live

    from lightning_tdisent.files import write_whole
    from lightning_tdisent.fleet.status import Board, page, tiles

    refuse_no_page(a.html, "--html")
    work, console = open_fleet(a.folder), wide_console()
    found, title = tiles(work), work.fleet.title
    if a.watch:
        with Live(Board(found, title), console=console) as live:
            while any(tile.state not in ("done", "failed") for tile in found):
                time.sleep(1)
                shown = title
                try:
                    found = tiles(work)
                except OSError as error:  # a failure of the store or network that may pass
                    shown = f"{title} (not updated: {error})"
                live.update(Board(found, shown))
    else:
        console.print(Board(found, title), highlight=False)
    if a.html:
        write_whole(a.html, f"<!DOCTYPE html><meta charset=utf-8>{page(found, title)}".encode())
