"""Record how each number was obtained, and show it on a page."""

import functools
import html
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lightning_tdisent.distributed import all_gather
from lightning_tdisent.processes import cores

PACKAGES = ("torch", "lightning", "diffusers", "torchmetrics", "lightning_tdisent")
UNKNOWN = "measured by a version that did not record the command, the machine and the versions of packages"


def provenance(held_out: int) -> dict[str, Any]:
    """Return the date, command, machine and package versions of a measurement: those of rank 0 (collective).

    held_out: number of held-out images.
    """
    mine = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "commit": commit(),
        "held-out images": held_out,
        "machine": {
            "processor": platform.machine(),
            "model": processor(),
            "CPU cores": cores(),
            "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        },
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
    }
    first: dict[str, Any] = all_gather(mine)[0]
    return first


def facts(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the protocols, the models with their training seeds, and how the rows of an evaluation were measured.

    Rows that were measured in the same way are grouped; a group has the dates of its first and its last row.
    """
    groups: dict[str, dict[str, Any]] = {}
    for row in (row for row in rows if "source" in row):
        how = dict(row.get("measured", {"note": UNKNOWN}))
        date = how.pop("date", None)
        group = groups.setdefault(json.dumps(how, sort_keys=True), {"rows": [], "dates": [], **how})
        group["rows"].append(row["name"])
        group["dates"] += [date] if date else []
    for group in groups.values():
        dates = sorted(group.pop("dates"))
        group |= {"date": " to ".join(dict.fromkeys((dates[0], dates[-1])))} if dates else {}
    keys = ("name", "sampler", "table", "training_data", "weights_kind", "seeds", "source")
    return {
        "protocols": {row["protocol"]: row["protocol_fields"] for row in rows},
        "models": [{key: row[key] for key in keys if key in row} for row in rows if "networks" in row],
        "measured": list(groups.values()),
    }


def html_facts(found: Any) -> str:
    """Return `facts` as HTML."""
    shown = html.escape(json.dumps(found, indent=1))
    return f"<details><summary>protocols, models, commands and machines as JSON</summary><pre>{shown}</pre></details>"


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each way in which rows were measured: dates, commit, machine, versions."""
    out = []
    for how in facts(rows)["measured"]:
        if "machine" not in how:
            out.append(how["note"])
            continue
        machine, versions = how["machine"], how["versions"]
        dates = " to ".join(f"{date[:10]} {date[11:16]}" for date in how.get("date", "").split(" to "))
        code = f", commit {how['commit']}" if how.get("commit") else ""
        gpu = "no GPU" if machine["accelerator"] == "none" else machine["accelerator"]
        out.append(
            f"Measured {dates}{code}, {machine.get('model') or machine['processor']}, "
            f"{machine['CPU cores']} CPU cores, {gpu}, torch {versions['torch']}, "
            f"lightning_tdisent {versions['lightning_tdisent']}"
        )
    return out


@functools.cache
def commit() -> str:
    """Return the commit of the checkout that this package is part of, with ``-dirty`` if files have changed.

    Empty if the package is installed otherwise, or git is not.
    """
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, encoding="utf-8", check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return ""


def processor() -> str:
    """Return the name of the processor, "" if the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
