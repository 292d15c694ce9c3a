"""Rounds of an adaptive budget: cost, order and status."""

import dataclasses
import json

import fsspec
import pytest
from places import Shared

from lightning_tdisent.cli import describe, fits
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.fleet.rounds import targets
from lightning_tdisent.fleet.state import FleetWork
from lightning_tdisent.fleet.status import tiles
from lightning_tdisent.fleet.store import read_json
from lightning_tdisent.fleet.work import Session, work_through
from lightning_tdisent.lit.modules import SingleState
from lightning_tdisent.models.card import read_card
from lightning_tdisent.models.cost import flops, training_cost
from lightning_tdisent.networks.unet import UNet


def card(rows, rounds, images, seconds, parents=()):
    network = UNet([1, 8, 8], [8, 16], 1, mid_attention=False, groups=4)
    module = SingleState(network, LatentStates(S=4), rows=rows)
    return dataclasses.replace(
        module.card("ema", {"decay": 0.9, "steps": 1}), images_seen=images, seconds=seconds, rounds=rounds,
        parents=list(parents),
    )  # fmt: skip


def test_each_round_waits_for_its_longest_job():
    a = card(
        [1],
        {
            "0": {"images_seen": 75, "seconds": 7.5},
            "1": {"images_seen": 200, "seconds": 20.0},
            "2": {"images_seen": 383, "seconds": 38.3},
        },
        383,
        38.3,
    )
    b = card(
        [2],
        {
            "0": {"images_seen": 75, "seconds": 7.5},
            "1": {"images_seen": 80, "seconds": 8.0},
            "2": {"images_seen": 395, "seconds": 39.5},
        },
        395,
        39.5,
    )
    c = card([3], {"0": {"images_seen": 75, "seconds": 7.5}}, 75, 7.5)  # granted nothing more
    d = card([4], {"0": {"images_seen": 75, "seconds": 7.5}, "2": {"images_seen": 90, "seconds": 9.0}}, 90, 9.0)
    cost = training_cost([a, b, c, d])
    assert cost["images_seen_longest"] == 75 + (200 - 75) + (395 - 80) == 515
    assert cost["training_seconds_longest"] == pytest.approx(51.5)
    assert cost["images_seen"] == 383 + 395 + 75 + 90
    parent = {"sha256": "a", "network": a.network, "images_seen": 1000, "seconds": 100.0}
    warm = [dataclasses.replace(x, parents=[parent]) for x in (a, b, c, d)]
    assert training_cost(warm)["images_seen_longest"] == 1515
    assert training_cost([dataclasses.replace(x, rounds={}) for x in (a, b, c, d)])["images_seen_longest"] == 395


def test_validation_is_part_of_the_total_compute():
    one = dataclasses.replace(card([1], {}, 100, 1.0), validation={"passes": 60, "seconds": 0.5})
    parent = {"sha256": "a", "network": one.network, "images_seen": 50, "seconds": 2.0}
    parent["validation"] = {"passes": 30, "seconds": 0.25}
    cost = training_cost([dataclasses.replace(one, parents=[parent])])
    network = UNet([1, 8, 8], [8, 16], 1, mid_attention=False, groups=4).time_agnostic()
    assert cost["training_flops"] == 3 * 150 * flops(network)
    assert cost["validation_flops"] == 90 * flops(network)
    assert cost["total_flops"] == cost["training_flops"] + cost["validation_flops"]
    assert (cost["training_seconds"], cost["validation_seconds"]) == (3.0, 0.75)


def test_cards_curves_and_board_of_an_adaptive_fleet_agree(planned, digits):
    shared = {"shared": {"configs": ["shared.yaml"], "images": 64}}
    budget = {"images": 64 + 256, "rule": "adaptive", "first": 0.5, "rounds": 2}
    common = {"trainer.val_check_interval": 2, "trainer.limit_val_batches": 1.0}
    fleet = planned(experts=2, start=shared, budget=budget, set=common)
    work = FleetWork(fleet, describe)
    assert work_through(work, fits, Session()) == {}
    cards = {e.name: read_card(fleet.root / e.name / "model.safetensors") for e in fleet.experts}
    rounds = {k: read_json(fleet.store, f"rounds/{k:04d}.json")["images"] for k in (1, 2)}
    assert targets(fleet) == (2, rounds[2])
    held = 297
    longest = {0: 64, 1: 0, 2: 0}
    for name, found in cards.items():
        ends = {0: 64, 1: rounds[1][name], 2: rounds[2][name]}
        granted = [k for k in ends if k == 0 or ends[k] > ends[k - 1]]
        ended = {str(k): ends[k] for k in granted} if len(granted) > 1 else {}
        assert {k: end["images_seen"] for k, end in found.rounds.items()} == ended
        assert found.images_seen == ends[2]
        for k in (1, 2):
            longest[k] = max(longest[k], ends[k] - ends[k - 1])
        points = json.loads((fleet.root / name / "curve.json").read_text(encoding="utf-8"))["points"]
        assert points[0][0] == 0
        assert points[-1][0] == ends[2]
        assert sum(points[0][1]) / 2 == pytest.approx(found.errors["start"], rel=1e-12)
        assert found.validation["passes"] == 2 * held * len(points)  # two rows each
        decided = read_json(fleet.store, "rounds/0001.json")["curves"][name]
        assert decided[0][0] == 0
        tile = next(t for t in tiles(work) if t.name == name)
        assert tile.x0 == pytest.approx(min(found.errors.values()), rel=1e-12)
    cost = training_cost(list(cards.values()))
    assert cost["images_seen_longest"] == 64 + sum(longest.values())
    assert cost["images_seen"] == 64 + sum(rounds[2].values()) <= 320


def test_the_board_of_an_object_store_shows_the_shared_model_s_error(planned, tmp_path):
    fsspec.register_implementation("shared", Shared, clobber=True)
    shared = {"shared": {"configs": ["shared.yaml"], "images": 32}}
    fleet = planned(f"shared:/{tmp_path}/board", start=shared, budget=32 + 128)
    for name, error in (("shared", 0.5), ("expert_001", 0.25)):
        curve = {"points": [[0, [1.0]], [32, [error]]], "variances": [1.0]}
        fleet.store.write(f"{fleet.folder(name)}/curve.json", json.dumps(curve).encode())
        rows = {"rows": [1], "fingerprint": fleet.table["fingerprint"]} if name != "shared" else {}
        fleet.store.write(f"done/{name}.json", json.dumps({"images_seen": 32, **rows}).encode())
    found = {tile.name: tile.x0 for tile in tiles(FleetWork(fleet, describe))}
    assert (found["shared"], found["expert_001"]) == (0.5, 0.25)


def test_warm_started_experts_trained_together_equal_those_trained_alone(planned, same_weights):
    shared = {"shared": {"configs": ["shared.yaml"], "images": 64}}
    alone, beside = (planned(start=shared, budget=64 + 4 * 24) for _ in range(2))
    for fleet, count in ((alone, 1), (beside, 4)):
        assert work_through(FleetWork(fleet, describe), fits, Session(together=count)) == {}
    for e in alone.experts:
        same_weights(alone.root / e.name, beside.root / e.name)
        one, other = (read_card(fleet.root / e.name / "model.safetensors") for fleet in (alone, beside))
        assert one.errors == other.errors
        assert (one.weights, one.average, one.validation["passes"]) == (
            other.weights,
            other.average,
            other.validation["passes"],
        )
        curves = [
            json.loads((fleet.root / e.name / "curve.json").read_text(encoding="utf-8")) for fleet in (alone, beside)
        ]
        assert curves[0] == curves[1]
        assert curves[0]["points"][0][0] == 0
