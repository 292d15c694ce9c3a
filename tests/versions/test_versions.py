"""Files that released versions wrote are read for ever, those of a newer version are refused by name.

`make.py` wrote them, one folder for each version. They are copied first: nothing may change them.
"""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_tdisent.cli import main
from lightning_tdisent.data.decode import Decoder
from lightning_tdisent.data.held_out import refuse_shared
from lightning_tdisent.data.index import Index
from lightning_tdisent.data.shards import Shards
from lightning_tdisent.diffusion.schedules import Linear
from lightning_tdisent.errors import InputError
from lightning_tdisent.evaluation.measured import Measured
from lightning_tdisent.evaluation.observations import Observations
from lightning_tdisent.fleet import lease
from lightning_tdisent.fleet.mirror import step_of
from lightning_tdisent.fleet.plan import Fleet
from lightning_tdisent.fleet.store import Store, read_json
from lightning_tdisent.fleet.work import failures
from lightning_tdisent.lit.resume import find_checkpoint
from lightning_tdisent.metrics import reference
from lightning_tdisent.metrics.features import load_classifier, save_classifier
from lightning_tdisent.models.card import read_card
from lightning_tdisent.models.checkpoint import check_of
from lightning_tdisent.models.compose import load_model
from lightning_tdisent.models.expert import load_expert
from lightning_tdisent.models.prior_files import load_prior
from lightning_tdisent.schemas import check_schema
from lightning_tdisent.studies.claim import kept
from lightning_tdisent.studies.plan import plan
from lightning_tdisent.studies.results import Study

RELEASES = sorted(path for path in Path(__file__).parent.iterdir() if (path / "run").is_dir())


@pytest.fixture(params=RELEASES, ids=lambda path: path.name)
def old(request, tmp_path):
    """A copy of the files of a release."""
    return Path(shutil.copytree(request.param, tmp_path / "old"))


def test_weights_and_checkpoints_are_read(old):
    one, card = load_expert(old / "run" / "model.safetensors")
    assert (card.rows, card.steps, one.states.S) == ([1, 2, 3, 4], 2, 4)
    assert one.states.fingerprint == "a86f58a881a4ba2d"
    path, manifest, bad = find_checkpoint(old / "run")
    assert (manifest["step"], bad) == (2, [])
    again, _ = load_expert(path)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in one.state_dict().items())
    assert step_of((old / "run" / "checkpoints" / "newest.json").read_bytes()) == 2
    model = load_model(old / "composite")
    cards = model.cards
    assert [c.rows for c in cards] == [[1, 2], [3, 4]]
    assert model(torch.zeros(1, 1, 8, 8), 4).isfinite().all()
    prior, fitted = load_prior(old / "prior")
    assert (fitted.row, fitted.n, prior.shape) == (2, 64, [1, 8, 8])


def test_a_training_goes_on(old, capsys):
    assert main(["fit", "--config", str(old / "run" / "config.yaml"), "--trainer.max_steps", "3"]) == 0
    assert "from step 2" in capsys.readouterr().out
    assert read_card(old / "run" / "model.safetensors").steps == 3


def test_fleets_studies_and_their_results_are_read(old):
    fleet = Fleet.load(old / "fleet")
    assert [e.name for e in fleet.experts] == [f"expert_{k:03d}" for k in (1, 2, 3, 4)]
    fleet.refuse_late()
    number, holder = lease.current(Store(old / "fleet"), "expert_001")
    assert (number, holder["released"]) == (1, True)
    todo = plan(old / "yaml" / "study.yaml", old / "study")
    assert todo.compare() == []
    study = Study.load(old / "results")
    assert [row["networks"] for row in study.rows[:1]] == [1]
    assert round(study.rows[0]["fd_digits"], 3) == 131.275
    row, images = Measured(old / "measured").get({"model": "one"})
    assert (row, images.shape) == ({"name": "one", "fd": 1.5}, (1, 1, 2, 2))


def test_indices_caches_and_observations_are_read(old):
    index = Index.load(old / "train.index.safetensors")
    assert [(s.name, s.samples) for s in index.shards] == [("train-0000.tar", 3)]
    found = reference._read(old / "reference.safetensors", "key")
    assert (found.moments.n, found.kept.shape) == (4, (3, 2))
    assert len(Observations.load(old / "observations.safetensors")) == 2


def test_results_and_plans_of_the_first_schemas_are_read(old):
    file = old / "results" / "study.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    del content["schema"]
    content["contenders"][0]["source"] = "elsewhere/run"  # these were relative to the working directory
    file.write_text(json.dumps(content), encoding="utf-8")
    assert Study.load(old / "results").contenders[0]["source"] == "elsewhere/run"
    file = old / "study" / "plan.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    del content["schema"]
    content["configs"] = {key: entry["sha256"] for key, entry in content["configs"].items()}
    file.write_text(json.dumps(content), encoding="utf-8")
    assert plan(old / "yaml" / "study.yaml", old / "study").compare() == []


def _json(file, key="schema"):
    def change(value):
        content = json.loads(file.read_text(encoding="utf-8"))
        content = {**content, key: value} if value is not None else {k: v for k, v in content.items() if k != key}
        if "check" in content:
            content["check"] = check_of({k: v for k, v in content.items() if k != "check"})
        file.write_text(json.dumps(content), encoding="utf-8")

    return change


def _yaml(file):
    def change(value):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        content = (
            {**content, "schema": value} if value is not None else {k: v for k, v in content.items() if k != "schema"}
        )
        file.write_text(yaml.safe_dump(content), encoding="utf-8")

    return change


def _metadata(file, key=None, name="schema"):
    """Change the schema in the metadata of a .safetensors file, or in the JSON below a key of it."""

    def change(value):
        with safe_open(file, "pt") as opened:
            about = dict(opened.metadata())
        inner = json.loads(about[key]) if key else about
        inner.pop("sha256" if key == "card" else "", None)
        inner.pop(name, None)
        if value is not None:
            inner[name] = value if key else str(value)
        save_file(load_file(file), file, {**about, key: json.dumps(inner)} if key else inner)

    return change


# each kind: how its schema is changed, how it is read, whether it may lack one
KINDS = {
    "manifest": lambda d: (
        _json(next(d.glob("run/checkpoints/*.ckpt.json"))), lambda: find_checkpoint(d / "run"), False,
    ),
    "pointer": lambda d: (
        _json(d / "run" / "checkpoints" / "newest.json"),
        lambda: step_of((d / "run" / "checkpoints" / "newest.json").read_bytes()),
        True,
    ),
    "card": lambda d: (
        _metadata(d / "run" / "model.safetensors", "card"), lambda: load_model(d / "run" / "model.safetensors"), False,
    ),
    "prior": lambda d: (_metadata(d / "prior" / "prior.safetensors", "prior"), lambda: load_prior(d / "prior"), False),
    "composite": lambda d: (_json(d / "composite" / "composite.json"), lambda: load_model(d / "composite"), False),
    "fleet": lambda d: (_yaml(d / "fleet" / "plan.yaml"), lambda: Fleet.load(d / "fleet"), False),
    "begun": lambda d: (
        _json(d / "fleet" / "begun" / "expert_001.json"), lambda: Fleet.load(d / "fleet").refuse_late(), True,
    ),
    "lease": lambda d: (
        _json(next(d.glob("fleet/leases/*"))), lambda: lease.current(Store(d / "fleet"), "expert_001"), True,
    ),
    "study": lambda d: (_json(d / "study" / "plan.json"), lambda: kept(d / "study"), True),
    "results": lambda d: (_json(d / "results" / "study.json"), lambda: Study.load(d / "results"), True),
    "measured": lambda d: (
        _metadata(next(d.glob("measured/*")), "row"), lambda: Measured(d / "measured").get({"model": "one"}), True,
    ),
    "reference": lambda d: (
        _metadata(d / "reference.safetensors"), lambda: reference._read(d / "reference.safetensors", "key"), None,
    ),
    "observations": lambda d: (
        _metadata(d / "observations.safetensors"), lambda: Observations.load(d / "observations.safetensors"), True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_a_newer_version_or_without_a_schema_is_refused_by_name(old, kind):
    change, read, may_lack = KINDS[kind](old)
    read()
    for value, words in (
        (99, "schema 99, made by a newer version"),
        ("two", "damaged: its schema is"),
        (True, "damaged"),
    ):
        change(value)
        with pytest.raises(InputError) as refusal:
            read()
        assert words in str(refusal.value)
        assert "json" in str(refusal.value) or "yaml" in str(refusal.value) or "safetensors" in str(refusal.value)
    change(None)
    if may_lack:
        read()
    elif may_lack is False:
        with pytest.raises(InputError, match="its schema is none"):
            read()


def test_an_index_of_schema_1_compares_shards_and_says_so(old, capsys):
    file = old / "train.index.safetensors"
    assert b"lightning_tdisent.index/1" in file.read_bytes()
    index = Index.load(file)
    assert len(index) > 0
    assert not index.keyed
    assert index.shared(index) == len(index)
    there = Shards.open(old, "train", Decoder(1))
    with pytest.raises(InputError, match="among the"):
        refuse_shared(there, there, "these", "Name others")
    said = capsys.readouterr().err
    assert re.search(r"note: the index of .* is of an earlier version, .* make it anew: python -m .* data index", said)


def test_the_index_the_config_and_the_features_say_their_schema(old, tmp_path, capsys):
    file = old / "train.index.safetensors"
    content = file.read_bytes()
    file.write_bytes(content.replace(b"lightning_tdisent.index/1", b"lightning_tdisent.index/9"))
    with pytest.raises(InputError, match=r"train.index.safetensors: schema 9, made by a newer version"):
        Index.load(file)
    config = old / "run" / "config.yaml"
    config.write_text(
        "# config of lightning_tdisent, schema 7\n" + config.read_text(encoding="utf-8"), encoding="utf-8"
    )
    assert main(["fit", "--config", str(config)]) == 2
    assert "config.yaml: schema 7, made by a newer version" in capsys.readouterr().err
    shipped = next(Path(reference.__file__).parent.glob("shipped/*.safetensors"))
    save_classifier(tmp_path / "own.safetensors", load_classifier(shipped))
    assert load_classifier(tmp_path / "own.safetensors").num_features
    _metadata(tmp_path / "own.safetensors")(3)
    with pytest.raises(InputError, match=r"own.safetensors: schema 3, made by a newer version"):
        load_classifier(tmp_path / "own.safetensors")


def test_what_stores_keep_has_a_schema(tmp_path):
    store = Store(tmp_path)
    store.write("done/a.json", b'{"images_seen": 3}')
    assert read_json(store, "done/a.json") == {"images_seen": 3}
    with pytest.raises(InputError, match=r"done/a.json: damaged: seconds is missing. Remove it, and run the"):
        read_json(store, "done/a.json", ("images_seen", "seconds"))
    store.write("done/a.json", b'{"schema": 2, "images_seen": 3}')
    with pytest.raises(InputError, match=r"done/a.json: schema 2, made by a newer version.*reads 1. Upgrade"):
        read_json(store, "done/a.json")


def test_what_is_said_of_a_failed_job_by_a_newer_version_is_refused(tmp_path):
    store = Store(tmp_path)
    work = SimpleNamespace(store=store)
    for content, known in ((b'{"sessions": ["x"], "reason": "r"}', ["a"]), (b'{"sess', []), (b'{"schema": "?"}', [])):
        store.write("failed/a.json", content)
        assert list(failures(work)) == known
    store.write("failed/a.json", b'{"schema": 2, "sessions": []}')
    with pytest.raises(InputError, match=r"failed/a.json: schema 2, made by a newer version"):
        failures(work)


def test_an_option_that_an_older_config_lacks_has_its_default(old, capsys):
    file = old / "run" / "config.yaml"
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    del content["model"]["init_args"]["label_drop"]
    del content["model"]["init_args"]["network"]["init_args"]["dropout"]
    del content["ema"]["lengths"]
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    words = ["fit", "--config", str(old / "yaml" / "one.yaml"), "--run", str(old / "run"), "--trainer.max_steps", "3"]
    assert main(words) == 0
    out = capsys.readouterr().out
    for key in ("model.init_args.label_drop", "model.init_args.network.init_args.dropout"):
        assert f"{key}: not in the config of then, taken as its default" in out
    assert main([*words, "--model.label_drop", "0.7"]) == 2
    assert "model.init_args.label_drop: 0.1 there, 0.7 now" in capsys.readouterr().err


def test_the_default_of_then_counts_where_it_has_changed(old, monkeypatch):
    monkeypatch.setattr(
        "lightning_tdisent.diffusion.spec.THEN", {"lightning_tdisent.diffusion.schedules.Linear.beta_end": 0.02}
    )
    monkeypatch.setattr(Linear.__init__, "__defaults__", (1000, 1e-4, 0.03, False))
    file = old / "run" / "model.safetensors"
    with safe_open(file, "pt") as opened:
        card = json.loads(opened.metadata()["card"])
    del card["states"]["init_args"]["schedule"]["init_args"]["beta_end"], card["sha256"]
    save_file(load_file(file), file, {"card": json.dumps(card)})
    assert load_expert(file)[0].states.fingerprint == card["fingerprint"]


def test_schemas():
    assert check_schema({"schema": 1}, "file", 2, oldest=1) == 1
    with pytest.raises(InputError, match="file: schema 1, made by an older version"):
        check_schema({"schema": 1}, "file", 2)
