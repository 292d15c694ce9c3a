"""Shards of real data sets, if present, against known facts about these data sets."""

import itertools

import pytest
import torch

from lightning_tdisent.data.decode import Decoder
from lightning_tdisent.data.shards import Shards, load
from lightning_tdisent.lit.datamodule import ImageShards

MNIST_TEST = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_mnist(prepared):
    data = load(prepared("mnist"), "test", 1)
    assert data.images.shape == (10_000, 1, 28, 28)
    assert data.labels.bincount().tolist() == MNIST_TEST
    x = data.images.double() / 255
    assert x.mean().item() == pytest.approx(0.1325, abs=5e-5)
    assert x.std().item() == pytest.approx(0.3105, abs=5e-5)


def test_cifar10(prepared):
    """Class counts; mean and deviation of the channels. (The shards are JPEG: the third digit is theirs.)"""
    data = load(prepared("cifar10"), "test", 3)
    assert data.images.shape == (10_000, 3, 32, 32)
    assert data.labels.bincount().tolist() == [1000] * 10
    x = data.images.double() / 255
    assert x.mean((0, 2, 3)).tolist() == pytest.approx([0.4942, 0.4851, 0.4504], abs=3e-3)
    assert x.std((0, 2, 3)).tolist() == pytest.approx([0.2467, 0.2429, 0.2616], abs=4e-3)


def test_gzipped_cifar10_is_streamed_whole_by_two_ranks_with_two_workers(prepared):
    """Both ranks read their part of the single shard: an epoch has every sample once."""
    folder = prepared("cifar10")
    seen = []
    for rank in range(2):
        data = ImageShards(str(folder), batch_size=1000, train="test", resident=False, workers=2, seed=0)
        data._rank_and_world = lambda rank=rank: (rank, 2)
        loader = data.train_dataloader()
        assert len(loader) == 5
        seen += [number for batch in itertools.islice(loader, 5) for number in batch["id"].tolist()]
        loader.close()
    assert sorted(seen) == list(range(10_000))


def test_imagenet_at_64(prepared):
    shards = Shards.open(prepared("imagenet-sample"), "train", Decoder(3, 64))
    data = shards.decoded()
    assert data.images.shape == (200, 3, 64, 64)
    assert len(data.labels.unique()) == 200
    assert torch.equal(shards.classes(), data.labels)
    x = data.images.double() / 255  # ImageNet's means: 0.485, 0.456, 0.406; 200 pictures are within 0.03
    assert x.mean((0, 2, 3)).tolist() == pytest.approx([0.485, 0.456, 0.406], abs=0.04)
