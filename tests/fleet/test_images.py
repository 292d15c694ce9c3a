"""Plan, trainer, card, curve, board and simulation count images in the same way."""

import json

import pytest
import yaml
from lightning.pytorch.callbacks import Callback

from lightning_tdisent.cli import describe, fits, main
from lightning_tdisent.errors import InputError
from lightning_tdisent.fleet.forecast import loads_of
from lightning_tdisent.fleet.local import refuse_undone
from lightning_tdisent.fleet.plan import Fleet
from lightning_tdisent.fleet.rounds import targets
from lightning_tdisent.fleet.state import FleetWork
from lightning_tdisent.fleet.status import summary, tiles
from lightning_tdisent.fleet.work import Session, work_through
from lightning_tdisent.lit.entry import run as fit
from lightning_tdisent.models.card import read_card


def train(fleet, *only):
    session, work = Session(only), FleetWork(fleet, describe)
    work_through(work, fits, session)
    refuse_undone(work, session)
    return work


@pytest.mark.parametrize(("accumulate", "steps"), [(2, 4), (3, 2)])
def test_accumulated_batches_are_counted_everywhere(planned, accumulate, steps):
    images = steps * accumulate * 8
    fleet = planned(experts=2, budget=2 * images + 7, set={"trainer.accumulate_grad_batches": accumulate})
    assert [(e.images, e.batch, e.parts) for e in fleet.experts] == [(images, 8, accumulate)] * 2
    facts = fleet.check(describe)
    assert [(job.images, fact.max_steps) for job, fact in zip(fleet.jobs(), facts, strict=True)] == [
        (images, steps)
    ] * 2
    loads = loads_of(fleet, facts)
    assert [load.images for load in loads] == [images] * 2
    train(fleet)
    assert summary(tiles(FleetWork(fleet, describe))) == f"2 jobs: 2 done, {2 * images} of {2 * images} images (100%)"
    for e in fleet.experts:
        card = read_card(fleet.root / e.name / "model.safetensors")
        assert (card.images_seen, card.steps) == (images, steps)
        assert json.loads((fleet.root / e.name / "curve.json").read_text(encoding="utf-8"))["points"][-1][0] <= images


def test_a_shared_model_and_an_adaptive_budget_accumulate_as_well(planned):
    budget = {"images": 32 + 320, "rule": "adaptive", "rounds": 1}
    shared = {"shared": {"configs": ["shared.yaml"], "images": 40, "set": {"trainer.accumulate_grad_batches": 4}}}
    common = {"trainer.accumulate_grad_batches": 2, "trainer.val_check_interval": 2}
    fleet = planned(experts=2, budget=budget, start=shared, set=common)
    assert (fleet.shared["images"], fleet.shared["parts"]) == (32, 4)
    train(fleet)
    number, images = targets(fleet)
    assert number == 1
    assert 320 - 16 < sum(images.values()) <= 320
    assert all(n % 16 == 0 for n in images.values())
    cards = {e.name: read_card(fleet.root / e.name / "model.safetensors") for e in fleet.experts}
    assert {name: card.images_seen for name, card in cards.items()} == images
    assert [card.parents[0]["images_seen"] for card in cards.values()] == [32, 32]


def test_two_devices_are_counted(planned):
    fleet = planned(experts=2, budget=2 * 64, set={"trainer.devices": 2, "trainer.strategy": "ddp_fork"})
    assert [(e.images, e.parts) for e in fleet.experts] == [(64, 2)] * 2
    train(fleet, "expert_001")
    card = read_card(fleet.root / "expert_001" / "model.safetensors")
    assert (card.images_seen, card.steps) == (64, 4)


def test_a_strategy_that_repeats_the_command_line_is_refused(planned):
    with pytest.raises(InputError, match=r"trainer.devices: 2 .*trainer.strategy: ddp_fork"):
        planned(set={"trainer.devices": 2, "trainer.strategy": "ddp"})


def test_a_plan_uses_one_device_if_the_config_uses_all(planned):
    two = {"trainer.devices": 2, "trainer.strategy": "ddp_fork"}
    for fleet, devices in ((planned(), "1"), (planned(set=two), "2")):
        argv = fleet.jobs()[0].argv
        assert argv[argv.index("--trainer.devices") + 1] == devices


def test_a_machine_with_another_number_of_batches_per_step_is_refused(planned):
    fleet = planned(experts=1, budget=64)
    other = Fleet.load(fleet.root, ["--trainer.accumulate_grad_batches", "2"])
    with pytest.raises(InputError, match=r"a step of its config has 2 batches .* its line in the plan has parts: 1"):
        train(other)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            {"images": 15, "parts": 2},
            "expert_001: 15 images are less than 2 batches of 8, so that nothing would be trained",
        ),
        ({"images": 0}, "images: expected an integer of at least 1, got 0"),
        ({"images": 7}, "7 images are less than one batch of 8"),
        ({"parts": 0}, r"parts: 0 \(expected the batches per step, at least 1\)"),
    ],
)
def test_a_line_that_trains_nothing_is_refused(planned, edit, message):
    fleet = planned()
    content = yaml.safe_load((fleet.root / "plan.yaml").read_text(encoding="utf-8"))
    content["experts"][0] |= edit
    (fleet.root / "plan.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        Fleet.load(fleet.root)


def test_a_shared_model_that_trains_nothing_is_refused(planned):
    fleet = planned(start={"shared": {"configs": ["shared.yaml"], "images": 32}}, budget=32 + 4 * 16)
    content = yaml.safe_load((fleet.root / "plan.yaml").read_text(encoding="utf-8"))
    content["shared"]["images"] = 0
    (fleet.root / "plan.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(InputError, match=r"shared\.images: expected at least one batch of 8 images, got 0"):
        Fleet.load(fleet.root)


def test_images_are_rounded_down_to_whole_steps(planned):
    fleet = planned()
    content = yaml.safe_load((fleet.root / "plan.yaml").read_text(encoding="utf-8"))
    content["experts"][0]["images"] = 39
    (fleet.root / "plan.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    fleet = Fleet.load(fleet.root)
    assert targets(fleet)[1]["expert_001"] == fleet.jobs()[0].images == 32


@pytest.mark.parametrize("limit", ["max_steps", "max_epochs", "limit_train_batches"])
def test_a_fit_of_nothing_is_refused(configs, tmp_path, capsys, limit):
    words = ["fit", "--config", str(configs / "expert.yaml"), "--run", str(tmp_path / "run"), f"--trainer.{limit}", "0"]
    assert main(words) == 2
    assert f"trainer.{limit}: 0 trains nothing" in capsys.readouterr().err


class Sizes(Callback):
    """Images seen at each optimizer step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(pl_module.images_seen)


@pytest.mark.parametrize(("accumulate", "batch"), [(2, 300), (3, 400), (4, 700), (3, 1500)])
def test_every_optimizer_step_sees_the_same_number_of_images(configs, tmp_path, accumulate, batch):
    # 1,500 training images: epochs of 5, 3, 2 and 1 batches
    sizes = Sizes()
    words = ["fit", "--config", str(configs / "expert.yaml"), "--run", str(tmp_path / "run"),
             "--trainer.max_steps", "5", "--trainer.accumulate_grad_batches", str(accumulate),
             "--data.batch_size", str(batch),
             "--trainer.val_check_interval", "100"]  # fmt: skip
    fit(words, [sizes])
    assert sizes.seen == [accumulate * batch * k for k in range(1, 6)]


@pytest.mark.parametrize(("key", "value"), [("limit_train_batches", 5), ("overfit_batches", 5)])
def test_limits_that_would_cut_a_step_short_are_refused(configs, tmp_path, capsys, key, value):
    words = ["fit", "--config", str(configs / "expert.yaml"), "--run", str(tmp_path / "run"), f"--trainer.{key}",
             str(value), "--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "100"]  # fmt: skip
    assert main(words) == 2
    assert f"trainer.{key}: 5 makes an epoch of 5 batches" in capsys.readouterr().err
    assert main([*words[:-5], "4", *words[-4:]]) == 0
