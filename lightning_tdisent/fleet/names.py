"""Check the names of runs, experts, priors and contenders, which are used for folders, lease files and labels."""

import unicodedata
from collections.abc import Collection, Sequence
from itertools import groupby
from typing import Any

MARKS = " ._-+,()=&%"  # characters allowed in a name in addition to letters and digits
LONGEST = 100  # bytes


def fault(name: Any, reserved: Collection[str] = (), marks: str = MARKS) -> str | None:
    """Return why ``name`` is not a valid name, or None if it is valid.

    A name is text of letters, digits and ``marks`` that begins with a letter or digit and does not end with a space or
    dot. It has at most `LONGEST` bytes and is in Unicode normal form C.

    reserved: names of files and folders in the same place; compared without regard to case.
    """
    if not isinstance(name, str):
        return "a name is text; write it in quotes"
    if not name:
        return "a name must not be empty"
    if name != unicodedata.normalize("NFC", name) or len(name.encode()) > LONGEST:
        return f"a name has at most {LONGEST} bytes and is in Unicode normal form C"
    if invalid := sorted({c for c in name if not (c.isalnum() or c in marks)}):
        return f"a name consists of letters, digits and any of {marks.strip()!r}, not {' '.join(map(repr, invalid))}"
    if not name[0].isalnum() or name[-1] in " .":
        return "a name begins with a letter or a digit, and does not end with a space or a dot"
    if name.casefold() in {r.casefold() for r in reserved}:
        return "this name is reserved for a file or folder of the program"
    return None


def clashes(claims: Sequence[tuple[str, str]]) -> list[str]:
    """Return a line for each name that occurs several times in ``claims``, pairs (name, where it is used).

    Names that differ only in case count as equal, because some file systems do not distinguish case.
    """
    out = []
    for _, some in groupby(sorted(claims, key=lambda claim: claim[0].casefold()), key=lambda c: c[0].casefold()):
        found = list(some)
        if len(found) > 1:
            out.append(
                f"{' and '.join(dict.fromkeys(f'{who} ({name})' for name, who in found))} would have the same name"
            )
    return out
