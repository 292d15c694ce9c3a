"""Train one network for 8 of the 1,000 noise levels, about a minute on one core, and draw 64 digits to digits.png.

python data/digits.py && python examples/train_and_sample.py
"""

import os

import lightning.pytorch as L
import torch

from lightning_tdisent import DPMSolver, ImageShards, LatentStates, ReducedStates, UNet, sample
from lightning_tdisent.evaluation.pictures import save_png
from lightning_tdisent.images import grid

steps = int(os.environ.get("STEPS", "1200"))
L.seed_everything(0)
network = UNet([1, 8, 8], channels=[16, 32], layers=1)
module = ReducedStates(network, LatentStates(S=8), lr=2e-3, decay="cosine")
trainer = L.Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(module, datamodule=ImageShards("data/digits", channels=1))
images = torch.cat(list(sample(module.denoiser, DPMSolver(), range(64))))
save_png(grid(images), "digits.png")
