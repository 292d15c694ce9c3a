"""Compare sets of images: refuse held-out images that were trained on, and note classes without images."""

import sys

from torch import Tensor

from lightning_tdisent.data.shards import Shards
from lightning_tdisent.distributed import rank_and_world
from lightning_tdisent.errors import InputError

MOST_SHARED = 0.01  # share of held-out samples that may be training samples; real data sets have a few duplicates


def refuse_shared(held_out: Shards, training: Shards, what: str, remedy: str) -> None:
    """Raise `InputError` if more than 1 % of the held-out samples have a training image; print a note if fewer have.

    what: the two splits, and remedy: what to do, for messages. Images are compared by the bytes of their files.
    """
    for one in (held_out, training):
        if one.hashed_index.regions is not None and not one.hashed_index.keyed:
            print(
                f"note: the index of {one.where} is of an earlier version, with which images that are in both splits "
                f"({what}) are not found; make it anew: {one.again}",
                file=sys.stderr,
            )
    shared, n = held_out.hashed_index.shared(training.hashed_index), len(held_out)
    said = f"{what}: {shared:,} of {n:,} held-out samples of {held_out.where} are among the {len(training):,} training"
    if shared > MOST_SHARED * n:
        raise InputError(f"{said} samples of {training.where}, so they would not be held out. {remedy}")
    if shared:
        print(f"note: {said} samples of {training.where}", file=sys.stderr)


def note_classes(what: str, labels: Tensor, where: str, classes: int) -> None:
    """Print, on the first rank, which classes of a network no image has. Print nothing if an image has no class.

    what: the key or the model that has this number of ``classes``, and where: the images, for the message.
    """
    lacking = sorted(set(range(classes)).difference(labels.unique().tolist()))
    if lacking and int(labels.min()) >= 0 and rank_and_world()[0] == 0:
        some = ", ".join(map(str, lacking[:5])) + (f", .. ({len(lacking):,} in all)" if len(lacking) > 5 else "")
        print(
            f"note: {what} is {classes}, but {where} have none of the classes {some}; samples of all classes in "
            "turn, as sample and evaluate draw them, include these classes, too",
            file=sys.stderr,
        )
