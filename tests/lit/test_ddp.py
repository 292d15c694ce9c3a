"""Two real processes on gloo: what must not depend on the number of ranks, and what must differ between ranks."""

from datetime import timedelta

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_tdisent.diffusion.rng import key, seed_noise
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.lit.callbacks.quality import SampleQuality
from lightning_tdisent.lit.datamodule import Seeds
from lightning_tdisent.lit.modules import ReducedStates


class Write(L.Callback):
    """Save what each rank saw to a separate file."""

    def __init__(self, folder):
        self.folder, self.images, self.rows, self.losses = folder, [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.images.append(batch["image"].clone())
        self.rows.append(outputs["row"].clone())
        self.losses.append(outputs["losses"].clone())

    def on_train_end(self, trainer, pl_module):
        seen = {"images": torch.stack(self.images), "rows": torch.stack(self.rows), "losses": torch.stack(self.losses)}
        metrics = {k: v.double() for k, v in trainer.callback_metrics.items()}
        torch.save(seen | {"metrics": metrics}, self.folder / f"{trainer.world_size}_{trainer.global_rank}.pt")


def strategy(ranks):
    if ranks == 1:
        return "auto"
    return DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60))


@pytest.fixture
def fit(tiny, data, trainer, tmp_path):
    def run(ranks):
        torch.manual_seed(0)
        module = ReducedStates(tiny(), LatentStates(S=4), lr=1e-30)  # weights do not change, so metrics can be equal
        callbacks = [Write(tmp_path), SampleQuality("digits", 31)]
        options = {"devices": ranks, "strategy": strategy(ranks)}
        trainer(3, *callbacks, **options).fit(module, datamodule=data(batch_size=32 // ranks, seed=3))
        return [torch.load(tmp_path / f"{ranks}_{r}.pt", weights_only=True) for r in range(ranks)]

    return run


def test_two_ranks_share_data_and_metrics_and_not_their_noise(fit):
    (one,), (first, second) = fit(1), fit(2)
    # the global batch has the same images in the same order
    assert torch.equal(torch.cat([first["images"], second["images"]], 1), one["images"])
    assert not torch.equal(first["losses"], second["losses"])
    # metrics: exact sums over all ranks, equal to the single process, the same on every rank
    assert len([k for k in one["metrics"] if k.startswith("quality/fd_digits/")]) == 1
    for name, value in one["metrics"].items():
        torch.testing.assert_close(first["metrics"][name], value, rtol=2e-7 if "quality" in name else 2e-5, atol=1e-7)


def test_the_noise_of_equal_images_differs_between_ranks(tiny, tmp_path, data, trainer):
    class Noisy(ReducedStates):
        def on_train_batch_start(self, batch, batch_idx):
            super().on_train_batch_start(batch, batch_idx)
            noise = torch.randn(8, generator=self.generator.clone_state())
            torch.save(noise, tmp_path / f"noise_{self.trainer.global_rank}.pt")

    module = Noisy(tiny(), LatentStates(S=4))
    trainer(1, devices=2, strategy=strategy(2)).fit(module, datamodule=data(batch_size=16))
    a, b = (torch.load(tmp_path / f"noise_{r}.pt", weights_only=True) for r in (0, 1))
    assert not torch.equal(a, b)


def test_ranks_that_draw_the_same_noise_are_refused(tiny, data, trainer, monkeypatch):
    monkeypatch.setattr("lightning_tdisent.lit.modules.key", lambda seed, rank, step: key(seed, 0, step))
    module = ReducedStates(tiny(), LatentStates(S=4))
    with pytest.raises(Exception, match=r"ranks \[0, 1\] draw the same training noise"):
        trainer(1, devices=2, strategy=strategy(2)).fit(module, datamodule=data(batch_size=16))


class Keep(L.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        for seed, image in zip(batch, outputs, strict=True):
            torch.save(image.clone(), self.folder / f"{trainer.world_size}_{seed}.pt")


def test_images_do_not_depend_on_ranks_or_batches(tiny, tmp_path):
    torch.manual_seed(0)
    module = ReducedStates(tiny(), LatentStates(S=4))
    for ranks, batch in ((1, 7), (2, 2)):
        trainer = L.Trainer(
            accelerator="cpu",
            devices=ranks,
            strategy=strategy(ranks),
            logger=False,
            enable_progress_bar=False,
            callbacks=[Keep(tmp_path)],
            default_root_dir=tmp_path,
        )
        trainer.predict(module, datamodule=Seeds(7, 3, batch), return_predictions=False)
    for seed in range(3, 10):
        a, b = (torch.load(tmp_path / f"{ranks}_{seed}.pt", weights_only=True) for ranks in (1, 2))
        assert torch.equal(a, b)
    assert torch.equal(seed_noise([5], 4, [1, 8, 8])[0], seed_noise(range(3, 10), 4, [1, 8, 8])[2])
