import json
from pathlib import Path

import pytest
import yaml

from lightning_tdisent.cli import describe
from lightning_tdisent.fleet.draft import draft

TRAINER = {"max_steps": 4, "max_epochs": -1, "val_check_interval": 2, "check_val_every_n_epoch": None,
           "num_sanity_val_steps": 0, "log_every_n_steps": 2, "limit_val_batches": 1, "accelerator": "cpu"}  # fmt: skip
NETWORK = {
    "class_path": "UNet",
    "init_args": {"shape": [1, 8, 8], "channels": [8, 16], "layers": 1, "groups": 4, "mid_attention": False},
}


@pytest.fixture
def configs(tmp_path, digits):
    """Write the configs of an expert and of a shared model (4 rows, a few steps); return their folder."""
    folder = tmp_path / "yaml"
    folder.mkdir()
    for name, cls in (("expert", "SingleState"), ("shared", "ReducedStates")):
        model = {"class_path": cls, "init_args": {"network": NETWORK, "states": {"S": 4}, "lr": 0.01, "warmup": 2}}
        data = {"class_path": "ImageShards", "init_args": {"path": str(digits), "channels": 1, "batch_size": 8}}
        content = {"seed_everything": 3, "trainer": TRAINER, "model": model, "data": data}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder


@pytest.fixture
def planned(configs, tmp_path):
    """Return a function that plans a fleet with the given settings of the YAML file, in a new folder."""

    def make(out: object = None, **settings: object):
        content = {"configs": ["expert.yaml"], "budget": 4 * 32, "seed": 3, **settings}
        file = configs / "fleet.yaml"
        file.write_text(json.dumps(content), encoding="utf-8")
        return draft(file, describe, out or tmp_path / f"fleet{len(list(tmp_path.glob('fleet*')))}")

    return make


@pytest.fixture
def same_weights():
    """Return a function that asserts that two run folders have bitwise equal weights."""
    import torch
    from safetensors.torch import load_file

    def check(one: Path, other: Path) -> None:
        a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)

    return check
