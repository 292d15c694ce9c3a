"""Commands that measure and report: evaluate, fetch, report and study."""

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_tdisent.cli.models import fit_and_save
from lightning_tdisent.cli.options import part_entry, print_merged
from lightning_tdisent.cli.samples import sampled_by, sampler_of, sampler_options
from lightning_tdisent.cli.terminal import DEVICE, Commands, command, refuse_no_page, use_device, wide_console
from lightning_tdisent.cli.trainings import describe, fits, role
from lightning_tdisent.errors import InputError, check_number
from lightning_tdisent.progress import Progress
from lightning_tdisent.runs import CHECKPOINTS, CONFIG, PRIOR, WEIGHTS

if TYPE_CHECKING:
    from lightning_tdisent.studies.results import Study


def add_commands(commands: Commands) -> None:
    """Add the subcommands and their options to the parser."""
    e = command(
        commands,
        "evaluate",
        _evaluate,
        "evaluate and compare models and folders of images; with torchrun on several ranks",
        ("sampler", "protocol"),
    )
    e.add_argument("models", type=Path, nargs="+", help="model as for sample, a .ckpt, a folder of images or shards, "
                   "or an .npz of images in ADM's format")  # fmt: skip
    e.add_argument("--data", required=True, help="folder of shards with the real images, or an .npz of ADM")
    e.add_argument(
        "--split", default="test", help="split for the errors per state, and of shards given as models (default test)"
    )
    e.add_argument("--reference", help="reference of distances: a split (default: the protocol's, train), or an .npz")
    e.add_argument("--protocol", required=True, help="digits, mnist, cifar10, random, adm, clean, torch-fidelity, ..; "
                   "--protocol.KEY VALUE changes a field of it, e.g. --protocol.n_real 1000")  # fmt: skip
    e.add_argument("--metrics", help="comma-separated: fd, fd_infinity, is, kid, prdc, sfd, class paths of your own "
                   "(default: the protocol's); in addition bpd, bpd_ode: bits per dimension by the bound and by the "
                   "ODE; lpips: for conditional models")  # fmt: skip
    e.add_argument("--lpips-weights", help="file with the weights of LPIPS")
    e.add_argument("--bits-images", type=int, default=256, help="held-out images for bits per dimension (default 256)")
    e.add_argument("--decoder", choices=("discrete", "uniform", "density"), default="discrete",
                   help="for bits per dimension: grey levels (default), uniform dequantisation, or none")  # fmt: skip
    e.add_argument("--weights", help="file or folder of the feature network, if the protocol's is not shipped")
    e.add_argument("-n", "--n", type=int, help="images generated per model (default: the protocol's, e.g. 1000)")
    e.add_argument("--first-seed", type=int, help="first seed of the generated images (default: the protocol's, 0)")
    e.add_argument("--held-out", type=int, help="maximum number of images of --split (default: 1000; for a "
                   "conditional model as many as its draws need)")  # fmt: skip
    e.add_argument(
        "--out",
        type=Path,
        default=Path("runs/evaluate"),
        help="folder for results.json and report.html (default runs/evaluate)",
    )
    sampler_options(e)

    k = command(commands, "fetch", _fetch, "download and verify the weights of a feature network that is not shipped")
    k.add_argument("name", help="feature network: inception")
    k.add_argument("--source", help="another file or URL to take the weights from")

    r = command(
        commands, "report", _report, "write report.html again from the results in a folder of study or evaluate"
    )
    r.add_argument("folders", type=Path, nargs="+", metavar="folder",
                   help="one folder; or several of one study with other seeds, whose means go to --out")  # fmt: skip
    r.add_argument("--out", type=Path, help=".html file to write for several folders")

    f = command(
        commands, "study", run_study, "train, compose, sample, evaluate and report everything that a YAML lists",
        keys="lightning_tdisent.studies.plan",
    )  # fmt: skip
    study_options(f)


def study_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a study; every other key of its YAML is an option as well."""
    parser.add_argument("--out", type=Path, help="output folder (default: from the YAML)")
    parser.add_argument("--seed", type=int, help="seed of all trainings (default: from the YAML, or 0)")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="repeat the study with these seeds, each "
                        "in OUT_SEED, and pool them in the page OUT.html")  # fmt: skip
    parser.add_argument(
        "--workers", type=int, default=0, help="number of parallel processes (default: one per GPU, or per core)"
    )
    parser.add_argument("--device", default="auto", help=f"device that draws and measures; {DEVICE}")
    parser.epilog = "Other options are keys of the YAML, e.g. --n 2000 --runs.NAME.set.model.lr 1e-3; * is every run"


def _evaluate(a: argparse.Namespace) -> None:
    from lightning_tdisent.diffusion.spec import spec
    from lightning_tdisent.metrics.likelihood import BOUND, ODE
    from lightning_tdisent.metrics.lpips import LPIPS
    from lightning_tdisent.models.compose import MANIFEST, holds_weights, newest_of, refuse_damaged, short_names
    from lightning_tdisent.studies.results import Study

    for name in ("study.json", "plan.json", "plan.yaml", CONFIG, CHECKPOINTS, WEIGHTS, MANIFEST, PRIOR):
        if (a.out / name).exists():
            raise InputError(
                f"--out {a.out} already keeps results, a study, a fleet, a run, a composite or a prior ({name}); "
                "choose another folder"
            )
    missing = [str(m) for m in a.models if not m.exists()]
    if missing:
        raise InputError(
            f"{', '.join(missing)}: not there. Name run folders, files of weights, checkpoints, composites, or folders "
            "or shards of images"
        )
    sampler = sampler_of(a)
    contenders = [
        {
            "name": name,
            "source": str(source),
            "sampler": spec(sampler) if holds_weights(source) else None,
            **({"prior": a.prior} if a.prior else {}),
        }
        for name, source in zip(short_names(a.models), map(newest_of, a.models), strict=True)
    ]
    asked = (a.metrics or "").split(",")
    metrics = [name for name in asked if name and name not in (BOUND.name, ODE.name, LPIPS.name)]
    if a.lpips_weights and LPIPS.name not in asked:
        raise InputError("--lpips-weights: belongs to --metrics lpips, which is not given")
    if not {BOUND.name, ODE.name} & {*asked} and (a.bits_images != 256 or a.decoder != "discrete"):
        raise InputError("--bits-images, --decoder: belong to --metrics bpd or bpd_ode, which is not given")
    lpips = (a.lpips_weights or "") if LPIPS.name in asked else None
    bits = {"bound": BOUND.name in asked, "ode": ODE.name in asked, "n": a.bits_images, "decoder": a.decoder}
    options = {"residency": a.residency, "fill": a.fill, "batch_size": a.batch_size}
    options |= {"lpips": lpips}
    options |= {"bits": bits if bits["bound"] or bits["ode"] else None}
    protocol = part_entry(a.protocol, "--protocol")
    protocol = protocol if isinstance(protocol, dict) else {"preset": protocol}
    protocol = {**protocol, **a.dotted["protocol"], **({"metrics": metrics} if metrics else {})}
    options |= {"reference": a.reference, "n": a.n, "first_seed": a.first_seed, "n_held_out": a.held_out}
    with _ranks(use_device(a.device)) as device:
        study = Study(
            str(a.out), "Evaluation", contenders, a.data, protocol, a.weights, a.split, device=device, **options
        )
        refuse_damaged([c["source"] for c in contenders if c["sampler"]])
        study.check()
        if int(os.environ.get("RANK", 0)) == 0 and any(contender["sampler"] for contender in contenders):
            print(sampled_by(sampler))
        _finish(study)


@contextmanager
def _ranks(device: str) -> Iterator[str]:
    """Join the process group if torchrun started this process; yield the device of this rank."""
    import datetime

    import torch.distributed as dist

    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield device
        return
    if device == "cuda":
        device = use_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    # ranks wait for each other only at the end, which may be hours after the first rank is done
    dist.init_process_group("nccl" if "cuda" in device else "gloo", timeout=datetime.timedelta(hours=12))
    try:
        yield device
        dist.barrier()  # a rank that exits while another still writes the report breaks the connections
    finally:
        dist.destroy_process_group()


def _fetch(a: argparse.Namespace) -> None:
    from lightning_tdisent.metrics.weights import fetch

    with Progress("fetch", unit="MB") as progress:
        print(fetch(a.name, a.source, progress=lambda done, total: progress.update(done >> 20, (total or 0) >> 20)))


def _report(a: argparse.Namespace) -> None:
    from lightning_tdisent.studies.claim import refuse_no_repeats
    from lightning_tdisent.studies.results import Study

    if (len(a.folders) > 1) == (a.out is None):
        raise InputError("report: --out FILE.html is required for several folders, and only allowed for several")
    refuse_no_page(a.out, "--out")
    studies = [Study.load(folder) for folder in a.folders]
    refuse_no_repeats(a.folders)
    if a.out is None:
        print(f"report: {studies[0].write_report()}")
        return
    _print_pooled(studies, a.out)


def _print_pooled(studies: Sequence["Study"], out: Path) -> None:
    """Write the page of studies that differ in their seeds, and print its tables and notes."""
    from lightning_tdisent.report.table import terminal_tables
    from lightning_tdisent.report.verdict import verdicts
    from lightning_tdisent.studies.seeds import notes_of, write_page

    rows = write_page(studies, out)
    for text in verdicts(rows):
        print(text)
    for shown in terminal_tables(rows):
        wide_console(1000).print(shown, highlight=False)
    for line in notes_of({str(study.folder): study.rows for study in studies}, rows):
        print(f"note: {line}")
    print(f"report: {out}")


def run_study(a: argparse.Namespace) -> None:
    """Train, compose, evaluate and report what the YAML files ``a.config`` name."""
    from lightning_tdisent.studies.plan import plan
    from lightning_tdisent.studies.run import train

    def fit_prior(source: str, at: int | float, part: dict[str, Any], data: str, folder: Path) -> None:
        fit_and_save(source, at, part, data, "train", None, folder)

    check_number("--workers", a.workers, 0)
    if a.print_config:
        print_merged(a)
        return
    if not a.seeds:
        todo = plan(a.config, a.out, a.seed, a.assigned)
        todo.evaluation["device"] = use_device(a.device)
        _finish(train(todo, a.config[0], fits, describe, role, fit_prior, a.workers))
        return
    if a.seed is not None or len({*a.seeds}) < len(a.seeds):
        raise InputError("--seeds: give each seed once, and no --seed beside them")
    base = Path(a.out or plan(a.config, None, a.seeds[0], a.assigned).out)
    refuse_no_page(base.with_name(f"{base.name}.html"), "--seeds")
    plans = [plan(a.config, base.with_name(f"{base.name}_{seed}"), seed, a.assigned) for seed in a.seeds]
    for todo in plans:  # folders of other studies are refused before the first training
        todo.compare()
    studies = []
    for todo in plans:
        todo.evaluation["device"] = use_device(a.device)
        studies.append(train(todo, a.config[0], fits, describe, role, fit_prior, a.workers))
        _finish(studies[-1])
    _print_pooled(studies, base.with_name(f"{base.name}.html"))


def _finish(study: "Study") -> None:
    from lightning_tdisent.distributed import rank_and_world

    use_device(study.device)
    study.evaluate()
    if rank_and_world()[0]:
        return
    console = wide_console(1000)
    for part in study.lines():
        console.print(part, highlight=False)
    print(f"numbers: {study.folder / 'results.json'}\nreport: {study.write_report()}")
    refused = [f"{row['name']}: {row['refused']}" for row in study.rows if "refused" in row and "source" in row]
    if refused:
        raise InputError("; ".join(refused))
