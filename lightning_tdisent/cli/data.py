"""Commands on data: prepare, toy, index, verify, inspect."""

import argparse
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_tdisent.cli.terminal import DEVICE, Commands, Run, command, use_device, wide_console
from lightning_tdisent.errors import Halted, InputError, check_number
from lightning_tdisent.files import write_whole
from lightning_tdisent.processes import cores
from lightning_tdisent.progress import Progress

if TYPE_CHECKING:
    from lightning_tdisent.data.prepare import Options, Summary
    from lightning_tdisent.data.raw import Source

TRAIN, HELD_OUT, SHARE = "train", "test", 0.05  # splits that prepare writes, and the share of the second
FEWEST = 40  # images of which a share is held out by default
TEXT = "make, prepare, index, verify or inspect shards of images"


def add_commands(commands: Commands) -> None:
    """Add the command ``data`` with its subcommands and their options."""
    commands = commands.add_parser("data", help=TEXT, description=TEXT).add_subparsers(
        dest="data_command", metavar="COMMAND", required=True
    )

    def add(name: str, run: Run, text: str, jobs: bool = True, made: bool = False) -> argparse.ArgumentParser:
        out = command(commands, name, run, text)
        which = "split to write (default train)" if made else "split (default train), or a pattern of its shards"
        out.add_argument("--split", default=None if run is _prepare else TRAIN, help=which)
        if jobs:
            out.add_argument("--jobs", type=int, help="number of processes (default: one per core)")
        return out

    p = add("prepare", _prepare, "make shards and their index from a raw data set; the same command resumes")
    p.add_argument(
        "source", type=Path, help="images in class folders or flat, ILSVRC, MNIST, CIFAR-10, parquet, shards"
    )
    p.add_argument("out", type=Path, help="folder for the shards")
    p.add_argument(
        "--kind", default="auto", help="kind of the source, if it is ambiguous; an unknown one lists all kinds"
    )
    p.add_argument(
        "--size", type=int, help="crop and resize to SIZE x SIZE pixels as ADM does (default: keep the size)"
    )
    p.add_argument("--encode", default="keep", help="png, jpg or webp (default: keep the bytes if nothing changes)")
    p.add_argument("--samples", type=int, default=10_000, help="number of samples per shard (default 10000)")
    shuffle = "shuffle all samples once (default: if the source may be sorted by class)"
    p.add_argument("--shuffle", action=argparse.BooleanOptionalAction, default=None, help=shuffle)
    p.add_argument("--seed", type=int, default=0, help="seed of the order")
    p.add_argument("--vae", type=Path, help="folder of a diffusers AutoencoderKL: store latents instead of images")
    p.add_argument("--device", default="auto", help=f"device of the autoencoder; {DEVICE}")
    p.add_argument("--batch-size", type=int, default=32, help="batch size of the autoencoder (default 32)")
    p.add_argument("--bad", type=float, default=0.001, help="share of the samples that may be left out (default 0.001)")
    p.add_argument("--hold-out", type=float, metavar="SHARE", help="share of the images that become the split test, if "
                   f"the source has no splits (default {SHARE:g}; 0: none)")  # fmt: skip
    p.add_argument("--as", dest="name", metavar="NAME", help="name of the split to write, if --split is a pattern")
    p.add_argument("--range", help="LOW,HIGH: values of black and white, for images with floats, 32 or 16 bits "
                   "(default for 16 bits: 0,65535)")  # fmt: skip
    p.add_argument("--labels", default="auto", help="folders: always use folders as classes; none: read no classes")
    p.add_argument("--columns", help="of parquet files: image=NAME,text=NAME,label=NAME; an empty NAME leaves one out")
    p.add_argument("--follow-links", action="store_true", help="also read links that point outside the source")

    t = add("toy", _toy, "make shards of generated pictures with classes and captions, without a download", made=True)
    t.add_argument("out", type=Path, help="folder for the shards")
    t.add_argument("-n", "--n", type=int, default=2000, help="number of pictures (default 2000), in at most 4 shards")
    t.add_argument("--size", type=int, default=32, help="width and height in pixels (default 32)")
    t.add_argument("--seed", type=int, default=0, help="seed of the pictures; use another one for each split")

    i = add("index", _index, "write the index of shards; with an index, samples are verified and read one by one")
    i.add_argument("folder", help="folder of the shards, or its URL")
    i.add_argument("--out", help="folder for the index, or NAME.safetensors, if the folder of the shards is read-"
                   "only; give it to fit as data.index")  # fmt: skip
    i.add_argument("--no-samples", action="store_true", help="one row per shard, for a corpus too large to list")

    v = add("verify", _verify, "read every byte and compare it with the index; exit code 1 if anything has changed")
    v.add_argument("folder", help="folder of the shards, or its URL")
    v.add_argument("--index", help="the index or its folder, if it is not in the folder of the shards")

    n = add("inspect", _inspect, "show a contact sheet, histogram and classes, as PNG and in the terminal", jobs=False)
    n.add_argument("folder", help="folder of the shards, or its URL")
    n.add_argument("-n", "--n", type=int, default=1000, help="number of samples to read (default 1000)")
    n.add_argument("--out", type=Path, help="the PNG to write (default inspect-SPLIT.png in this folder)")


def _processes(a: argparse.Namespace) -> int:
    if a.jobs is not None:
        check_number("--jobs", a.jobs, 1)
    return a.jobs or cores()


def _prepare(a: argparse.Namespace) -> None:
    from lightning_tdisent.data.prepare import Options, is_split, prepare
    from lightning_tdisent.data.raw import class_table, find_source
    from lightning_tdisent.data.raw.hold_out import hold_out, sizes_of

    if a.out.resolve() == a.source.resolve():
        raise InputError(
            f"{a.out} is the source itself. Name another folder for the shards; it may be inside the source"
        )
    device = use_device(a.device) if a.vae else "cpu"
    options = Options(
        a.size, a.encode, a.samples, a.shuffle, a.seed, vae=a.vae, device=device, batch_size=a.batch_size, bad=a.bad,
        range=_range(a.range),
    )  # fmt: skip
    opened = partial(
        find_source, a.source, kind=a.kind, skip=a.out, columns=_columns(a.columns), labels=a.labels,
        links=a.follow_links,
    )  # fmt: skip
    source = opened(a.split or TRAIN)
    if a.labels != "auto" and source.kind not in ("folder", "ilsvrc", "webdataset"):
        raise InputError(f"--labels {a.labels} is for images in folders and shards, but {a.source} is {source.kind}")
    split = (a.split or TRAIN) if a.name is None else a.name
    if not is_split(split):
        what = f"--split {split}: name the split that is written" if a.name is None else f"--as {split}: name it"
        raise InputError(f"{what} with letters of a to z, digits and _, as in --as train")
    parts: dict[str, Source] = {split: source}
    if share := _share_held_out(a, source, opened):
        with Progress("read", unit="images") as progress:
            parts = dict(zip((split, HELD_OUT), hold_out(source, share, a.seed, progress.update), strict=True))
    print(f"{a.source}: {len(source):,} samples of {source.kind}")
    for line in parts[split].notes:
        print(f"  {_plain(line)}")
    if source.classes:
        print(f"  class numbers: {_plain(class_table(source.classes))}")
    if a.size is None and len(sizes := sizes_of(source)) > 1:
        listed = ", ".join(f"{w}x{h}" for w, h in sorted(sizes)[:: max(1, len(sizes) // 3)])
        print(
            f"  note: the images have different sizes (such as {listed}), and a training needs one: give --size, or "
            "data.size when training"
        )
    for name, part in parts.items():
        with Progress(f"prepare {name}", unit="samples") as progress:
            made = prepare(part, name, a.out, options, _processes(a), progress.update)
        _print_made(a, name, options, made)


def _share_held_out(a: argparse.Namespace, source: "Source", opened: Callable[[str], "Source"]) -> float:
    """Return the share of the images to hold out, 0 for none: that of --hold-out, else `SHARE` without splits.

    A source has no splits if its split test is the same as its split train.
    """
    named = a.split is not None or a.name is not None
    if a.hold_out and named:
        raise InputError("--hold-out: makes the splits train and test of all images; leave --split and --as out")
    if named or a.hold_out == 0:
        return 0.0
    try:
        alike = opened(HELD_OUT).fingerprint() == source.fingerprint()
    except InputError:  # it has a split train alone
        alike = False
    if not alike:
        if a.hold_out:
            raise InputError(f"--hold-out {a.hold_out:g}: {a.source} has splits of its own; prepare these with --split")
        return 0.0
    if a.hold_out is None and len(source) < FEWEST:
        print(f"note: {len(source)} images are too few to hold some out (--hold-out SHARE does)")
        return 0.0
    return SHARE if a.hold_out is None else float(a.hold_out)


def _print_made(a: argparse.Namespace, split: str, options: "Options", made: "Summary") -> None:
    from lightning_tdisent.data.prepare import caption_count

    print(
        f"{a.out}, {split}: {made.samples:,} samples in {made.shards} shards, {made.bytes / 1e6:,.1f} MB, with their "
        "index"
    )
    print(f"  captions: {caption_count(made.captions, made.samples)}")
    for kind, n in made.depths.most_common():
        low, high = options.range or (0, 65535)
        print(f"  values: {n:,} images of {kind}" + ("" if kind == "8 bits" else f", {low:g} to {high:g} as 0 to 255"))
    if options.range and not made.depths.keys() - {"8 bits"} and made.depths:
        print(f"  --range {a.range} was not used, as all images have 8 bits")
    for name, n in made.shared.items():
        print(f"  {n:,} images are also images of {name}")
    if made.skipped:
        first = made.skipped[0]
        print(f"{len(made.skipped)} left out, see {a.out}/{split}.skipped.txt; the first: {first.name}: {first.reason}")


def _plain(text: str) -> str:
    """Return a text that any terminal can print: bytes in names of files that are not UTF-8 are escaped."""
    return text.encode(errors="backslashreplace").decode()


def _range(text: str | None) -> tuple[float, float] | None:
    try:
        low, high = map(float, text.split(",")) if text else (0.0, 0.0)
    except ValueError:
        raise InputError(
            f"--range {text}: expected two numbers, the values of black and white, as in --range 0,1"
        ) from None
    return (low, high) if text else None


def _columns(text: str | None) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")] if text else []
    if wrong := [role for role, mark, _ in pairs if not mark]:
        raise InputError(f"--columns {text}: {wrong[0]!r} is not ROLE=NAME, as in --columns image=pixel_values,text=")
    return {role.strip(): name.strip() for role, _, name in pairs}


def _toy(a: argparse.Namespace) -> None:
    from lightning_tdisent.data.prepare import Options, prepare
    from lightning_tdisent.data.toy import Toy

    if a.n < 1 or a.size < 4:
        raise InputError(f"-n {a.n} --size {a.size}: at least one picture, of at least 4 pixels")
    with Progress("prepare", unit="samples") as progress:
        source = Toy(a.n, a.size, a.seed)
        made = prepare(source, a.split, a.out, Options(samples=-(-a.n // 4)), _processes(a), progress.update)
    print(f"{a.out}: {made.samples:,} pictures in {made.shards} shards, with their index")


def _index(a: argparse.Namespace) -> None:
    from lightning_tdisent.data.index import ELSEWHERE, path_of
    from lightning_tdisent.data.remote import is_remote
    from lightning_tdisent.data.scan import build
    from lightning_tdisent.data.tars import find
    from lightning_tdisent.files import refuse_unwritable

    files, file = find(a.folder, a.split), path_of(a.folder, a.split, a.out)
    if not is_remote(file):
        refuse_unwritable(Path(file).parent, ELSEWHERE)
    with Progress("index", unit="shards") as progress:
        index = build(files, _processes(a), progress.update, regions=not a.no_samples)
    if index.unusable[0] == len(index) and index.notes:  # if samples cannot be used, the last note says so
        raise InputError(f"{a.folder} ({a.split}): no sample can be used: {index.notes[-1]}")
    index.save(file)
    print(f"{file}: {len(index):,} samples in {len(files)} shards, digest {index.digest}")
    print("".join(f"{line}\n" for line in index.notes), end="")


def _verify(a: argparse.Namespace) -> None:
    from lightning_tdisent.data.verify import verify

    with Progress("verify", unit="shards") as progress:
        index, wrong = verify(a.folder, a.split, _processes(a), progress.update, a.index)
    for line in wrong[:20]:
        print(line)
    what = f"{a.folder} ({a.split})"
    if wrong:
        raise Halted(f"{what}: {len(wrong):,} samples or shards of {len(index):,} have changed, or cannot be used")
    print(f"{what}: all {len(index):,} samples in {len(index.shards)} shards are good, digest {index.digest}")
    print("".join(f"{line}\n" for line in index.notes), end="")


def _inspect(a: argparse.Namespace) -> None:
    from lightning_tdisent.report.dataset import draw, look, table

    out = a.out or Path(f"inspect-{a.split}.png")
    if a.n < 1 or out.suffix != ".png" or not out.parent.is_dir():
        raise InputError(f"-n {a.n} --out {out}: at least one sample, and a .png in an existing folder")
    found = look(a.folder, a.split, a.n)
    wide_console().print(table(found))
    if not found.looked:
        raise InputError(f"{a.folder} ({a.split}): none of the {len(found.bad):,} samples looked at can be used")
    picture = io.BytesIO()
    draw(found).savefig(picture, dpi=110, format="png")
    write_whole(out, picture.getvalue())
    print(f"picture: {out}")
