"""The command sample, and the options of a sampler that evaluate has, too."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_tdisent.cli.options import part_entry
from lightning_tdisent.cli.terminal import DEVICE, Commands, command, use_device
from lightning_tdisent.errors import InputError
from lightning_tdisent.progress import Progress
from lightning_tdisent.runs import CONFIG

if TYPE_CHECKING:
    from lightning_tdisent.evaluation.observations import Observations
    from lightning_tdisent.sampling.sampler import Sampler

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
        help="folder for the images SEED.png; their grid is OUT.png. The same command resumes",
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
    sampler_options(s)


def sampler_options(command: argparse.ArgumentParser) -> None:
    """Add the options of a sampler and of how a model is loaded."""
    own = "that of the run, else ddim" if command.prog.endswith(" sample") else "ddim for all models"
    command.add_argument("--sampler", metavar="NAME",
                         help="ddim, ancestral, dpm, or any sampler by its class name, its class path, or as "
                         "{class_path: .., init_args: ..}; --sampler.KEY VALUE sets an argument of it (default: "
                         f"{own})")  # fmt: skip
    command.add_argument("--eta", type=float, help="of ddim: 0 deterministic (default) .. 1 ancestral")
    command.add_argument("--steps", type=int, help="network evaluations (default: every row of the model's table)")
    command.add_argument("--batch-size", type=int, default=250, help="batch size of sampling (default 250)")
    command.add_argument("--residency", choices=("resident", "offload", "stream"), default="resident",
                         help="place of a composite's experts: the device, host memory, or the disk")  # fmt: skip
    command.add_argument("--fill", help="make a preview with missing experts replaced: nearest, or shared:PATH")
    command.add_argument("--prior", help="start at the row of this prior (a folder written by the command prior); "
                         "cut:ROW, or cut: and a fraction of the rows, starts there from N(0, I)")  # fmt: skip
    command.add_argument("--device", default="auto", help=DEVICE)


def sampler_of(a: argparse.Namespace, own: Any = None) -> "Sampler":
    """Build the sampler of the options; one rule (`part_of`) serves these and the ``sampler:`` of studies.

    own: entry of a sampler that is used if --sampler is not given.
    """
    from lightning_tdisent.diffusion.spec import arguments
    from lightning_tdisent.sampling.sampler import Sampler
    from lightning_tdisent.studies.plan import part_of

    entry = part_entry(a.sampler, "--sampler") if a.sampler is not None else own or "ddim"
    more = dict(a.dotted["sampler"])
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


def _own_sampler(model: Path) -> tuple[Any, str]:
    """Return the sampler in the config of the run that a model is of, and where it stands; None if there is none."""
    from lightning_tdisent.fleet.keys import read_yaml

    places = (model.parent, model.parent.parent) if model.is_file() else (model,)
    for file in (place / CONFIG for place in places):
        if file.is_file():
            found: Any = read_yaml(file, secrets=False)
            for key in ("model", "init_args", "sampler"):
                found = found.get(key) if isinstance(found, dict) else None
            return found, f"{file}: model.init_args.sampler"
    return None, ""


def sampled_by(sampler: "Sampler", whose: str = "") -> str:
    """Describe a sampler in one line; whose: where it was set."""
    from lightning_tdisent.diffusion.spec import arguments

    values = {name: getattr(sampler, name) for name in arguments(type(sampler)) if hasattr(sampler, name)}
    steps = ["every row"] if values.get("steps", 0) is None else []
    listed = [type(sampler).__name__, *(f"{k} {v}" for k, v in values.items() if v is not None), *steps]
    return f"sampler: {', '.join(listed)}{whose}"


def _sample(a: argparse.Namespace) -> None:
    import torch

    from lightning_tdisent.diffusion.spec import spec
    from lightning_tdisent.digests import digest
    from lightning_tdisent.evaluation.drawn import Drawn, drawn_from
    from lightning_tdisent.evaluation.observations import FILE as OBSERVATIONS
    from lightning_tdisent.evaluation.pictures import read_png, save_png
    from lightning_tdisent.images import grid, zoomed
    from lightning_tdisent.models.compose import holds_weights, load_model, newest_of
    from lightning_tdisent.models.truncated import load_truncated, signal_note
    from lightning_tdisent.sampling.guidance import Guided, extras
    from lightning_tdisent.sampling.sample import sample
    from lightning_tdisent.sampling.sampler import refuse_unowned

    if a.out.name in ("", ".."):
        raise InputError(f"--out {a.out}: name a folder for the images; their grid is written beside it")
    seeds, tiles = _range(a.seeds, "--seeds"), a.out.with_name(f"{a.out.name}.png")
    if (a.out / CONFIG).exists() or holds_weights(a.out):
        raise InputError(f"--out {a.out} is the folder of a run or of weights; choose another for the images")
    drawn = Drawn(a.out)
    if not drawn.begun and tiles.exists():
        raise InputError(f"--out {a.out}: {tiles}, the grid of the first images, already exists; choose another folder")
    a.device = use_device(a.device)
    a.model = newest_of(a.model)
    own, place = _own_sampler(a.model)
    try:
        sampler = sampler_of(a, own)
    except InputError as error:
        raise (error.within(place) if own and a.sampler is None else error) from None
    loaded: Any = (
        load_truncated(a.model, a.prior, a.residency, a.fill) if a.prior else load_model(a.model, a.residency, a.fill)
    )
    model: Any = loaded.to(a.device)
    if filled := extras(model).filled:
        print("a preview: " + ", ".join(f"row {s} is filled by {what}" for s, what in filled.items()))
    if a.prior and (note := model.check_label(a.label)):
        print(f"note: {note}")
    refuse_unowned(str(a.model), model, sampler)
    if note := signal_note(model):
        print(f"note: {note}")
    if a.guidance is not None:
        if a.guidance != 1 and any(card.label_drop == 0 and not card.warm_from for card in loaded.cards):
            raise InputError(
                f"--guidance {a.guidance:g}: {a.model} was trained with label_drop 0, so its null label, which "
                "guidance needs, was never trained"
            )
        model = Guided(model, a.guidance)
    if a.label is not None and (model.classes is None or not 0 <= a.label < model.classes):
        raise InputError(f"--label {a.label}: the model has {model.classes or 'no'} classes")
    print(sampled_by(sampler, "" if a.sampler else " (of the run; --sampler takes another)" if own else " (default)"))
    seen = _observations(a, model, seeds)
    drawn.claim({
        **drawn_from(a.model, a.fill, a.prior),
        "sampler": spec(sampler), "label": a.label, "guidance": a.guidance, "put_back": a.put_back,
        "observations": None if seen is None else digest(seen.y.numpy().tobytes()),
    })  # fmt: skip
    there = drawn.of(seeds)
    left = [k for k, seed in enumerate(seeds) if seed not in there]
    if there:
        print(f"going on with {a.out}: {len(there)} of {len(seeds)} images are there")
    label = None if a.label is None else torch.full((len(left),), a.label, device=a.device)
    given = None if seen is None else seen.y[left]
    known = seen.kernel.expand(len(left), -1, -1, -1) if seen is not None and a.put_back else None
    todo = [seeds[k] for k in left]
    try:
        with Progress("sample", len(seeds), len(there), unit="images") as progress:
            images = sample(
                model, sampler, todo, a.batch_size, label, given=given, known=known, progress=progress.advance
            )
            written = iter(todo)
            for batch in images:
                if not drawn.begun:
                    drawn.begin()
                    if seen is not None:
                        seen.save(a.out / OBSERVATIONS)
                for image in batch.cpu():
                    save_png(image, drawn.file(next(written)))
    finally:
        if shown := sorted(drawn.of(seeds[:256])):
            save_png(grid(zoomed(torch.stack([read_png(drawn.file(seed)) for seed in shown]))), tiles)
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
