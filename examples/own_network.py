"""Train a network of your own, keep it with its card, and load it again.

python examples/own_network.py
PYTHONPATH=examples tdisent sample runs/own_network --import own_network --out runs/own_network_images
"""

import os

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from lightning_tdisent import DPMSolver, ImageShards, LatentStates, Network, ReducedStates, load_model, sample
from lightning_tdisent.evaluation.pictures import save_png
from lightning_tdisent.images import grid
from lightning_tdisent.lit.callbacks.weights import EMA, Export

FOLDER = "runs/own_network"


class Pyramid(Network):
    """Convolutions at the full and at half the resolution; the time enters as a vector."""

    def __init__(
        self, shape: list[int], width: int = 48, classes: int | None = None, conditioning: str | None = None
    ) -> None:
        super().__init__(shape, classes, conditioning)  # keeps these three; the others are kept here
        self.width = width
        self.first = nn.Conv2d(shape[0], width, 3, padding=1)
        self.of_time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.down = nn.Sequential(nn.SiLU(), nn.Conv2d(width, width, 3, stride=2, padding=1))
        self.middle = nn.Sequential(nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.SiLU())
        self.up = nn.Upsample(scale_factor=2)
        self.last = nn.Sequential(nn.Conv2d(2 * width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, shape[0], 1))

    def forward(self, x: Tensor, time: Tensor | None = None, label: Tensor | None = None) -> Tensor:
        """Return the raw output (B, C, H, W) for states x of these times (B,)."""
        vector = self.of_time(self.times(x, time)[:, None].to(x.dtype) / 1000)[:, :, None, None]
        full = self.first(x) + vector
        return self.last(torch.cat([full, self.up(self.middle(self.down(full)))], 1))


def main() -> None:
    """Train, load, draw."""
    L.seed_everything(0)
    module = ReducedStates(Pyramid([1, 8, 8]), LatentStates(S=8), lr=2e-3)
    trainer = L.Trainer(
        max_steps=int(os.environ.get("STEPS", "1500")),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        callbacks=[EMA(0.99), Export()],  # the averaged weights, written to FOLDER/model.safetensors
        default_root_dir=FOLDER,
    )
    trainer.fit(module, datamodule=ImageShards("data/digits", channels=1))
    model = load_model(FOLDER)
    (card,) = model.cards
    print(f"{card.network['class_path']}: {card.steps} steps, rows {card.rows}")
    save_png(grid(torch.cat(list(sample(model, DPMSolver(), range(64))))), "own_network.png")


if __name__ == "__main__":
    # A file of weights names the class of its network. As a script this module is called __main__, which no other
    # program can import; imported, it has its own name.
    import own_network

    own_network.main()
