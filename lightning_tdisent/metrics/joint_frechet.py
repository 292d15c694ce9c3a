"""Frechet distance between pairs of images and observations."""

import torch
from torch import Tensor

from lightning_tdisent.images import to_uint8
from lightning_tdisent.metrics.metric import Column, Metric
from lightning_tdisent.metrics.network import FeatureNetwork


class JointFrechetDistance(Metric):
    """Frechet distance between [f(y), f(x)] of all draws and [f(y), f(x_0)] of real pairs.

    f sees y as uint8, with the channels of x: repeated, or their mean.
    """

    name = "jfd"
    needs = "pairs"
    asked_by = "computed for every conditional model"
    columns = (Column("jfd", "joint Frechet distance of image and observation", "lower", inception="jfid"),)

    @staticmethod
    def features(network: FeatureNetwork, images: Tensor, observations: Tensor) -> Tensor:
        """Return [f(y), f(x)] (B, 2 d) of uint8 images (B, C, H, W) and observations (B, C', H, W) in [-1, 1]."""
        y = observations.double()
        if y.shape[1] != images.shape[1]:
            y = y.mean(1, keepdim=True).expand(-1, images.shape[1], -1, -1)
        return torch.cat([network(to_uint8(y)).features, network(images).features], 1)
