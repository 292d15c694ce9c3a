"""Files whose words were changed by somebody: they are refused in one line and at once, or are what they were.

Each value in the JSON or YAML of a file is deleted, or replaced by a value of another kind, size or depth. The tests
take some of these at random; with HOSTILE=full all of them.
"""

import json
import os
import random
import shutil
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_tdisent.cli import main
from lightning_tdisent.data.index import Index
from lightning_tdisent.data.npz import read_npz
from lightning_tdisent.errors import InputError
from lightning_tdisent.files import load_yaml
from lightning_tdisent.fleet import lease
from lightning_tdisent.fleet.plan import Fleet
from lightning_tdisent.fleet.store import Store
from lightning_tdisent.lit.resume import find_checkpoint
from lightning_tdisent.models.checkpoint import check_of, load
from lightning_tdisent.models.compose import load_model
from lightning_tdisent.models.cost import training_cost
from lightning_tdisent.models.expert import load_expert
from lightning_tdisent.models.prior_files import load_prior
from lightning_tdisent.studies.claim import kept
from lightning_tdisent.studies.results import Study

NEWEST = max(path for path in Path(__file__).parent.iterdir() if (path / "run").is_dir())
FULL = os.environ.get("HOSTILE") == "full"
DEEP: Any = 0
for _ in range(300):
    DEEP = [DEEP]
GONE = object()
VALUES = [GONE, None, "x", "", True, -1, 0, 1.5, 10**9, 10**15, 10**30, float("nan"), float("inf"), -1e300, [], {},
          [1, 1], [10**9], {"class_path": "os.system", "init_args": {}}, {"a": 1}, DEEP, "\0", "../x"]  # fmt: skip


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all values below the top."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def changed(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a copy of data with another value at a path."""
    copy = json.loads(json.dumps(data))
    at = copy
    for key in path[:-1]:
        at = at[key]
    if value is GONE:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return copy


def forged(file: Path, key: str) -> tuple[Any, Any]:
    """The JSON in the metadata of a .safetensors file, and how to write it."""
    with safe_open(file, "pt") as opened:
        about = dict(opened.metadata())
    tensors, data = load_file(file), json.loads(about[key])
    data.pop("sha256", None)
    return data, lambda new: save_file(tensors, file, {**about, key: json.dumps(new)})


def written(file: Path, guard: bool = False) -> tuple[Any, Any]:
    """The JSON in a file, and how to write it, with a manifest's check of itself."""
    data = json.loads(file.read_text(encoding="utf-8"))
    data.pop("check", None) if guard else None

    def write(new: Any) -> None:
        new = {**new, "check": check_of(new)} if guard and isinstance(new, dict) else new
        file.write_text(json.dumps(new), encoding="utf-8")

    return data, write


def answer(denoiser: Any) -> Any:
    """Return the estimate of a model for a fixed state at each of its rows."""
    x = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    with torch.no_grad():
        return [denoiser(x, s).tolist() for s in range(1, denoiser.states.S + 1)]


def _expert(file: Path) -> Any:
    denoiser, card = load_expert(file)
    training_cost([card])
    return answer(denoiser)


def _prior(folder: Path) -> Any:
    prior, _ = load_prior(folder)
    return prior.log_prob(torch.zeros(1, 1, 8, 8)).tolist()


def _index(data: Any, write: Any) -> tuple[Any, Any]:
    return {**data, "table": json.loads(data["table"])}, lambda new: write(
        {**new, "table": json.dumps(new["table"])} if "table" in new else new
    )


def _plan(file: Path) -> tuple[Any, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8")), lambda new: file.write_text(
        yaml.safe_dump(new), encoding="utf-8"
    )


def _composite(folder: Path) -> Any:
    return answer(load_model(folder))


KINDS = {
    "card": lambda d: (*forged(d / "run/model.safetensors", "card"), lambda: _expert(d / "run/model.safetensors")),
    "prior": lambda d: (*forged(d / "prior/prior.safetensors", "prior"), lambda: _prior(d / "prior")),
    "composite": lambda d: (*written(d / "composite/composite.json"), lambda: _composite(d / "composite")),
    "manifest": lambda d: (
        *written(next(d.glob("run/checkpoints/*.ckpt.json")), guard=True), lambda: find_checkpoint(d / "run")[0],
    ),
    "fleet": lambda d: (*_plan(d / "fleet/plan.yaml"), lambda: Fleet.load(d / "fleet").refuse_late()),
    "begun": lambda d: (*written(d / "fleet/begun/expert_001.json"), lambda: Fleet.load(d / "fleet").refuse_late()),
    "lease": lambda d: (
        *written(next(d.glob("fleet/leases/*"))), lambda: bool(lease.current(Store(d / "fleet"), "expert_001")),
    ),
    "study": lambda d: (*written(d / "study/plan.json"), lambda: bool(kept(d / "study"))),
    "results": lambda d: (*written(d / "results/study.json"), lambda: bool(Study.load(d / "results"))),
    "rows": lambda d: (*written(d / "results/results.json"), lambda: bool(Study.load(d / "results").rows)),
    "index": lambda d: (
        *_index(*forged(d / "train.index.safetensors", "index")),
        lambda: len(Index.load(d / "train.index.safetensors")),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_with_a_changed_value_is_refused_or_is_what_it_was(tmp_path, kind):
    folder = Path(shutil.copytree(NEWEST, tmp_path / "files"))
    data, write, read = KINDS[kind](folder)
    right = read()
    trials = [(path, value) for path in places(data) for value in VALUES]
    wrong = []
    for path, value in trials if FULL else random.Random(kind).sample(trials, min(40, len(trials))):  # noqa: S311
        write(changed(data, path, value))
        begin = time.process_time()
        try:
            if read() != right:
                wrong.append((path, f"{value!r:.60}", "loads something else"))
        except InputError as error:
            if len(str(error)) > 3000:
                wrong.append((path, f"{value!r:.60}", f"{len(str(error))} characters"))
        except BaseException as error:
            wrong.append((path, f"{value!r:.60}", f"{type(error).__name__}: {error!s:.200}"))
        if (took := time.process_time() - begin) > 5:
            wrong.append((path, f"{value!r:.60}", f"{took:.1f} s"))
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("network", "init_args", "channels"), [10**9], "other weights|do not fit|tensor|cannot be built"),
        (("network", "init_args", "shape"), [1, 10**6, 10**6], "at most"),
        (("network", "init_args", "layers"), 10**9, "far more layers than the file has weights"),
        (("states", "init_args", "S"), 10**12, "S"),
        (("states", "init_args", "schedule", "init_args", "T"), 10**15, "T: from 1 to 200000"),
        (("rows",), [1, 1, 2], "rows: .1, 1, 2"),
        (("rows",), [1, 2, 3, 9], "not among the latent rows 1..4"),
        (("image_range",), [0.0, 255.0], r"images in \[0.0, 255.0\], this version knows \[-1.0, 1.0\]"),
        (("seconds",), -1.0, "seconds: -1.0"),
        (("images_seen",), 10**30, "images_seen"),
    ],
)
def test_a_card_that_asks_for_what_its_file_has_not_is_refused_at_once(tmp_path, capsys, place, value, words):
    folder = Path(shutil.copytree(NEWEST / "run", tmp_path / "run"))
    load_expert(folder / "model.safetensors")
    data, write = forged(folder / "model.safetensors", "card")
    write(changed(data, place, value))
    begin = time.process_time()
    with pytest.raises(InputError, match=words) as refusal:
        load_expert(folder / "model.safetensors")
    assert time.process_time() - begin < 5
    assert "\n" not in str(refusal.value)
    assert "model.safetensors" in str(refusal.value)


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "[" * 100_000, b"\xff\xfe", "1" * 5000, '{"schema": 1'])
def test_json_that_is_no_plain_data_is_refused(tmp_path, text):
    folder = Path(shutil.copytree(NEWEST / "composite", tmp_path / "composite"))
    (folder / "composite.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=r"composite.json: not a composite"):
        load_model(folder)


def test_what_a_composite_states_is_compared_with_its_experts(tmp_path):
    folder = Path(shutil.copytree(NEWEST / "composite", tmp_path / "composite"))
    data, write = written(folder / "composite.json")
    for place, value, words in (
        (("fingerprint",), "0123456789abcdef", "fingerprint a86f58a881a4ba2d, the manifest has 0123456789abcdef"),
        (("experts", 0, "rows"), [1], r"rows \[1, 2\], the manifest has \[1\]"),
        (("experts",), [], r"experts: expected a list of experts, got \[\]"),
        (("experts", 1), data["experts"][0], "the same file stands there twice"),
    ):
        write(changed(data, place, value))
        with pytest.raises(InputError, match=words):
            load_model(folder)
    write({**data, "preview": {"missing": [4], "fill": "nearest", "sha256": None}})
    with pytest.raises(InputError, match=r"says rows \[4\] are missing, these are: \[\]"):
        load_model(folder)
    write({**data, "written by": "a later version with the same schema"})
    load_model(folder)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + k)}: &{chr(98 + k)} [{', '.join([f'*{chr(97 + k)}'] * 10)}]\n" for k in range(9)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "values once its aliases are written out"),
        ("a: &a [*a]", "nested deeper than 100 levels, or an alias within itself"),
        ("[" * 5000, "cannot be parsed|nested"),
        ("a: !!python/object/apply:os.system [true]", "python/object"),
        (b"a: \xff\xfe", "not valid"),
    ],
    ids=["bomb", "itself", "deep", "tag", "bytes"],
)
def test_yaml_that_expands_or_runs_is_refused_wherever_it_is_read(tmp_path, capsys, text, words):
    content = text if isinstance(text, bytes) else text.encode()
    with pytest.raises(InputError, match=words):
        load_yaml(content, "a.yaml")
    (tmp_path / "a.yaml").write_bytes(content)
    (tmp_path / "plan.yaml").write_bytes(content)
    for command in (
        ["fit", "--config", str(tmp_path / "a.yaml"), "--run", str(tmp_path / "run")],
        ["study", "--config", str(tmp_path / "a.yaml"), "--out", str(tmp_path / "out")],
        ["fleet", "plan", str(tmp_path)],
        ["fleet", "plan", "--config", str(tmp_path / "a.yaml"), "--out", str(tmp_path / "new")],
    ):
        begin = time.process_time()
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert time.process_time() - begin < 15  # imports included


def test_archives_that_lie_about_their_sizes_take_no_memory(tmp_path):
    header = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little")
    about = "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 8, 8, 3), }"
    with zipfile.ZipFile(tmp_path / "lie.npz", "w") as archive:
        archive.writestr("arr_0.npy", header + about.ljust(117).encode() + b"\n" + b"0" * 64)
    with pytest.raises(InputError, match=r"lie.npz cannot be read: arr_0.npy: its header says \(1000000000000"):
        read_npz(tmp_path / "lie.npz")
    np.savez_compressed(tmp_path / "right.npz", np.zeros((4, 8, 8, 3), np.uint8))
    assert read_npz(tmp_path / "right.npz")[0].shape == (4, 3, 8, 8)
    with zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * 10_000_000)
    (tmp_path / "old.ckpt").write_bytes(b"\x80\x02.")
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, tmp_path / "wide.ckpt")
    for name, words in (("bomb", "compressed"), ("old", "no checkpoint that torch"), ("wide", "more values than")):
        with pytest.raises(InputError, match=words):
            load(tmp_path / f"{name}.ckpt")
