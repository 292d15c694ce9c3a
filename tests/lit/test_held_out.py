"""Held-out images that are also training images, and images whose range of values is not declared."""

import gzip
import io

import lightning.pytorch as L
import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from lightning_tdisent.data.index import path_of
from lightning_tdisent.data.scan import build
from lightning_tdisent.data.tars import find
from lightning_tdisent.errors import InputError
from lightning_tdisent.lit.datamodule import ImageShards
from lightning_tdisent.lit.inference import clean


def png(seed):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), np.uint8)).save(out, "png")
    return out.getvalue()


def split(folder, name, seeds, prefix="", index=True, regions=True):
    """Write a split with the images of these seeds; keys are a prefix and a number from 0."""
    with wds.TarWriter(str(folder / f"{name}-0000.tar"), mtime=0) as shard:
        for k, seed in enumerate(seeds):
            shard.write({"__key__": f"{prefix}{k:04d}", "png": png(seed), "cls": b"0"})
    if index:
        build(find(folder, name), regions=regions).save(path_of(folder, name))


def fit(folder, **options):
    data = ImageShards(str(folder), 1, batch_size=8, **options)
    data.setup("fit")


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize(("prefix", "order"), [("", 1), ("other", -1)])
def test_test_images_that_are_training_images_are_refused(prefix, order, index, tmp_path):
    """Duplicates are found for any keys and any order."""
    split(tmp_path, "train", range(40), index=index)
    split(tmp_path, "test", range(20)[::order], prefix, index=index)
    message = r"data.train train, data.val test: 20 of 20 held-out samples of .* are among the 40 training samples"
    with pytest.raises(InputError, match=message):
        fit(tmp_path)


def test_a_shard_that_is_in_both_is_refused_where_no_samples_are_listed(tmp_path):
    split(tmp_path, "train", range(40), regions=False)
    (tmp_path / "test-0000.tar").write_bytes((tmp_path / "train-0000.tar").read_bytes())
    build(find(tmp_path, "test"), regions=False).save(path_of(tmp_path, "test"))
    with pytest.raises(InputError, match="40 of 40 held-out samples"):
        fit(tmp_path)


def test_shards_that_name_no_split_are_no_held_out_ones(tmp_path):
    split(tmp_path, "00000", range(20), index=False)
    with pytest.raises(InputError, match=r"20 of 20 held-out samples.*Choose other splits, or select their shards"):
        fit(tmp_path)


@pytest.mark.parametrize(("shared", "refused"), [(0, False), (1, False), (2, False), (3, True)])
def test_up_to_one_percent_may_be_duplicates_and_are_counted(shared, refused, tmp_path, capsys):
    split(tmp_path, "train", range(300))
    split(tmp_path, "test", range(300 - shared, 500 - shared))
    if refused:
        with pytest.raises(InputError, match="3 of 200 held-out samples"):
            fit(tmp_path)
    else:
        fit(tmp_path)
        said = capsys.readouterr().err
        assert (f"note: data.train train, data.val test: {shared} of 200" in said) == bool(shared)


def test_gzipped_copies_are_found_too(tmp_path):
    split(tmp_path, "train", range(20))
    (tmp_path / "test-0.tar.gz").write_bytes(gzip.compress((tmp_path / "train-0000.tar").read_bytes()))
    with pytest.raises(InputError, match="20 of 20 held-out samples"):
        fit(tmp_path)


def test_fit_refuses_before_it_trains_and_overfitting_may_look_at_what_it_learns(make, data, trainer):
    module, same = make(), data(train="test", val="test")
    with pytest.raises(InputError, match="297 of 297 held-out samples"):
        trainer(2).fit(module, datamodule=same)
    run = trainer(2, overfit_batches=1)
    run.fit(module, datamodule=data(train="test", val="test"))
    assert run.global_step == 2


# Ranges of values

IMAGE = torch.randint(256, (4, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
IMAGE[0, 0, 0, :2] = torch.tensor([0, 255])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"image": IMAGE / 255}, r"'image' is torch.float32 from 0 to 1; expected uint8.*'x0' instead"),
        ({"image": IMAGE / 127.5 - 1}, r"from -1 to 1"),
        ({"image": IMAGE.float()}, r"from 0 to 255"),
        ({"image": IMAGE.long()}, r"torch.int64 from 0 to 255"),
        ({"image": (IMAGE / 255).half()}, r"torch.float16"),
        ({"x0": IMAGE}, r"'x0' is torch.uint8 from 0 to 255; expected floats in \[-1, 1\]"),
        ({"x0": IMAGE.float()}, r"'x0' is torch.float32 from 0 to 255"),
    ],
)
def test_images_of_an_undeclared_range_are_refused(batch, message):
    with pytest.raises(InputError, match=message):
        clean(batch)


def test_uint8_images_and_floats_by_their_own_name_are_the_same_x0():
    x0 = IMAGE.float() / 127.5 - 1
    assert torch.equal(clean({"image": IMAGE}), x0)
    assert torch.equal(clean({"x0": x0}), x0)
    assert clean({"x0": x0.double()}).dtype == torch.float32


class Plain(Dataset):
    def __init__(self, name, images):
        self.name, self.images = name, images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return {self.name: self.images[i], "label": torch.tensor(0), "id": torch.tensor(i)}


def test_a_plain_loader_of_floats_must_declare_their_range(make, trainer):
    def losses(name, images):
        L.seed_everything(0, verbose=False)
        module, run, loader = make(), trainer(1), DataLoader(Plain(name, images), batch_size=4)
        run.fit(module, loader, loader)
        return float(run.callback_metrics["val/x0_mse"])

    assert losses("x0", IMAGE / 127.5 - 1) == losses("image", IMAGE)
    with pytest.raises(InputError, match=r"'image' is torch.float32"):
        losses("image", IMAGE / 255)
