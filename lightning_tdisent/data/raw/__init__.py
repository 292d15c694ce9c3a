"""Read raw data sets as they are published, item by item: image folders, ILSVRC, MNIST, CIFAR-10, parquet, tars.

`find_source` detects the kind of a data set. A kind is a pair of functions: one finds the files, the other opens them.
All kinds return undecoded bytes, so that `prepare` decides how images are stored. Nothing is unpacked or executed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from lightning_tdisent.data.decode import IMAGES
from lightning_tdisent.data.raw.arrays import find_cifar, find_mnist, open_cifar, open_mnist
from lightning_tdisent.data.raw.folders import find_folder, find_ilsvrc, open_folder, open_ilsvrc
from lightning_tdisent.data.raw.source import ARCHIVES, Ask, Item, Source, class_table, names_in, some
from lightning_tdisent.data.raw.tables import find_parquet, open_parquet
from lightning_tdisent.data.raw.tars import find_tars, open_tars
from lightning_tdisent.errors import InputError, nearest

__all__ = ["KINDS", "Ask", "Item", "Kind", "Source", "class_table", "find_source"]


@dataclass(frozen=True)
class Kind:
    """A kind of raw data set.

    ``find(path, ask)`` returns the files of a data set, something falsy if there are none; ``open(files, ask)`` opens
    them. ``looks_for`` describes the files, for messages.
    """

    find: Callable[[Path, Ask], Any]
    open: Callable[[Any, Ask], Source]
    looks_for: str


KINDS = {
    "ilsvrc": Kind(find_ilsvrc, open_ilsvrc, "ILSVRC/Data/CLS-LOC"),
    "cifar10": Kind(find_cifar, open_cifar, "cifar-10-batches-py with data_batch_1..5, batches.meta"),
    "mnist": Kind(find_mnist, open_mnist, "train-images-idx3-ubyte(.gz), t10k-images-idx3-ubyte(.gz)"),
    "parquet": Kind(find_parquet, open_parquet, "*.parquet"),
    "webdataset": Kind(find_tars, open_tars, "*.tar, *.tar.gz"),
    "folder": Kind(find_folder, open_folder, f"images ({', '.join(IMAGES)}), flat or in class folders"),
}


def find_source(path: str | Path, split: str, kind: str = "auto", **more: Any) -> Source:
    """Open a split of a raw data set.

    kind: one of `KINDS`, or ``auto`` to detect it. more: further fields of `Ask`. Raises `InputError` if the path is no
    known data set, can be read as several kinds, is damaged, or has no such split.
    """
    path, ask = Path(path), Ask(split, **more)
    if kind not in ("auto", *KINDS):
        raise InputError(f"kind: {kind!r} is not known; it is one of auto, {', '.join(KINDS)}.{nearest(kind, KINDS)}")
    if ask.labels not in (known := get_args(get_type_hints(Ask)["labels"])):
        raise InputError(f"labels: {ask.labels!r} is not one of {', '.join(known)}.{nearest(ask.labels, known)}")
    if not path.exists():
        raise InputError(f"{path} does not exist. Name the folder or file of the raw data set")
    kinds = KINDS if kind == "auto" else {kind: KINDS[kind]}
    try:
        if ask.skip is not None:  # drop it if the source cannot reach that folder
            skip = ask.skip.resolve()
            ask = replace(ask, skip=skip if ask.links or skip.is_relative_to(path.resolve()) else None)
        for name, advice in ARCHIVES.items():
            if names_in(path) == [name]:
                raise InputError(f"{path} is an archive that is not opened here: {advice}")
        if path.is_file() and path.suffix.lower() in (".zip", ".7z", ".rar", ".tgz"):
            raise InputError(f"{path} is an archive that is not opened here: unpack it, and name the folder")
        found = {name: files for name, k in kinds.items() if (files := k.find(path, ask))}
        if "ilsvrc" in found:  # which is also a folder of images
            found.pop("folder", None)
        if not found:
            what = "data set that is known here" if kind == "auto" else f"{kind} data set"
            looked = "; ".join(f"{name}: {k.looks_for}" for name, k in kinds.items())
            raise InputError(f"{path} is no {what}; it holds {some(names_in(path))}. Looked for {looked}")
        if len(found) > 1:
            raise InputError(f"{path} can be read as {' and '.join(found)}. Choose one with --kind")
        ((name, files),) = found.items()
        if ask.columns and name != "parquet":
            raise InputError(f"{path}: --columns is for parquet files, this is {name}")
        source = KINDS[name].open(files, ask)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not len(source):
        raise InputError(f"{path}: the split {split!r} of this {source.kind} data set is empty")
    return source
