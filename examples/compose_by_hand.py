"""Train four experts, each alone and with one noise level, and compose their files to one sampler.

python examples/compose_by_hand.py

Each expert may be trained on another machine: what counts is its file, model.safetensors.
"""

import os
from pathlib import Path

import lightning.pytorch as L
import torch

from lightning_tdisent import DPMSolver, ImageShards, LatentStates, SingleState, UNet, compose, load_model, sample
from lightning_tdisent.evaluation.pictures import save_png
from lightning_tdisent.images import grid
from lightning_tdisent.lit.callbacks.weights import EMA, Export

FOLDER = Path("runs/by_hand")
STEPS = int(os.environ.get("STEPS", "400"))


def train(k: int) -> Path:
    """Train expert k of the four rows, and return its folder."""
    L.seed_everything(k)
    network = UNet([1, 8, 8], channels=[16, 32], layers=1)  # an expert of one row does not see the time
    module = SingleState(network, LatentStates(S=4), expert=k, lr=2e-3)
    trainer = L.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        callbacks=[EMA(0.99), Export()],
        default_root_dir=FOLDER / f"expert_{k}",
    )
    trainer.fit(module, datamodule=ImageShards("data/digits", channels=1))
    return FOLDER / f"expert_{k}"


folders = [train(k) for k in (1, 2, 3, 4)]
compose(folders, FOLDER / "composite")  # refuses experts that do not fit, or rows that nobody owns
model = load_model(FOLDER / "composite")
cards = model.cards
print(f"{len(cards)} experts, {sum(card.images_seen for card in cards):,} images seen by all of them")
save_png(grid(torch.cat(list(sample(model, DPMSolver(), range(64))))), "by_hand.png")
