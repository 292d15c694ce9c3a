import dataclasses
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tdisent.cli import describe, main
from lightning_tdisent.cli.trainings import open_fleet
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError
from lightning_tdisent.fleet.draft import draft
from lightning_tdisent.fleet.keys import value_of
from lightning_tdisent.fleet.lease import Watch, take
from lightning_tdisent.fleet.plan import Fleet
from lightning_tdisent.fleet.planned import Planned, refuse_unfit
from lightning_tdisent.fleet.state import FleetWork

BY_EPOCH = {"trainer.val_check_interval": 0.5, "trainer.check_val_every_n_epoch": 1}


def edit(fleet, old, new):
    file = fleet.store.path("plan.yaml")
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")
    return file


def test_a_plan_has_a_line_for_each_expert_and_reads_back_as_it_was(planned):
    fleet = planned(title="four")
    text = fleet.store.path("plan.yaml").read_text(encoding="utf-8")
    assert len([line for line in text.splitlines() if line.startswith("- {name: expert_")]) == 4
    assert Fleet.load(fleet.store.where).content() == fleet.content()
    assert fleet.table["fingerprint"] == LatentStates(S=4).fingerprint
    assert fleet.table["index"] == [250, 500, 750, 1000]
    assert [e.rows for e in fleet.experts] == [[1], [2], [3], [4]]
    assert {e.seed for e in fleet.experts} == {3}
    assert [job.images for job in fleet.jobs()] == [32] * 4
    assert [f.max_steps for f in fleet.check(describe)] == [4] * 4


def test_the_same_yaml_gives_the_same_plan_and_another_is_refused_after_the_start(planned, tmp_path, capsys):
    fleet = planned(tmp_path / "fleet")
    assert planned(tmp_path / "fleet").content() == fleet.content()
    assert capsys.readouterr().out == ""
    edited = fleet.store.read("plan.yaml")
    other = planned(tmp_path / "fleet", seed=4)  # nothing has begun
    assert Fleet.load(other.store.where).seed == 4
    said = capsys.readouterr().out.splitlines()
    assert "it is replaced, and kept as plan.previous.yaml" in said[0]
    assert said[1:3] == ["  - seed: 3 there, 4 now", "  - experts[0].seed: 3 there, 4 now"]
    assert fleet.store.read("plan.previous.yaml") == edited  # including edits by hand
    take(other.store, "expert_001", Watch()).release()
    with pytest.raises(InputError, match="holds another plan, which has started"):
        planned(tmp_path / "fleet", seed=5)


def test_a_moved_fleet_has_the_same_plan_and_an_edit_is_named_by_its_keys(planned, tmp_path):
    fleet = planned(tmp_path / "fleet")
    take(fleet.store, "expert_001", Watch()).release()
    text = fleet.store.path("plan.yaml").read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    (tmp_path / "fleet").rename(tmp_path / "moved")
    moved = planned(tmp_path / "moved")
    assert moved.store.path("plan.yaml").read_text(encoding="utf-8") == text
    assert all(str(tmp_path / "moved") in " ".join(job.argv) for job in moved.jobs())
    assert not any(f"{tmp_path / 'fleet'}/" in " ".join(job.argv) for job in moved.jobs())
    edit(moved, "images: 32", "images: 64")
    with pytest.raises(InputError, match=r"another plan, which has started \(experts\[0\].images: 64 there, 32 now"):
        planned(tmp_path / "moved")


def test_every_part_of_the_yaml_reaches_the_command_of_its_expert(planned):
    fleet = planned(
        start={"shared": {"configs": ["shared.yaml"], "images": 40}},
        budget={"images": 40 + 8 * 20, "rule": "explicit", "shares": [8, 4, 4, 4], "least": 0},
        for_rows={"4": {"model.network.channels": [8, 8], "model.network.conditioning": "none"}},
        set={"model.lr": 0.02},
    )
    shared, *experts = fleet.jobs()
    assert shared.folder == fleet.root / "start" / "shared"
    cost = fleet.experts[3].cost  # the small network is cheaper, which leaves one more batch for the others
    assert 0.4 < cost < 0.6
    assert (shared.images, [job.images for job in experts]) == (40, [72, 32, 32, 32])
    assert 72 + 32 + 32 + 32 * cost <= 160
    assert [job.needs for job in experts] == [("shared",)] * 3 + [()]  # the last has another network
    words = " ".join(experts[0].argv)
    for part in (
        f"--config {fleet.root}/configs/yaml_expert.yaml",
        "--model.lr 0.02",
        "--model.rows [1]",
        f"--model.warm_start {fleet.root}/start/shared",
        "--seed_everything 3",
        "--data.batch_size 8",
        "--trainer.max_steps 9",
        f"--run {fleet.root}/expert_001",
    ):
        assert part in words
    assert "--model.network.channels [8, 8]" in " ".join(experts[3].argv)
    assert 0.1 < fleet.experts[3].cost < 1.0 == fleet.experts[0].cost
    facts = fleet.check(describe)
    assert facts[4].weights < facts[1].weights


def test_each_kind_of_start_gives_its_initial_weights(planned, configs):
    chain = planned(start="neighbour")
    assert [e.start for e in chain.experts] == ["expert_002", "expert_003", "expert_004", "scratch"]
    scratch = planned(start="scratch")
    assert [e.seed for e in scratch.experts] == [3, 4, 5, 6]
    assert "--data.seed 3" in " ".join(scratch.jobs()[2].argv)  # all experts read images in the same order
    (configs / "weights.safetensors").touch()
    warm = planned(start="weights.safetensors")
    assert warm.experts[0].start == str(configs / "weights.safetensors")
    with pytest.raises(InputError, match="no file or folder 'wrm'"):
        planned(start="wrm")


@settings(max_examples=80, deadline=None)
@given(owner=st.lists(st.integers(0, 4), min_size=1, max_size=12), spoil=st.sampled_from(["", "lose", "double", "far"]))
def test_rows_are_owned_once_or_each_wrong_row_is_named(owner, spoil):
    S = len(owner)
    owned: dict[int, list[int]] = {}
    for s, k in enumerate(owner, 1):
        owned.setdefault(k, []).append(s)
    experts = [Planned(f"e{k}", rows, 8, 8, 0) for k, rows in owned.items()]
    first = experts[0]
    if not spoil:
        refuse_unfit(experts, S, False, "here")
        return
    if spoil == "lose":
        lost = first.rows[-1]
        changed = [dataclasses.replace(first, rows=first.rows[:-1]), *experts[1:]]
        message = f"row {lost} is owned by no expert"
    elif spoil == "double":
        changed = [*experts, Planned("twin", [first.rows[0]], 8, 8, 0)]
        message = f"row {first.rows[0]} is owned by {first.name} and twin"
    else:
        changed = [dataclasses.replace(first, rows=[*first.rows, S + 2]), *experts[1:]]
        message = f"row {S + 2} of {first.name} is not among 1..{S}"
    with pytest.raises(InputError, match=re.escape(message)):
        refuse_unfit(changed, S, False, "here")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rows: [2]", "rows: [3]", "row 2 is owned by no expert\n  - row 3 is owned by expert_002 and expert_003"),
        ("rows: [2]", "rows: [2, 3]", "row 3 is owned by expert_002 and expert_003"),
        ("rows: [1]", "rows: [true]", "rows: [True] (expected ascending row numbers)"),
        ("rows: [2]", "rows: two", r"experts\[1\] (expert_002): rows: 'two'"),
        ("name: expert_002", "name: expert_003", "two experts are called expert_003"),
        (
            "name: expert_002",
            "name: ../x",
            "name: '../x' (a name consists of letters, digits and any of '._-+', not '/'",
        ),
        ("name: expert_002", "name: leases", "name: 'leases' (this name is reserved"),
        ("name: expert_002", "name: '002'", "name: '002' (numbers stand for expert_NNN"),
        ("name: expert_002", "name: 2", "name: 2 (a name is text; write it in quotes"),
        (
            "name: expert_002",
            "name: EXPERT_003",
            "expert (EXPERT_003) and expert (expert_003) would have the same name",
        ),
        ("name: expert_002", "nam: x", "unknown key 'nam'. Did you mean 'name'"),
        ("rows: [2], images: 32", "rows: [2], images: 3", "expert_002: 3 images are less than one batch of 8"),
        ("rows: [2], images: 32", "rows: [2], images: many", "images: expected an integer of at least 1, got 'many'"),
        ("start: scratch}", "start: shared}", "expert_001 starts from the shared model, but the plan has none"),
        ("seed: 3, start", "seed: -3, start", "seed: expected an integer in [0, 2^32), got -3"),
        (
            "shared: null",
            "shared: {configs: [a], images: 8, batch: 8}",
            "shared: configs: expected a mapping, got ['a']",
        ),
        ("title: fleet", "title: [1]", "title: expected text, got [1]"),
        ("schema: 1", "schema: 9", "schema 9, made by a newer version; this one (0.1.0) reads 1"),
        ("schema: 1", "schema: [", "not valid YAML"),
        ("schema: 1", "schema: 2\nschema: 1", "schema: duplicate key"),
        (
            "seed: 3, start: scratch}",
            "seed: 3, start: scratch, set: {seed_everything: 1}}",
            "set by the plan itself; change seed instead",
        ),
        ("table: {", "table: null # {", "table: expected a mapping, got None"),
    ],
)
def test_an_edited_plan_that_cannot_be_run_is_refused(old, new, message, planned):
    fleet = planned()
    edit(fleet, old, new)
    with pytest.raises(InputError) as refusal:
        Fleet.load(fleet.store.where)
    assert message.replace("\\", "") in str(refusal.value)
    assert "plan.yaml" in str(refusal.value)


def test_a_study_changes_single_keys_of_a_budget(configs, tmp_path):
    file = configs / "fleet.yaml"
    content = {"configs": ["expert.yaml"], "budget": {"images": 128, "rule": "explicit", "shares": [3, 1, 2, 2]}}
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    fleet = draft(file, describe, tmp_path / "f", changes={"budget": {"images": 256}})
    assert (fleet.budget.images, fleet.budget.rule, fleet.budget.shares) == (256, "explicit", (3, 1, 2, 2))


@pytest.mark.parametrize("key", ["run", "seed_everything", "model.init_args.expert", "model.rows", "trainer.max_steps"])
def test_what_the_plan_sets_is_not_set_on_one_machine(key, planned):
    with pytest.raises(InputError, match=f"--set: {key}: set by the plan itself"):
        open_fleet(planned().store.where, {key: 1})


def test_experts_that_wait_for_each_other_are_refused(planned):
    fleet = planned(start="neighbour")
    edit(fleet, "start: scratch", "start: expert_001")
    with pytest.raises(InputError, match="expert_001 starts from expert_002, which waits for expert_001"):
        Fleet.load(fleet.store.where)


def test_a_changed_config_or_table_is_refused(planned):
    fleet = planned()
    edit(fleet, fleet.table["fingerprint"], "0" * 16)
    with pytest.raises(
        InputError, match=f"expert_001: its config defines a table with fingerprint {fleet.table['fingerprint']}"
    ):
        Fleet.load(fleet.store.where).check(describe)
    fleet = planned()
    edit(fleet, "set: {}", "set: {model.lrr: 1}")
    with pytest.raises(InputError, match=r"expert_001: .*lrr"):
        Fleet.load(fleet.store.where).check(describe)
    fleet.store.path("configs/yaml_expert.yaml").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match=r"configs/yaml_expert.yaml has been changed. The configs of a fleet must"):
        Fleet.load(fleet.store.where)
    fleet.store.path("configs/yaml_expert.yaml").unlink()
    with pytest.raises(InputError, match=r"configs/yaml_expert.yaml is missing"):
        Fleet.load(fleet.store.where)
    with pytest.raises(InputError, match="there is no plan here"):
        Fleet.load(fleet.root / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"configs": ["exprt.yaml"]}, "exprt.yaml: no such file. Did you mean 'expert.yaml'"),
        ({"set": {"model.lrr": 3}}, "/yaml/expert.yaml: "),
        ({"configs": ["shared.yaml"]}, "an expert must be a SingleState"),
        ({"budgt": 3}, "unknown key 'budgt'. Did you mean 'budget'"),
        ({"experts": 5}, "5 owners cannot share 4 rows"),
        ({"experts": 2, "rows": [[1, 2, 3, 4]]}, "experts and rows are both given"),
        ({"rows": [[1], [2], [4]]}, "row 3 is owned by no expert"),
        (
            {"for_rows": {"1..2": {"model.lr": 0.1}, "2": {"model.lr": 0.2}}},
            "model.lr of rows [2] is 0.1 in 1..2 and 0.2 in 2",
        ),
        ({"for_rows": {"1..9": {}}}, "'1..9' is not a range FIRST..LAST within 1..4"),
        ({"experts": 2, "for_rows": {"2..3": {}}}, "contains only some of the rows [1, 2] of one expert"),
        ({"budget": {"images": 20}}, "20 images for the experts are less than a batch of 8 for each of the 4"),
        ({"start": {"shred": {}}}, "unknown key 'shred'. Did you mean 'shared'"),
        ({"start": {"shared": {"configs": ["shared.yaml"], "images": 3}}}, "at least one batch of 8 images, got 3"),
        ({"set": {"model.decay": "cosine"}, "budget": {"images": 128, "rule": "adaptive"}}, "model.decay: constant"),
        ({"rows": [[1, 2], [3, 4, 9]]}, "rows: [9] are not among 1..4"),
        ({"seed": "abc"}, "seed: expected an integer in [0, 2^32), got 'abc'"),
        ({"batch": "abc"}, "batch: expected an integer of at least 1, got 'abc'"),
        ({"start": {"shared": None}}, "start.shared: expected a mapping with the keys"),
        ({"title": 17}, "fleet.yaml: title: expected text, got 17; write it in quotes"),
        ({"batch": 0}, "fleet.yaml: batch: expected an integer of at least 1, got 0"),
        ({"start": [1]}, "fleet.yaml: start: expected text or a mapping, got [1]"),
        ({"seed": 2**32}, "fleet.yaml: seed: expected an integer in [0, 2^32), got 4294967296"),
        ({"seed": 2**32 - 3}, "seed of expert_004: expected an integer in [0, 2^32), got 4294967296"),
        ({"budget": {"images": True}}, "images: expected the images of all jobs, an integer of at least 1, got True"),
        ({"set": [1]}, "set: expected a mapping of config keys, got [1]"),
        ({"set": {"trainer.max_steps": 3}}, "trainer.max_steps: set by the plan itself; change images instead"),
        ({"for_rows": {"1": {"model.rows": [2]}}}, "model.rows: set by the plan itself; change rows instead"),
        ({"budget": {"images": 256, "rule": "adaptive", "rounds": 2.5}}, "rounds: expected an integer, got 2.5"),
        (
            {"budget": {"images": 256, "rule": "explicit", "shares": ["a"] * 4}},
            "shares: expected finite numbers of at least 0",
        ),
        ({"set": BY_EPOCH, "budget": {"images": 256, "rule": "adaptive"}}, "trainer.val_check_interval to a number of"),
        ({"budget": {"images": 256, "rule": "adaptive"}}, "requires at least 3 validations in the first 4 steps"),
    ],
)
def test_a_wrong_yaml_is_refused(changes, message, planned):
    with pytest.raises(InputError) as refusal:
        planned(**changes).check(describe)
    assert message in str(refusal.value)


def test_configs_of_the_same_name_have_separate_copies(planned, configs):
    for folder in ("a", "b"):
        (configs / folder / "x").mkdir(parents=True)
        (configs / folder / "x" / "c.yaml").write_text(
            f"model: {{lr: {0.1 if folder == 'a' else 0.2}}}", encoding="utf-8"
        )
    fleet = planned(configs=["expert.yaml", "a/x/c.yaml", "b/x/c.yaml"])
    assert len(fleet.configs) == 3
    assert len({fleet.store.read(name) for name in fleet.configs}) == 3


def test_an_edit_by_hand_that_a_new_plan_replaces_is_printed(planned, tmp_path, capsys):
    fleet = planned(tmp_path / "fleet")
    edited = edit(fleet, "name: expert_003, rows: [3], images: 32", "name: expert_003, rows: [3], images: 64")
    edited = edited.read_bytes()
    planned(tmp_path / "fleet")
    assert capsys.readouterr().out.splitlines()[1:] == ["  - experts[2].images: 64 there, 32 now"]
    assert fleet.store.read("plan.previous.yaml") == edited


def test_a_plan_that_is_refused_leaves_the_folder_as_it_was(configs, tmp_path, capsys):
    out, file = tmp_path / "out", configs / "fleet.yaml"
    shared = {"configs": ["shared.yaml"], "images": 32, "set": {"model.objective": "Eps"}}
    words = ["fleet", "plan", "--config", str(file), "--out", str(out)]

    def plan(**changes):
        content = yaml.safe_dump({"configs": ["expert.yaml"], "budget": 160, "seed": 3, **changes})
        file.write_text(content, encoding="utf-8")
        return main(words)

    assert plan(start={"shared": shared}) == 2
    assert "starts from shared" in capsys.readouterr().err
    assert not out.exists()
    assert plan() == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert plan(start={"shared": shared}) == 2
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_missing_initial_weights_are_named(planned):
    fleet = planned()
    edit(fleet, "start: scratch", "start: nowhere/at/all")
    with pytest.raises(InputError, match="expert_001: start: nowhere/at/all"):
        Fleet.load(fleet.store.where).check(describe)


def test_rows_may_be_split_in_any_way(planned, configs):
    fleet = planned(rows=[[1, 3], [2, 4]])
    assert [e.rows for e in fleet.experts] == [[1, 3], [2, 4]]
    assert yaml.safe_load(fleet.store.path("plan.yaml").read_text(encoding="utf-8"))["experts"][0]["rows"] == [1, 3]
    with pytest.raises(InputError, match="cannot be read"):
        draft(configs / "none.yaml", describe)


def test_a_shared_model_of_another_network_or_prediction_is_refused_before_it_is_trained(planned, configs):
    settings = {"model.network.channels": [16, 32]}
    fleet = planned(start={"shared": {"configs": ["shared.yaml"], "images": 32, "set": settings}}, budget=160)
    with pytest.raises(
        InputError, match=r"(?s)do not fit: expert_001 \(UNet.*\[8, 16\].*starts from shared \(.*16, 32"
    ):
        fleet.check(describe)
    fleet = planned(start={"shared": {"configs": ["shared.yaml"], "images": 32, "set": {"model.objective": "Eps"}}})
    with pytest.raises(InputError, match=r"v-prediction\) starts from shared .*eps-prediction"):
        fleet.check(describe)


def test_a_shared_model_counts_with_its_cost(planned):
    small = {"model.network.channels": [8, 8]}
    start = {"shared": {"configs": ["shared.yaml"], "images": 160, "set": small}}
    fleet = planned(start=start, budget=160 + 64)
    assert 0.4 < fleet.shared["cost"] < 0.6
    assert fleet.shared_cost == 160 * fleet.shared["cost"]
    spent = fleet.shared_cost + sum(e.images for e in fleet.experts)
    assert 160 + 64 - 8 < spent <= 160 + 64
    assert Fleet.load(fleet.root).shared_cost == fleet.shared_cost


def test_a_fleet_is_planned_in_an_empty_folder(planned, configs, tmp_path, capsys):
    for name in ("study.json", "plan.json", "config.yaml"):
        (tmp_path / name).mkdir()
        file = tmp_path / name / name
        file.write_text("{}", encoding="utf-8")
        with pytest.raises(InputError, match=rf"is not empty and holds no plan of a fleet \(it has {name}\); choose"):
            planned(tmp_path / name)
        assert [p.name for p in file.parent.iterdir()] == [name]
    (tmp_path / "cut short" / "configs").mkdir(parents=True)
    planned(tmp_path / "cut short")
    words = ["fleet", "plan", "--config", str(configs / "fleet.yaml"), "--out", str(tmp_path / "new")]
    assert main([*words, "--simulate", "0"]) == 2
    assert "--simulate.workers: at least 1, got 0" in capsys.readouterr().err
    assert main([*words, "--simulate", "2"]) == 2  # before the plan is written
    assert "the speed is not known, since no finished job of this fleet is on this machine" in capsys.readouterr().err
    assert main([*words, "--seed", "-1"]) == 2
    assert "--seed: expected an integer in [0, 2^32), got -1" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_images_are_not_lowered_below_what_was_seen(planned, capsys):
    fleet = planned()
    pointer = fleet.store.path("expert_002/checkpoints/newest.json")
    pointer.parent.mkdir(parents=True)
    pointer.write_text('{"step": 4}', encoding="utf-8")
    FleetWork(fleet, describe).refuse_fewer()
    edit(fleet, "name: expert_002, rows: [2], images: 32", "name: expert_002, rows: [2], images: 16")
    for words in (["plan"], ["run"]):
        assert main(["fleet", *words, str(fleet.root)]) == 2
        assert "plan.yaml: expert_002: images: 16 in the plan, 32 seen already" in capsys.readouterr().err
    FleetWork(Fleet.load(fleet.root), describe).refuse_fewer(["expert_001"])


def test_a_plan_of_an_adaptive_budget_says_what_is_its_first_round(configs, tmp_path, capsys):
    (configs / "fleet.yaml").write_text(
        "configs: [expert.yaml]\nset: {model.decay: constant, trainer.val_check_interval: 2}\n"
        "budget: {images: 512, rule: adaptive}\n",
        encoding="utf-8",
    )
    assert main(["fleet", "plan", "--config", str(configs / "fleet.yaml"), "--out", str(tmp_path / "f")]) == 0
    said = capsys.readouterr().out
    assert "all, first round" in said
    assert "first round: 256 of the budget of 512 images" in said
    assert "the other 256 follow from the error curves" in said


def test_only_the_images_of_a_started_expert_may_change(planned):
    fleet = planned()
    FleetWork(fleet, describe).begin(fleet.jobs()[1])
    edit(fleet, "name: expert_002, rows: [2], images: 32", "name: expert_002, rows: [2], images: 64")
    Fleet.load(fleet.root).refuse_late()
    edit(fleet, "rows: [2], images: 64, batch: 8, seed: 3", "rows: [2], images: 64, batch: 4, seed: 5")
    with pytest.raises(InputError) as refusal:
        Fleet.load(fleet.root).refuse_late()
    Fleet.load(fleet.root).refuse_late(["expert_001"])
    with pytest.raises(InputError, match="expert_002: batch was 8"):
        Fleet.load(fleet.root).refuse_late(["expert_002"])
    for text in ("expert_002: batch was 8 at its start, now it is 4", "seed was 3", "plan.yaml", "Restore the lines"):
        assert text in str(refusal.value)
    edit(fleet, "rows: [2], images: 64, batch: 4, seed: 5", "rows: [2], images: 64, batch: 8, seed: 3")
    edit(fleet, "name: expert_002", "name: expert_two")
    with pytest.raises(InputError, match="expert_002: was removed from the plan"):
        Fleet.load(fleet.root).refuse_late()


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("00:12:00:00", "00:12:00:00"),  # of trainer.max_time; 43200 in base 60
        ("010", "010"),
        ("8:00", "8:00"),
        ("0.5", 0.5),
        ("-3", -3),
        ("0", 0),
        ("[1, 2]", [1, 2]),
        ("{a: 1:30}", {"a": 90}),
        ("true", True),
        ("null", None),
    ],
)
def test_words_are_yaml_except_for_numbers_in_base_8_and_60(word, value):
    assert value_of(word, "--set.trainer.max_time") == value
