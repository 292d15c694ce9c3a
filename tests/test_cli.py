import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_tdisent.cli import fits, main
from lightning_tdisent.diffusion.objectives import Eps, V
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError
from lightning_tdisent.lit.modules import ReducedStates, SingleState
from lightning_tdisent.models.expert import save_expert
from lightning_tdisent.networks.unet import UNet

BASE = "experiments/digits/reduced8.yaml"


def refusal(capsys, *argv) -> str:
    """Run a command that must be refused (exit code 2, no traceback) and return the last line of stderr."""
    assert main([str(a) for a in argv]) == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text.strip().splitlines()[-1]


# what is typed, and what the message must name: the key, the value or the nearest word
MISTAKES = [
    (["--trainer.max_stepz", "3"], ["--trainer.max_stepz", "'--trainer.max_steps'"]),
    (["--trainer.max_steps", "many"], ["--trainer.max_steps", "expected int", "'many'"]),
    (["--model", "Reduced"], ["--model", "'Reduced'", "'ReducedStates'"]),
    (["--model", "Basline"], ["--model", "'Baseline'"]),
    (["--model.lrr", "1"], ["--model.lrr", "'lr'"]),
    (["--model.lr", "fast"], ["--model.lr", "float", "'fast'"]),
    (["--model.draw", "sometimes"], ["--model.draw", "balanced", "iid", "'sometimes'"]),
    (["--model.network", "UNett"], ["--model.network", "'UNet'"]),
    (["--model.network.channelz", "[8]"], ["--model.network.channelz", "'channels'"]),
    (["--model.network.layers", "two"], ["--model.network.layers", "int", "'two'"]),
    (["--model.network.conditioning", "time"], ["conditioning", "state", "none", "'time'"]),
    (["--model.states.schedule", "Cosin"], ["--model.states.schedule", "'Cosine'"]),
    (["--model.states.spacing", "evn"], ["--model.states.spacing", "even", "trailing"]),
    (["--model.states.S", "eight"], ["--model.states.S", "int", "'eight'"]),
    (["--model.states.SS", "8"], ["--model.states.SS", "'S'"]),
    (["--model.objective", "W"], ["--model.objective", "'W'"]),
    (["--model.objective.weight", "MinSnr"], ["--model.objective.weight", "'MinSNR'"]),
    (["--model.sampler", "DDMI"], ["--model.sampler", "'DDIM'"]),
    (["--model.network", "lightning_tdisent.networks.unet.UNett"], ["--model.network", "no class", "'UNet'"]),
    (["--model.network", "lightning_tdisent.networks.unett.UNet"], ["--model.network", "no class", "'UNet'"]),
    (["--model.network", "my_nett.Net"], ["--model.network: there is no class 'my_nett.Net'", "PYTHONPATH"]),
    (["--model.network", "torch.nn.Conv2d"], ["--model.network: torch.nn.Conv2d is no Network. ", "DiT", "UNet"]),
    (["--model.network", "DDIM"], ["--model.network: there is no class 'DDIM'", "DiT", "UNet"]),
    (["--model.objective", "lightning_tdisent.Epss"], ["--model.objective: there is no class", "'Eps'"]),
    (["--model", "lightning_tdisent.ReducedState"], ["--model: there is no class", "'ReducedStates'"]),
    (["--trainer.logger", "CSVLoger"], ["--trainer.logger", "'CSVLogger'"]),
    (["--trainer.callbacks", "torch.nn.Linear"], ["--trainer.callbacks: torch.nn.Linear is no Callback"]),
    (["--trainer.max_steps", "0"], ["trainer.max_steps: 0 trains nothing", "at least 1"]),
    (["--trainer.max_epochs", "0"], ["trainer.max_epochs: 0 trains nothing"]),
    (["--trainer.enable_checkpointing", "false"], ["trainer.enable_checkpointing", "checkpoint.keep"]),
    (["--data", "ImageShard"], ["--data", "'ImageShards'"]),
    (["--data.batch_siz", "3"], ["--data.batch_siz", "'batch_size'"]),
    (["--data.channels", "2"], ["channels", "1 or 3", "2"]),
    (["--ema.decay", "1.5"], ["ema.decay", "1.5"]),
    (["--runn", "x"], ["--runn", "'--run'"]),
    (["--config", "experiments/digits/reduced.yaml"],
     ["experiments/digits/reduced.yaml", "'experiments/digits/reduced8.yaml'"]),
    (["--model.states.S", "2000"], ["S=2000", "T=1000"]),
    (["--model.states.S", "1000"], ["ReducedStates", "1000"]),
    (["--model.states.kind", "native"], ["terminal_bound", "kind: mapped"]),
    (["--model.states.kind", "rescaled"], ["(0, 1)", "of 8"]),
    (["--model.states.schedule", "Linear", "--model.states.schedule.zero_terminal", "true", "--model.objective", "Eps"],
     ["zero terminal SNR", "V or X0"]),
    (["--model.network.groups", "7"], ["groups: 7", "[16, 32]"]),
    (["--trainer.callbacks", "[]", "--model.network.shape", "[3, 8, 8]"], ["[3, 8, 8]", "[1, 8, 8]", "data"]),
    (["--model.warm_start", "runs/nothing"], ["runs/nothing", "no weights"]),
    (["--data.path", "nowhere"], ["nowhere", "data/README.md"]),
    (["--data.path", "tests"], ["tests holds no shards"]),
    (["--data.batch_size", "5000"], ["batch_size: 5000", "1500"]),
]  # fmt: skip


@pytest.mark.parametrize(("words", "named"), MISTAKES, ids=[" ".join(w)[:40] for w, _ in MISTAKES])
def test_a_mistake_on_the_command_line(words, named, capsys, tmp_path):
    line = refusal(capsys, "fit", "--config", BASE, "--trainer.max_steps", 1, *words, "--run", tmp_path / "run")
    assert all(name in line for name in named), line
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--model.states.S", "null"], "states.init_args.S", None),
        (["--model.states.S=null"], "states.init_args.S", None),
        (["--model.states.S", "~"], "states.init_args.S", None),
        (["--model.init_args.states.init_args.S", "null"], "states.init_args.S", None),
        (["--model.network.classes", "null"], "network.init_args.classes", None),
        (["--model.sampler", "DPMSolver", "--model.sampler.steps=null"], "sampler.init_args.steps", None),
        (["--model.network", "{init_args: {classes: null}}"], "network.init_args.classes", None),
        (["--model.warm_start", "None"], "warm_start", "None"),  # a word
        (["--model.states.S", "null", "--model.states.S", "4"], "states.init_args.S", 4),
    ],
)
def test_a_null_on_the_command_line_is_one_at_any_depth(words, key, value):
    from lightning_tdisent.lit.entry import Parsed, run

    class Unbuilt(Parsed):
        def instantiate_classes(self):
            pass

    config = run(["fit", "--config", BASE, *words], cls=Unbuilt).config.fit.model.init_args
    assert config[key] == value


FILES = {
    "model:\n  init_args:\n    lrr: 1\n": (3, "model.lrr", "'lr'"),
    "model:\n  init_args:\n    network:\n      class_path: UNett\n": (3, "model.network", "'UNet'"),
    "model:\n  init_args:\n    network:\n      init_args:\n        layerz: 2\n": (
        5,
        "model.network.layerz",
        "'layers'",
    ),
    "model:\n  class_path: Reduced\n": (1, "model", "'ReducedStates'"),
    "trainer:\n  max_stepz: 3\n": (2, "trainer.max_stepz", "'trainer.max_steps'"),
    "trainer:\n  max_steps: many\n": (2, "trainer.max_steps", "int"),
    "trainer:\n  callbacks:\n    - Picturess\n": (2, "trainer.callbacks", "'Pictures'"),
    "modell: 3\n": (1, "modell", "'model'"),
    "model:\n  init_args:\n    lr: ${nope}\n": (3, "lr", "${nope}"),
}


@pytest.mark.parametrize("text", FILES, ids=[v[1] + "-" + v[2] for v in FILES.values()])
def test_a_mistake_in_a_file_names_file_line_key_and_nearest(text, capsys, tmp_path):
    number, *named = FILES[text]
    file = tmp_path / "overlay.yaml"
    file.write_text(text, encoding="utf-8")
    line = refusal(capsys, "fit", "--config", BASE, "--config", file, "--run", tmp_path / "run")
    assert line.startswith(f"error: {file}:{number}: ")
    assert all(name in line for name in named), line


def test_broken_yaml_is_named(capsys, tmp_path):
    file = tmp_path / "broken.yaml"
    file.write_text("model: [\n", encoding="utf-8")
    assert f"{file}: not valid YAML" in refusal(capsys, "fit", "--config", BASE, "--config", file)
    file.write_text(
        "trainer: {max_steps: 2}\nmodel: {lr: 1.0e-3}\ntrainer: {max_steps: 3, min_steps: 1, max_steps: 4}\n",
        encoding="utf-8",
    )
    line = refusal(capsys, "fit", "--config", BASE, "--config", file)
    assert f"{file}: line 3: max_steps; line 3: trainer: a key that this mapping has already" in line


def test_a_folder_with_another_run_is_refused(capsys, tmp_path):
    (tmp_path / "config.yaml").write_text("", encoding="utf-8")
    assert "already holds a run" in refusal(capsys, "fit", "--config", BASE, "--run", tmp_path, "--resume", "never")


def test_a_checkpoint_of_another_run_does_not_open_a_folder(capsys, tmp_path):
    (tmp_path / "config.yaml").write_text("", encoding="utf-8")
    line = refusal(capsys, "fit", "--config", BASE, "--run", tmp_path, "--ckpt_path", "LICENSE")
    assert "already holds a run" in line


def test_a_refused_run_does_not_claim_its_folder(capsys, tmp_path):
    argv = [
        "fit",
        "--config",
        BASE,
        "--trainer.callbacks",
        "[]",
        "--run",
        str(tmp_path / "run"),
        "--trainer.max_steps",
        "2",
    ]
    refusal(capsys, *argv, "--model.network.shape", "[3, 8, 8]")
    assert main(argv) == 0


def test_predict_names_its_data(capsys, tmp_path):
    assert "--data Seeds" in refusal(capsys, "predict", "--config", BASE, "--run", tmp_path / "run")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--device", "cuda:77"], "--device cuda:77"),
        (["--sampler", "dpm", "--eta", "0.5"], "--eta 0.5 belongs to --sampler ddim, not to DPMSolver"),
        (
            ["--sampler", "dpn"],
            "--sampler: there is no Sampler 'dpn'. Did you mean 'dpm'? There are ddim, ancestral, dpm,",
        ),
        (["--sampler", "DPMSolve"], "there is no Sampler 'DPMSolve'. Did you mean 'DPMSolver'?"),
        (["--sampler", "UNet"], "there is no Sampler 'UNet'."),
        (["--sampler", "lightning_tdisent.UNet"], "--sampler: lightning_tdisent.UNet is no Sampler."),
        (["--sampler", "my_samplers.Heun"], "If you trust it, import it first (--import my_samplers"),
        (["--sampler", "{class_path: DDIM, args: {}}"], "--sampler: unknown key 'args'. Did you mean 'init_args'?"),
        (["--sampler", "{class_path: DDIM"], "--sampler: cannot be read: not valid YAML"),
        (
            ["--sampler.step", "4"],
            "unexpected keyword argument 'step'. Did you mean 'steps'? It takes: eta, steps, clip",
        ),
        (["--sampler.steps", "2.5"], "sampler.steps: an integer, at least 1, got 2.5"),
        (["--sampler.steps=many"], "sampler.steps: an integer, at least 1, got many"),
        (["--sampler.steps"], "--sampler.steps: expected a value"),
        (["--sampler.steps", "--put-back"], "--sampler.steps: expected a value"),
        (["--steps", "2", "--sampler.steps", "2"], "--steps and --sampler.steps set the same argument"),
        (["--sampler", "Ancestral", "--steps", "5"], "sampler.steps: 5 steps on a table of 4 rows"),
        (["--batch-size", "0"], "batch_size: at least 1"),
    ],
)
def test_wrong_options_of_sample(words, named, experts, capsys, tmp_path):
    folder = experts()[0].parents[1]
    assert named in refusal(capsys, "sample", folder, "--out", tmp_path / "x", *words)


def images(capsys, folder, out, *words):
    """Draw the images of two seeds and return their files and the line on the sampler."""
    assert main(["sample", str(folder), "--out", str(out), "--seeds", "0:2", *words]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sampler: ")]
    return [(out / f"{seed:06d}.png").read_bytes() for seed in range(2)], line.partition(" (set")[0]


def test_a_sampler_has_a_nickname_a_name_and_a_class_path(experts, capsys, tmp_path):
    folder = experts()[0].parents[1]
    path = "lightning_tdisent.sampling.sampler.DPMSolver"
    ways = [
        ["--sampler", "dpm", "--steps", "3"],
        ["--sampler", "DPMSolver", "--sampler.steps", "3"],
        ["--sampler", path, "--sampler.init_args.steps=3"],
        ["--sampler", json.dumps({"class_path": "DPMSolver", "init_args": {"steps": 3}})],
        ["--sampler", f"{{class_path: {path}, init_args: {{steps: 4}}}}", "--sampler.steps=3", "--sampler.clip", "1e0"],
    ]
    drawn = [images(capsys, folder, tmp_path / str(k), *words) for k, words in enumerate(ways)]
    assert all(one == drawn[0] for one in drawn)
    assert drawn[0][1] == "sampler: DPMSolver, steps 3, clip 1.0"
    ddim = images(capsys, folder, tmp_path / "ddim")
    assert ddim[1] == "sampler: DDIM, eta 0.0, clip 1.0, every row (default)"
    assert ddim[0] != drawn[0][0]
    free = images(capsys, folder, tmp_path / "free", "--sampler.clip", "null", "--eta", "0")
    assert free[1] == "sampler: DDIM, eta 0.0, every row (default)"


MINE = """
from lightning_tdisent.sampling.sampler import DDIM

class Noisy(DDIM):
    def __init__(self, share: float, steps: int | None = None) -> None:
        super().__init__(share, steps)
        self.share = share
"""


def test_a_sampler_of_ones_own_works_in_every_command_that_samples(experts, capsys, tmp_path, monkeypatch):
    folder = experts()[0].parents[1]
    (tmp_path / "my_samplers.py").write_text(MINE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    expected, _ = images(capsys, folder, tmp_path / "ddim", "--eta", "0.25")
    imported = ["--import", "my_samplers"]
    for k, words in enumerate((["--sampler", "Noisy"], ["--sampler", "my_samplers.Noisy"])):
        found = images(capsys, folder, tmp_path / str(k), *words, "--sampler.share", "0.25", *imported)
        assert found == (expected, "sampler: Noisy, share 0.25, every row")
    evaluate = ["evaluate", str(folder), "--data", "data/digits", "--protocol", "digits", "-n", "8", *imported]
    out = tmp_path / "e"
    assert main([*evaluate, "--out", str(out), "--sampler", "Noisy", "--sampler.share=0.25", "--steps", "2"]) == 0
    (row,) = [r for r in json.loads((out / "results.json").read_text(encoding="utf-8")) if "sampler" in r]
    assert row["sampler"].startswith("Noisy(")
    assert row["nfe"] == 2
    capsys.readouterr()
    wrong = refusal(capsys, *evaluate, "--out", tmp_path / "x", "--sampler", "Noisyy", "--sampler.share=0.25")
    assert "there is no Sampler 'Noisyy'. Did you mean 'Noisy'?" in wrong
    wrong = refusal(capsys, *evaluate, "--out", tmp_path / "x", "--sampler", "Noisy", "--sampler.shard=0.25")
    assert "Did you mean 'share'? It takes: share, steps" in wrong
    assert not (tmp_path / "x").exists()


def test_the_exit_code_reaches_the_shell_without_a_traceback(cli):
    code, out, err = cli("fit", "--config", BASE, "--model.lrr", 1)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_unknown_commands_are_answered_with_the_nearest(capsys):
    assert "'compose'" in refusal(capsys, "compos")


@pytest.fixture
def experts(tmp_path):
    """Write files of four untrained experts of one table."""

    def make(folder="experts", rows=(1, 2, 3, 4), **options):
        files = []
        for k in rows:
            torch.manual_seed(k)
            net = UNet([1, 8, 8], [8, 16], 1, mid_attention=False, groups=4, **options.get("network", {}))
            states = LatentStates(S=options.get("S", 4))
            module = SingleState(net, states, k, objective=options.get("objective", V()))
            path = tmp_path / folder / f"expert_{k:03d}" / "model.safetensors"
            path.parent.mkdir(parents=True)
            save_expert(path, module.denoiser, module.card("ema", {"decay": 0.9}))
            files.append(path)
        return files

    return make


@pytest.mark.parametrize("words", [("--merge-split", "test"), ("-n", "5"), ("--device", "cuda"), ("--merge-data", "d")])
def test_options_of_a_merge_are_refused_without_one(words, experts, tmp_path, capsys):
    folder = experts()[0].parents[1]
    said = refusal(capsys, "compose", folder, "--out", tmp_path / "all", *words)
    assert said.startswith(f"error: {words[0]}: belong to --merge K, which is not given")
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize("words", [("--bits-images", "5"), ("--decoder", "uniform")])
def test_options_of_bits_are_refused_without_them(words, experts, tmp_path, capsys):
    ask = [
        "evaluate",
        experts()[0].parents[1],
        "--data",
        "data/digits",
        "--protocol",
        "digits",
        "--out",
        tmp_path / "e",
    ]
    assert "belong to --metrics bpd or bpd_ode" in refusal(capsys, *ask, "--metrics", "fd", *words)


def test_compose_sample_evaluate_report_by_hand(experts, tmp_path, capsys):
    files = experts()
    out = tmp_path / "all"
    assert main(["compose", str(files[0].parents[1]), "--out", str(out)]) == 0
    assert main(["sample", str(out), "--out", str(tmp_path / "a"), "--seeds", "3:8"]) == 0
    assert main(["sample", *[str(out)], "--out", str(tmp_path / "b"), "--seeds", "5:7", "--batch-size", "1"]) == 0
    for seed in (5, 6):  # image i depends on its seed alone
        a, b = ((tmp_path / d / f"{seed:06d}.png").read_bytes() for d in "ab")
        assert a == b
    assert len(list((tmp_path / "a").glob("0*.png"))) == 5
    argv = ["evaluate", str(out), "--data", "data/digits", "--protocol", "digits", "-n", "8"]
    assert main([*argv, "--out", str(tmp_path / "e"), "--sampler", "dpm"]) == 0
    assert main(["report", str(tmp_path / "e")]) == 0
    page = (tmp_path / "e" / "report.html").read_text(encoding="utf-8")
    assert "fd_digits" in page
    assert "DPMSolver(steps=None, clip=1.0)" in page
    capsys.readouterr()
    assert "already keeps results" in refusal(capsys, *argv, "--out", tmp_path / "e")
    assert "drawn with other sampler" in refusal(capsys, "sample", out, "--out", tmp_path / "a", "--steps", "2")
    assert "is the folder of a run or of weights" in refusal(capsys, "sample", out, "--out", out)


def test_images_are_the_same_wherever_the_experts_are(experts, tmp_path):
    out = tmp_path / "all"
    assert main(["compose", *map(str, experts()), "--out", str(out)]) == 0
    drawn = []
    for residency in ("resident", "offload", "stream"):
        images = tmp_path / residency
        assert main(["sample", str(out), "--out", str(images), "--seeds", "0:3", "--residency", residency]) == 0
        drawn.append([(images / f"{seed:06d}.png").read_bytes() for seed in range(3)])
    assert drawn[0] == drawn[1] == drawn[2]


def test_a_preview_is_asked_for_and_marked_everywhere(experts, tmp_path, capsys):
    files, out = experts()[:-1], tmp_path / "some"
    assert "no expert owns row" in refusal(capsys, "compose", *files, "--out", out)
    assert main(["compose", *map(str, files), "--out", str(out), "--fill", "nearest"]) == 0
    assert "it is a preview" in capsys.readouterr().out
    assert "no expert owns row" in refusal(capsys, "sample", out, "--out", tmp_path / "i")
    assert main(["sample", str(out), "--out", str(tmp_path / "i"), "--seeds", "0:2", "--fill", "nearest"]) == 0
    assert "a preview: row " in capsys.readouterr().out
    argv = ["evaluate", str(out), "--data", "data/digits", "--protocol", "digits", "-n", "8", "--fill", "nearest"]
    assert main([*argv, "--out", str(tmp_path / "e")]) == 0
    printed = capsys.readouterr().out
    assert "(preview)" in printed
    assert "is a preview, no result" in printed
    assert "(preview)" in (tmp_path / "e" / "report.html").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "e" / "results.json").read_text(encoding="utf-8"))[0]["preview"]
    line = refusal(capsys, "compose", *files, "--out", tmp_path / "m", "--fill", "nearest", "--merge", 2)
    assert "--merge requires that no expert is missing" in line


def test_merge_and_export_by_command(experts, tmp_path, capsys):
    files = [str(file) for file in experts()]
    assert "belong to --merge K" in refusal(
        capsys, "compose", *files, "--out", tmp_path / "m", "--merge-weights", "images"
    )
    words = ["--merge", "2", "--merge-blocks", "1,3", "--merge-data", "data/digits", "-n", "8"]
    assert main(["compose", *files, "--out", str(tmp_path / "m"), *words]) == 0
    assert "4 experts merged to 2" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "m"), "--out", str(tmp_path / "x")]) == 0
    assert json.loads((tmp_path / "x" / "config.json").read_text(encoding="utf-8"))["S"] == 4
    assert main(["sample", str(tmp_path / "x"), "--out", str(tmp_path / "i"), "--seeds", "0:1"]) == 0
    assert "is there already" in refusal(capsys, "export", tmp_path / "m", "--out", tmp_path / "x")


def test_a_composite_is_validated_and_predicts_by_command(experts, tmp_path, capsys):
    out = tmp_path / "all"
    assert main(["compose", *map(str, experts()), "--out", str(out)]) == 0
    model = ["--model", "Composite", "--model.path", str(out)]
    data = ["--data", "ImageShards", "--data.path", "data/digits", "--data.channels", "1"]
    quality = ["--trainer.callbacks+=SampleQuality", "--trainer.callbacks.protocol=digits", "--trainer.callbacks.n=20"]
    assert main(["validate", *model, *data, *quality, "--run", str(tmp_path / "v")]) == 0
    assert re.search(r"quality/fd_digits/[0-9a-f]{8}", capsys.readouterr().out)
    assert main(["predict", *model, "--data", "Seeds", "--data.n", "3", "--run", str(tmp_path / "p")]) == 0
    assert len(list((tmp_path / "p" / "images").glob("*.png"))) == 3
    last = refusal(capsys, "fit", *model, *data, "--trainer.max_steps", 1, "--run", tmp_path / "f")
    assert "a composite is not trained" in last


def test_what_is_required_is_named(capsys):
    assert "data is required" in refusal(capsys, "fit")


def test_compose_names_all_offenders_and_writes_nothing(experts, tmp_path, capsys):
    good = experts()
    wrong = [
        experts("table", [1], S=5)[0],
        experts("eps", [2], objective=Eps())[0],
        experts("classes", [3], network={"classes": 7})[0],
    ]
    assert main(["compose", *map(str, [good[0], good[1], *wrong]), "--out", str(tmp_path / "no")]) == 2
    text = capsys.readouterr().err
    for named in (
        r"table.*: table is .*S=5.*the others have .*S=4",
        r"eps.*: parametrisation is \"Eps\", the others have \"V\"",
        r"classes.*: network input is .*\"classes\": 7.*the others have .*null",
        r"no expert owns row 4 of 1\.\.4",
        r"row 1 is owned by .* and ",
        r"row 2 is owned by .* and ",
    ):
        assert re.search(named, text), f"{named} not in {text}"
    assert not (tmp_path / "no").exists()


def test_sampling_refusals(experts, tmp_path, capsys):
    files = experts()
    assert "rows" in refusal(capsys, "sample", files[0], "--out", tmp_path / "x")
    assert "no weights" in refusal(capsys, "sample", tmp_path, "--out", tmp_path / "x")
    assert "FIRST:END" in refusal(capsys, "sample", files[0], "--out", tmp_path / "x", "--seeds", "5")
    folder = files[0].parents[1]
    assert "5 steps on a table of 4" in refusal(capsys, "sample", folder, "--out", tmp_path / "x", "--steps", 5)
    assert "no classes" in refusal(capsys, "sample", folder, "--out", tmp_path / "x", "--label", 3)
    assert "class-conditional" in refusal(capsys, "sample", folder, "--out", tmp_path / "x", "--guidance", 3)
    assert not (tmp_path / "x").exists()


def test_guidance_by_command(tmp_path):
    module = ReducedStates(UNet([1, 8, 8], [8, 16], 1, groups=4, classes=10), LatentStates(S=2))
    save_expert(tmp_path / "model.safetensors", module.denoiser, module.card("live"))
    argv = ["sample", str(tmp_path), "--seeds", "0:4", "--label", "3", "--out"]
    assert main([*argv[:4], "--out", str(tmp_path / "turn")]) == 0  # the classes in turn: seed 3 draws class 3
    assert main([*argv, str(tmp_path / "a"), "--guidance", "1"]) == 0
    assert main([*argv, str(tmp_path / "b")]) == 0
    assert main([*argv, str(tmp_path / "c"), "--guidance", "5"]) == 0
    a, b, c = ((tmp_path / f"{d}.png").read_bytes() for d in "abc")
    assert a == b != c
    turn = [(tmp_path / d / "000003.png").read_bytes() for d in ("turn", "b")]
    assert turn[0] == turn[1]
    assert (tmp_path / "turn" / "000002.png").read_bytes() != (tmp_path / "b" / "000002.png").read_bytes()


def test_a_class_of_ones_own_needs_its_import(tmp_path, capsys, monkeypatch):
    source = (
        "from lightning_tdisent.networks.network import Network\n"
        "from torch import nn\n"
        "class Mine(Network):\n"
        "    def __init__(self, shape: list[int], width: int = 4):\n"
        "        super().__init__(shape, None, 'none')\n"
        "        self.width = width\n"
        "        self.net = nn.Conv2d(shape[0], shape[0], 3, padding=1)\n"
        "    def forward(self, x, index=None, label=None):\n"
        "        return self.net(x)\n"
    )
    (tmp_path / "my_net.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    import sys

    words = ["--model.network", "my_net.Mine", "--model.network.shape", "[1,8,8]", "--trainer.max_steps", "2"]
    assert main(["fit", "--config", BASE, *words, "--trainer.callbacks", "[]", "--run", str(tmp_path / "run")]) == 0
    for name in [n for n in sys.modules if n == "my_net"]:
        monkeypatch.delitem(sys.modules, name)
    argv = ["sample", str(tmp_path / "run"), "--out", str(tmp_path / "x"), "--seeds", "0:2"]
    assert "--import my_net" in refusal(capsys, *argv)
    assert main([*argv, "--import", "my_net"]) == 0

    (tmp_path / "my_other.py").write_text(source.replace("Mine", "Other"), encoding="utf-8")
    words[1] = "Other"  # a short name, available once its module is imported
    fit = ["fit", "--config", BASE, *words, "--trainer.callbacks", "[]", "--run", str(tmp_path / "other")]
    assert "there is no class 'Other'" in refusal(capsys, *fit)
    assert "--import my_othr: No module named 'my_othr'" in refusal(capsys, *fit, "--import", "my_othr")
    assert main([*fit, "--import", "my_other"]) == 0


def test_workers_import_what_their_parent_was_told_to(tmp_path, capsys, monkeypatch):
    (tmp_path / "my_worker.py").write_text("raise ImportError('as a worker would')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TDISENT_IMPORT", "my_worker")
    with pytest.raises(InputError, match="--import my_worker: as a worker would"):
        fits([["fit"]], [lambda *_: None])
    assert main(["data", "inspect", "nowhere", "--import", "json"]) == 2
    assert "TDISENT_IMPORT" not in os.environ  # set only while the command runs


def test_the_script_of_the_digits_takes_a_folder_and_no_option(tmp_path):
    for words, code in ((["--help"], 0), (["--out"], 2)):
        done = subprocess.run(
            [sys.executable, str(Path("data/digits.py").resolve()), *words],
            cwd=tmp_path,
            capture_output=True,
            check=False,
        )
        assert done.returncode == code
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seeds", ["-3:5", "-5:-3", f"0:{2**32 + 1}"])
def test_seeds_out_of_range_are_refused_in_one_line_before_anything_is_loaded(seeds, capsys, tmp_path):
    assert main(["sample", str(tmp_path / "nothing"), "--out", str(tmp_path / "images"), "--seeds", seeds]) == 2
    assert capsys.readouterr().err == f"error: --seeds {seeds}: the numbers must lie in [0, 2^32)\n"


@pytest.mark.parametrize("printed", ["print", "rich", "at the end"])
def test_output_that_nobody_reads_any_more_ends_quietly(printed, monkeypatch, capsys):
    from rich.console import Console

    from lightning_tdisent.cli import data

    def act(_):
        if printed == "rich":
            Console().print("x")
        print("x" * (100_000 if printed == "print" else 10))

    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(data, "_toy", act)
    with open(writer, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["data", "toy", "x"]) == 141
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


def test_a_network_that_is_away_is_one_line(monkeypatch, capsys):
    from lightning_tdisent.cli import data

    def act(_):
        raise TimeoutError(110, "no answer from s3://bucket/fleet in 5 s")

    monkeypatch.setattr(data, "_toy", act)
    assert main(["data", "toy", "x"]) == 75
    assert capsys.readouterr().err == "error: [Errno 110] no answer from s3://bucket/fleet in 5 s\n"


def test_a_pipe_that_is_not_our_output_is_no_reader_gone(monkeypatch, capsys):
    from lightning_tdisent.cli import data

    def act(_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(data, "_toy", act)
    assert main(["data", "toy", "x"]) == 75
    assert "Broken pipe" in capsys.readouterr().err
