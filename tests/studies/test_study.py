import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from lightning_tdisent.diffusion.components import ComponentStates
from lightning_tdisent.diffusion.observation import Observation
from lightning_tdisent.diffusion.operators import Inpainting
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError
from lightning_tdisent.studies.claim import refuse_no_repeats
from lightning_tdisent.studies.plan import Role, plan, refuse_cuts, refuse_roles

STUDY = {
    "runs": {
        "shared": {"configs": ["a.yaml"], "set": {"trainer.max_steps": 5}},
        "experts": {"configs": ["a.yaml", "b.yaml"], "experts": 3, "warm_start": "shared"},
    },
    "contenders": {"one": {"run": "shared"}, "all": {"run": "experts", "sampler": "DPMSolver"}},
    "data": "data/digits",
    "protocol": "digits",
}


@pytest.fixture
def study(tmp_path):
    def write(**changes):
        for name in ("a.yaml", "b.yaml"):
            (tmp_path / name).write_text("{}", encoding="utf-8")
        file = tmp_path / "study.yaml"
        file.write_text(json.dumps({**STUDY, **changes}), encoding="utf-8")
        return file

    return write


def test_a_plan_has_one_job_per_expert_with_its_needs(study, tmp_path):
    todo = plan(study(), tmp_path / "out", 7, [("runs.experts.set.model.lr", 0.1), ("runs.*.set.data.batch_size", 8)])
    assert [j.name for j in todo.jobs] == ["shared", "experts_001", "experts_002", "experts_003"]
    assert len({j.folder for j in todo.jobs}) == 4
    expert = todo.jobs[2]
    assert expert.needs == ("shared",)
    words = " ".join(expert.argv)
    for part in (
        f"--config {tmp_path}/a.yaml --config {tmp_path}/b.yaml",
        "--model.expert 2 --model.experts 3",
        "--seed_everything 7",
        "--model.lr 0.1",
        "--data.batch_size 8",
        f"--model.warm_start {tmp_path}/out/shared",
    ):
        assert part in words
    assert "--trainer.max_steps 5" in " ".join(todo.jobs[0].argv)
    assert "--model.lr" not in todo.jobs[0].argv
    samplers = [c["sampler"]["class_path"] for c in todo.evaluation["contenders"]]
    assert samplers == ["lightning_tdisent.DDIM", "lightning_tdisent.DPMSolver"]
    assert todo.evaluation["contenders"][1]["source"] == str(tmp_path / "out" / "experts_composite")


def test_a_sweep_over_the_cut_is_expanded(study, tmp_path):
    sweep = {
        "run": "shared",
        "cuts": [2, 0.6],
        "priors": {"mix": {"class_path": "Mixture", "init_args": {"components": 3}}},
    }
    todo = plan(study(diffusion_time=sweep, bits={"n": 9}), tmp_path / "out")
    names = {c["name"]: c.get("prior") for c in todo.evaluation["contenders"]}
    assert names == {
        "one": None,
        "all": None,
        "whole chain": None,
        "cut 2, N(0, I)": "cut:2",
        "cut 2, mix": str(tmp_path / "out" / "priors" / "mix_2"),
        "cut 0.6, N(0, I)": "cut:0.6",
        "cut 0.6, mix": str(tmp_path / "out" / "priors" / "mix_0.6"),
    }
    part = {"class_path": "lightning_tdisent.Mixture", "init_args": {"components": 3}}
    model = str(tmp_path / "out" / "shared")
    assert todo.priors == {
        tmp_path / "out" / "priors" / "mix_2": (model, 2, part),
        tmp_path / "out" / "priors" / "mix_0.6": (model, 0.6, part),
    }
    assert todo.evaluation["bits"] == {"n": 9}
    assert "whole chain" not in str(todo.content)  # the plan stores the YAML as written, not expanded


def test_a_folder_keeps_one_plan(study, tmp_path):
    file, out = study(), tmp_path / "out"
    first = plan(file, out)
    first.claim()
    first.jobs[0].folder.mkdir()
    (first.jobs[0].folder / "half").write_text("", encoding="utf-8")
    plan(file, out).claim()  # the same plan resumes, and keeps the files of its jobs
    assert (first.jobs[0].folder / "half").exists()
    with pytest.raises(InputError, match=r"another study \(seed: 0 there, 3 now\)"):
        plan(file, out, 3).claim()
    (tmp_path / "a.yaml").write_text("{x: 1}", encoding="utf-8")
    with pytest.raises(InputError, match=r"another study \(.*a.yaml: x: nothing there, 1 now\)"):
        plan(file, out).claim()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="is not empty and holds no study"):
        plan(file, tmp_path / "full").claim()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runz": {}}, "unknown key 'runz'. Did you mean 'runs'"),
        ({"runs": {"a": {"config": []}}}, "runs.a: unknown key 'config'. Did you mean 'configs'"),
        ({"runs": {"a": {"configs": ["aa.yaml"]}}}, "aa.yaml: no such file. Did you mean 'a.yaml'"),
        ({"runs": {"a": {"configs": ["a.yaml"], "warm_start": "b"}}}, "'b' is not an earlier run"),
        ({"contenders": {"x": {"run": "expert"}}}, "no run 'expert'. Did you mean 'experts'"),
        ({"features": "${nope}"}, "not valid: .*nope"),
        ({"contenders": {}}, "contenders, or diffusion_time, is missing"),
        ({"contenders": {"x": {"run": "shared", "prior": "mx"}}}, "contenders.x.prior: no prior 'mx'"),
        ({"priors": {"p": {"run": "shared", "at": 1}}}, "priors.p: prior is missing"),
        ({"priors": {"p": {"run": "share", "at": 1, "prior": "Gaussian"}}}, "no run 'share'. Did you mean 'shared'"),
        ({"diffusion_time": {"run": "shared", "cuts": 3}}, "cuts must be a list of rows"),
        ({"diffusion_time": {"run": "shared", "cuts": []}}, "cuts must be a list of rows"),
        (
            {"diffusion_time": {"run": "shared", "cuts": ["x"]}},
            "cut:x: expected a row of at least 1, or a share .* got 'x'",
        ),
        ({"diffusion_time": {"run": "shared", "cuts": [2], "priors": {"a": "Gausian"}}}, "Gausian"),
        (
            {"diffusion_time": {"run": "shared", "cuts": [2], "priors": {"a": 3}}},
            "priors.a_2.prior: expected a mapping with the keys",
        ),
        (
            {"priors": {"p": {"run": "shared", "at": "z", "prior": "Gaussian"}}},
            "priors.p.at: expected a row of at least 1",
        ),
        ({"priors": {"p": {"run": "shared", "at": 2, "prior": "Flow"}}}, "is trained: make it a run with PriorModule"),
        ({"diffusion_time": {"run": "shared", "cut": [3]}}, "unknown key 'cut'. Did you mean 'cuts'"),
        ({"title": 17}, "study.yaml: title: expected text, got 17; write it in quotes"),
        ({"notes": [1, 2]}, r"study.yaml: notes: expected text, got \[1, 2\]"),
        ({"data": None}, "study.yaml: data: expected text, got None"),
        ({"split": 1.5}, "study.yaml: split: expected text, got 1.5"),
        ({"n": "many"}, "study.yaml: n: expected an integer, got 'many'"),
        ({"seed": -1}, r"study.yaml: seed: expected an integer in \[0, 2\^32\), got -1"),
        ({"first_seed": 2**32}, "study.yaml: first_seed: expected an integer in"),
        ({"protocol": 3}, "study.yaml: protocol: expected text or a mapping, got 3"),
        ({"bits": True}, "study.yaml: bits: expected a mapping, got True"),
        ({"runs": [1]}, "study.yaml: runs: expected a mapping of names to settings"),
        ({"runs": {"f": {"fleet": 3}}, "contenders": {"f": {"run": "f"}}}, "runs.f: fleet: expected text, got 3"),
        (
            {"contenders": {"x": {"run": "shared", "sampler": 5}}},
            "contenders.x.sampler: expected a mapping with the keys class_path",
        ),
        ({"contenders": {"x": {"run": "shared", "sampler": "DDMI"}}}, "study.yaml: contenders.x.sampler: .*DDMI"),
    ],
)
def test_a_wrong_study_is_refused(changes, message, study):
    with pytest.raises(InputError, match=message):
        plan(study(**changes))


def test_a_seed_on_the_command_line_has_the_same_range(study):
    for seed in (-1, 99999999999):
        with pytest.raises(InputError, match=rf"--seed: expected an integer in \[0, 2\^32\), got {seed}"):
            plan(study(), seed=seed)
    assert plan(study(title=None, notes=None, split=None, n=None)).evaluation["title"] == "study"


def test_wrong_overrides_are_refused(study):
    with pytest.raises(
        InputError, match=r"--runs.expert.set.x: there is no such key in runs, which has shared, experts"
    ):
        plan(study(), assigned=[("runs.expert.set.x", 1)])


RUN = {"configs": ["a.yaml"]}


@pytest.mark.parametrize(
    ("runs", "messages"),
    [
        (
            {"../evil": RUN, "/abs": RUN, "": RUN},
            ["runs: '../evil': a name consists of", "runs: '/abs': a name consists of", "empty"],
        ),
        ({".hid": RUN, "a.": RUN, "..": RUN}, ["'.hid': a name begins with a letter", "'a.'", "'..'"]),
        (
            {"leases": RUN, "Plan.json": RUN, "priors": RUN},
            ["'leases': this name is reserved", "'Plan.json'", "'priors'"],
        ),
        ({"configs": RUN, "x\u0000": RUN}, ["'configs': this name is reserved", "not '\\x00'"]),
        (
            {"e": {**RUN, "experts": 2}, "e_001": RUN},
            ["runs.e_001 (e_001) and runs.e.experts (e_001) would have the same name"],
        ),
        ({"x": {**RUN, "experts": 2}, "x_composite": RUN}, ["runs.x_composite (x_composite) and runs.x (x_composite)"]),
        ({"x": {"fleet": "a.yaml"}, "x_composite": RUN}, ["runs.x_composite (x_composite) and runs.x (x_composite)"]),
        ({"run": RUN, "Run": RUN}, ["runs.run (run) and runs.Run (Run) would have the same name"]),
        (
            {"e": {**RUN, "experts": 0}, "f": {**RUN, "experts": True}},
            ["runs.e.experts: expected an integer of at least 1, got 0", "runs.f.experts: expected an integer"],
        ),
        ({"a": {"configs": "a.yaml"}}, ["runs.a.configs: expected a list of YAML files, got 'a.yaml'"]),
        ({"mix": RUN}, ["runs.mix (mix) and priors.mix (mix) would have the same name"]),
        ({"n" * 101: RUN, "e\u0301": RUN}, ["a name has at most 100 bytes", "normal form C"]),
    ],
)
def test_invalid_names_are_refused_all_at_once(runs, messages, study):
    first = next(iter(runs))
    priors = {"mix": {"run": first, "at": 2, "prior": "Gaussian"}} if "mix" in runs else {}
    with pytest.raises(InputError) as refusal:
        plan(study(runs=runs, contenders={"c": {"run": first}}, priors=priors))
    assert all(message in str(refusal.value) for message in messages), str(refusal.value)


def test_numbers_are_not_names_and_names_of_contenders_are_checked(tmp_path, study):
    study()
    (tmp_path / "s.yaml").write_text(
        "runs: {1: {configs: [a.yaml]}, yes: {configs: [a.yaml]}}\n"
        "contenders: {a/b: {run: 1}, C: {run: 1}, c: {run: 1}, __metadata__: {run: 1}}\ndata: d\nprotocol: digits\n",
        encoding="utf-8",
    )
    with pytest.raises(InputError) as refusal:
        plan(tmp_path / "s.yaml")
    text = str(refusal.value)
    assert "runs: 1: a name is text; write it in quotes" in text
    assert "contenders: 'a/b': a name consists of" in text
    assert "contenders: '__metadata__': a name begins with" in text
    assert "contenders (C) and contenders (c) would have the same name" in text


def test_names_used_in_the_experiments_are_valid(study):
    names = [
        "reduced, half",
        "4x, CDE",
        "experts, 8 steps",
        "reduced (mapped), 10 steps",
        "größer",
        "v1.0",
        "50 % more",
    ]
    file = study(runs=dict.fromkeys(names, RUN), contenders={n: {"run": n} for n in names})
    todo = plan(file, None, 0, [("runs.v1.0.set.model.lr", 1)])
    assert [job.name for job in todo.jobs] == names
    assert ["--model.lr" in job.argv for job in todo.jobs] == [n == "v1.0" for n in names]


def test_references_by_number_are_resolved_and_lists_are_refused(study, tmp_path):
    runs = {"1": RUN, "2": {**RUN, "warm_start": 1}}
    todo = plan(study(runs=runs, contenders={"a": {"run": 1, "prior": 2}}), tmp_path / "out")
    (contender,) = todo.evaluation["contenders"]
    assert (contender["source"], contender["prior"]) == (str(tmp_path / "out" / "1"), str(tmp_path / "out" / "2"))
    assert todo.jobs[1].needs == ("1",)
    for odd in ({"run": ["1"]}, {"run": "1", "prior": ["2"]}):
        with pytest.raises(InputError, match=r"contenders.a.(run|prior): no (run|prior) "):
            plan(study(runs=runs, contenders={"a": odd}))


def test_a_sweep_does_not_replace_contenders_of_the_study(study):
    sweep = {"run": "shared", "cuts": [2], "priors": {"mix": "Gaussian"}}
    for key, name in (("contenders", "cut 2, N(0, I)"), ("contenders", "whole chain"), ("contenders", "cut 2, mix")):
        with pytest.raises(InputError, match=re.escape(f"{key}.{name}: diffusion_time generates some of these names")):
            plan(study(diffusion_time=sweep, contenders={name: {"run": "experts"}}))
    own = {"mix_2": {"run": "shared", "at": 3, "prior": "Gaussian"}}
    with pytest.raises(InputError, match=r"priors.mix_2: diffusion_time generates"):
        plan(study(diffusion_time=sweep, priors=own))
    with pytest.raises(InputError, match="contains a row twice"):
        plan(study(diffusion_time={**sweep, "cuts": [2, 3, 2]}))


@pytest.mark.parametrize("key", ["model.init_args.expert", "model.init_args.warm_start", "model.rows"])
def test_keys_that_the_study_sets_are_refused_however_they_are_spelt(key, study):
    with pytest.raises(InputError, match=f"runs.experts: set: {key}: set by the study"):
        plan(study(), assigned=[(f"runs.experts.set.{key}", 1)])
    if key == "model.rows":  # of a single network it is an option like any other
        assert "--model.rows" in plan(study(), assigned=[("runs.shared.set.model.rows", [1])]).jobs[0].argv


def test_keys_that_the_study_sets_are_refused_in_runs(study):
    with pytest.raises(InputError, match=r"runs.a: set: seed_everything: set by the study; change seed instead"):
        plan(study(runs={"a": {**RUN, "set": {"seed_everything": 4}}}, contenders={"a": {"run": "a"}}))
    with pytest.raises(InputError, match=r"'experts' is not an earlier run of a single network"):
        plan(study(runs={**STUDY["runs"], "late": {**RUN, "warm_start": "experts"}}))


def begin(todo):
    """Claim the folder of a study, and create the run folder of a training that has started."""
    todo = todo.claim()
    todo.jobs[0].folder.mkdir(exist_ok=True)
    return todo


def test_jobs_read_copies_and_an_edit_is_refused_with_key_and_values(study, tmp_path):
    file, out = study(), tmp_path / "out"
    (tmp_path / "a.yaml").write_text("model: {objective: V, lr: 0.1}\n", encoding="utf-8")
    first = plan(file, out).claim()
    words = [word for job in first.jobs for option, word in pairwise(job.argv) if option == "--config"]
    assert {Path(word) for word in words} == {out / "configs" / "a.yaml", out / "configs" / "b.yaml"}
    (tmp_path / "a.yaml").write_text("model: {objective: X0, lr: 0.1}\n", encoding="utf-8")
    assert (out / "configs" / "a.yaml").read_text(encoding="utf-8") == "model: {objective: V, lr: 0.1}\n"
    assert any("the plan is replaced" in line for line in plan(file, out).compare())  # no training has started
    first.jobs[0].folder.mkdir()
    with pytest.raises(InputError, match=r"another study \(.*a.yaml: model.objective: 'V' there, 'X0' now\)"):
        plan(file, out).compare()
    (tmp_path / "a.yaml").write_text("# as it was\nmodel: {lr: 0.1, objective: V}\n", encoding="utf-8")
    again = plan(file, out)
    assert again.compare() == []
    assert [job.argv for job in again.claim().jobs] == [job.argv for job in first.jobs]
    assert (out / "configs" / "a.yaml").read_text(encoding="utf-8") == "model: {objective: V, lr: 0.1}\n"
    (out / "configs" / "a.yaml").write_text("model: {objective: Eps}\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"configs/a.yaml: has been changed since it was copied"):
        plan(file, out).compare()


def test_an_edited_config_of_a_fleet_is_refused(study, tmp_path):
    runs, contenders = {"f": {"fleet": "sub/fleet.yaml"}}, {"f": {"run": "f"}}
    file, out = study(runs=runs, contenders=contenders), tmp_path / "out"
    (tmp_path / "sub").mkdir()
    fleet = {"configs": ["../b.yaml"], "start": {"shared": {"configs": ["c.yaml"], "images": 8}}, "budget": 99}
    (tmp_path / "sub" / "fleet.yaml").write_text(json.dumps(fleet), encoding="utf-8")
    (tmp_path / "sub" / "c.yaml").write_text("x: 1\n", encoding="utf-8")
    todo = plan(file, out).claim()
    assert set(todo.configs) == {"sub/fleet.yaml", "b.yaml", "sub/c.yaml"}
    (out / "f" / "leases").mkdir(parents=True)
    (tmp_path / "sub" / "c.yaml").write_text("x: 2\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"c.yaml: x: 1 there, 2 now"):
        plan(file, out).compare()


def test_the_evaluation_may_change_when_a_study_resumes(study, tmp_path):
    out = tmp_path / "out"
    begin(plan(study(n=100, notes="a"), out))
    more = {**STUDY["contenders"], "more": {"run": "shared", "sampler": "Ancestral"}}
    todo = plan(study(n=200, notes="b", title="c", contenders=more), out)
    assert todo.compare() == [
        "n: 100 there, 200 now",
        "contenders.more.run: nothing there, 'shared' now",
        "contenders.more.sampler: nothing there, 'Ancestral' now",
    ]
    todo.claim()
    assert plan(study(n=200, notes="b", title="c", contenders=more), out).compare() == []
    runs = {**STUDY["runs"], "late": RUN}
    assert plan(study(runs=runs), out).claim().members["late"] == ["late"]  # a run may be added, too
    with pytest.raises(InputError, match=r"runs.shared.set.trainer.max_steps: 5 there, 6 now"):
        plan(study(runs={**runs, "shared": {**RUN, "set": {"trainer.max_steps": 6}}}), out).compare()
    with pytest.raises(InputError, match=r"runs.late.configs: \['a.yaml'\] there, nothing now"):
        plan(study(), out).compare()


def test_a_study_killed_while_it_claims_its_folder_starts_again(study, tmp_path):
    out = tmp_path / "out"
    first = plan(study(), out).claim()
    (out / "plan.json").unlink()  # it is written last
    assert [job.argv for job in plan(study(), out).claim().jobs] == [job.argv for job in first.jobs]


def test_a_plan_of_an_older_version_is_continued(study, tmp_path):
    out = tmp_path / "out"
    begin(plan(study(), out))
    content = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    content = {k: v for k, v in content.items() if k != "schema"}
    content["configs"] = {key: entry["sha256"] for key, entry in content["configs"].items()}
    (out / "plan.json").write_text(json.dumps(content), encoding="utf-8")
    for copy in (out / "configs").iterdir():
        copy.unlink()
    todo = plan(study(), out)
    assert todo.compare() == []
    assert (out / "configs" / "a.yaml") in map(Path, todo.claim().jobs[0].argv)
    assert (out / "configs" / "a.yaml").exists()
    (out / "plan.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match=r"plan.json: damaged: not the plan of a study"):
        plan(study(), out)


def test_studies_are_pooled_if_they_differ_only_in_the_seed(study, tmp_path):
    for seed in (0, 1):
        plan(study(), tmp_path / f"s{seed}", seed).claim()
    refuse_no_repeats([tmp_path / "s0", tmp_path / "s1", tmp_path])  # folders without a study are ignored
    plan(study(), tmp_path / "again", 1).claim()
    with pytest.raises(InputError, match=r"again: has the same seed 1 as .*s1"):
        refuse_no_repeats([tmp_path / f for f in ("s0", "s1", "again")])
    plan(study(), tmp_path / "other", 2, [("runs.shared.set.trainer.max_steps", 9)]).claim()
    with pytest.raises(InputError, match=r"other: runs.shared.set.trainer.max_steps: 5 there, 9 now"):
        refuse_no_repeats([tmp_path / "s0", tmp_path / "other"])
    file = study()
    (tmp_path / "b.yaml").write_text("model: {objective: X0}", encoding="utf-8")
    plan(file, tmp_path / "edited", 3).claim()
    with pytest.raises(InputError, match=r"edited: b.yaml: model.objective: nothing there, 'X0' now"):
        refuse_no_repeats([tmp_path / "s0", tmp_path / "edited"])


def test_runs_used_for_the_wrong_purpose_are_refused(study, tmp_path):
    inpainting = ComponentStates([1, 8, 8], observation=Observation(Inpainting()), S=6)
    runs = dict.fromkeys(("model", "flow", "other", "cde", "scales"), RUN)
    contenders = {"a": {"run": "model", "prior": "flow"}, "b": {"run": "model"}}
    todo = plan(study(runs=runs, contenders=contenders), tmp_path / "out")
    table, cut = LatentStates(S=8), LatentStates(S=8).truncate(3)
    roles = {name: Role("model", "ReducedStates", table) for name in runs} | {"flow": Role("prior", "PriorModule", cut)}
    assert refuse_roles(todo, roles) is False
    roles["cde"] = Role("model", "ReducedStates", inpainting)
    todo = plan(study(runs=runs, contenders={**contenders, "c": {"run": "cde"}}), tmp_path / "out")
    assert refuse_roles(todo, roles) is True
    wrong = {"a": {"run": "flow"}, "b": {"run": "model", "prior": "other"}, "c": {"run": "cde", "prior": "flow"}}
    wrong["d"] = {"run": "cde", "prior": "cut:2"}
    warm = {**runs, "late": {**RUN, "warm_start": "flow"}, "odd": RUN}
    priors = {"p": {"run": "flow", "at": 2, "prior": "Gaussian"}, "q": {"run": "cde", "at": 2, "prior": "Gaussian"}}
    todo = plan(study(runs=warm, contenders=wrong, priors=priors, bits={"n": 9}), tmp_path / "out")
    more = {"late": Role("model", "ReducedStates", table), "odd": Role("", "BoringModel", None)}
    with pytest.raises(InputError) as refusal:
        refuse_roles(todo, {**roles, **more})
    for line in (
        "contenders.a.run: flow trains a prior (PriorModule), but a model is required",
        "contenders.b.prior: other trains a model (ReducedStates), but a prior is required",
        "contenders.c.prior: flow is at row 3 of a table that differs from cde's",
        "priors.p.run: flow trains a prior (PriorModule), but a model is required",
        f"priors.q.run: cde has a table of {inpainting.K} columns",
        "contenders.d.prior: cde has a table of 2 columns, but a chain is cut only on tables of one column",
        "contenders.c: cde has a table of 2 columns, but bits are measured only on tables of one column",
        "runs.late.warm_start: flow trains a prior",
        "runs.odd: its config defines a BoringModel, which is neither a model of images nor a prior",
    ):
        assert line in str(refusal.value)


def test_a_cut_is_checked_against_the_table_of_its_run(study, tmp_path):
    contenders = {"a": {"run": "experts", "prior": "cut:3"}, "b": {"run": "shared", "prior": "cut:3"}}
    todo = plan(study(contenders=contenders), tmp_path / "out")
    asked = []

    def states_of(argv, rows=8):
        asked.append(argv[-1])
        return LatentStates(S=rows)

    refuse_cuts(todo, states_of, {})
    assert asked == [str(tmp_path / "out" / "experts" / "expert_001"), str(tmp_path / "out" / "shared")]
    with pytest.raises(InputError, match=r"experts_composite: .*3"):
        refuse_cuts(todo, lambda argv: LatentStates(S=2), {})
