"""Select the files and folders of a split, by a single rule for shards, raw files and raw folders.

A name belongs to a split if the split is one of its words, in upper or lower case: ``imagenet-train-0000.tar``,
``Train``, ``cifar10_testing.parquet``, ``trainA``. ``train``, ``val`` and ``test`` have synonyms (`SYNONYMS`).
"""

import re
from collections.abc import Iterable

from lightning_tdisent.errors import InputError

SYNONYMS = {
    "train": ("train", "training", "trainset"),
    "val": ("val", "valid", "validation", "valset", "dev", "eval", "evaluation"),
    "test": ("test", "testing", "testset"),
}
_SPLIT = {word: split for split, words in SYNONYMS.items() for word in words}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+|[^\W\d_]+")


def canonical(split: str) -> str:
    """Return ``train``, ``val`` or ``test`` for one of their synonyms, and any other split's name in lower case."""
    return _SPLIT.get(split.lower(), split.lower())


def named(name: str) -> list[str]:
    """Return which of ``train``, ``val`` and ``test`` are words of a file's or folder's name."""
    words = (_SPLIT.get(word.lower()) for word in _WORD.findall(name))
    return list(dict.fromkeys(split for split in words if split))


def found(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names that have the word of a split, by split: {split: [name, ..]}."""
    out: dict[str, list[str]] = {}
    for name in names:
        for split in named(name):
            out.setdefault(split, []).append(name)
    return out


def of_split(names: Iterable[str], split: str, where: str) -> list[str]:
    """Return the names that belong to a split, in the given order; all names if none has the word of any split.

    The result is empty if the names have the words of other splits only (see `found`). Names that begin with exactly
    ``{split}-`` take precedence, so that a split of any name can be prepared. Raises `InputError` for a name with the
    words of two splits. where: the folder, for messages.
    """
    names = list(names)
    begun = [n for n in names if n.startswith(f"{split}-") and not named(n.removeprefix(f"{split}-"))]
    if begun:
        return begun
    words = [word.lower() for word in _WORD.findall(split)]
    known, mine = split.lower() in _SPLIT, canonical(split)

    def belongs(name: str) -> bool:
        own = [word.lower() for word in _WORD.findall(name)]
        return mine in named(name) if known else any(own[k : k + len(words)] == words for k in range(len(own)))

    chosen = [name for name in names if belongs(name)]
    if known and (both := [name for name in chosen if len(named(name)) > 1]):
        raise InputError(
            f"{where}: {both[0]} names the splits {' and '.join(named(both[0]))}. Rename it, or name the files of "
            f"{split} by a pattern"
        )
    return chosen or ([] if any(named(name) for name in names) else names)
