"""Errors that end a command with a one-line message and an exit code, not with a traceback."""

import math
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, Self


class InputError(ValueError):
    """A request that cannot be carried out.

    The message says what is wrong, where, which value was found and which was expected, and what to do. The same facts
    are attributes, None (or empty) where they do not apply:

    where: file, or option, in which it was found.
    key: dotted name of the argument, option or key.
    value: value found.
    expected: what is accepted, in words.
    nearest: accepted word closest to the one found.
    problems: all problems, one line each, if there may be several.

    code: exit status of the command.
    """

    code = 2

    def __init__(
        self, message: object = "", *, where: str | None = None, key: str | None = None, value: Any = None,
        expected: str | None = None, nearest: str | None = None, problems: Sequence[str] = (),
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.where, self.key, self.value, self.expected = where, key, value, expected
        self.nearest, self.problems = nearest, tuple(problems)

    @classmethod
    def of_value(cls, key: str, value: Any, expected: str) -> Self:
        """Return the error for a value that is not as expected: ``KEY: EXPECTED, got VALUE``."""
        return cls(f"{key}: {expected}, got {value}", key=key, value=value, expected=expected)

    def within(self, where: str) -> Self:
        """Return the same error with ``where`` before its message and as its attribute."""
        facts = {name: getattr(self, name) for name in ("key", "value", "expected", "nearest", "problems")}
        return type(self)(f"{where}: {self}", where=where, **facts)


class Halted(InputError):
    """Training stopped itself to prevent damage, e.g. because of a full disk or non-finite losses."""

    code = 1


class Busy(InputError):
    """Another process holds the run folder. Nothing has failed; wait for that process to finish."""


class Lost(Halted):
    """This process lost the folder or lease that it was writing under: removed, moved, or taken by another worker."""


class Crashed(InputError):
    """Unexpected error in a training run; a retry, or a run on another machine, may succeed."""

    code = 70


class NotFinite(InputError):
    """Weights, states or images contain NaN or infinity."""


class Newer(InputError):
    """A file was written by a newer version of this package."""


class Unavailable(InputError):
    """A file or package that is not shipped with this one is missing; the message says how to get it."""


# OSErrors caused by the path that the user named, not by a disk or network failure that a retry may survive
NAMED = (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


def closest(word: str, allowed: Iterable[str], likeness: float = 0.5) -> str | None:
    """Return the allowed word closest to ``word``, None if none is close.

    likeness: minimum similarity of the two words, 0 to 1 (the cutoff of `difflib.get_close_matches`).
    """
    return next(iter(get_close_matches(word, list(allowed), 1, likeness)), None)


def nearest(word: str, allowed: Iterable[str], likeness: float = 0.5) -> str:
    """Return `` Did you mean 'x'?`` for the word that `closest` returns, or an empty string if none is close."""
    close = closest(word, allowed, likeness)
    return "" if close is None else f" Did you mean {close!r}?"


def is_whole(value: Any) -> bool:
    """Return whether a value is an integer and not a boolean."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_number(
    key: str, value: Any, least: float = 0, most: float = math.inf, above: bool = False, whole: bool = False
) -> None:
    """Raise InputError unless ``value`` is a finite number from ``least`` to ``most``, both included.

    key: name of the value, for the message; above: exclude ``least`` itself; whole: accept integers only. Strings and
    booleans are not numbers.
    """
    number = is_whole(value) if whole else isinstance(value, Real) and not isinstance(value, bool)
    if number and least <= value <= most and math.isfinite(value) and not (above and value == least):
        return
    kind = "" if number and math.isfinite(value) else "an integer, " if whole else "a number, "
    bounds = (
        f"from {least:.10g} to {most:.10g}"
        if math.isfinite(most)
        else f"{'above' if above else 'at least'} {least:.10g}"
    )
    raise InputError.of_value(key, value, kind + bounds)


LARGEST = 1 << 26  # maximum number of values in a state: one channel of 8192 x 8192


def check_shape(key: str, shape: Any) -> None:
    """Raise InputError unless ``shape`` is [channels, height, width], integers >= 1 with at most `LARGEST` values."""
    whole = isinstance(shape, (list, tuple)) and all(is_whole(n) for n in shape)
    if not whole or len(shape) != 3 or min(shape) < 1:
        expected = "[channels, height, width] of an image"
        raise InputError(f"{key} must be {expected}, got {shape!r:.200}", key=key, value=shape, expected=expected)
    if math.prod(shape) > LARGEST:
        said = f"{key}: {shape!r:.200} has {math.prod(shape):.3g} values, at most {LARGEST:,} are allowed"
        raise InputError(said, key=key, value=shape)
