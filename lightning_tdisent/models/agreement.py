"""Check that experts agree in everything they must to form one sampler, and that every row is owned exactly once."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_tdisent.errors import InputError

if TYPE_CHECKING:
    from lightning_tdisent.models.card import Card
    from lightning_tdisent.sampling.denoiser import Denoiser

ALLOWED = ("training data", "weights", "parametrisation")  # fields in which experts may differ if the caller allows it


def facts_of(expert: "Denoiser") -> dict[str, Any]:
    """Return the fields of a denoiser that experts must agree in, and its rows."""
    return {
        "rows": expert.rows,
        "S": expert.states.S,
        "table": expert.states.fingerprint,
        "parametrisation": type(expert.objective).__name__,
        "network input": {"shape": expert.shape, "classes": expert.classes},
    }


def facts_of_card(card: "Card") -> dict[str, Any]:
    """Return the fields of a card that experts must agree in, and its rows."""
    network = card.network["init_args"]
    states = card.states["init_args"]
    return {
        "rows": card.rows,
        "S": states.get("S"),
        "table": f"{card.fingerprint} ({_brief(states)})",
        "parametrisation": card.objective["class_path"].rpartition(".")[2],
        "image range": card.image_range,
        "network input": {"shape": card.shape, "classes": network.get("classes")},
        "training data": card.data,
        "weights": card.kind,
    }


def _brief(states: dict[str, Any]) -> str:
    schedule = states.get("schedule") or {"class_path": "another schedule", "init_args": {}}
    arguments = ", ".join(f"{k}={v}" for k, v in schedule["init_args"].items())
    kind = states.get("kind", "components")
    return f"S={states.get('S')} {kind} of {schedule['class_path'].rpartition('.')[2]}({arguments})"


def differing(facts: Sequence[dict[str, Any]], allow: Sequence[str]) -> dict[str, list[str]]:
    """Return the values of the fields in ``allow`` in which the experts differ."""
    found = {field: sorted({str(fact[field]) for fact in facts}) for field in allow if field in facts[0]}
    return {field: values for field, values in found.items() if len(values) > 1}


def refuse_unfit(
    names: Sequence[str], facts: Sequence[dict[str, Any]], preview: bool = False, allow: Sequence[str] = (),
    upto: int | None = None,
) -> list[int]:  # fmt: skip
    """Raise InputError for experts that cannot be composed, and return the rows that none of them owns.

    The message lists all problems, with both values of a field. Every row 1..upto must be owned, and none twice.

    names: of the experts, for the message.
    facts: of the experts, from `facts_of` or `facts_of_card`. The most common value of a field is the reference.
    preview: rows may be missing.
    allow: fields in which experts may differ, from `ALLOWED`.
    upto: the last row that must be owned; S if not given.
    """
    if not facts:
        raise InputError("no experts to compose")
    if odd := [field for field in allow if field not in ALLOWED]:
        raise InputError(f"--allow-mismatch {odd[0]}: experts may differ in {', '.join(ALLOWED)} alone")
    problems = []
    for field in facts[0]:
        if field == "rows" or field in allow:
            continue
        common = Counter(json.dumps(f[field]) for f in facts).most_common(1)[0][0]
        may = (
            f" (compose --allow-mismatch {field!r} composes them all the same, and says so)" if field in ALLOWED else ""
        )
        for name, fact in zip(names, facts, strict=True):
            if json.dumps(fact[field]) != common:
                problems.append(f"{name}: {field} is {json.dumps(fact[field])}, the others have {common}{may}")
    S = Counter(f["S"] for f in facts).most_common(1)[0][0]
    unowned, wrong = ownership(names, [fact["rows"] for fact in facts], S)
    missing = [s for s in unowned if s <= (upto or S)]
    if missing and not preview:
        problems.append(
            f"no expert owns row{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} of 1..{S}; "
            "compose and sample give a preview without them with --fill nearest, and one with a shared model in their "
            "place with --fill shared:PATH"
        )
    problems += wrong
    if problems:
        lines = "\n".join(f"  - {p}" for p in problems)
        raise InputError(f"these {len(facts)} experts cannot be composed:\n{lines}", problems=problems)
    return missing


def ownership(names: Sequence[str], rows: Sequence[Sequence[int]], S: int) -> tuple[list[int], list[str]]:
    """Return the rows of 1..S that have no owner, and a message for each row with several owners or outside 1..S.

    names: of the owners. rows: the rows of each owner.
    """
    owners: dict[int, list[str]] = {s: [] for s in range(1, S + 1)}
    for name, own in zip(names, rows, strict=True):
        for s in own:
            owners.setdefault(s, []).append(name)
    wrong = [f"row {s} is owned by {' and '.join(who)}" for s, who in owners.items() if len(who) > 1]
    wrong += [f"row {s} of {' and '.join(who)} is not among 1..{S}" for s, who in owners.items() if not 1 <= s <= S]
    return [s for s, who in owners.items() if not who], wrong
