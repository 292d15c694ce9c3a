"""Find metrics by name or class path, and the columns of a row of results."""

import importlib
from collections.abc import Mapping
from typing import Any

from lightning_tdisent.diffusion.spec import build
from lightning_tdisent.errors import InputError, nearest
from lightning_tdisent.metrics.metric import KNOWN, Column, Metric

# modules of this package's metrics, in the order of their columns in tables
BUILT_IN = {
    "fd": "frechet_distance",
    "sfd": "spatial_frechet",
    "is": "inception_score",
    "kid": "kernel_distance",
    "prdc": "precision_recall",
    "fd_infinity": "frechet_infinity",
    "psnr": "psnr",
    "ssim": "ssim",
    "consistency": "consistency",
    "lpips": "lpips",
    "diversity": "diversity",
    "jfd": "joint_frechet",
    "bpd": "likelihood",
    "bpd_ode": "likelihood",
}


def find(name: str) -> type[Metric]:
    """Return the metric of a name, or of a class path whose module is imported; raises InputError."""
    if "." in name:
        return _by_path(name)
    if name in BUILT_IN:
        importlib.import_module(f"{__package__}.{BUILT_IN[name]}")
    if name not in KNOWN:
        raise InputError(
            f"metrics: there is no {name!r}.{nearest(name, choices())} Choose from {', '.join(choices())}, or give the "
            "class path of a metric of your own"
        )
    return KNOWN[name]


def _by_path(path: str) -> type[Metric]:
    if path not in (cls.path() for cls in KNOWN.values()):
        build({"class_path": path, "init_args": {}}, Metric)  # refuses what is no metric, or not imported
    for cls in KNOWN.values():
        if cls.path() == path:
            return cls
    raise InputError(f"metrics: {path} has no `name` of its own")


def known() -> list[type[Metric]]:
    """Return all metrics: those of this package in the order of `BUILT_IN`, then others that are imported.

    Raises InputError if two of them have a number of the same name.
    """
    out = [find(name) for name in BUILT_IN]
    out += [cls for name, cls in KNOWN.items() if name not in BUILT_IN]
    owners: dict[str, type[Metric]] = {}
    for cls in out:
        for name in (name for column in cls.columns for name in column.names()):
            if owners.setdefault(name, cls) is not cls:
                raise InputError(f"{cls.path()}: {owners[name].path()} has a number called {name!r}, too; rename one")
    return out


def choices() -> list[str]:
    """Return the names that the ``metrics`` of a protocol may hold."""
    return [named(cls) for cls in known() if not cls.asked_by]


def named(cls: type[Metric]) -> str:
    """Return how protocols record a metric: by its name, or by its class path if it is not of this package."""
    return cls.name if cls.name in BUILT_IN else cls.path()


def columns(features: str) -> dict[str, Column]:
    """Return the columns of all metrics by their keys in these features."""
    return {column.key(features): column for cls in known() for column in cls.columns}


def features_of(row: Mapping[str, Any]) -> str:
    """Return the name of the feature network of a row of results."""
    features: str = row["protocol_fields"].get("features", "")
    return features


def columns_of(row: Mapping[str, Any]) -> dict[str, Column]:
    """Return the columns that a row of results has numbers for, by key, in the order of the row."""
    there = columns(features_of(row))
    return {key: there[key] for key, value in row.items() if key in there and isinstance(value, float)}


def missing(row: Mapping[str, Any]) -> list[str]:
    """Return the metrics of a row's protocol that are not known: their modules are not imported."""
    there = {named(cls) for cls in known()}
    return [name for name in row["protocol_fields"].get("metrics", []) if name not in there]
