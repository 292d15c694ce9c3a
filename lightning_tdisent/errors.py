"""Errors that end a command with a message, never with a traceback."""

import math
from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any


class InputError(ValueError):
    """Something asked for cannot be done; the message says what, where, both values and what would help."""

    code = 2


class Halted(InputError):
    """Training stopped itself before it could do harm: a full disk, losses that are not finite."""

    code = 1


class Busy(InputError):
    """Another process holds the folder of a run: nothing has failed, wait for it."""


class Lost(Halted):
    """This process no longer holds what it was writing: its folder has gone, or its lease is another worker's."""


class Crashed(InputError):
    """A training ended by an error that nobody foresaw: elsewhere, or another time, it may go well."""

    code = 70


class NotFinite(InputError):
    """Weights, states or images hold NaN or infinity."""


class Newer(InputError):
    """A file was made by a newer version than this one."""


class Unavailable(InputError):
    """A file or package that is not shipped is not here; the message says how to get it."""


# errors of what was named: no disk or network that may be better another time
NAMED = (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


def nearest(word: str, allowed: Iterable[str], likeness: float = 0.5) -> str:
    """Return `` Did you mean 'x'?`` for the closest allowed word, or an empty string.

    likeness: of two words that may be meant for each other, 0 to 1, as of difflib.
    """
    close = get_close_matches(word, list(allowed), 1, likeness)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_number(
    key: str, value: Any, least: float = 0, most: float = math.inf, above: bool = False, whole: bool = False
) -> None:
    """Raise InputError unless a value is a finite number from ``least`` to ``most``.

    above: exclude ``least`` itself; whole: take integers only. Strings and booleans are no numbers.
    """
    number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if number and least <= value <= most and math.isfinite(value) and not (above and value == least):
        return
    kind = "" if number and math.isfinite(value) else "an integer, " if whole else "a number, "
    bounds = (
        f"from {least:.10g} to {most:.10g}"
        if math.isfinite(most)
        else f"{'above' if above else 'at least'} {least:.10g}"
    )
    raise InputError(f"{key}: {kind}{bounds}, got {value}")


LARGEST = 1 << 26  # values of a state: 8192 x 8192, grey


def check_shape(key: str, shape: Any) -> None:
    """Raise InputError unless a value is [channels, height, width], whole numbers from 1 on, of at most `LARGEST`."""
    whole = isinstance(shape, (list, tuple)) and all(isinstance(n, int) and not isinstance(n, bool) for n in shape)
    if not whole or len(shape) != 3 or min(shape) < 1:
        raise InputError(f"{key} must be [channels, height, width] of an image, got {shape!r:.200}")
    if math.prod(shape) > LARGEST:
        raise InputError(f"{key}: {shape!r:.200} has {math.prod(shape):.3g} values, at most {LARGEST:,} are possible")
