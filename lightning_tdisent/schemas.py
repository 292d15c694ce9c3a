"""Read JSON of bounded depth, check the schema version of the project's files, and list where two files differ."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from lightning_tdisent import __version__
from lightning_tdisent.errors import InputError, Newer, is_whole

DEEPEST = 64  # maximum nesting depth; well above that of any file of this project


def parse_json(text: bytes | str) -> Any:
    """Parse JSON. Raises ValueError for invalid JSON, nesting deeper than `DEEPEST` levels, and duplicate keys."""
    try:
        data = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(f"nested deeper than {DEEPEST} levels") from None
    level = [data]
    for _ in range(DEEPEST):
        level = [v for one in level if isinstance(one, (dict, list))
                 for v in (one.values() if isinstance(one, dict) else one)]  # fmt: skip
    if level:
        raise ValueError(f"nested deeper than {DEEPEST} levels")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is repeated")
    return found


def check_schema(
    data: Mapping[str, Any], where: str, reads: int, oldest: int | None = None, absent: int | None = None
) -> int:
    """Check and return the schema version of a file's data.

    where: name of the file, for messages; reads: newest schema that this version reads; oldest: oldest schema that it
    reads, ``reads`` if not given; absent: schema of a file without the key, for kinds of files that were once written
    without it. Raises InputError that names the file and both schemas; Newer if the file's schema is a later one.
    """
    found = data.get("schema", absent)
    if not is_whole(found) or found < 1:
        said = f"{found!r:.40}" if "schema" in data else "none"
        raise InputError(f"{where}: damaged: its schema is {said}, expected an integer from 1 to {reads}")
    if found > reads:
        raise Newer(
            f"{where}: schema {found}, made by a newer version; this one ({__version__}) reads {reads}. Upgrade "
            "lightning_tdisent"
        )
    if found < (oldest or reads):
        raise InputError(
            f"{where}: schema {found}, made by an older version; this one ({__version__}) reads {reads}. Create it "
            "again, or use the version that made it"
        )
    return int(found)


def check_metadata(metadata: Mapping[str, str] | None, where: str, reads: int) -> None:
    """Check the schema in the metadata of a .safetensors file, where values are text.

    A file without the key has schema 1: the first versions wrote none.
    """
    found = (metadata or {}).get("schema", "1")
    number = int(found) if found.isascii() and found.isdigit() and len(found) < 10 else found
    check_schema({"schema": number}, where, reads)


def check_format(found: Any, expected: str, where: str, oldest: int | None = None) -> None:
    """Raise InputError unless a file's ``format`` is NAME/SCHEMA as expected, such as ``lightning_tdisent.index/2``.

    oldest: oldest schema that is read; the schema of ``expected`` if not given.
    """
    name, _, number = expected.rpartition("/")
    there, _, schema = str(found).rpartition("/")
    if there != name or not (schema.isascii() and schema.isdigit() and len(schema) < 10):
        raise InputError(f"{where}: has the format {found!r:.80}, expected {expected}: create it again")
    check_schema({"schema": int(schema)}, where, int(number), oldest)


Card = TypeVar("Card")
Kinds = Mapping[str, Callable[[Any], bool]]


def check_fields(cls: type, data: Mapping[str, Any], where: str, kinds: Kinds) -> None:
    """Raise InputError unless ``data`` has the fields of the dataclass ``cls``; fields with a default may be absent.

    Unknown fields are refused, since another version wrote them. kinds: for a field, a predicate its value must fulfil.
    """
    fields: Any = dataclasses.fields(cls)
    needed = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    if lost := [name for name in needed if name not in data]:
        raise InputError(f"{where}: damaged: its card lacks {', '.join(lost)}")
    if unknown := sorted(data.keys() - {f.name for f in fields}):
        raise InputError(
            f"{where}: its card has {', '.join(unknown)[:200]}, which this version ({__version__}) does not know; "
            f"it was written by version {data.get('version')!r:.20}. Upgrade lightning_tdisent"
        )
    if wrong := [name for name, fits in kinds.items() if name in data and not fits(data[name])]:
        raise InputError(f"{where}: damaged: its card says {wrong[0]}: {data[wrong[0]]!r:.100}")


def from_json(cls: type[Card], data: Any, where: str, reads: int, kinds: Kinds) -> Card:
    """Return a card, a dataclass, from its JSON; missing fields get their defaults, since older files lack them.

    reads: the newest schema that is read; kinds: see `check_fields`. Raises InputError for anything but an object,
    another schema, missing or unknown fields, and values of a wrong type.
    """
    if not isinstance(data, dict):
        raise InputError(f"{where}: its card is a {type(data).__name__}, not an object")
    check_schema(data, where, reads)
    check_fields(cls, data, where, kinds)
    return cls(**data)


def is_text(value: Any) -> bool:
    """Return whether a value is text."""
    return isinstance(value, str)


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number >= 0, and not a boolean."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def is_count(value: Any) -> bool:
    """Return whether a value is an integer with 0 <= value < 2^63, and not a boolean."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def is_part(value: Any) -> bool:
    """Return whether a value is the `spec` of a part: class path, arguments and optional digests of files."""
    named = isinstance(value, dict) and is_text(value.get("class_path")) and isinstance(value.get("init_args"), dict)
    return named and isinstance(value.get("files", {}), dict) and all(map(is_text, value.get("files", {}).values()))


def differences(theirs: Any, mine: Any, there: str = "there", now: str = "now") -> list[str]:
    """Return a line ``KEY: X there, Y now`` for each (nested) key in which two sets of plain data differ."""
    a, b = dict(_flat(theirs)), dict(_flat(mine))
    # compared as JSON text, so that 1 differs from true and NaN equals NaN
    texts = [{key: json.dumps(value, default=str) for key, value in data.items()} for data in (a, b)]
    return [
        f"{k}: {_shown(a, k)} {there}, {_shown(b, k)} {now}" for k in {**a, **b} if texts[0].get(k) != texts[1].get(k)
    ]


def _shown(data: dict[str, Any], key: str) -> str:
    return repr(data[key]) if key in data else "nothing"


def _flat(data: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    items: Any = None
    if isinstance(data, dict):
        items = [(f"{name}.{k}" if name else str(k), v) for k, v in data.items()]
    elif isinstance(data, list) and any(isinstance(v, (dict, list)) for v in data):
        items = [(f"{name}[{k}]", v) for k, v in enumerate(data)]
    if not items:
        if name or data:
            yield name, data
        return
    for key, value in items:
        yield from _flat(value, key)
