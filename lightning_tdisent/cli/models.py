"""Commands that make or change files of models: compose, export, average and prior."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_tdisent.cli.options import part_entry
from lightning_tdisent.cli.terminal import DEVICE, Commands, command, use_device
from lightning_tdisent.cli.trainings import open_fleet
from lightning_tdisent.errors import InputError
from lightning_tdisent.progress import working
from lightning_tdisent.runs import CONFIG, PRIOR


def add_commands(commands: Commands) -> None:
    """Add the subcommands and their options to the parser."""
    c = command(commands, "compose", _compose, "make one composite of the weights of experts")
    c.add_argument(
        "experts", nargs="+", help="run folders, a folder of run folders, a fleet's folder or URL, or files of weights"
    )
    c.add_argument("--out", type=Path, required=True, help="folder of the composite")
    c.add_argument("--fill", help="make a preview with missing experts replaced: nearest, or shared:PATH")
    c.add_argument("--allow-mismatch", action="append", default=[], metavar="FIELD",
                   help="allow experts to differ in training data, weights or parametrisation; recorded")  # fmt: skip
    c.add_argument(
        "--merge", type=int, metavar="K", help="average neighbouring experts into K networks: cheaper, but less exact"
    )
    c.add_argument("--merge-weights", default="uniform",
                   help="uniform (default), images, search, or comma-separated numbers, one per expert")  # fmt: skip
    c.add_argument(
        "--merge-blocks", default="equal", help="equal (default), search, or comma-separated numbers of experts"
    )
    c.add_argument("--merge-data", help="folder of shards for a search; also prints the errors before and after")
    c.add_argument("--merge-split", default="train", help="split of --merge-data (default train)")
    c.add_argument("-n", "--n", type=int, default=256, help="number of images of --merge-data (default 256)")
    c.add_argument("--device", default="auto", help=f"device of the search; {DEVICE}")

    x = command(
        commands,
        "export",
        _export,
        "export a model to a folder: safetensors and JSON, or a diffusers pipeline",
    )
    x.add_argument("model", type=Path, help="model, as for sample")
    x.add_argument("--out", type=Path, required=True, help="folder to write")
    x.add_argument("--format", choices=("safetensors", "diffusers"), default="safetensors",
                   help="format of this project (default), or a diffusers pipeline")  # fmt: skip

    w = command(
        commands,
        "average",
        _average,
        "compute an average of a run's weights with another length, from its snapshots (fit --ema.lengths)",
    )
    w.add_argument("run_folder", type=Path, metavar="run", help="run folder")
    w.add_argument("--sigma-rel", type=float, required=True, help="length of the average, relative to the training")
    w.add_argument("--step", type=int, help="training step at which the average ends (default: the last snapshot)")
    w.add_argument("--out", type=Path, required=True, help=".safetensors file to write")

    q = command(
        commands, "prior", _prior, "fit a density at a row of a model's table, from which sampling can start",
        ("prior",),
    )  # fmt: skip
    q.add_argument("model", type=Path, help="model whose table is used, as for sample")
    q.add_argument("--at", required=True, help="row, or a fraction of the rows such as 0.6")
    q.add_argument("--prior", default="Gaussian", help="Gaussian (default), Mixture, StandardNormal, ModelPrior, a "
                   "class path, or {class_path: .., init_args: ..}; --prior.KEY VALUE sets an argument of it, e.g. "
                   "--prior.components 20, --prior.rank 64, --prior.source runs/vae")  # fmt: skip
    q.add_argument("--data", required=True, help="folder of shards to fit to")
    q.add_argument("--split", default="train", help="split of --data (default train)")
    q.add_argument("-n", "--n", type=int, help="number of images of --data (default: all)")
    q.add_argument("--label", type=int, help="for a class-conditional model: fit to the images of this class only")
    q.add_argument("--out", type=Path, required=True, help="folder for prior.safetensors")


def _average(a: argparse.Namespace) -> None:
    from lightning_tdisent.models.averages import reconstruct

    if a.out.suffix != ".safetensors":
        raise InputError(f"--out {a.out}: files of weights must end with .safetensors")
    if a.out.exists():
        raise InputError(f"--out {a.out} already exists; choose another name")
    error = reconstruct(a.run_folder, a.sigma_rel, a.out, a.step)
    print(f"{a.out}: sigma_rel {a.sigma_rel:g}, relative error of its profile {error:.2%}")
    if error > 0.1:
        print(
            "this is far from the requested profile: choose a length closer to the snapshots', or take more snapshots"
        )


def _compose(a: argparse.Namespace) -> None:
    with _sources(a.experts) as files:
        _compose_files(a, files)


@contextmanager
def _sources(names: Sequence[str]) -> Iterator[list[Path]]:
    """Yield the files of weights that the names refer to.

    Those of a fleet in an object store are downloaded to a temporary folder, which is removed at the end.
    """
    import tempfile

    from lightning_tdisent.fleet.planned import FILE
    from lightning_tdisent.fleet.store import Store
    from lightning_tdisent.models.compose import find_files

    with tempfile.TemporaryDirectory(prefix="experts-") as place:
        files: list[Path] = []
        for k, name in enumerate(names):
            if not Store(name).remote and not (Path(name) / FILE).exists():
                files += find_files(name)
                continue
            found, unfinished = open_fleet(name).weights(Path(place) / str(k))
            files += found
            if unfinished:
                print(f"{name} is not finished: {'; '.join(unfinished)}")
        yield files


def _compose_files(a: argparse.Namespace, files: list[Path]) -> None:
    from lightning_tdisent.diffusion.spec import build
    from lightning_tdisent.diffusion.states import LatentStates
    from lightning_tdisent.files import typed
    from lightning_tdisent.models.card import read_card
    from lightning_tdisent.models.compose import compose

    if not files:
        raise InputError(f"{', '.join(a.experts)}: no finished expert to compose")
    if a.merge is not None:
        if a.fill is not None or a.allow_mismatch:
            raise InputError(
                "--merge requires that no expert is missing and all are alike: leave out --fill and --allow-mismatch"
            )
        _merge(a, files)
        return
    chosen = {"--merge-weights": a.merge_weights != "uniform", "--merge-blocks": a.merge_blocks != "equal"}
    chosen |= {"--merge-split": a.merge_split != "train", "-n": a.n != 256, "--device": a.device != "auto"}
    if misplaced := [name for name, given in {**chosen, "--merge-data": a.merge_data}.items() if given]:
        raise InputError(f"{', '.join(misplaced)}: belong to --merge K, which is not given")
    out = compose(files, a.out, a.fill, a.allow_mismatch)
    how = ["--fill", a.fill] if a.fill is not None else []
    how += [word for name in a.imports for word in ("--import", name)]
    how += ["--observe", "DATA"] if build(read_card(files[0]).states, LatentStates).observation is not None else []
    images = out.with_name(f"{out.stem}_images")
    experts = f"{len(files)} expert{'s' if len(files) > 1 else ''}"
    print(f"{experts} composed in {out}: {typed('sample', out, '--out', images, *how)}")
    if a.fill is not None:
        print("it is a preview, and loads only with --fill: rows of missing experts are filled")


def _merge(a: argparse.Namespace, files: list[Path]) -> None:
    from lightning_tdisent.data.decode import side_of
    from lightning_tdisent.data.shards import load
    from lightning_tdisent.models.card import read_card
    from lightning_tdisent.models.merge import merge

    if a.n < 1:
        raise InputError(f"-n {a.n}: at least 1 image")
    a.device = use_device(a.device)
    shape = read_card(files[0]).shape
    data = None
    if a.merge_data:
        data = load(a.merge_data, a.merge_split, shape[0], a.n, side_of(shape), spread=True)
    weights, blocks = _numbers(a.merge_weights, float), _numbers(a.merge_blocks, int)
    with working("merge"):
        merged = merge(files, a.out, a.merge, weights, blocks, data, a.device)
    for one in merged:
        cost = f", error of its steps {one.errors[0]:.4g} -> {one.errors[1]:.4g}" if one.errors else ""
        print(f"rows {one.rows[0]}..{one.rows[-1]}: weights {', '.join(f'{w:.3f}' for w in one.weights)}{cost}")
    print(f"{len(files)} experts merged to {a.merge} in {a.out}")


def _numbers(text: str, kind: type) -> Any:
    """Parse comma-separated numbers; return any other text unchanged."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        return text


def _export(a: argparse.Namespace) -> None:
    from lightning_tdisent.models.export import export

    with working("export"):
        folder = export(a.model, a.out, a.format)
    print(f"{a.model} exported to {folder}; its README.md says how to load it")


def _prior(a: argparse.Namespace) -> None:
    from lightning_tdisent.models import model_prior  # noqa: F401, a message lists the classes that are loaded
    from lightning_tdisent.models.compose import holds_weights
    from lightning_tdisent.priors import gaussian, mixture  # noqa: F401
    from lightning_tdisent.priors.prior import Prior
    from lightning_tdisent.studies.plan import part_of
    from lightning_tdisent.studies.sweep import row_or_share

    if (a.out / PRIOR).exists():
        raise InputError(f"--out {a.out} already holds a prior; choose another folder")
    if (a.out / CONFIG).exists() or holds_weights(a.out):
        raise InputError(f"--out {a.out} is the folder of a run or of weights; choose another for the prior")
    at = row_or_share(a.at, "--at")
    part, _ = part_of(part_entry(a.prior, "--prior"), "Gaussian", Prior, "--prior", more=a.dotted["prior"])
    fit_and_save(str(a.model), at, part, a.data, a.split, a.n, a.out, a.label)


def fit_and_save(
    model: str, at: int | float, part: dict[str, Any], data: str, split: str, n: int | None, out: Path,
    label: int | None = None,
) -> None:  # fmt: skip
    """Fit a prior, write it, and print its row, the number of images and the notes of the fit."""
    from lightning_tdisent.models.prior_files import fit_to, save_prior

    use_device("cpu")
    name = part["class_path"].rpartition(".")[2]
    print(f"fitting {name} to the images of {data}", file=sys.stderr, flush=True)
    with working(f"fit {name}"):
        prior, fitted = fit_to(model, at, part, data, split, n, label)
    save_prior(out / PRIOR, prior, fitted)
    of = "" if label is None else f" of class {label}"
    print(f"{name} at row {fitted.row} (index {fitted.index}), {fitted.n:,} images{of}: {out / PRIOR}")
    for note in fitted.notes:
        print(f"note: {note}")
