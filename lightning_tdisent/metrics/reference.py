"""Statistics of the real images, computed once for each data set and protocol, and cached on disk."""

import contextlib
import itertools
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_tdisent.digests import digest_of, digest_of_data
from lightning_tdisent.distributed import all_gather, rank_and_world, shared_errors
from lightning_tdisent.errors import InputError, Newer
from lightning_tdisent.files import write_whole
from lightning_tdisent.images import spaced
from lightning_tdisent.metrics.accumulators import FeatureList, FeatureMoments
from lightning_tdisent.metrics.distances import Moments
from lightning_tdisent.metrics.network import FeatureNetwork
from lightning_tdisent.metrics.protocol import Protocol
from lightning_tdisent.metrics.weights import cache_folder
from lightning_tdisent.schemas import check_metadata, check_schema, parse_json

BATCH = 256
_KEY, SCHEMA = "check", 1  # files without a schema have schema 1


class Reference(NamedTuple):
    """Statistics of the features of real images.

    key: `Protocol.reference` of the protocol they were computed for; moments: of the features of all images; kept:
    features (k, d) of some images; spatial: moments of the spatial features, None if no metric needs them.
    """

    key: str
    moments: Moments
    kept: Tensor
    spatial: Moments | None = None

    def to(self, device: torch.device | str) -> "Reference":
        """Return a copy on a device."""
        spatial = None if self.spatial is None else self.spatial.to(device)
        return Reference(self.key, self.moments.to(device), self.kept.to(device), spatial)


def reference(
    protocol: Protocol, network: FeatureNetwork, take: Callable[[Tensor], Tensor], device: torch.device | str = "cpu"
) -> Reference:
    """Return the statistics of the real images of a resolved protocol, from the cache if it has them (collective).

    take: maps image numbers, int64 (B,), to uint8 images (B, C, H, W); each rank takes its share, and all return the
    same. A file whose bytes have changed causes a warning, and is computed and written again. Raises InputError for a
    file of a newer version.
    """
    path = _in_cache("reference", f"{protocol.real}-{protocol.reference}.safetensors")
    with shared_errors():
        try:
            found = _read(path, protocol.reference) if path else None
        except Newer as error:
            raise InputError(f"{error}, or name another folder with TDISENT_CACHE") from None
        except FileNotFoundError:
            found = None
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            warnings.warn(f"{path}: refused ({error}); its statistics are computed again", stacklevel=2)
            found = None
    complete = all(all_gather(found is not None))
    if found is not None and complete:
        return found
    found = measure(protocol, network, take, device)
    if path and os.environ.get("LOCAL_RANK", "0") == "0":  # one rank per machine: each may have its own cache
        try:
            _write(path, found, protocol)
        except InputError as error:
            warnings.warn(f"{error}; the next run has to measure the real images again", stacklevel=2)
    return found


def measure(
    protocol: Protocol, network: FeatureNetwork, take: Callable[[Tensor], Tensor], device: torch.device | str = "cpu"
) -> Reference:
    """Return the statistics of the real images: each rank passes its share through the network (collective)."""
    assert protocol.n_real is not None
    rank, world = rank_and_world()
    network.to(device)
    width, inner = network.num_features, protocol.needs("spatial") and network.num_spatial
    moments, kept = FeatureMoments(width).to(device), FeatureList(width).to(device)
    spatial = FeatureMoments(inner).to(device) if inner else None
    kept.update(torch.empty(0, width, device=device), torch.empty(0, dtype=torch.int64))
    chosen = spaced(protocol.n_real, protocol.n_split)
    among = torch.zeros(protocol.n_real, dtype=torch.bool)
    among[spaced(min(protocol.kept, protocol.n_real), protocol.n_real)] = True
    with shared_errors():
        for numbers in torch.arange(protocol.n_real)[rank::world].split(BATCH):
            if not len(numbers):
                continue
            found = network(take(chosen[numbers]).to(device))
            moments.update(found.features)
            keep = among[numbers]
            kept.update(found.features[keep.to(device)], numbers[keep])
            if spatial is not None:
                spatial.update(found.spatial)
    inner_moments = None if spatial is None else spatial.compute()
    return Reference(protocol.reference, moments.compute(), kept.compute(), inner_moments).to("cpu")


def remembered(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the JSON data cached under a name, measured if there is none or the file was changed (collective)."""
    path = _in_cache("numbers", f"{name}.json")
    with shared_errors():
        try:
            found = parse_json(path.read_bytes() if path else b"null")
            check_schema(found, str(path), SCHEMA, absent=1)
            found = found["values"] if found["check"] == digest_of_data(found["values"]) else None
        except Newer as error:
            raise InputError(f"{error}, or name another folder with TDISENT_CACHE") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            found = None
    everywhere = all(all_gather(found is not None))
    values: dict[str, Any] = found if everywhere else measure()
    if everywhere:
        return values
    if path and os.environ.get("LOCAL_RANK", "0") == "0":
        with contextlib.suppress(InputError):  # without a cache it is measured in each run
            write_whole(
                path, json.dumps({"schema": SCHEMA, "values": values, "check": digest_of_data(values)}).encode()
            )
    return values


def _in_cache(*parts: str) -> Path | None:
    """Return the path of a file in the cache, None if there is no folder for the cache."""
    try:
        return cache_folder().joinpath(*parts)
    except InputError:
        return None


def _write(path: Path, found: Reference, protocol: Protocol) -> None:
    tensors = {"mean": found.moments.mean, "covariance": found.moments.covariance, "kept": found.kept.contiguous()}
    if found.spatial is not None:
        tensors |= {"spatial_mean": found.spatial.mean, "spatial_covariance": found.spatial.covariance}
    about = {"schema": str(SCHEMA), "n": str(found.moments.n), "key": found.key}
    about["protocol"] = json.dumps(protocol.fields)
    write_whole(path, save(tensors, about | {_KEY: _check(tensors, about)}))


def _read(path: Path, key: str) -> Reference:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
        about = dict(file.metadata() or {})
    check_metadata(about, str(path), SCHEMA)
    said = about.pop(_KEY)
    if (now := _check(tensors, about)) != said:
        raise ValueError(f"its sha256 is {now[:12]}.., it was written with {said[:12]}..")
    if about["key"] != key:
        raise ValueError(f"it belongs to protocol {about['key']}, not to {key}")
    n = int(about["n"])
    inner = Moments(n, tensors["spatial_mean"], tensors["spatial_covariance"]) if "spatial_mean" in tensors else None
    return Reference(key, Moments(n, tensors["mean"], tensors["covariance"]), tensors["kept"], inner)


def _check(tensors: dict[str, Tensor], about: dict[str, str]) -> str:
    begin = json.dumps(about, sort_keys=True).encode()
    described = (
        (f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), tensor.contiguous().numpy().data)
        for name, tensor in sorted(tensors.items())
    )
    return digest_of(itertools.chain([begin], itertools.chain.from_iterable(described)))
