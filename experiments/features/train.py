"""Train a feature network as it is shipped with the package: digits 20 seconds, mnist 3 minutes on one core.

python experiments/features/train.py {digits,mnist} DATA_FOLDER [OUT.safetensors]
"""

import sys
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from lightning_tdisent.metrics.features import SHIPPED, SmallClassifier, save_features
from lightning_tdisent.streaming.shards import load


def train(name: str, folder: Path, out: Path, seed: int = 0, steps: int = 3000) -> float:
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    data, test = (load(folder, split, 1) for split in ("train", "test"))
    network = SmallClassifier(list(data.images.shape[1:]))
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    generator = torch.Generator().manual_seed(seed)
    reach = data.images.shape[-1] // 8
    for _ in range(steps):
        chosen = torch.randint(len(data), (64,), generator=generator)
        shift = tuple(torch.randint(-reach, reach + 1, (2,), generator=generator).tolist())
        images = torch.roll(data.images[chosen], shift, (2, 3))
        loss = cross_entropy(network.logits(images), data.labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        accuracy = (network.eval().logits(test.images).argmax(1) == test.labels).double().mean().item()
    out.parent.mkdir(parents=True, exist_ok=True)
    save_features(out, network)
    print(f"{name}: test accuracy {accuracy:.4f} on {len(test)} images; {out} has {out.stat().st_size} bytes")
    return accuracy


if __name__ == "__main__":
    which = sys.argv[1]
    train(which, Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else SHIPPED / f"{which}.safetensors")
