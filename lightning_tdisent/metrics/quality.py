"""`Quality`: every metric of one protocol from one pass over the images, the same under any split over ranks."""

import dataclasses
import functools
import warnings

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_tdisent.errors import InputError
from lightning_tdisent.metrics.distances import frechet_bias
from lightning_tdisent.metrics.network import FeatureNetwork
from lightning_tdisent.metrics.protocol import Protocol
from lightning_tdisent.metrics.reference import Reference
from lightning_tdisent.metrics.scores import FeatureList, FrechetDistance, InceptionScore, PairMetrics


class Quality:
    """The metrics of one protocol between generated images and a reference.

    Names say the features: ``fd_digits``, ``is_mnist``; those of Inception have the literature's, ``fid``, ``is``,
    ``kid``. ``fd_bias`` is what a perfect model would reach with as few images (`frechet_bias`).
    """

    def __init__(self, protocol: Protocol, network: FeatureNetwork, reference: Reference) -> None:
        self.protocol, self.network, self.reference = protocol, network, reference
        if reference.key != protocol.reference:
            raise InputError(
                f"the reference was measured by another protocol ({reference.key}) than {protocol.line} "
                f"({protocol.reference}): other features, resize, images or versions"
            )
        asked = set(protocol.metrics)
        self.metrics: dict[str, Metric] = {}
        if "fd" in asked:
            self.metrics["fd"] = FrechetDistance(reference.moments, protocol.n)
        if "sfd" in asked:
            if reference.spatial is None:
                raise InputError(f"sfd: {protocol.features} has no features with places; leave it out of metrics")
            self.metrics["sfd"] = FrechetDistance(reference.spatial, protocol.n)
        if "is" in asked:
            if network.classes is None:
                raise InputError(f"is: {protocol.features} names no classes; leave it out of metrics")
            self.metrics["is"] = InceptionScore(network.classes, protocol.n, *protocol.parts)
        if pairs := asked & {"kid", "prdc", "fd_infinity"}:
            self.metrics["pairs"] = PairMetrics(
                reference.moments, reference.kept, sorted(pairs), protocol.neighbours, expected=protocol.n
            )
        if "fd_infinity" in asked and protocol.n < 10 * network.num_features:
            least = 10 * network.num_features
            raise InputError(
                f"fd_infinity: {network.num_features} features need {least:,} images at least, got n={protocol.n:,}"
            )

    @functools.cached_property
    def bias(self) -> float:
        """`frechet_bias` of this many images."""
        return frechet_bias(self.reference.moments.covariance, self.protocol.n, self.reference.moments.n)

    def of(self, n: int, fewer: bool = False) -> "Quality":
        """The same for n images that come from files; fewer: without the metrics that need more of them."""
        protocol = self.protocol
        if fewer:
            enough = {"fd_infinity": 10 * self.network.num_features, "prdc": protocol.neighbours + 1}
            kept = tuple(m for m in protocol.metrics if n >= enough.get(m, 2))
            protocol = dataclasses.replace(protocol, metrics=kept or ("fd",))
        return Quality(protocol.of_files(n), self.network, self.reference).to(self.device)

    @property
    def device(self) -> torch.device:
        """Where network and states are."""
        return next(iter(self.metrics.values())).device

    def to(self, device: torch.device) -> "Quality":
        """Move network and states to a device."""
        for part in (self.network, *self.metrics.values()):
            part.to(device)
        return self

    def add(self, images: Tensor, numbers: Tensor) -> None:
        """Add uint8 images (B, C, H, W), with their numbers 0..n-1, int64 (B,).

        On a GPU nothing waits for it if both are there.
        """
        found, numbers = self.network(images.to(self.device)), numbers.to(self.device)
        for name, metric in self.metrics.items():
            if name == "is":
                metric.update(found.logits, numbers)
            elif name == "pairs":
                metric.update(found.features, numbers)
            else:
                metric.update(found.spatial if name == "sfd" else found.features)

    def compute(self) -> dict[str, float]:
        """Synchronise over ranks and return the numbers by name; raises InputError where they are none."""
        out: dict[str, float] = {}
        for metric in self.metrics.values():
            if isinstance(metric, FeatureList):  # a rank without images has something to send all the same
                none = torch.empty(0, dtype=torch.int64, device=self.device)
                metric.update(torch.empty(0, self.network.num_features, device=self.device), none)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*was called before the ``update``.*")  # more ranks than images
            for name, metric in self.metrics.items():
                try:
                    value = metric.compute()
                except InputError:
                    if metric._is_synced:  # torchmetrics leaves it so
                        metric.unsync()
                    raise
                if name == "is":
                    out["is"], out["is_std"] = map(float, value)
                    if self.protocol.parts[0] == 1:
                        del out["is_std"]
                else:
                    out |= value if isinstance(value, dict) else {name: float(value)}
        if "fd" in out:
            out["fd_bias"] = self.bias
        return {named(k, self.protocol.features): v for k, v in out.items()}

    def reset(self) -> None:
        """Forget the generated images."""
        for metric in self.metrics.values():
            metric.reset()


def named(metric: str, features: str) -> str:
    """Name of a metric in these features: Inception's are the literature's."""
    if features == "inception":
        return metric.replace("fd", "fid")
    return f"{metric}_{features}"
