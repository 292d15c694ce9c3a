"""The data module in training: latents, damaged samples, different numbers of ranks and workers."""

import io
import itertools
import os

import lightning.pytorch as L
import numpy as np
import pytest
import torch
import webdataset as wds
from fsspec import AbstractFileSystem, register_implementation
from watching import Memory, Watch

from lightning_tdisent.data.index import Index, path_of
from lightning_tdisent.data.scan import build
from lightning_tdisent.data.tars import find
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError
from lightning_tdisent.lit.callbacks.guard import Guard
from lightning_tdisent.lit.callbacks.pictures import Pictures
from lightning_tdisent.lit.datamodule import ImageShards
from lightning_tdisent.lit.inference import clean
from lightning_tdisent.lit.modules import ReducedStates
from lightning_tdisent.models.expert import load_expert
from lightning_tdisent.sampling.sample import sample
from lightning_tdisent.sampling.sampler import DDIM


def indexed(source, folder, damaged=()):
    """Copy the digits, index them, then flip one bit in the content of the ``damaged`` training samples."""
    for split in ("train", "test"):
        content = bytearray((source / f"{split}-0000.tar").read_bytes())
        (folder / f"{split}-0000.tar").write_bytes(content)
        build(find(folder, split)).save(path_of(folder, split))
        if split == "train":
            regions = Index.load(path_of(folder, split)).regions
            for number in damaged:
                content[int(regions.begin[number]) + 700] ^= 4
            (folder / f"{split}-0000.tar").write_bytes(content)
    return folder


@pytest.fixture
def latents(tmp_path):
    """Write 40 latents of 4 x 8 x 8: entry 0 has mean i and deviation 0.5, entry 1 (the flip) -i and 0.25.

    The test split has different means.
    """
    for split, n in (("train", 40), ("test", 10)):
        with wds.TarWriter(str(tmp_path / f"{split}-0000.tar"), mtime=0) as shard:
            for i in range(n):
                array, mean = np.empty((2, 2, 4, 8, 8), np.float16), i if split == "train" else i + 0.5
                array[0, 0], array[0, 1], array[1, 0], array[1, 1] = mean, 0.5, -mean, 0.25
                content = io.BytesIO()
                np.save(content, array)
                shard.write({"__key__": f"{i:04d}", "latent.npy": content.getvalue(), "cls": str(i % 3).encode()})
    return tmp_path


@pytest.mark.parametrize("resident", [True, False])
def test_a_latent_is_sampled_from_its_mean_and_deviation(latents, resident):
    data = ImageShards(str(latents), batch_size=40, resident=resident, flip=True, seed=0)
    assert data.image_shape == [4, 8, 8]
    (batch,) = data.train_dataloader()
    assert batch["latent"].shape == (40, 2, 4, 8, 8)
    flipped = batch["latent"][:, 1, 0, 0, 0] == 0.25
    assert 8 < int(flipped.sum()) < 32
    sign = torch.where(flipped, -1.0, 1.0)
    mean = batch["id"] * sign
    assert torch.equal(clean(batch), mean[:, None, None, None].expand(40, 4, 8, 8))
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([clean(batch, generator) for _ in range(50)])
    assert torch.allclose(draws.mean((0, 2, 3, 4)), mean, atol=0.05)
    deviation = torch.where(flipped, 0.25, 0.5)
    assert torch.allclose(draws.transpose(0, 1).flatten(1).std(1), deviation, rtol=0.05)


def test_a_model_of_latents_is_trained_and_refuses_to_make_images(latents, trainer, tiny, tmp_path):
    run = trainer(12, Pictures())
    module = ReducedStates(tiny(shape=[4, 8, 8]), LatentStates(S=4))
    run.fit(module, datamodule=ImageShards(str(latents), batch_size=20))
    assert run.callback_metrics["val/x0_mse"].isfinite()
    assert not (tmp_path / "pictures").exists()
    denoiser, _ = load_expert(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"makes latents of \[4, 8, 8\], not images"):
        list(sample(denoiser, DDIM(), range(2)))
    assert DDIM(clip=None)(denoiser, range(2)).shape == (2, 4, 8, 8)


def fit(folder, module, steps, *callbacks, logger=False, **options):
    L.seed_everything(0, verbose=False)
    run = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        callbacks=[*callbacks],
        logger=logger,
        log_every_n_steps=5,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    data = ImageShards(str(folder), channels=1, batch_size=100, **options)
    run.fit(module, datamodule=data)
    return data


@pytest.fixture
def module(tiny):
    torch.manual_seed(0)
    return ReducedStates(tiny(), LatentStates(S=4))


@pytest.mark.parametrize("options", [{"access": "random"}, {"access": "sequential"}, {"workers": 2}])
def test_samples_with_a_flipped_bit_are_skipped_named_and_counted(digits, tmp_path, module, capfd, options):
    damaged = [3, 700, 1499]
    memory, watch = Memory(), Watch()
    folder = indexed(digits, tmp_path, damaged)
    data = fit(
        folder, module, 30, Guard(), watch, logger=memory,
        resident=False, on_bad_shard="skip", bad_ceiling=0.002, **options,
    )  # fmt: skip
    assert data.lost == 3
    seen = [number for batch in watch.ids for number in batch]
    assert not set(damaged) & set(seen)
    assert len(seen) == 3000
    assert len(set(seen)) == 1497
    counts = [values["train/skipped_samples"] for values in memory.values.values() if "train/skipped_samples" in values]
    assert counts == sorted(set(counts))
    assert counts[-1] == 3
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("skipped")]
    index = Index.load(path_of(tmp_path, "train"))
    assert sorted(lines) == sorted(
        f"skipped: {tmp_path}/{index.name(number)} has changed since the index was made: another CRC-32"
        for number in damaged
    )


def test_more_bad_samples_than_the_ceiling_stop_the_run(digits, tmp_path, module):
    folder = indexed(digits, tmp_path, [3, 700])
    with pytest.raises(InputError, match=r"2 of 1,500 samples cannot be used, more than data.bad_ceiling 0.001 allows"):
        fit(folder, module, 15, resident=False, on_bad_shard="skip")


@pytest.mark.parametrize("resident", [True, False])
def test_a_flipped_bit_stops_the_run_and_is_named(digits, tmp_path, module, resident):
    folder = indexed(digits, tmp_path, [700])
    with pytest.raises(InputError, match=r"train-0000.tar: sample \d+ \(bytes \d+ to \d+\) has changed since"):
        fit(folder, module, 15, resident=resident)


def test_in_memory_bad_samples_are_left_out(digits, tmp_path, module):
    folder = indexed(digits, tmp_path, [700])
    data = fit(folder, module, 1, on_bad_shard="skip")
    assert len(data.training) == 1499
    assert data.lost == 1


def test_without_verification_the_bytes_are_taken_as_they_are(digits, tmp_path, module):
    """Flip a bit in the padding, which only the comparison with the index detects."""
    folder = indexed(digits, tmp_path)
    regions = Index.load(path_of(folder, "train")).regions
    content = bytearray((folder / "train-0000.tar").read_bytes())
    content[int(regions.begin[8]) - 1] ^= 1
    (folder / "train-0000.tar").write_bytes(content)
    assert len(fit(folder, module, 1, verify=False).training) == 1500
    with pytest.raises(InputError, match="another CRC-32"):
        fit(folder, module, 1)


def test_single_reads_by_workers_train_as_from_memory(digits, tmp_path, tiny):
    folder, ends = indexed(digits, tmp_path), []
    for options in ({}, {"resident": "device"}, {"resident": False}, {"resident": False, "workers": 2}):
        torch.manual_seed(0)
        module = ReducedStates(tiny(), LatentStates(S=4))
        fit(folder, module, 20, flip=True, **options)
        ends.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert all(torch.equal(ends[0], end) for end in ends)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 0}, "data.size: at least 1, got 0"),
        ({"buffer": 0}, "data.buffer: at least 1, got 0"),
        ({"on_bad_shard": "ignore"}, "data.on_bad_shard: stop or skip, got ignore"),
        ({"bad_ceiling": 2}, "data.bad_ceiling: a share of the samples, 0 to 1, got 2"),
        ({"workers": -1}, "data.workers: at least 0, got -1"),
        ({"val_limit": 0}, "data.val_limit: at least 1, got 0"),
        ({"access": "bogus"}, "data.access: expected auto, random or sequential, got bogus"),
        ({"resident": "devise"}, "data.resident: expected true, false or device, got devise"),
    ],
)
def test_invalid_options_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        ImageShards("data/digits", **options)


def test_more_workers_than_images_in_a_batch(digits, tmp_path):
    folder = indexed(digits, tmp_path)
    for access in ("random", "sequential"):
        data = ImageShards(str(folder), 1, batch_size=1, resident=False, access=access, workers=2, seed=0)
        loader = data.train_dataloader()
        ids = [int(batch["id"]) for batch in itertools.islice(loader, 8)]
        loader.close()
        assert len(set(ids)) == 8


class Early(L.Callback):
    """Ask for training images in the setup of callbacks, as `SampleQuality` may."""

    def setup(self, trainer, pl_module, stage):
        trainer.datamodule.images("train", 10)


@pytest.mark.parametrize(("resident", "callbacks"), [(True, []), (True, [Early()]), (False, []), (False, [Early()])])
def test_classes_that_the_network_does_not_know_are_refused(digits, tmp_path, tiny, resident, callbacks):
    folder = indexed(digits, tmp_path)
    module = ReducedStates(tiny(classes=9), LatentStates(S=4))
    module.setup = lambda stage: None  # skip the check of the held-out images
    with pytest.raises(InputError, match=r"train-0000.tar: sample .* has the class 9 .*, the network knows 9"):
        fit(folder, module, 15, *callbacks, resident=resident)


@pytest.mark.parametrize("resident", [True, False])
def test_classes_that_no_training_image_has_are_named(digits, tmp_path, tiny, resident, capsys):
    folder = indexed(digits, tmp_path)
    for classes in (10, 12):
        fit(folder, ReducedStates(tiny(classes=classes), LatentStates(S=4)), 15, resident=resident)
        said = f"note: model.network.classes is {classes}, but the 1,500 training images of {folder} have none of"
        assert (f"{said} the classes 10, 11;" in capsys.readouterr().err) == (classes == 12)


def test_a_second_network_that_knows_fewer_classes_refuses_what_the_first_one_took(digits, tmp_path, tiny):
    data = ImageShards(str(indexed(digits, tmp_path)), channels=1, batch_size=100)
    run = {"logger": False, "limit_val_batches": 0, "enable_checkpointing": False, "enable_progress_bar": False}
    for classes in (10, 9):
        module = ReducedStates(tiny(classes=classes), LatentStates(S=4))
        module.setup = lambda stage: None
        trainer = L.Trainer(max_steps=1, accelerator="cpu", enable_model_summary=False, **run)
        if classes == 10:
            trainer.fit(module, datamodule=data)
        else:
            with pytest.raises(InputError, match=r"has the class 9 .*, the network knows 9"):
                trainer.fit(module, datamodule=data)


def test_in_memory_the_ids_are_positions_in_the_split_also_where_some_are_left_out(digits, tmp_path):
    folder = indexed(digits, tmp_path, [10])
    whole = ImageShards(str(digits), 1, seed=0).training
    data = ImageShards(str(folder), 1, batch_size=1499, on_bad_shard="skip", seed=0)
    (batch,) = data.train_dataloader()
    assert sorted(batch["id"].tolist()) == [n for n in range(1500) if n != 10]
    assert torch.equal(batch["image"], whole.images[batch["id"]])
    assert torch.equal(batch["label"], whole.labels[batch["id"]])


def test_a_run_resumes_in_the_same_order_or_is_refused(digits, tmp_path):
    folder = indexed(digits, tmp_path)

    def loader(**options):
        return ImageShards(str(folder), 1, batch_size=100, seed=0, **options).train_dataloader()

    state = loader().state_dict()
    loader(resident=False).load_state_dict(state)  # random reads have the same order
    for options in ({"access": "sequential", "resident": False}, {"train": "test"}):
        with pytest.raises(InputError, match=r"data: the checkpoint was trained with the image order .*, this run has"):
            loader(**options).load_state_dict(state)
    with pytest.raises(InputError, match=r"data.batch_size: .* 100 images .* this run has 50"):
        ImageShards(str(folder), 1, batch_size=50, seed=0).train_dataloader().load_state_dict(state)
    loader().load_state_dict({"batches": 3, "images": 100})  # as in checkpoints of older versions


def test_what_does_not_fit_in_memory_is_refused(digits, monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 20}.get)
    with pytest.raises(InputError, match=r"data.resident: 1,500 images of \[1, 8, 8\] need .* set data.resident false"):
        ImageShards(str(digits), 1, seed=0).train_dataloader()


class Failing(AbstractFileSystem):
    """An object store whose client raises its own error classes."""

    protocol = "failing"

    class ClientError(Exception):
        def __init__(self, code, what):
            super().__init__(f"An error occurred ({code}) when calling {what}")

    def _open(self, path, mode="rb", **_):
        raise self.ClientError("SlowDown", "GetObject")

    def ls(self, path, detail=True, **_):
        raise self.ClientError("AccessDenied", "ListObjects")

    def cat_file(self, path, start=None, end=None, **_):
        raise self.ClientError("SlowDown", "GetObject")


def test_a_failing_object_store_is_a_one_line_error(digits, tmp_path, monkeypatch):
    register_implementation("failing", Failing, clobber=True)
    with pytest.raises(InputError, match=r"failing://set cannot be read: .*AccessDenied"):
        ImageShards("failing://set", 1, seed=0).train_dataloader()
    monkeypatch.setattr(Failing, "ls", lambda *_, **__: ["/set/train-0000.tar"])
    with pytest.raises(InputError, match=r"train.index.safetensors cannot be read: ClientError: .*SlowDown"):
        ImageShards("failing://set", 1, seed=0).train_dataloader()
    index = Index.load(path_of(indexed(digits, tmp_path), "train"))
    monkeypatch.setattr(Index, "load", lambda *_: index)
    for access in ("random", "sequential"):
        data = ImageShards("failing://set", 1, resident=False, access=access, seed=0)
        with pytest.raises(InputError, match=r"train-0000.tar: sample .* cannot be read: ClientError: .*SlowDown"):
            next(iter(data.train_dataloader()))
