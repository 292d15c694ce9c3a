"""One language for all commands: options, dotted keys, files, and what they give together."""

import json
import os
import pickle

import pytest
import yaml

from lightning_tdisent.cli import main, parser
from lightning_tdisent.cli.options import effective, parse
from lightning_tdisent.errors import InputError, Newer
from lightning_tdisent.fleet.keys import assign, value_of
from lightning_tdisent.models.agreement import refuse_unfit


def refusal(capsys, *words):
    """Run a command that is refused and return its message."""
    assert main([str(word) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def file(tmp_path):
    def write(content, name="options.yaml"):
        (path := tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
        return str(path)

    return write


def test_values_are_read_as_yaml_1_2():
    values = {"1e-3": 1e-3, "2.5E+2": 250.0, "00:12:00": "00:12:00", "010": "010", "[1, x]": [1, "x"], "1e": "1e",
              "-.5e1": -5.0, "null": None, "true": True, "{a: 1}": {"a": 1}, "runs/1e3": "runs/1e3"}  # fmt: skip
    assert {text: value_of(text, "--key") for text in values} == values


def test_a_file_gives_what_the_command_line_does_not(file):
    first = file({"model": "runs/a", "out": "images", "seeds": "0:8", "put-back": True, "batch_size": 4, "label": None,
                  "sampler": {"class_path": "DDIM", "init_args": {"eta": 0.5}}})  # fmt: skip
    second = file({"seeds": "8:9", "sampler": {"init_args": {"steps": 2}}}, "second.yaml")
    found = parse(
        parser(), ["sample", "--config", first, "--config", second, "--batch-size", "5", "--sampler.eta", "1"]
    )
    values = effective(found)
    assert (str(found.model), str(found.out), found.label) == ("runs/a", "images", None)
    assert (found.seeds, found.batch_size, found.put_back) == ("8:9", 5, True)
    assert values["sampler"] == {"class_path": "DDIM", "init_args": {"steps": 2, "eta": 1}}
    assert found.dotted == {"sampler": {"eta": 1}}
    other = parse(parser(), ["sample", "elsewhere", "--config", first, "--sampler", "dpm"])
    assert (str(other.model), other.sampler) == ("elsewhere", "dpm")


@pytest.mark.parametrize("text", ["A: B", "2026", "[x", "null"])
def test_a_title_is_text(text, capsys):
    words = ["study", "--config", "experiments/digits/quickstart.yaml", "--title", text, "--notes", text]
    assert main([*words, "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["title"], printed["notes"]) == (text, text)


def test_a_part_without_a_class_changes_the_default_one(file):
    words = ["sample", "runs/a", "--out", "x", "--config"]
    for content in ({"sampler": {"steps": 4, "clip": 2}}, {"sampler": {"init_args": {"steps": 4, "clip": 2}}}):
        found = parse(parser(), [*words, file(content), "--sampler.clip", "3"])
        assert (found.sampler, found.dotted["sampler"]) == (None, {"steps": 4, "clip": 3})
    first = file({"sampler": {"class_path": "DDIM", "init_args": {"eta": 1}}}, "first.yaml")
    found = parse(parser(), [*words, first, "--config", file({"sampler": {"steps": 4}})])
    assert effective(found)["sampler"] == {"class_path": "DDIM", "init_args": {"eta": 1, "steps": 4}}
    evaluation = ["evaluate", "m", "--data", "d", "--protocol", "digits", "--out", "x", "--config"]
    found = parse(parser(), [*evaluation, file({"protocol": {"n_real": 20}}), "--n", "30"])
    assert (found.protocol, found.dotted["protocol"], found.n) == ("digits", {"n_real": 20}, 30)


def test_a_pipe_as_a_config_and_no_run_folder_are_refused(tmp_path, capsys):
    os.mkfifo(pipe := tmp_path / "pipe")
    said = refusal(capsys, "fit", "--config", pipe)
    assert said == f"error: --config {pipe}: is a pipe or a device, which cannot be read twice; give a file"
    config = "experiments/digits/reduced8.yaml"
    said = refusal(capsys, "fit", "--config", config, "--run", "null")
    assert said == "error: --run null: a run folder is required; ./null is one of this name"


def test_a_list_in_a_file_is_one_with_commas(file):
    words = ["evaluate", "m", "--data", "d", "--protocol", "digits"]
    assert parse(parser(), [*words, "--config", file({"metrics": ["fd", "kid"]})]).metrics == "fd,kid"


COMMANDS = [
    ["sample", "runs/a", "--out", "x", "--sampler", "DPMSolver", "--sampler.steps", "3", "--label", "2"],
    ["evaluate", "runs/a", "runs/b", "--data", "d", "--protocol", "digits", "--protocol.n_real", "50", "-n", "9"],
    ["compose", "runs/a", "runs/b", "--out", "x", "--allow-mismatch", "data", "--allow-mismatch", "weights"],
    ["export", "runs/a", "--out", "x", "--format", "diffusers"],
    ["average", "runs/a", "--sigma-rel", "1e-1", "--out", "x.safetensors"],
    ["prior", "runs/a", "--at", "0.6", "--data", "d", "--out", "x", "--prior", "Mixture", "--prior.components", "3"],
    ["report", "runs/a", "runs/b", "--out", "x.html"],
    ["fleet", "run", "f", "--set.data.path", "there", "--option.cpus", "4", "--only", "1", "--only", "2"],
    ["fleet", "status", "f", "--watch"],
    ["data", "toy", "x", "-n", "8", "--jobs", "1"],
    ["data", "prepare", "a", "b", "--no-shuffle", "--bad", "0.5"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: "-".join(words[:2]))
def test_what_is_printed_gives_the_same_options_again(words, file, capsys):
    with pytest.raises(SystemExit) as end:
        main([*words, "--print_config"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    command = [word for word in words[:2] if word in ("fleet", "data")] + [words[words[0] in ("fleet", "data")]]
    assert effective(parse(parser(), [*command, "--config", file(said)])) == effective(parse(parser(), words))
    assert effective(parse(parser(), words)) == yaml.safe_load(said)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"seedz": 3}, "unknown key 'seedz'. Did you mean 'seeds'? Known: model, out, seeds,"),
        ({"config": "x"}, "unknown key 'config'."),
        ({"batch_size": "many"}, "batch_size: invalid int value: 'many'"),
        ({"batch_size": [1]}, "batch_size: expected one value, got [1]"),
        ({"batch_size": True}, "batch_size: expected one value, got True"),
        ({"residency": "here"}, "residency: invalid choice: 'here'"),
        ({"put_back": "yes"}, "put_back: expected true or false, got 'yes'"),
        ([1], "expected a mapping of the options of this command, got [1]"),
        ("a: [", "not valid: "),
    ],
)
def test_a_wrong_file_is_refused_with_its_key(content, message, file, capsys):
    line = refusal(capsys, "sample", "m", "--out", "x", "--config", file(content))
    assert "options.yaml: " in line
    assert message in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "m", "--outt", "x"], "--outt: no such option. Did you mean '--out'?"),
        (["sample", "m", "--see", "0:1", "--out", "x"], "--see: no such option. Did you mean '--seeds'?"),
        (["sample", "m", "x", "--out", "y"], "x: one argument too many."),
        (["sample", "m"], "sample: the following arguments are required: --out"),
        (
            ["sample", "m", "--out", "x", "--samplr.steps", "3"],
            "--samplr.steps: no such option. Did you mean '--sampler'?",
        ),
        (["sample", "m", "--out", "x", "--batch-size", "x"], "sample: --batch-size: invalid int value: 'x'"),
        (["sample", "m", "--out", "x", "--config"], "--config: expected a value"),
        (["sample", "m", "--out", "x", "--config", "none.yaml"], "none.yaml: cannot be read: No such file"),
        (["study", "a.yaml"], "a.yaml: one argument too many. The YAML is named with --config FILE"),
        (["study"], "study: name the YAML with --config FILE"),
        (["study", "--print_config"], "--print_config: name the YAML with --config FILE"),
        (["study", "--tilte", "x"], "--tilte: no such option. Did you mean '--title'?"),
        (["fleet"], "fleet: the following arguments are required: COMMAND"),
        (["fleet", "run", "f", "--set.a"], "--set.a: expected a value"),
        (["fleet", "run", "f", "--budget.images", "3"], "--budget.images: no such option."),
        (["fleet", "plan", "f", "--n.x", "3"], "--n.x: no such option."),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(words, message, capsys):
    assert refusal(capsys, *words).startswith(f"error: {message}")


STUDY = {
    "runs": {
        "a": {"configs": ["a.yaml"]},
        "v1.0": {"configs": ["a.yaml"], "set": {"model.lr": 1}},
        "f": {"fleet": "f.yaml"},
    },
    "contenders": {"a, 8 steps": {"run": "a", "sampler": "DDIM"}},
    "protocol": "digits",
}


def test_dotted_keys_set_what_they_name():
    assigned = [
        ("runs.*.set.trainer.max_steps", 5), ("runs.v1.0.set.model.lr", 2), ("contenders.a, 8 steps.sampler.eta", 1.0),
        ("contenders.a, 8 steps.sampler.init_args.steps", 3), ("protocol.n_real", 50), ("n", 7), ("bits.n", 9),
    ]  # fmt: skip
    before = json.dumps(STUDY)
    found = assign(STUDY, assigned)
    assert found["runs"] == {
        "a": {"configs": ["a.yaml"], "set": {"trainer.max_steps": 5}},
        "v1.0": {"configs": ["a.yaml"], "set": {"model.lr": 2, "trainer.max_steps": 5}},
        "f": {"fleet": "f.yaml", "set": {"trainer.max_steps": 5}},
    }
    sampler = {"class_path": "DDIM", "init_args": {"eta": 1.0, "steps": 3}}
    assert found["contenders"] == {"a, 8 steps": {"run": "a", "sampler": sampler}}
    assert (found["protocol"], found["n"], found["bits"]) == ({"preset": "digits", "n_real": 50}, 7, {"n": 9})
    assert json.dumps(STUDY) == before
    fleet = {"budget": {"images": 8}, "for_rows": {"1..2": {"model.lr": 1}}}
    more = [("for_rows.1..2.model.lr", 3), ("for_rows.3..4.model.lr", 4), ("start.shared.set.model.lr", 5)]
    assert assign(fleet, [("budget.rule", "uniform"), *more]) == {
        "budget": {"images": 8, "rule": "uniform"},
        "for_rows": {"1..2": {"model.lr": 3}, "3..4": {"model.lr": 4}},
        "start": {"shared": {"set": {"model.lr": 5}}},
    }
    for key, message in (("runs.b.set.x", "has a, v1.0, f"), ("n.x", "n is 7, which has no keys")):
        with pytest.raises(InputError, match=f"--{key}: .*{message}"):
            assign({**STUDY, "n": 7}, [(key, 1)])


def test_a_study_of_several_files_is_printed_as_one(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "/there")
    first = file({"runs": {"a": {"configs": ["a.yaml"], "set": {"model.lr": 1}}}, "n": 3, "title": "A"})
    second = file({"runs": {"a": {"set": {"model.warmup": 2}}}, "contenders": {"c": {"run": "a"}}}, "second.yaml")
    words = ["study", "--config", first, "--config", second, "--n", "4", "--out", "there", "--seed", "7"]
    assert main([*words, "--runs.a.set.data.path", "${oc.env:MY_SECRET}", "--print_config"]) == 0
    said = capsys.readouterr().out
    assert yaml.safe_load(said) == {
        "runs": {"a": {"configs": [f"{tmp_path}/a.yaml"], "set": {
            "model.lr": 1, "model.warmup": 2, "data.path": "${oc.env:MY_SECRET}"}}},
        "n": 4, "title": "A", "contenders": {"c": {"run": "a"}}, "out": "there", "seed": 7,
    }  # fmt: skip


def test_the_options_that_are_shipped_are_options():
    found = parse(parser(), ["sample", "m", "--out", "x", "--config", "experiments/digits/sample.yaml"])
    assert (found.seeds, found.sampler) == ("0:64", {"class_path": "DPMSolver", "init_args": {"steps": 8}})


def test_errors_carry_what_they_say(file):
    with pytest.raises(InputError) as one:
        parse(parser(), ["sample", "m", "--outt", "x"])
    assert (one.value.key, one.value.nearest) == ("--outt", "--out")
    with pytest.raises(InputError) as two:
        parse(parser(), ["sample", "--config", file({"seedz": 1})])
    assert (two.value.where, two.value.key, two.value.nearest) == (file({"seedz": 1}), "seedz", "seeds")
    inside = two.value.within("a study")
    assert (inside.where, inside.key, str(inside)) == ("a study", "seedz", f"a study: {two.value}")
    copy = pickle.loads(pickle.dumps(inside))  # noqa: S301, as workers report their errors
    assert (copy.where, copy.key, str(copy)) == ("a study", "seedz", str(inside))
    with pytest.raises(InputError) as three:
        refuse_unfit(["a", "b", "c"], [{"rows": [k], "S": 3, "weights": w} for k, w in ((1, "x"), (2, "x"), (2, "y"))])
    assert [problem.split(" ")[0] for problem in three.value.problems] == ["c:", "no", "row"]
    assert isinstance(Newer("n").within("f"), Newer)


def test_files_are_merged_to_any_depth_and_the_command_line_replaces_lists(file):
    first = file({"sampler": {"class_path": "DDIM", "init_args": {"steps": 4}}, "put_back": True})
    second = file({"sampler": {"init_args": {"eta": 0.5}}}, "second.yaml")
    words = ["sample", "m", "--out", "x", "--config", first, "--config", second]
    assert parse(parser(), words).sampler == {"class_path": "DDIM", "init_args": {"steps": 4, "eta": 0.5}}
    assert parse(parser(), [*words, "--put-back", "false"]).put_back is False
    assert parse(parser(), [*words, "--put-back=false"]).put_back is False
    assert parse(parser(), [*words, "--put-back"]).put_back is True
    assert parse(parser(), ["data", "prepare", "a", "b", "--shuffle", "false"]).shuffle is False
    assert parse(parser(), ["data", "prepare", "a", "b", "--shuffle"]).shuffle is True
    again = ["--sampler.steps", "4", "--sampler.init_args.steps", "8", "--sampler.steps", "2"]
    assert parse(parser(), ["sample", "m", "--out", "x", *again]).dotted == {"sampler": {"steps": 2}}
    assert parse(parser(), ["sample", "m", "--out", "x", "--sampler.class_path", "Ancestral"]).sampler == "Ancestral"
    only = file({"only": [1]}, "only.yaml")
    assert parse(parser(), ["fleet", "run", "f", "--config", only]).only == ["1"]
    assert parse(parser(), ["fleet", "run", "f", "--config", only, "--only", "2"]).only == ["2"]


def test_printing_the_quickstart_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["quickstart", "--n", "20", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["n"] == 20
    assert list(tmp_path.iterdir()) == []


def test_numbers_with_colons_in_a_file_are_text(file):
    found = parse(parser(), ["sample", "m", "--out", "x", "--config", file("seeds: 10:20\nlabel: 3\n")])
    assert (found.seeds, found.label) == ("10:20", 3)


def test_configs_of_an_overlay_are_those_of_its_folder(tmp_path, capsys, monkeypatch):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    (tmp_path / "a/s.yaml").write_text("runs: {one: {configs: [c.yaml]}}\n", encoding="utf-8")
    text = "runs: {two: {configs: [c.yaml, ~/d.yaml, $BASE/e.yaml]}, f: {fleet: f.yaml}}\n"
    (tmp_path / "b/o.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("BASE", "/base")
    assert (
        main(["study", "--config", f"{tmp_path}/a/s.yaml", "--config", f"{tmp_path}/b/o.yaml", "--print_config"]) == 0
    )
    runs = yaml.safe_load(capsys.readouterr().out)["runs"]
    assert runs == {
        "one": {"configs": [f"{tmp_path}/a/c.yaml"]},
        "two": {"configs": [f"{tmp_path}/b/c.yaml", "/home/me/d.yaml", "/base/e.yaml"]},
        "f": {"fleet": f"{tmp_path}/b/f.yaml"},
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "m", "--out", "."], "--out .: name a folder for the images"),
        (["sample", "m", "--out", ".."], "--out ..: name a folder for the images"),
        (["sample", "m", "--out", "x", "--put-back=yes"], "--put-back: expected true or false, got 'yes'"),
        (["study", "--config", "s.yaml", "--workers", "-1"], "--workers: at least 0, got -1"),
        (
            ["prior", "m", "--at", "1", "--data", "d", "--out", "x", "--prior", "gaussian"],
            "--prior: there is no Prior 'gaussian'. Did you mean 'Gaussian'?",
        ),
    ],
)
def test_more_wrong_values_are_refused_in_one_line(words, message, capsys):
    assert refusal(capsys, *words).startswith(f"error: {message}")


def test_help_of_a_part_without_its_class_says_how_to_ask(capsys):
    words = ["--config", "experiments/digits/reduced8.yaml", "--model.objective.help"]
    assert main(["fit", *words]) == 2
    said = capsys.readouterr().err
    assert "command line: --model.objective.help shows the arguments of a class: name it" in said
    assert "--model ReducedStates --model.objective.help CLASS" in said
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--model", "ReducedStates", "--model.objective.help", "V"])
    assert "Help for --objective.help=lightning_tdisent.V" in capsys.readouterr().out
