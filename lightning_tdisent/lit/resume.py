"""Resume a run with the same command from the newest good checkpoint of its folder, or refuse and say why."""

import contextlib
import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_tdisent.data.index import Index, index_command, path_of
from lightning_tdisent.diffusion.spec import defaults_of_then, filled, identity
from lightning_tdisent.errors import InputError
from lightning_tdisent.files import absolute_paths, load_yaml
from lightning_tdisent.lit.checkpoints import Manifest, newest
from lightning_tdisent.models.checkpoint import manifest_of, read_manifest
from lightning_tdisent.runs import AVERAGES, CHECKPOINTS, CONFIG, WEIGHTS, checkpoints_in
from lightning_tdisent.schemas import check_schema

# options that define a run: changing one makes another run. All others (limits, logging, devices, paths) may change
# when a run is resumed. The digest of the data, the table and the images per step are compared with those of the
# checkpoint when it is loaded
FIXED = ("model", "data", "ema", "seed_everything", "trainer.precision", "trainer.accumulate_grad_batches",
         "trainer.limit_train_batches", "trainer.overfit_batches")  # fmt: skip
FREE = (  # exceptions to FIXED
    "model.init_args.sampler",
    "model.init_args.warm_start",  # a path, not needed after the start; the card records the parent
    *(f"data.init_args.{name}" for name in ("path", "index", "workers", "val", "val_limit", "batch_size")),
    *(f"data.init_args.{name}" for name in ("verify", "on_bad_shard", "bad_ceiling")),
)
# options in FIXED that a training branched from a checkpoint may set: learning rate, its schedule, weight decay
BRANCH = tuple(f"model.init_args.{name}" for name in ("lr", "warmup", "decay", "weight_decay"))
# options that the card of a checkpoint records, which are compared by means of the card
CARD = ("model.class_path", *(f"model.init_args.{name}" for name in
        ("network", "states", "objective", "expert", "experts", "rows", "prior", "at")))  # fmt: skip


def options_of(trainer: L.Trainer) -> dict[str, Any]:
    """Return the trainer options that define a run, by their keys in a config."""
    return {key: getattr(trainer, key.removeprefix("trainer.")) for key in FIXED if key.startswith("trainer.")}


def refuse_changes(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise InputError if the options of a training differ from those that its checkpoint was made with.

    then, now: options of the checkpoint and of this training, by their keys in a config. Only options in both are
    compared, because older checkpoints do not record all of them. The options in `BRANCH` may differ, and a note on
    stderr names the change.
    """
    mine, theirs = _flat(identity(now)), _flat(identity(then))
    both = sorted(mine.keys() & theirs.keys())
    for k in both if rank_zero_only.rank == 0 else ():
        if _is_below(k, BRANCH) and mine[k] != theirs[k]:
            named = k.replace(".init_args", "")
            print(
                f"note: from here on {named} is {mine[k]}; the checkpoint was trained with {theirs[k]}", file=sys.stderr
            )
    kept = [k for k in both if _defines_run(k) and not _is_below(k, (*BRANCH, *CARD))]
    if differ := [k for k in kept if mine[k] != theirs[k]]:
        lines = "".join(
            f"\n  - {k.replace('.init_args', '')}: the checkpoint has {theirs[k]}, this run {mine[k]}" for k in differ
        )
        raise InputError(
            f"this checkpoint was trained with other options:{lines}\nUse those of the checkpoint, or start a separate "
            "training from its weights: load_from_checkpoint in Python, --model.warm_start and another --run"
        )


def seed_of(then: int, now: int) -> int:
    """Return the seed of a resumed training, which is the seed it began with.

    then: the seed it began with. now: the seed of torch's generator, which is random unless ``seed_everything`` set
    it. Raises InputError if ``seed_everything`` set another seed.
    """
    said = os.environ.get("PL_GLOBAL_SEED")
    if said is not None and str(then) not in (said, str(now)):
        raise InputError(
            f"seed_everything: the training was started with seed {then}, this process has {said}: the order of the "
            f"data and the noise would differ. Give seed_everything {then}"
        )
    return then


SCHEMA = 1  # schema of config.yaml


def config_of(folder: Path) -> dict[str, Any]:
    """Return the config stored in a run folder; raise InputError if it cannot be read."""
    file = folder / CONFIG
    try:
        text = file.read_bytes()
        check_header(text, file)
        content = load_yaml(text, str(file))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: contains no config. Put it back, or choose another --run")
    return content


def check_config(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the config stored in a run folder; raise InputError if ``config`` differs in an option that defines a run.

    An option that the stored config lacks takes the default of the version that wrote it, which is printed (see
    `filled`).
    """
    old: dict[str, Any] = absolute_paths(config_of(folder))
    there, old = _flat(old), filled(_completed(old))
    mine, theirs = _flat(absolute_paths(config)), _flat(old)
    differ = [k for k in sorted(mine.keys() | theirs.keys()) if _defines_run(k) and mine.get(k) != theirs.get(k)]
    if rank_zero_only.rank == 0 and not differ:
        added = [k for k in mine if _defines_run(k) and k not in there and mine[k] is not None]
        print("".join(f"{k}: not in the config of then, taken as its default {mine[k]}\n" for k in added), end="")
        gone = [k for k in there if _defines_run(k) and k not in mine]
        print("".join(f"{k}: in the stored config, but not an option of this version\n" for k in gone), end="")
    if differ:
        lines = "\n".join(f"  - {k}: {theirs.get(k)} there, {mine.get(k)} now" for k in differ)
        raise InputError(
            f"run: {folder} holds a run of another config:\n{lines}\nUse the stored config, or choose another folder "
            f"with --run{_branch_options(folder, differ, mine)}",
            where=str(folder),
            problems=lines.splitlines(),
        )
    return old


def _branch_options(folder: Path, differ: Sequence[str], config: dict[str, Any]) -> str:
    """Return text that names the options to start another run from this one's weights, empty if that is impossible."""
    if all(_is_below(key, BRANCH) for key in differ):
        words, kept = ["--ckpt_path", str(folder)], "weights and optimizer"
    elif "model.init_args.warm_start" in config and not any(_is_below(key, CARD) for key in differ):
        there = [folder] if (folder / WEIGHTS).exists() else checkpoints_in(folder / CHECKPOINTS)
        if not there:
            return ""
        words, kept = ["--model.warm_start", str(there[-1])], "weights alone"
    else:
        return ""
    return f"; {shlex.join(words)} beside that begins there with this one's {kept}"


def header() -> str:
    """Return the first line of a run's config, which names its schema; a comment, since all keys are options."""
    return f"# config of lightning_tdisent, schema {SCHEMA}\n"


def check_header(text: bytes, file: Path) -> None:
    """Raise InputError if the first line says that a newer version wrote the config; without it the schema is 1."""
    if match := re.match(rb"# config of lightning_tdisent, schema (\d{1,9})\s", text):
        check_schema({"schema": int(match[1])}, str(file), SCHEMA)


def _completed(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config with missing options of ema and trainer set to the defaults of the version that wrote it."""
    from lightning_tdisent.lit.callbacks.weights import EMA  # imported here because it imports this module indirectly

    groups: dict[str, type] = {"ema": EMA, "trainer": L.Trainer}  # option groups without a class path
    return config | {name: {**defaults_of_then(cls), **(config.get(name) or {})} for name, cls in groups.items()}


def find_checkpoint(folder: Path) -> tuple[Path | None, Manifest, list[str]]:
    """Return the newest good checkpoint of a run folder, its manifest, and why each newer one is not good.

    The path is None if no checkpoint was written yet. A checkpoint without a manifest was interrupted while it was
    written and does not count. Raises InputError if all checkpoints are damaged, or if one belongs to another run.
    """
    if (folder / CONFIG).exists():
        refuse_other_runs(folder, str(config_of(folder).get("id") or ""))
    path, manifest, bad = newest(folder / CHECKPOINTS)
    if path is None and any(manifest_of(p).exists() for p in checkpoints_in(folder / CHECKPOINTS)):
        raise InputError(
            f"run: {folder} cannot be resumed, no checkpoint is good:\n"
            + "\n".join(f"  - {why}" for why in bad)
            + f"\nRemove {what_is_trained(folder)} to begin anew, or choose another folder with --run"
        )
    return path, manifest, bad


def what_is_trained(folder: Path) -> str:
    """Return the paths in a run folder to remove before training starts from scratch there, as text for messages."""
    there = [folder / CHECKPOINTS, *sorted(folder.glob("*.safetensors")), folder / AVERAGES]
    return " and ".join(str(path) for path in there if path.exists())


def refuse_other_runs(folder: Path, run: str) -> None:
    """Raise InputError if a folder holds checkpoints of another run; those of older versions do not name their run."""
    others = {}
    for path in checkpoints_in(folder / CHECKPOINTS):
        with contextlib.suppress(InputError):
            if (theirs := read_manifest(path).get("run")) and run and theirs != run:
                others[path] = theirs
    if others:
        lines = "\n".join(f"  - {path}: of run {theirs}" for path, theirs in others.items())
        raise InputError(
            f"run: {folder} belongs to run {run} (id in its config.yaml), but holds checkpoints of another run:\n"
            f"{lines}\nMove them to another folder, or put back the config.yaml that belongs to them"
        )


def refuse_other_data(folder: Path, manifest: Manifest, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise InputError if data or images per step differ from those that a finished run was trained with.

    A training that resumes compares both when it loads its checkpoint; for a run that has ended nothing is loaded.
    """
    data, lines = now.get("data", {}).get("init_args", {}), list[str]()
    theirs, mine = (_factors(config) for config in (then, now))
    known = [(a, b) for a, b in zip(theirs, mine, strict=True) if isinstance(a, int) and isinstance(b, int)]
    same = all(a == b for a, b in zip(theirs, mine, strict=True) if (a, b) not in known)
    before, after = (math.prod(values) for values in zip(*known, strict=True)) if known else (1, 1)
    if same and before > 0 and before != after and "images_seen" in manifest:
        each = manifest["images_seen"] / manifest["step"]
        lines.append(f"data.batch_size: {each:g} images a step there, {each * after / before:g} now")
    if now.get("data", {}).get("class_path", "").endswith(".ImageShards"):
        with contextlib.suppress(FileNotFoundError):
            where = (data["path"], data["train"], data.get("index"))
            index = Index.load(path_of(*where), index_command(*where))
            if index.hashed and (trained := manifest.get("data")) not in (None, "unknown", index.digest):
                lines.append(f"data: training images {trained} there, {index.digest} now")
    if lines:
        listed = "".join(f"\n  - {line}" for line in lines)
        raise InputError(
            f"run: {folder} has ended, and was trained with other data or batches:{listed}\nChoose another folder "
            "with --run"
        )


def _factors(config: dict[str, Any]) -> list[Any]:
    """Return the factors of the number of images per step; the devices may be ``auto``, which is not a number."""
    trainer, data = config["trainer"], config.get("data", {}).get("init_args", {})
    keys = ("devices", "num_nodes", "accumulate_grad_batches")
    return [data.get("batch_size"), *(trainer.get(key) for key in keys)]


def _defines_run(key: str) -> bool:
    return _is_below(key, FIXED) and not _is_below(key, FREE)


def _is_below(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


def _flat(data: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(data, dict) or not data:
        return {name: data}
    return {k: v for key, value in data.items() for k, v in _flat(value, f"{name}.{key}" if name else key).items()}
