"""Record how each number was obtained, and show it on a page."""

import html
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
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
        "held-out images": held_out,
        "machine": {
            "processor": platform.machine(),
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
    """Return `facts` as HTML, the last section of a page."""
    return f"<h2>How these numbers were obtained</h2><pre>{html.escape(json.dumps(found, indent=1))}</pre>"
