"""The commands: wiring only, and long since every option of every command is named here with its help.

Nothing heavy is imported before a command needs it, so that help is instant.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_tdisent import __version__
from lightning_tdisent.errors import Halted, InputError, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from lightning_tdisent.fleet.job import Report
    from lightning_tdisent.fleet.plan import Facts, Fleet
    from lightning_tdisent.fleet.work import FleetWork
    from lightning_tdisent.report.study import Study
    from lightning_tdisent.sampling.sampler import Sampler

LIGHTNING = {
    "fit": "train one module: --config FILE [--config OVERLAY ..] [--run FOLDER]",
    "validate": "held-out errors, quality and pictures of a checkpoint or composite",
    "test": "the same, logged as test",
    "predict": "write images of seeds with a LightningModule",
}

OTHERS = ("sample", "compose", "average", "export", "evaluate", "fetch", "report", "study", "fleet", "data")


def parser() -> argparse.ArgumentParser:
    """The whole command line but for the options of Lightning's four commands."""
    out = argparse.ArgumentParser(
        "python -m lightning_tdisent", description="Diffusion models over few latent states, and their composition."
    )
    out.add_argument("--version", action="version", version=__version__)
    commands = out.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in LIGHTNING.items():
        commands.add_parser(name, help=text, add_help=False)

    def add(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        command.add_argument("--import", dest="imports", action="append", default=[], metavar="MODULE",
                             help="import your module first, so that files may name its classes")  # fmt: skip
        return command

    s = add("sample", _sample, "draw images from a run, a file of weights, or a composite folder")
    s.add_argument("model", type=Path, help="run folder, model.safetensors, folder of experts, or composite folder")
    s.add_argument(
        "--out", type=Path, required=True, help="folder for SEED.png, the grid beside it; must not hold images yet"
    )
    s.add_argument("--seeds", default="0:64", help="FIRST:END (default 0:64)")
    s.add_argument("--label", type=int, help="class, for a class-conditional model")
    s.add_argument("--guidance", type=float, help="scale of classifier-free guidance; needs --label")
    _sampler_options(s)

    c = add("compose", _compose, "make one composite folder from the weights of experts")
    c.add_argument(
        "experts", type=Path, nargs="+", help="folders of runs, a folder of such folders, or files of weights"
    )
    c.add_argument("--out", type=Path, required=True, help="the composite folder to write")
    c.add_argument("--merge", type=int, metavar="K", help="average neighbours to K networks: cheaper, and less exact")
    c.add_argument("--merge-weights", default="uniform",
                   help="uniform (default), images, search, or numbers by commas, one per expert")  # fmt: skip
    c.add_argument("--merge-blocks", default="equal", help="equal (default), search, or numbers of experts by commas")
    c.add_argument("--merge-data", help="folder of shards, for a search, and to print the errors before and after")
    c.add_argument("--merge-split", default="train", help="of these (default train)")
    c.add_argument("-n", type=int, default=256, help="images of these (default 256)")
    c.add_argument("--device", default="cpu", help="of the search: cpu, cuda, cuda:1 ..")

    x = add("export", _export, "write a model as a folder for others: safetensors and JSON, or a diffusers pipeline")
    x.add_argument("model", type=Path, help="as for sample")
    x.add_argument("--out", type=Path, required=True, help="the folder to write")
    x.add_argument("--format", choices=("safetensors", "diffusers"), default="safetensors")

    w = add("average", _average, "average a run's weights over another length, from its snapshots (fit --ema.lengths)")
    w.add_argument("run_folder", type=Path, metavar="run", help="run folder")
    w.add_argument("--sigma-rel", type=float, required=True, help="length of the average, relative to the training")
    w.add_argument("--step", type=int, help="step of the training it ends at (default: the last snapshot)")
    w.add_argument("--out", type=Path, required=True, help="the .safetensors to write")

    e = add("evaluate", _evaluate, "models and folders of images side by side; on several ranks under torchrun")
    e.add_argument("models", type=Path, nargs="+", help="as for sample, a .ckpt, or a folder of images or shards")
    e.add_argument("--data", required=True, help="folder of shards with the real images")
    e.add_argument(
        "--split", default="test", help="split of the errors per state, and of shards measured (default test)"
    )
    e.add_argument("--reference", help="split that distances are taken to (default: the protocol's, train)")
    e.add_argument("--protocol", required=True, help="digits, mnist, cifar10, random, adm, clean, torch-fidelity, ..")
    e.add_argument("--metrics", help="of fd, fd_infinity, is, kid, prdc, sfd, by commas (default: the protocol's)")
    e.add_argument("--weights", help="file or folder of the feature network, where the protocol's is not shipped")
    e.add_argument("-n", type=int, help="images generated per model (default: the protocol's, e.g. 1000 or 50000)")
    e.add_argument("--first-seed", type=int)
    e.add_argument("--out", type=Path, default=Path("runs/evaluate"), help="folder for results.json and report.html")
    _sampler_options(e)

    k = add("fetch", _fetch, "download weights of a feature network that is not shipped, and check them")
    k.add_argument("name", help="inception")
    k.add_argument("--source", help="a file or URL to take them from instead")

    r = add("report", _report, "write report.html anew from a folder that study or evaluate filled")
    r.add_argument("folder", type=Path)

    f = add("study", _study, "train, compose, sample, evaluate and report everything that one YAML names")
    f.add_argument("config", type=Path, help="e.g. experiments/digits/quickstart.yaml")
    f.add_argument("--out", type=Path, help="folder (default: that of the YAML)")
    f.add_argument("--seed", type=int, help="seed of all trainings (default: that of the YAML)")
    f.add_argument("--workers", type=int, default=0, help="processes at a time (default: one per core)")
    f.add_argument("--set", action="append", default=[], metavar="RUN.KEY=VALUE", dest="overrides",
                   help="override for a run's fit, e.g. experts.model.objective=Eps; * is every run")  # fmt: skip
    _fleet_commands(commands.add_parser("fleet", help="plan, run and watch the trainings of many independent experts"))
    _data_commands(commands.add_parser("data", help="make, prepare, index, verify or inspect shards of images"))
    return out


def _fleet_commands(fleet: argparse.ArgumentParser) -> None:
    commands = fleet.add_subparsers(dest="fleet_command", metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        command.add_argument("--import", dest="imports", action="append", default=[], metavar="MODULE",
                             help="import your module first, so that configs may name its classes")  # fmt: skip
        return command

    p = add("plan", _fleet_plan, "expand a fleet's YAML into a plan, one training per expert; or check one")
    p.add_argument("folder", nargs="?", help="of a fleet that is planned already: check its plan, as edited")
    p.add_argument("--config", type=Path, help="the YAML, e.g. experiments/digits/fleet.yaml")
    p.add_argument("--out", help="folder or URL of the fleet (default: that of the YAML)")
    p.add_argument("--seed", type=int, help="of all trainings (default: that of the YAML)")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                   help="config key of every training, e.g. trainer.val_check_interval=100")  # fmt: skip

    p.add_argument("--simulate", metavar="workers=N[,speed=..,failures=..]",
                   help="say what it will take; without speed= a few steps are rehearsed here first")  # fmt: skip

    r = add("run", _fleet_run, "train what is not trained yet; the same command goes on, on any number of machines")
    r.add_argument("folder", help="of the fleet, or its URL")
    r.add_argument("--only", action="append", default=[], metavar="EXPERT",
                   help="a number or name, or several by commas; a single one is trained right here")  # fmt: skip
    r.add_argument("--workers", type=int, default=0, help="processes at a time (default: one per core, or per GPU)")
    r.add_argument("--gpus", default="", help="names for CUDA_VISIBLE_DEVICES by commas, e.g. 0,1: a worker sees one")
    r.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                   help="what is different on this machine, e.g. data.path=/data/digits")  # fmt: skip
    r.add_argument("--scratch", type=Path, help="folder for runs of a fleet in an object store (default: the cache)")
    r.add_argument("--ttl", type=float, default=60.0, help="seconds of silence after which a worker is taken for dead")

    s = add("status", _fleet_status, "where every expert stands")
    s.add_argument("folder", help="of the fleet, or its URL")
    s.add_argument("--watch", action="store_true", help="show it until all is done, or Ctrl-C")
    s.add_argument("--html", type=Path, help="write it to this file, too")


def _data_commands(data: argparse.ArgumentParser) -> None:
    commands = data.add_subparsers(dest="data_command", metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run, imports=[])
        command.add_argument("--split", default="train", help="which one (default train), or a pattern of its shards")
        command.add_argument("--jobs", type=int, help="processes (default: one per core)")
        return command

    p = add("prepare", _prepare, "make shards and their index from a raw data set; the same command goes on")
    p.add_argument(
        "source", type=Path, help="images in class folders or flat, ILSVRC, MNIST, CIFAR-10, parquet, shards"
    )
    p.add_argument("out", type=Path, help="folder for the shards")
    p.add_argument("--kind", default="auto", help="of the source, where it is not clear; a wrong one lists them")
    p.add_argument("--size", type=int, help="crop and resize to SIZE x SIZE as ADM does (default: as they are)")
    p.add_argument("--encode", default="keep", help="png, jpg or webp (default: keep the bytes where nothing changes)")
    p.add_argument("--samples", type=int, default=10_000, help="per shard (default 10000)")
    shuffle = "mix all samples once (default: where the source is sorted by class)"
    p.add_argument("--shuffle", action=argparse.BooleanOptionalAction, default=None, help=shuffle)
    p.add_argument("--seed", type=int, default=0, help="of the order")
    p.add_argument("--vae", type=Path, help="folder of a diffusers AutoencoderKL: store latents instead of images")
    p.add_argument("--device", default="cpu", help="of the autoencoder")
    p.add_argument("--batch-size", type=int, default=32, help="of the autoencoder")
    p.add_argument("--bad", type=float, default=0.001, help="share of the samples that may be left out (default 0.001)")

    t = add("toy", _toy, "shards of made-up pictures with classes and captions: no download, no network")
    t.add_argument("out", type=Path, help="folder for the shards")
    t.add_argument("-n", type=int, default=2000, help="pictures (default 2000), in 4 shards")
    t.add_argument("--size", type=int, default=32, help="of a side in pixels (default 32)")
    t.add_argument("--seed", type=int, default=0, help="of the pictures; another one for another split")

    i = add("index", _index, "write the index of shards, from which on they are verified and read one by one")
    i.add_argument("folder", help="of the shards, or its URL")
    i.add_argument("--no-samples", action="store_true", help="one row per shard, for a corpus too large to list")

    v = add("verify", _verify, "read every byte and compare it with the index; exit code 1 if anything has changed")
    v.add_argument("folder", help="of the shards, or its URL")

    n = add("inspect", _inspect, "contact sheet, histogram and classes, as PNG and in the terminal")
    n.add_argument("folder", help="of the shards, or its URL")
    n.add_argument("-n", type=int, default=1000, help="samples looked at (default 1000)")
    n.add_argument("--out", type=Path, help="the PNG (default inspect-SPLIT.png, here)")


def _sampler_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--sampler", choices=("ddim", "ancestral", "dpm"), default="ddim")
    command.add_argument("--eta", type=float, default=0.0, help="of ddim: 0 deterministic .. 1 ancestral")
    command.add_argument("--steps", type=int, help="network evaluations (default: every row of the model's table)")
    command.add_argument("--batch-size", type=int, default=250)
    command.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ..")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 done, 1 halted and 2 refused (one message, no traceback), 130 interrupted, 143 preempted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv and argv[0] in LIGHTNING:
            from lightning_tdisent.lit.entry import run

            run(argv)
            return 0
        if argv and not argv[0].startswith("-"):
            known = [
                *LIGHTNING,
                *["sample", "compose", "average", "export", "evaluate", "fetch", "report", "study", "fleet", "data"],
            ]
            if argv[0] not in known:
                raise InputError(
                    f"there is no command {argv[0]!r}.{nearest(argv[0], known)} Commands: {', '.join(known)}"
                )
        arguments = parser().parse_args(argv)
        for module in arguments.imports:
            try:
                __import__(module)
            except ImportError as error:
                raise InputError(f"--import {module}: {error}") from None
        arguments.run(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _sampler(a: argparse.Namespace) -> "Sampler":
    from lightning_tdisent.sampling.sampler import DDIM, Ancestral, DPMSolver

    if a.eta and a.sampler != "ddim":
        raise InputError(f"--eta {a.eta:g} belongs to --sampler ddim, not to {a.sampler}")
    if a.sampler == "ddim":
        return DDIM(a.eta, a.steps)
    return {"ancestral": Ancestral, "dpm": DPMSolver}[a.sampler](a.steps)


def _device(name: str) -> None:
    """Refuse a device that torch does not have; small networks on a CPU are fastest on one thread."""
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if name.startswith("cuda"):
        torch.cuda.set_device(name)
    if name == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))


def _sample(a: argparse.Namespace) -> None:
    import torch

    from lightning_tdisent.sampling.composite import load_model
    from lightning_tdisent.sampling.denoiser import Guided
    from lightning_tdisent.sampling.pictures import grid, save_png
    from lightning_tdisent.sampling.sampler import sample

    try:
        first, end = (int(part) for part in a.seeds.split(":"))
    except ValueError:
        raise InputError(f"--seeds {a.seeds}: expected FIRST:END, e.g. 0:64") from None
    if end <= first:
        raise InputError(f"--seeds {a.seeds}: the end must be above the first")
    if a.out.exists() and any(a.out.glob("*.png")):
        raise InputError(f"--out {a.out} already holds images; choose another folder")
    _device(a.device)
    model: Any = load_model(a.model)[0].to(a.device)
    if a.guidance is not None:
        model = Guided(model, a.guidance)
    if a.label is not None and (model.classes is None or not 0 <= a.label < model.classes):
        raise InputError(f"--label {a.label}: the model has {model.classes or 'no'} classes")
    label = None if a.label is None else torch.full((end - first,), a.label, device=a.device)
    images = torch.cat(list(sample(model, _sampler(a), range(first, end), a.batch_size, label))).cpu()
    for seed, image in enumerate(images, first):
        save_png(image, a.out / f"{seed:06d}.png")
    tiles = a.out.with_name(f"{a.out.name}.png")
    save_png(grid(images[:256]), tiles)
    print(f"{len(images)} images in {a.out}, the first of them in {tiles}")


def _average(a: argparse.Namespace) -> None:
    from lightning_tdisent.sampling.averages import reconstruct

    if a.out.exists():
        raise InputError(f"--out {a.out} is there already; choose another name")
    error = reconstruct(a.run_folder, a.sigma_rel, a.out, a.step)
    print(f"{a.out}: sigma_rel {a.sigma_rel:g}, relative error of its profile {error:.2%}")
    if error > 0.1:
        print("that is far from what was asked: choose a length nearer to those of the snapshots, or take more of them")


def _compose(a: argparse.Namespace) -> None:
    from lightning_tdisent.sampling.composite import compose, find_files

    files = [file for source in a.experts for file in find_files(source)]
    if a.merge is not None:
        _merge(a, files)
        return
    chosen = {"--merge-weights": a.merge_weights != "uniform", "--merge-blocks": a.merge_blocks != "equal"}
    if odd := [name for name, given in {**chosen, "--merge-data": a.merge_data}.items() if given]:
        raise InputError(f"{', '.join(odd)}: belong to --merge K, which is not given")
    out = compose(files, a.out)
    print(f"{len(files)} experts composed in {out}: python -m lightning_tdisent sample {out} --out {out}/images")


def _merge(a: argparse.Namespace, files: list[Path]) -> None:
    from lightning_tdisent.sampling.expert import read_card
    from lightning_tdisent.sampling.merge import merge
    from lightning_tdisent.streaming.shards import load

    _device(a.device)
    shape = read_card(files[0]).network["init_args"]["shape"]
    data = load(a.merge_data, a.merge_split, shape[0], a.n) if a.merge_data else None
    weights, blocks = _numbers(a.merge_weights, float), _numbers(a.merge_blocks, int)
    for one in merge(files, a.out, a.merge, weights, blocks, data, a.device):
        cost = f", error of its steps {one.errors[0]:.4g} -> {one.errors[1]:.4g}" if one.errors else ""
        print(f"rows {one.rows[0]}..{one.rows[-1]}: weights {', '.join(f'{w:.3f}' for w in one.weights)}{cost}")
    print(f"{len(files)} experts merged to {a.merge} in {a.out}")


def _numbers(text: str, kind: type) -> Any:
    """Numbers by commas, or the word that is there instead."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        return text


def _export(a: argparse.Namespace) -> None:
    from lightning_tdisent.sampling.export import export

    print(f"{a.model} exported to {export(a.model, a.out, a.format)}; its README.md says how to load it")


def _evaluate(a: argparse.Namespace) -> None:
    from lightning_tdisent.diffusion.spec import spec
    from lightning_tdisent.report.study import Study
    from lightning_tdisent.sampling.composite import holds_weights

    if (a.out / "study.json").exists():
        raise InputError(f"--out {a.out} already keeps results; choose another folder")
    missing = [str(m) for m in a.models if not m.exists()]
    if missing:
        raise InputError(
            f"{', '.join(missing)}: not there. Name run folders, files of weights, checkpoints, composites, or folders "
            "or shards of images"
        )
    contenders = [
        {"name": str(m), "source": str(m), "sampler": spec(_sampler(a)) if holds_weights(m) else None} for m in a.models
    ]
    protocol = {"preset": a.protocol, **({"metrics": a.metrics.split(",")} if a.metrics else {})}
    options = {"reference": a.reference, "batch_size": a.batch_size, "n": a.n, "first_seed": a.first_seed}
    with _ranks(a.device) as device:
        study = Study(
            str(a.out), "Evaluation", contenders, a.data, protocol, a.weights, a.split, device=device, **options
        )
        study.check()
        _finish(study)


@contextmanager
def _ranks(device: str) -> Iterator[str]:
    """Join the other processes that torchrun started, if it did; gives this one's device."""
    import datetime

    import torch.distributed as dist

    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        _device(device)
    # ranks wait for each other at the end alone, and that may be hours after the first is done
    dist.init_process_group("nccl" if "cuda" in device else "gloo", timeout=datetime.timedelta(hours=12))
    try:
        yield device
        dist.barrier()  # who leaves while another still writes the report may find its connections torn down
    finally:
        dist.destroy_process_group()


def _fetch(a: argparse.Namespace) -> None:
    from lightning_tdisent.metrics.weights import fetch

    with _bar("MB") as progress:
        print(fetch(a.name, a.source, progress=lambda done, total: progress(done >> 20, (total or 0) >> 20)))


def _report(a: argparse.Namespace) -> None:
    from lightning_tdisent.report.study import Study

    print(f"report: {Study.load(a.folder).write_report()}")


def _study(a: argparse.Namespace) -> None:
    from lightning_tdisent.files import write_whole
    from lightning_tdisent.fleet.local import run
    from lightning_tdisent.fleet.plan import draft
    from lightning_tdisent.fleet.status import page, tiles
    from lightning_tdisent.fleet.store import Store
    from lightning_tdisent.fleet.study import plan
    from lightning_tdisent.fleet.work import FleetWork, Jobs
    from lightning_tdisent.report.study import BOARDS, Study
    from lightning_tdisent.sampling.composite import MANIFEST, compose, find_files

    todo = plan(a.config, a.out, a.seed, a.overrides)
    study = Study(**todo.evaluation)
    study.check()
    todo.claim()
    fleets = {}
    for name, (file, changes) in todo.fleets.items():
        fleets[name] = FleetWork(draft(file, describe, todo.out / name, todo.seed, changes=changes), describe)
        fleets[name].fleet.check(describe)
        study.runs |= {f"{name}/{e.name}": str(todo.out / name / e.name) for e in fleets[name].fleet.experts}
    if todo.jobs:
        run(Jobs(Store(todo.out), todo.jobs), fit_job, a.workers, title=study.title)
    for name, work in fleets.items():
        run(work, fit_job, a.workers, title=f"{study.title}, {name}")
    boards = "".join(page(tiles(work), name) for name, work in fleets.items())
    write_whole(todo.out / BOARDS, boards.encode())
    for fleet, folder in todo.composites.items():
        if not (folder / MANIFEST).exists():
            compose(find_files(todo.out / fleet), folder)
    _finish(study)


def _fleet_plan(a: argparse.Namespace) -> None:
    from lightning_tdisent.fleet.plan import Fleet, draft

    if (a.folder is None) == (a.config is None):
        raise InputError("fleet plan wants --config FILE for a new fleet, or the folder of one that is planned")
    fleet = draft(a.config, describe, a.out, a.seed, a.overrides) if a.config else Fleet.load(a.folder)
    facts = fleet.check(describe)
    _console().print(_plan_table(fleet, facts), highlight=False)
    if a.simulate:
        from lightning_tdisent.fleet.simulate import Pool, lines, rehearse

        pool, given = Pool.of(a.simulate)
        if "speed" not in given:
            found = rehearse(fleet, fit_job, min(pool.workers, _cores(None)))
            kept = {name: getattr(pool, name) for name in given}
            pool = replace(found, **{"workers": pool.workers, **kept})
        for name, text in lines(fleet, facts, pool):
            print(f"{name}: {text}")
    print(f"plan: {fleet.store}/plan.yaml\nrun it: python -m lightning_tdisent fleet run {fleet.store}")


def _plan_table(fleet: "Fleet", facts: Sequence["Facts"]) -> Any:
    from rich.table import Table

    out = Table(title=f"{fleet.title}: {fleet.budget.rule} budget, table {fleet.table['fingerprint']}")
    for name in ("job", "rows", "t", "images", "batch", "steps", "start", "weights", "TFLOP"):
        out.add_column(name, justify="left" if name in ("job", "start") else "right")
    total = [0.0, 0.0]
    starts = {e.name: e.start for e in fleet.experts}
    for job, fact in zip(fleet.jobs(), facts, strict=True):
        rows = job.expect.get("rows", list(range(1, fact.S + 1)))
        span = [f"{v[0]}..{v[-1]}" if len(v) > 1 else str(v[0]) for v in (rows, [fact.index[s - 1] for s in rows])]
        images, flop = job.images or 0, 3e-12 * fact.flops * (job.images or 0)
        total = [total[0] + images, total[1] + flop]
        out.add_row(
            job.name, *span, f"{images:,}", str(fact.batch), f"{fact.max_steps:,}", starts.get(job.name, "scratch"),
            f"{fact.weights:,}", f"{flop:.3f}",
        )  # fmt: skip
    out.add_section()
    out.add_row("all", "", "", f"{total[0]:,.0f}", "", "", "", "", f"{total[1]:.3f}")
    return out


def _open_fleet(where: str, overrides: Sequence[str] = (), scratch: Path | None = None) -> "FleetWork":
    import hashlib

    from lightning_tdisent.fleet.plan import Fleet, words
    from lightning_tdisent.fleet.store import Store
    from lightning_tdisent.fleet.work import FleetWork

    if Store(where).remote and scratch is None:
        from lightning_tdisent.metrics.weights import cache_folder

        scratch = cache_folder() / "fleets" / hashlib.sha256(where.encode()).hexdigest()[:16]
    return FleetWork(Fleet.load(where, words(overrides), scratch), describe)


def _fleet_run(a: argparse.Namespace) -> None:
    from lightning_tdisent.fleet.local import refuse_undone, run
    from lightning_tdisent.fleet.status import summary, tiles
    from lightning_tdisent.fleet.work import Session, work_through

    if a.ttl <= 0 or a.workers < 0:
        raise InputError(f"--ttl {a.ttl:g} --workers {a.workers}: a time above 0, a number of processes")
    work = _open_fleet(a.folder, a.overrides, a.scratch)
    work.store.check()
    names = [name for words in a.only for name in words.split(",")]
    only = [f"expert_{int(name):03d}" if name.isdigit() else name for name in names]
    here = len(only) == 1
    session = Session(only, a.ttl, quiet=not here)
    if here:
        _device("cpu")
        work_through(work, fit_job, session)
        refuse_undone(work, session)
    else:
        run(work, fit_job, a.workers, session, gpus=[g for g in a.gpus.split(",") if g], title=work.fleet.title)
    print(summary(tiles(work)))


def _fleet_status(a: argparse.Namespace) -> None:
    import time

    from rich.live import Live

    from lightning_tdisent.files import write_whole
    from lightning_tdisent.fleet.status import board, page, tiles

    work, console = _open_fleet(a.folder), _console()
    found, title = tiles(work), work.fleet.title
    if a.watch:
        with Live(board(found, title), console=console) as live:
            while any(tile.state not in ("done", "failed") for tile in found):
                time.sleep(1)
                found = tiles(work)
                live.update(board(found, title))
    else:
        console.print(board(found, title), highlight=False)
    if a.html:
        write_whole(a.html, f"<!DOCTYPE html><meta charset=utf-8>{page(found, title)}".encode())


def _console() -> "Console":
    """The terminal, or something wide where there is none."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 160))


def _finish(study: "Study") -> None:
    from lightning_tdisent.ranks import place

    _device(study.device)
    study.evaluate()
    if place()[0]:
        return
    console = _console()
    for part in study.lines():
        console.print(part, highlight=False)
    print(f"numbers: {study.folder / 'results.json'}\nreport: {study.write_report()}")
    refused = [f"{row['name']}: {row['refused']}" for row in study.rows if "refused" in row and "source" in row]
    if refused:
        raise InputError("; ".join(refused))


def fit_job(argv: list[str], report: "Report") -> None:
    """Run one `fit` in a worker process."""
    from lightning_tdisent.lit.callbacks.curve import Curve
    from lightning_tdisent.lit.callbacks.progress import StepProgress
    from lightning_tdisent.lit.entry import run

    run(argv, [StepProgress(report), Curve()])


def describe(argv: list[str]) -> "Facts":
    """What a command line of `fit` amounts to; nothing is read but its configs, nothing is written."""
    from lightning_tdisent.fleet.plan import Facts
    from lightning_tdisent.lit.entry import parse
    from lightning_tdisent.sampling.cost import flops

    cli = parse(argv)
    module, states = cli.model, cli.model.states
    return Facts(
        f"{type(module).__module__}.{type(module).__qualname__}",
        states.fingerprint,
        states.S,
        states.index.tolist()[1:],
        states.log_snr[1:, 0].tolist(),
        cli.datamodule.batch_size,
        sum(p.numel() for p in module.parameters()),
        flops(module.network),
        module.decay,
        cli.trainer.max_steps,
        int(cli.trainer.val_check_interval),
    )


def _cores(asked: int | None) -> int:
    if asked is not None and asked < 1:
        raise InputError(f"--jobs: at least 1, got {asked}")
    return asked or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


@contextmanager
def _bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _prepare(a: argparse.Namespace) -> None:
    from lightning_tdisent.streaming.prepare import Options, prepare
    from lightning_tdisent.streaming.raw import find_source

    source = find_source(a.source, a.split, a.kind)
    options = Options(
        a.size, a.encode, a.samples, a.shuffle, a.seed, vae=a.vae, device=a.device, batch_size=a.batch_size, bad=a.bad
    )
    print(f"{a.source}: {len(source):,} samples of {source.kind}")
    with _bar("samples") as progress:
        made = prepare(source, a.split, a.out, options, _cores(a.jobs), progress)
    print(f"{a.out}: {made.samples:,} samples in {made.shards} shards, {made.bytes / 1e6:,.1f} MB, with their index")
    if made.skipped:
        first = made.skipped[0]
        print(
            f"{len(made.skipped)} left out, see {a.out}/{a.split}.skipped.txt; the first: {first.name}: {first.reason}"
        )


def _toy(a: argparse.Namespace) -> None:
    from lightning_tdisent.streaming.prepare import Options, prepare
    from lightning_tdisent.streaming.toy import Toy

    if a.n < 1 or a.size < 4:
        raise InputError(f"-n {a.n} --size {a.size}: at least one picture, of at least 4 pixels")
    with _bar("samples") as progress:
        source = Toy(a.n, a.size, a.seed)
        made = prepare(source, a.split, a.out, Options(samples=-(-a.n // 4)), _cores(a.jobs), progress)
    print(f"{a.out}: {made.samples:,} pictures in {made.shards} shards, with their index")


def _index(a: argparse.Namespace) -> None:
    from lightning_tdisent.streaming.index import path_of
    from lightning_tdisent.streaming.scan import build
    from lightning_tdisent.streaming.tars import find

    files = find(a.folder, a.split)
    with _bar("shards") as progress:
        index = build(files, _cores(a.jobs), progress, regions=not a.no_samples)
    index.save(path_of(a.folder, a.split))
    print(f"{path_of(a.folder, a.split)}: {len(index):,} samples in {len(files)} shards, digest {index.digest}")


def _verify(a: argparse.Namespace) -> None:
    from lightning_tdisent.streaming.verify import verify

    with _bar("shards") as progress:
        index, wrong = verify(a.folder, a.split, _cores(a.jobs), progress)
    for line in wrong[:20]:
        print(line)
    what = f"{a.folder} ({a.split})"
    if wrong:
        raise Halted(f"{what}: {len(wrong):,} samples or shards of {len(index):,} are not what they were")
    print(f"{what}: all {len(index):,} samples in {len(index.shards)} shards are good, digest {index.digest}")


def _inspect(a: argparse.Namespace) -> None:
    from rich.console import Console

    from lightning_tdisent.report.dataset import draw, look, table

    out = a.out or Path(f"inspect-{a.split}.png")
    if a.n < 1 or out.suffix != ".png" or not out.parent.is_dir():
        raise InputError(f"-n {a.n} --out {out}: at least one sample, and a .png in a folder that is there")
    found = look(a.folder, a.split, a.n)
    Console().print(table(found))
    draw(found).savefig(out, dpi=110)
    print(f"picture: {out}")
