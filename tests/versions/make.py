"""Write the small files of every kind that `test_versions.py` reads for ever: `python tests/versions/make.py 0.1.0`.

Run with the version that is to be released, from the root of the repository, into a new folder named after it. Folders
of earlier versions are never made again.
"""

import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
import yaml
from PIL import Image

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NETWORK = {
    "class_path": "UNet",
    "init_args": {"shape": [1, 8, 8], "channels": [4], "layers": 1, "groups": 2, "mid_attention": False},
}
TRAINER = {"max_steps": 2, "max_epochs": -1, "val_check_interval": 2, "check_val_every_n_epoch": None,
           "num_sanity_val_steps": 0, "log_every_n_steps": 2, "limit_val_batches": 1, "accelerator": "cpu",
           "callbacks": []}  # fmt: skip


def config(cls: str, **model: object) -> dict[str, object]:
    """Return the config of a training of two steps."""
    words = {"network": NETWORK, "states": {"S": 4}, "lr": 0.01, "warmup": 2, **model}
    data = {"class_path": "ImageShards", "init_args": {"path": "data/digits", "channels": 1, "batch_size": 8}}
    return {"seed_everything": 3, "trainer": TRAINER, "model": {"class_path": cls, "init_args": words}, "data": data}


def make(out: Path, work: Path) -> None:
    """Write all files below a folder; work: a folder for what is not kept."""
    from lightning_tdisent.cli import main
    from lightning_tdisent.data.scan import build
    from lightning_tdisent.diffusion.operators import Inpainting
    from lightning_tdisent.evaluation.measured import Measured
    from lightning_tdisent.evaluation.observations import Observations
    from lightning_tdisent.fleet import lease
    from lightning_tdisent.fleet.plan import Fleet
    from lightning_tdisent.fleet.state import FleetWork
    from lightning_tdisent.fleet.store import Store
    from lightning_tdisent.metrics import reference
    from lightning_tdisent.metrics.distances import Moments
    from lightning_tdisent.metrics.protocol import Protocol
    from lightning_tdisent.studies.plan import plan

    def run(*words: object) -> None:
        if code := main([str(word) for word in words]):
            raise SystemExit(f"{words}: {code}")

    os.environ["TDISENT_CACHE"] = str(work / "cache")
    (work / "one.yaml").write_text(yaml.safe_dump(config("ReducedStates")), encoding="utf-8")
    (work / "expert.yaml").write_text(yaml.safe_dump(config("SingleState", experts=2)), encoding="utf-8")
    run("fit", "--config", work / "one.yaml", "--run", out / "run")
    for k in (1, 2):
        run("fit", "--config", work / "expert.yaml", "--model.expert", k, "--run", work / f"expert{k}")
    run("compose", work / "expert1", work / "expert2", "--out", out / "composite")
    run("prior", out / "run", "--at", 2, "--prior.rank", 2, "--out", out / "prior", "--data", "data/digits", "-n", 64)
    (out / "yaml").mkdir()
    shutil.copy(work / "expert.yaml", out / "yaml" / "expert.yaml")
    (out / "yaml" / "fleet.yaml").write_text(
        json.dumps({"configs": ["expert.yaml"], "budget": 4 * 32, "seed": 3}), encoding="utf-8"
    )
    run("fleet", "plan", "--config", out / "yaml" / "fleet.yaml", "--out", out / "fleet")
    fleet = Fleet.load(out / "fleet")
    todo = FleetWork(fleet, lambda words: None)  # type: ignore[arg-type, return-value]
    begun = fleet.begun(fleet.experts[0].name)
    write = getattr(__import__("lightning_tdisent.fleet.store", fromlist=["dump_json"]), "dump_json", None)
    content = write(begun) if write else json.dumps(begun).encode()
    todo.store.create(f"begun/{fleet.experts[0].name}.json", content)
    taken = lease.take(Store(out / "fleet"), fleet.experts[0].name, lease.Watch())
    assert taken is not None
    taken.release()
    study = {"runs": {"one": {"configs": ["one.yaml"]}}, "contenders": {"one": {"run": "one"}}, "data": "data/digits",
             "protocol": "digits"}  # fmt: skip
    shutil.copy(work / "one.yaml", out / "yaml" / "one.yaml")
    (out / "yaml" / "study.yaml").write_text(json.dumps(study), encoding="utf-8")
    plan(out / "yaml" / "study.yaml", out / "study").claim()
    source = (out / "run").relative_to(ROOT)
    words = ("--protocol", "digits", "-n", 8, "--held-out", 4, "--out", out / "results")
    run("evaluate", source, "--data", "data/digits", *words)
    shutil.rmtree(out / "results" / "measured")
    Measured(out / "measured").put(
        {"model": "one"}, {"name": "one", "fd": 1.5}, torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    )
    moments = Moments(4, torch.ones(2), torch.eye(2))
    statistics = reference.Reference("key", moments, torch.ones(3, 2))
    reference._write(out / "reference.safetensors", statistics, Protocol.preset("digits"))
    with tarfile.open(out / "train-0000.tar", "w") as tar:
        for k in range(3):
            picture = io.BytesIO()
            Image.new("L", (8, 8), 40 * k).save(picture, "png")
            entry = tarfile.TarInfo(f"{k}.png")
            entry.size = len(picture.getvalue())
            tar.addfile(entry, io.BytesIO(picture.getvalue()))
    build([str(out / "train-0000.tar")]).save(out / "train.index.safetensors")
    images = torch.arange(128, dtype=torch.uint8).view(2, 1, 8, 8)
    Observations.of(Inpainting(), images, torch.arange(2)).save(out / "observations.safetensors")
    for litter in [*out.glob("run/events*"), *out.glob("run/metrics.jsonl"), *out.rglob(".lock"), *out.rglob("*.html")]:
        litter.unlink()
    for file in [*out.rglob("*.json"), *out.rglob("*.yaml")]:  # nothing of the machine
        text = file.read_text(encoding="utf-8").replace(f"{ROOT}/", "").replace(lease.me()["host"], "machine")
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        make((HERE / sys.argv[1]).resolve(), Path(work))
