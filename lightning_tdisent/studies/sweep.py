"""Expand parts of a study's YAML: sweeps over the diffusion time, and rows given as a share."""

from typing import Any

from lightning_tdisent.errors import InputError
from lightning_tdisent.fleet.keys import ANY, known

TIME_KEYS = dict.fromkeys(("run", "sampler", "cuts", "priors"), ANY)


def unrolled(study: dict[str, Any], file: str, strict: bool = True) -> dict[str, Any]:
    """Return a study with the contenders and priors of its ``diffusion_time`` sweep (2206.05173) added.

    The sweep has the whole chain, and for each cut the chain truncated at that row, started from N(0, I) and from each
    prior. strict: raise InputError if the study has another contender or prior with the name of one of the sweep.
    """
    study = {**study, **{key: dict(study.get(key) or {}) for key in ("priors", "contenders")}}
    if (sweep := study.get("diffusion_time")) is None:
        return study
    known(sweep, TIME_KEYS, f"{file}: diffusion_time", required=("run", "cuts"))
    cuts, priors = sweep["cuts"], sweep.get("priors") or {}
    if not isinstance(cuts, list) or not cuts or not isinstance(priors, dict):
        raise InputError(f"{file}: diffusion_time: cuts must be a list of rows, priors a mapping of names to classes")
    if len({str(cut) for cut in cuts}) < len(cuts):
        raise InputError(f"{file}: diffusion_time: cuts: {cuts} contains a row twice")
    common = {"run": sweep["run"], "sampler": sweep.get("sampler")}
    made: dict[str, dict[str, Any]] = {"priors": {}, "contenders": {"whole chain": common}}
    for cut in cuts:
        made["contenders"][f"cut {cut}, N(0, I)"] = {**common, "prior": f"cut:{cut}"}
        for name, prior in priors.items():
            made["priors"][f"{name}_{cut}"] = {"run": sweep["run"], "at": cut, "prior": prior}
            made["contenders"][f"cut {cut}, {name}"] = {**common, "prior": f"{name}_{cut}"}
    taken = [f"{key}.{name}" for key in made for name, e in made[key].items() if study[key].get(name, e) != e]
    if taken and strict:
        raise InputError(f"{file}: {', '.join(taken)}: diffusion_time generates some of these names; choose others")
    study.setdefault("bits", {})
    return {**study, **{key: {**study[key], **made[key]} for key in made}}


def row_or_share(value: Any, where: str) -> int | float:
    """Parse a row (int, from 1) or a share of the rows (float), given as a number or as text."""
    try:
        number = float(value)
        if isinstance(value, bool) or not 0 < number < float("inf"):
            raise ValueError
    except (TypeError, ValueError):
        raise InputError(f"{where}: expected a row of at least 1, or a share such as 0.6, got {value!r}") from None
    return int(number) if number.is_integer() and "." not in str(value) else number
