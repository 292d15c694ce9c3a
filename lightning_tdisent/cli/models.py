"""Commands on models: sample, compose, export, average, evaluate, prior, fetch, report and study."""

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_tdisent.cli.options import arguments_of, print_merged
from lightning_tdisent.cli.terminal import Commands, bar, command, refuse_no_page, use_device, wide_console
from lightning_tdisent.cli.trainings import describe, fits, open_fleet, role
from lightning_tdisent.errors import InputError
from lightning_tdisent.runs import CHECKPOINTS, CONFIG, PRIOR, WEIGHTS

if TYPE_CHECKING:
    from lightning_tdisent.evaluation.observations import Observations
    from lightning_tdisent.sampling.sampler import Sampler
    from lightning_tdisent.studies.results import Study

NICKNAMES = {"ddim": "DDIM", "ancestral": "Ancestral", "dpm": "DPMSolver"}  # of samplers


def add_commands(commands: Commands) -> None:
    """Add the subcommands and their options to the parser."""
    s = command(
        commands, "sample", _sample, "draw images from a run, a file of weights, or a composite folder", ("sampler",)
    )
    s.add_argument("model", type=Path, help="run folder, model.safetensors, folder of experts, or composite folder")
    s.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for the images SEED.png; their grid is OUT.png. Must not contain images",
    )
    s.add_argument("--seeds", default="0:64", help="seeds of the images, FIRST:END (default 0:64)")
    s.add_argument("--label", type=int, help="class of all images, for a class-conditional model "
                   "(default: class = seed modulo the number of classes)")  # fmt: skip
    s.add_argument("--observe", type=Path, help="observations for a conditional model: an image, a folder of images, "
                   "shards (their test images), or the observations.safetensors of an earlier command")  # fmt: skip
    s.add_argument("--items", help="which observations to use in turn, FIRST:END (default: for shards those with the "
                   "numbers of the seeds, else all)")  # fmt: skip
    s.add_argument("--mask", type=Path, help="for an inpainting model: an image that replaces the model's holes; white "
                   "pixels are known, black pixels are drawn")  # fmt: skip
    s.add_argument("--put-back", action="store_true", help="for an inpainting model: put the known pixels back at "
                   "every step, so that they are exact in the image")  # fmt: skip
    s.add_argument("--guidance", type=float, help="scale of classifier-free guidance towards --label, or "
                   "without --label towards each image's class")  # fmt: skip
    _sampler_options(s)

    c = command(commands, "compose", _compose, "make one composite of the weights of experts")
    c.add_argument(
        "experts", nargs="+", help="run folders, a folder of run folders, a fleet's folder or URL, or files of weights"
    )
    c.add_argument("--out", type=Path, required=True, help="composite to write: a folder, or a single file NAME.zip")
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
    c.add_argument("-n", type=int, default=256, help="number of images of --merge-data (default 256)")
    c.add_argument("--device", default="cpu", help="device of the search: cpu, cuda, cuda:1 ..")

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
    e.add_argument("-n", type=int, help="images generated per model (default: the protocol's, e.g. 1000 or 50000)")
    e.add_argument("--first-seed", type=int, help="first seed of the generated images (default: the protocol's, 0)")
    e.add_argument("--held-out", type=int, help="maximum number of images of --split (default: 1000; for a "
                   "conditional model as many as its draws need)")  # fmt: skip
    e.add_argument(
        "--out",
        type=Path,
        default=Path("runs/evaluate"),
        help="folder for results.json and report.html (default runs/evaluate)",
    )
    _sampler_options(e)

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
    q.add_argument("-n", type=int, help="number of images of --data (default: all)")
    q.add_argument("--label", type=int, help="for a class-conditional model: fit to the images of this class only")
    q.add_argument("--out", type=Path, required=True, help="folder for prior.safetensors")

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
    parser.add_argument(
        "--workers", type=int, default=0, help="number of parallel processes (default: one per GPU, or per core)"
    )
    parser.epilog = "Other options are keys of the YAML, e.g. --n 2000 --runs.experts.set.model.objective Eps; the " \
                    "run '*' stands for all: '--runs.*.set.trainer.max_steps' 200"  # fmt: skip


def _sampler_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--sampler", default="ddim", metavar="NAME",
                         help="ddim (default), ancestral, dpm, or any sampler by its class name, its class path, or as "
                         "{class_path: .., init_args: ..}; --sampler.KEY VALUE sets an argument of it. The sampler in "
                         "the config of a run is not used")  # fmt: skip
    command.add_argument("--eta", type=float, help="of ddim: 0 deterministic (default) .. 1 ancestral")
    command.add_argument("--steps", type=int, help="network evaluations (default: every row of the model's table)")
    command.add_argument("--batch-size", type=int, default=250, help="batch size of sampling (default 250)")
    command.add_argument("--residency", choices=("resident", "offload", "stream"), default="resident",
                         help="place of a composite's experts: the device, host memory, or the disk")  # fmt: skip
    command.add_argument("--fill", help="make a preview with missing experts replaced: nearest, or shared:PATH")
    command.add_argument("--prior", help="start at the row of this prior (a folder written by the command prior); "
                         "cut:ROW, or cut: and a fraction of the rows, starts there from N(0, I)")  # fmt: skip
    command.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ..")


def _sampler(a: argparse.Namespace) -> "Sampler":
    """Build the sampler of the options; one rule (`part_of`) serves these and the ``sampler:`` of studies."""
    from lightning_tdisent.diffusion.spec import arguments
    from lightning_tdisent.sampling.sampler import Sampler
    from lightning_tdisent.studies.plan import part_of

    entry = _entry(a.sampler, "--sampler")
    more = arguments_of(a.dotted["sampler"])
    for key, value in (("steps", a.steps), ("eta", a.eta)):
        if value is not None and key in more:
            raise InputError(f"--{key} and --sampler.{key} set the same argument; leave one out")
    if a.steps is not None:
        more["steps"] = a.steps
    _, sampler = part_of(entry, "DDIM", Sampler, "--sampler", NICKNAMES, more)
    if a.eta is None:
        return sampler
    if "eta" in arguments(type(sampler)):
        return part_of(entry, "DDIM", Sampler, "--sampler", NICKNAMES, {**more, "eta": a.eta})[1]
    if a.eta:
        raise InputError(f"--eta {a.eta:g} belongs to --sampler ddim, not to {type(sampler).__name__}")
    return sampler


def _entry(value: Any, option: str) -> Any:
    """Return the value of an option that names a part: a name, or a mapping given in a file or as text."""
    from lightning_tdisent.fleet.keys import value_of

    return value_of(value, option) if isinstance(value, str) and value.lstrip().startswith("{") else value


def _sampled_by(sampler: "Sampler") -> str:
    """Describe the sampler in one line: it is set by the options, not by the config of a run."""
    from lightning_tdisent.diffusion.spec import arguments

    values = {name: getattr(sampler, name) for name in arguments(type(sampler)) if hasattr(sampler, name)}
    steps = ["every row"] if values.get("steps", 0) is None else []
    listed = [type(sampler).__name__, *(f"{k} {v}" for k, v in values.items() if v is not None), *steps]
    return f"sampler: {', '.join(listed)} (set by options; the sampler in the config of a run is not used)"


def _sample(a: argparse.Namespace) -> None:
    import torch

    from lightning_tdisent.evaluation.observations import FILE as OBSERVATIONS
    from lightning_tdisent.evaluation.pictures import save_png
    from lightning_tdisent.images import grid
    from lightning_tdisent.models.compose import holds_weights, load_model
    from lightning_tdisent.models.truncated import load_truncated, signal_note
    from lightning_tdisent.sampling.guidance import Guided, extras
    from lightning_tdisent.sampling.sample import sample
    from lightning_tdisent.sampling.sampler import refuse_unowned

    seeds, tiles = _range(a.seeds, "--seeds"), a.out.with_name(f"{a.out.name}.png")
    if a.out.exists() and any(a.out.glob("*.png")):
        raise InputError(f"--out {a.out} already holds images; choose another folder")
    if tiles.exists():
        raise InputError(f"--out {a.out}: {tiles}, the grid of the first images, already exists; choose another folder")
    if (a.out / CONFIG).exists() or holds_weights(a.out):
        raise InputError(f"--out {a.out} is the folder of a run or of weights; choose another for the images")
    use_device(a.device)
    sampler = _sampler(a)
    loaded = (
        load_truncated(a.model, a.prior, a.residency, a.fill) if a.prior else load_model(a.model, a.residency, a.fill)
    )
    model: Any = loaded[0].to(a.device)
    if filled := extras(model).filled:
        print("a preview: " + ", ".join(f"row {s} is filled by {what}" for s, what in filled.items()))
    if a.prior and (note := model.check_label(a.label)):
        print(f"note: {note}")
    refuse_unowned(str(a.model), model, sampler)
    if note := signal_note(model):
        print(f"note: {note}")
    if a.guidance is not None:
        if a.guidance != 1 and any(card.label_drop == 0 and not card.warm_from for card in loaded[1]):
            raise InputError(
                f"--guidance {a.guidance:g}: {a.model} was trained with label_drop 0, so its null label, which "
                "guidance needs, was never trained"
            )
        model = Guided(model, a.guidance)
    if a.label is not None and (model.classes is None or not 0 <= a.label < model.classes):
        raise InputError(f"--label {a.label}: the model has {model.classes or 'no'} classes")
    label = None if a.label is None else torch.full((len(seeds),), a.label, device=a.device)
    print(_sampled_by(sampler))
    seen = _observations(a, model, seeds)
    given = None if seen is None else seen.y
    known = seen.kernel.expand(len(seen), -1, -1, -1) if seen is not None and a.put_back else None
    left, first = iter(seeds), list[torch.Tensor]()
    for batch in sample(model, sampler, seeds, a.batch_size, label, given=given, known=known):
        if seen is not None and not first:
            seen.save(a.out / OBSERVATIONS)
        for image in batch.cpu():  # saved one by one, so that an interrupted command keeps them
            save_png(image, a.out / f"{next(left):06d}.png")
            if len(first) < 256:
                first.append(image)
    save_png(grid(torch.stack(first)), tiles)
    print(f"{len(seeds)} images in {a.out}, the first of them in {tiles}")


def _observations(a: argparse.Namespace, model: Any, seeds: range) -> "Observations | None":
    """Return the observations of a conditional model for these seeds (None without --observe); print their source."""
    from lightning_tdisent.evaluation.observations import observe, refuse_without_masks

    states = model.states
    if a.observe is None:
        options = {"--mask": a.mask is not None, "--items": a.items is not None, "--put-back": a.put_back}
        if misplaced := [name for name, given in options.items() if given]:
            raise InputError(f"{', '.join(misplaced)}: belong to --observe, which is not given")
        if states.observation is not None:
            name = type(states.observation.operator).__name__
            raise InputError(
                f"the model draws images given an observation ({name}): pass observations with --observe DATA"
            )
        return None
    seen, said = observe(states, a.observe, seeds, _range(a.items, "--items") if a.items else None, a.mask)
    if a.put_back:
        if not seen.own_mask:
            refuse_without_masks(states.observation.operator, states.image_shape, "--put-back")
        said += "; known pixels are put back at every step"
    print(said)
    return seen


def _range(text: str, option: str) -> range:
    """Parse FIRST:END, 0 <= FIRST < END <= 2^32."""
    try:
        first, end = (int(part) for part in text.split(":"))
    except ValueError:
        raise InputError(f"{option} {text}: expected FIRST:END, e.g. 0:64") from None
    if end <= first:
        raise InputError(f"{option} {text}: the end must be above the first")
    if first < 0 or end > 1 << 32:
        raise InputError(f"{option} {text}: the numbers must lie in [0, 2^32)")
    return range(first, end)


def _prior(a: argparse.Namespace) -> None:
    from lightning_tdisent.models.compose import holds_weights
    from lightning_tdisent.priors.prior import Prior
    from lightning_tdisent.studies.plan import part_of
    from lightning_tdisent.studies.sweep import row_or_share

    if (a.out / PRIOR).exists():
        raise InputError(f"--out {a.out} already holds a prior; choose another folder")
    if (a.out / CONFIG).exists() or holds_weights(a.out):
        raise InputError(f"--out {a.out} is the folder of a run or of weights; choose another for the prior")
    at = row_or_share(a.at, "--at")
    part, _ = part_of(_entry(a.prior, "--prior"), "Gaussian", Prior, "--prior", more=arguments_of(a.dotted["prior"]))
    _fit(str(a.model), at, part, a.data, a.split, a.n, a.out, a.label)


def _fit(
    model: str, at: int | float, part: dict[str, Any], data: str, split: str, n: int | None, out: Path,
    label: int | None = None,
) -> None:  # fmt: skip
    """Fit a prior, write it, and print its row, the number of images and the notes of the fit."""
    from lightning_tdisent.models.truncated import fit_to, save_prior

    use_device("cpu")
    prior, fitted = fit_to(model, at, part, data, split, n, label)
    save_prior(out / PRIOR, prior, fitted)
    name = part["class_path"].rpartition(".")[2]
    of = "" if label is None else f" of class {label}"
    print(f"{name} at row {fitted.row} (index {fitted.index}), {fitted.n:,} images{of}: {out / PRIOR}")
    for note in fitted.notes:
        print(f"note: {note}")


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

    from lightning_tdisent.fleet.plan import FILE
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
    use_device(a.device)
    shape = read_card(files[0]).shape
    data = None
    if a.merge_data:
        data = load(a.merge_data, a.merge_split, shape[0], a.n, side_of(shape), spread=True)
    weights, blocks = _numbers(a.merge_weights, float), _numbers(a.merge_blocks, int)
    for one in merge(files, a.out, a.merge, weights, blocks, data, a.device):
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

    print(f"{a.model} exported to {export(a.model, a.out, a.format)}; its README.md says how to load it")


def _evaluate(a: argparse.Namespace) -> None:
    from lightning_tdisent.diffusion.spec import spec
    from lightning_tdisent.metrics.likelihood import BOUND, ODE
    from lightning_tdisent.metrics.lpips import LPIPS
    from lightning_tdisent.models.compose import MANIFEST, holds_weights, refuse_damaged
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
    sampler = _sampler(a)
    contenders = [
        {
            "name": str(m),
            "source": str(m),
            "sampler": spec(sampler) if holds_weights(m) else None,
            **({"prior": a.prior} if a.prior else {}),
        }
        for m in a.models
    ]
    asked = (a.metrics or "").split(",")
    metrics = [name for name in asked if name and name not in (BOUND.name, ODE.name, LPIPS.name)]
    if a.lpips_weights and LPIPS.name not in asked:
        raise InputError("--lpips-weights: belongs to --metrics lpips, which is not given")
    lpips = (a.lpips_weights or "") if LPIPS.name in asked else None
    bits = {"bound": BOUND.name in asked, "ode": ODE.name in asked, "n": a.bits_images, "decoder": a.decoder}
    options = {"residency": a.residency, "fill": a.fill, "batch_size": a.batch_size}
    options |= {"lpips": lpips}
    options |= {"bits": bits if bits["bound"] or bits["ode"] else None}
    protocol = a.protocol if isinstance(a.protocol, dict) else {"preset": a.protocol}
    protocol = {**protocol, **a.dotted["protocol"], **({"metrics": metrics} if metrics else {})}
    options |= {"reference": a.reference, "n": a.n, "first_seed": a.first_seed, "n_held_out": a.held_out}
    with _ranks(a.device) as device:
        study = Study(
            str(a.out), "Evaluation", contenders, a.data, protocol, a.weights, a.split, device=device, **options
        )
        refuse_damaged([c["source"] for c in contenders if c["sampler"]])
        study.check()
        if int(os.environ.get("RANK", 0)) == 0 and any(contender["sampler"] for contender in contenders):
            print(_sampled_by(sampler))
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
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        use_device(device)
    # ranks wait for each other only at the end, which may be hours after the first rank is done
    dist.init_process_group("nccl" if "cuda" in device else "gloo", timeout=datetime.timedelta(hours=12))
    try:
        yield device
        dist.barrier()  # a rank that exits while another still writes the report breaks the connections
    finally:
        dist.destroy_process_group()


def _fetch(a: argparse.Namespace) -> None:
    from lightning_tdisent.metrics.weights import fetch

    with bar("MB") as progress:
        print(fetch(a.name, a.source, progress=lambda done, total: progress(done >> 20, (total or 0) >> 20)))


def _report(a: argparse.Namespace) -> None:
    from lightning_tdisent.report.table import WideTable, costs, table, tables
    from lightning_tdisent.studies.claim import refuse_no_repeats
    from lightning_tdisent.studies.results import Study
    from lightning_tdisent.studies.seeds import notes_of, write_page

    if (len(a.folders) > 1) == (a.out is None):
        raise InputError("report: --out FILE.html is required for several folders, and only allowed for several")
    refuse_no_page(a.out, "--out")
    studies = [Study.load(folder) for folder in a.folders]
    refuse_no_repeats(a.folders)
    if a.out is None:
        print(f"report: {studies[0].write_report()}")
        return
    rows = write_page(studies, a.out)
    for line, alike in tables(rows):
        wide_console(1000).print(WideTable(line, table(alike)), highlight=False)
    if len(cost := costs(rows)) > 1:
        wide_console(1000).print(WideTable("what it cost", cost), highlight=False)
    for line in notes_of({str(study.folder): study.rows for study in studies}, rows):
        print(f"note: {line}")
    print(f"report: {a.out}")


def run_study(a: argparse.Namespace) -> None:
    """Train, compose, evaluate and report what the YAML files ``a.config`` name."""
    from lightning_tdisent.studies.plan import plan
    from lightning_tdisent.studies.run import train

    def fit_prior(source: str, at: int | float, part: dict[str, Any], data: str, folder: Path) -> None:
        _fit(source, at, part, data, "train", None, folder)

    if a.print_config:
        print_merged(a)
        return
    todo = plan(a.config, a.out, a.seed, a.assigned)
    _finish(train(todo, a.config[0], fits, describe, role, fit_prior, a.workers))


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
