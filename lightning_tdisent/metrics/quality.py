"""`Quality`: every metric of one protocol from one pass over the images, the same for any split over ranks."""

import functools
from typing import Any

import torch
from torch import Tensor

from lightning_tdisent.errors import InputError
from lightning_tdisent.metrics import registry
from lightning_tdisent.metrics.accumulators import Accumulator, computed
from lightning_tdisent.metrics.metric import Needs, SetMetric
from lightning_tdisent.metrics.network import FeatureNetwork
from lightning_tdisent.metrics.protocol import Protocol
from lightning_tdisent.metrics.reference import Reference

LACKS: dict[Needs, str] = {"spatial": "has no features with places", "logits": "names no classes"}
Source = tuple[type[Accumulator], Needs, str]  # class, output of the feature network, options


def widths(network: FeatureNetwork) -> dict[Needs, int | None]:
    """Return the widths of a network's outputs, None for those that it does not have."""
    return {"features": network.num_features, "logits": network.classes, "spatial": network.num_spatial}


class Quality:
    """The metrics of one protocol between generated images and a reference.

    Keys of the numbers name the features (`Column.key`): ``fd_digits``, ``is_mnist``; in Inception's they have the
    names of the literature, ``fid``, ``is``, ``kid``. metrics: by name, in the order of tables.
    """

    def __init__(self, protocol: Protocol, network: FeatureNetwork, reference: Reference) -> None:
        self.protocol, self.network, self.reference = protocol, network, reference
        if reference.key != protocol.reference:
            raise InputError(
                f"the reference was measured by another protocol ({reference.key}) than {protocol.line} "
                f"({protocol.reference}): other features, resize, images or versions"
            )
        self.metrics: dict[str, SetMetric] = {m.name: m for m in protocol.chosen if isinstance(m, SetMetric)}
        if not self.metrics:
            raise InputError(f"metrics: none of {', '.join(protocol.metrics)} compares sets of images; add fd")
        self.accumulators: dict[Source, Accumulator] = {}
        for name, metric in self.metrics.items():
            source, width = self._source(metric), widths(network)[metric.needs]
            if width is None:
                raise InputError(f"{name}: {protocol.features} {LACKS[metric.needs]}; leave it out of metrics")
            if protocol.n < (least := metric.least(width)):
                raise InputError(f"{name}: {width} features need {least:,} images at least, got n={protocol.n:,}")
            if source not in self.accumulators:
                self.accumulators[source] = metric.accumulator(width, protocol.n, **metric.options(protocol.n))

    def _source(self, metric: SetMetric) -> Source:
        return metric.accumulator, metric.needs, str(metric.options(self.protocol.n))

    @functools.cached_property
    def biases(self) -> dict[str, float]:
        """The bias of each metric that has one, by key."""
        out = {}
        for metric in self.metrics.values():
            if (bias := metric.bias(self.reference, self.protocol.n)) is not None:
                out[metric.columns[0].key(self.protocol.features, "bias")] = bias
        return out

    def of(self, n: int, fewer: bool = False) -> "Quality":
        """Return the same for n images that come from files; fewer: without the metrics that need more of them."""
        protocol = self.protocol
        if fewer:
            wide, metrics = widths(self.network), self.metrics.values()
            enough = {registry.named(type(m)) for m in metrics if n >= m.least(wide[m.needs] or 0)}
            kept = tuple(name for name in protocol.metrics if name in enough)
            protocol = protocol.limited(kept or ("fd",))
        return Quality(protocol.of_files(n), self.network, self.reference).to(self.device)

    @property
    def device(self) -> torch.device:
        """Device of the network and the accumulators."""
        return next(iter(self.accumulators.values())).device

    def to(self, device: torch.device) -> "Quality":
        """Move the network and the accumulators to a device."""
        for part in (self.network, *self.accumulators.values()):
            part.to(device)
        return self

    def add(self, images: Tensor, numbers: Tensor) -> None:
        """Add uint8 images (B, C, H, W) and their numbers in 0..n-1, int64 (B,).

        On a GPU this does not synchronise with the host if both are already on the device.
        """
        found, numbers = self.network(images.to(self.device)), numbers.to(self.device)
        for (_, needs, _), accumulator in self.accumulators.items():
            accumulator.update(getattr(found, needs), numbers)

    def compute(self) -> dict[str, float]:
        """Synchronise over ranks and return the numbers by key (collective); raises InputError if there are none."""
        real, values, out = self.reference.to(self.device), dict[Source, Any](), dict[str, float]()
        nothing = torch.empty(0, dtype=torch.int64, device=self.device)
        for accumulator in self.accumulators.values():  # a rank without images must take part, too
            accumulator.update(torch.empty(0, accumulator.width, device=self.device), nothing)
        for source, accumulator in self.accumulators.items():
            values[source] = computed(accumulator)
        for metric in self.metrics.values():
            keys = {k: key for c in metric.columns for k, key in c.names(self.protocol.features).items()}
            found = metric.compute(real, values[self._source(metric)])
            if undeclared := found.keys() - keys.keys():
                raise InputError(f"{metric.path()}: computes {sorted(undeclared)}, its columns have {sorted(keys)}")
            out |= {keys[k]: value for k, value in found.items()}
        return out | self.biases

    def reset(self) -> None:
        """Forget the generated images."""
        for accumulator in self.accumulators.values():
            accumulator.reset()
