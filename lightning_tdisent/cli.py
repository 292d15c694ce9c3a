"""The commands: wiring only. Nothing heavy is imported before a command needs it, so that help is instant."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_tdisent import __version__
from lightning_tdisent.errors import InputError, nearest

if TYPE_CHECKING:
    from lightning_tdisent.report.study import Study
    from lightning_tdisent.sampling.sampler import Sampler

LIGHTNING = {
    "fit": "train one module: --config FILE [--config OVERLAY ..] [--run FOLDER]",
    "validate": "held-out errors, quality and pictures of a checkpoint or composite",
    "test": "the same, logged as test",
    "predict": "write images of seeds with a LightningModule",
}


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
    s.add_argument("--out", type=Path, required=True, help="folder for SEED.png and grid.png; must not hold images yet")
    s.add_argument("--seeds", default="0:64", help="FIRST:END (default 0:64)")
    s.add_argument("--label", type=int, help="class, for a class-conditional model")
    s.add_argument("--guidance", type=float, help="scale of classifier-free guidance; needs --label")
    _sampler_options(s)

    c = add("compose", _compose, "make one composite folder from the weights of experts")
    c.add_argument(
        "experts", type=Path, nargs="+", help="folders of runs, a folder of such folders, or files of weights"
    )
    c.add_argument("--out", type=Path, required=True, help="the composite folder to write")

    w = add("average", _average, "average a run's weights over another length, from its snapshots (fit --ema.lengths)")
    w.add_argument("run_folder", type=Path, metavar="run", help="run folder")
    w.add_argument("--sigma-rel", type=float, required=True, help="length of the average, relative to the training")
    w.add_argument("--step", type=int, help="step of the training it ends at (default: the last snapshot)")
    w.add_argument("--out", type=Path, required=True, help="the .safetensors to write")

    e = add("evaluate", _evaluate, "models side by side in one table, from the same seeds")
    e.add_argument("models", type=Path, nargs="+", help="as for sample")
    e.add_argument("--data", required=True, help="folder of shards with the real images")
    e.add_argument("--split", default="test", help="split of the errors per state (default test)")
    e.add_argument("--reference", default="train", help="split that distances are taken to (default train)")
    e.add_argument("--features", required=True, help="feature network: digits or mnist")
    e.add_argument("-n", type=int, default=1000, help="images generated per model (default 1000)")
    e.add_argument("--first-seed", type=int, default=0)
    e.add_argument("--out", type=Path, default=Path("runs/evaluate"), help="folder for results.json and report.html")
    _sampler_options(e)

    r = add("report", _report, "write report.html anew from a folder that study or evaluate filled")
    r.add_argument("folder", type=Path)

    f = add("study", _study, "train, compose, sample, evaluate and report everything that one YAML names")
    f.add_argument("config", type=Path, help="e.g. experiments/digits/quickstart.yaml")
    f.add_argument("--out", type=Path, help="folder (default: that of the YAML)")
    f.add_argument("--seed", type=int, help="seed of all trainings (default: that of the YAML)")
    f.add_argument("--workers", type=int, default=0, help="processes at a time (default: one per core)")
    f.add_argument("--set", action="append", default=[], metavar="RUN.KEY=VALUE", dest="overrides",
                   help="override for a run's fit, e.g. experts.model.objective=Eps; * is every run")  # fmt: skip
    return out


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
            known = [*LIGHTNING, "sample", "compose", "average", "evaluate", "report", "study"]
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
    if name == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))


def _sample(a: argparse.Namespace) -> None:
    import torch

    from lightning_tdisent.sampling.composite import load_model
    from lightning_tdisent.sampling.denoiser import Guided
    from lightning_tdisent.sampling.evaluation import grid, save_png
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
    images = torch.cat(list(sample(model, _sampler(a), range(first, end), a.batch_size, label)))
    for seed, image in enumerate(images, first):
        save_png(image, a.out / f"{seed:06d}.png")
    save_png(grid(images[:256]), a.out / "grid.png")
    print(f"{len(images)} images and grid.png in {a.out}")


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
    out = compose(files, a.out)
    print(f"{len(files)} experts composed in {out}: python -m lightning_tdisent sample {out} --out {out}/images")


def _evaluate(a: argparse.Namespace) -> None:
    from lightning_tdisent.diffusion.spec import spec
    from lightning_tdisent.report.study import Study

    if (a.out / "study.json").exists():
        raise InputError(f"--out {a.out} already keeps results; choose another folder")
    contenders = [{"name": str(m), "source": str(m), "sampler": spec(_sampler(a))} for m in a.models]
    options = {"reference": a.reference, "batch_size": a.batch_size, "device": a.device}
    study = Study(
        str(a.out), "Evaluation", contenders, a.data, a.features, a.split, n=a.n, first_seed=a.first_seed, **options
    )
    study.check()
    _finish(study)


def _report(a: argparse.Namespace) -> None:
    from lightning_tdisent.report.study import Study

    print(f"report: {Study.load(a.folder).write_report()}")


def _study(a: argparse.Namespace) -> None:
    from lightning_tdisent.fleet.local import run
    from lightning_tdisent.fleet.plan import plan
    from lightning_tdisent.report.study import Study
    from lightning_tdisent.sampling.composite import MANIFEST, compose, find_files

    todo = plan(a.config, a.out, a.seed, a.overrides)
    study = Study(**todo.evaluation)
    study.check()
    todo.claim()
    run(todo.jobs, fit_job, a.workers)
    for fleet, folder in todo.composites.items():
        if not (folder / MANIFEST).exists():
            compose(find_files(todo.out / fleet), folder)
    _finish(study)


def _finish(study: "Study") -> None:
    from rich.console import Console

    _device(study.device)
    study.evaluate()
    console = Console()
    Console(width=max(console.width, 160) if not console.is_terminal else None).print(study.rich_table())
    print(f"report: {study.write_report()}")


def fit_job(argv: list[str], report: Callable[[int, int], None]) -> None:
    """Run one `fit` in a worker process."""
    from lightning_tdisent.lit.callbacks.progress import StepProgress
    from lightning_tdisent.lit.entry import run

    run(argv, [StepProgress(report)])
