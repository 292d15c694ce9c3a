import json
import subprocess
import sys

import pytest
import torch

from lightning_tdisent.diffusion.components import ComponentStates
from lightning_tdisent.diffusion.objectives import P2, X0, Constant, Eps, Likelihood, MinSNR, Objective, V
from lightning_tdisent.diffusion.schedules import Cosine, Linear, LogLinear, NoiseSchedule, ScaledLinear, Sigmoid
from lightning_tdisent.diffusion.spaces import Haar
from lightning_tdisent.diffusion.spec import Part, arguments, build, first_name, moved, spec
from lightning_tdisent.diffusion.states import LatentStates
from lightning_tdisent.errors import InputError


class Mine(Linear):
    def __init__(self, extra: int = 3, **kwargs: float) -> None:
        super().__init__(**kwargs)
        self.extra = extra


class Forgetful(Part):
    def __init__(self, kept: int, lost: int) -> None:
        self.kept = kept


class Holder(Part):
    def __init__(self, thing: object) -> None:
        self.thing = thing


@pytest.mark.parametrize(
    "part",
    [
        Linear(T=50, beta_end=0.1),
        ScaledLinear(zero_terminal=True),
        Cosine(offset=0.01),
        Sigmoid(tau=0.9),
        Eps(),
        X0(MinSNR(2.0)),
        V(P2(k=2.0, gamma=0.5)),
        V(Likelihood()),
        LatentStates(Cosine(), S=10),
        LatentStates(Linear(), indices=[5, 1000]),
        Mine(extra=4, beta_end=0.03),
        Holder([Linear(), {"a": (1, None)}]),
    ],
    ids=lambda p: type(p).__name__,
)
def test_a_part_can_be_built_again_from_json(part):
    data = json.loads(json.dumps(spec(part)))
    again = build(data, Part)
    assert type(again) is type(part) or isinstance(part, Holder)
    if not isinstance(part, Holder):
        assert spec(again) == data


def test_a_spec_by_hand():
    here = "lightning_tdisent.diffusion.objectives"
    assert spec(V(MinSNR(4.0))) == {
        "class_path": f"{here}.V",
        "init_args": {"weight": {"class_path": f"{here}.MinSNR", "init_args": {"gamma": 4.0}}},
    }
    assert spec(LatentStates(Linear(T=10, beta_end=0.5), S=2, terminal_bound=1.0)) == {
        "class_path": "lightning_tdisent.diffusion.states.LatentStates",
        "init_args": {
            "schedule": {
                "class_path": "lightning_tdisent.diffusion.schedules.Linear",
                "init_args": {"T": 10, "beta_start": 1e-4, "beta_end": 0.5, "zero_terminal": False},
            },
            "S": 2,
            "spacing": "even",
            "indices": None,
            "kind": "mapped",
            "terminal_bound": 1.0,
            "cut": None,
        },
    }


def test_arguments_follow_kwargs_to_the_base():
    assert arguments(Mine) == ["extra", "T", "beta_start", "beta_end", "zero_terminal"]
    assert arguments(Constant) == []


def test_a_class_of_the_reader_is_built_once_it_is_loaded():
    again = build(spec(Mine(extra=9, beta_end=0.03)), NoiseSchedule)
    assert isinstance(again, Mine)
    assert (again.extra, again.beta_end) == (9, 0.03)


def test_a_part_without_an_argument_as_attribute_is_refused():
    with pytest.raises(InputError, match=r"Forgetful .*\['lost'\]"):
        spec(Forgetful(1, 2))


def test_a_value_that_is_no_plain_data_is_refused():
    with pytest.raises(InputError, match=r"Holder\.thing holds a Tensor"):
        spec(Holder(torch.zeros(1)))


def path(class_path: str, **init_args: object) -> dict[str, object]:
    return {"class_path": class_path, "init_args": init_args}


def test_a_class_outside_the_package_is_refused_without_importing_it(tmp_path, monkeypatch):
    (tmp_path / "never_imported_part.py").write_text("raise SystemExit('imported')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for base, data in (
        (Part, path("never_imported_part.Thing")),
        (Objective, path("lightning_tdisent.diffusion.objectives.V", weight=path("never_imported_part.Thing"))),
    ):
        with pytest.raises(InputError, match=r"never_imported_part\.Thing"):
            build(data, base)
    assert "never_imported_part" not in sys.modules


def test_a_standard_module_that_is_not_loaded_stays_so():
    name = "this"
    assert name not in sys.modules
    with pytest.raises(InputError, match=r"this\.Zen"):
        build(path("this.Zen"), Part)
    assert name not in sys.modules


def test_a_class_that_is_not_a_part_is_never_called(tmp_path, monkeypatch):
    called = tmp_path / "called"
    assert "subprocess" in sys.modules
    monkeypatch.setattr(subprocess.Popen, "__init__", lambda *_, **__: called.touch())
    data = path("subprocess.Popen", args=["touch", str(called)])
    nested = path("lightning_tdisent.diffusion.objectives.V", weight=data)
    for attempt in (data, nested, path("subprocess.run", args=["true"]), path("builtins.print"), path("os.system")):
        with pytest.raises(InputError, match=r"is no |not loaded"):
            build(attempt, Part if attempt is nested else Objective)
    assert not called.exists()


def test_another_kind_of_part_is_refused():
    with pytest.raises(InputError, match="Linear is no Objective"):
        build(spec(Linear()), Objective)
    with pytest.raises(InputError, match=r"Epss is no Objective\..*'Eps'"):
        build(path("lightning_tdisent.diffusion.objectives.Epss"), Objective)
    with pytest.raises(InputError, match="Part"):
        build(path("lightning_tdisent.diffusion.objectives.torch"), Part)


@pytest.mark.parametrize(
    "data",
    [
        path("lightning_tdisent.diffusion.schedules.Linear", beta_middle=0.1),
        path("lightning_tdisent.nowhere.Linear"),
        path("lightning_tdisent.diffusion.objectives.Objective"),
        path("Linear"),
        path(""),
        {"class_path": "lightning_tdisent.diffusion.schedules.Linear"},
        {"init_args": {}},
        {"class_path": 3, "init_args": {}},
        {"class_path": "lightning_tdisent.diffusion.schedules.Linear", "init_args": [1]},
    ],
    ids=["argument", "module", "abstract", "bare", "empty", "no arguments", "no class", "number", "list"],
)
def test_a_spec_that_names_nothing_buildable_is_refused(data):
    with pytest.raises(InputError):
        build(data, Part)


def test_parts_in_lists_are_built_again():
    """A table whose curves are a list of schedules could be trained, and no file of it written."""
    curves: list[NoiseSchedule] = [LogLinear(), LogLinear(T=500)]
    states = ComponentStates([1, 8, 8], space=Haar(1), curves=curves, S=4)
    again = build(json.loads(json.dumps(spec(states))), LatentStates)
    assert again.fingerprint == states.fingerprint
    assert spec(again) == spec(states)
    holder = build(spec(Holder({"a": [Linear(T=7), {"b": Eps()}]})), Holder)
    assert holder.thing["a"][0].T == 7
    assert isinstance(holder.thing["a"][1]["b"], Eps)


def test_class_paths_of_earlier_versions_are_resolved():
    """Old paths resolve, and fingerprints keep hashing them."""
    old, new = "lightning_tdisent.sampling.start.PriorCard", "lightning_tdisent.models.prior_files.PriorCard"
    assert moved(old) == new
    assert first_name({"class_path": new}) == {"class_path": old}
