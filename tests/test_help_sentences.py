"""Each option of a part of a config has a sentence in its help, taken from the docstrings."""

import inspect

import pytest

from lightning_tdisent.cli import main
from lightning_tdisent.diffusion.spec import Part
from lightning_tdisent.lit import entry
from lightning_tdisent.lit.command_line import sentences
from lightning_tdisent.lit.inference import DenoiserModule
from lightning_tdisent.metrics import registry


def below(cls):
    for one in cls.__subclasses__():
        yield one
        yield from below(one)


registry.known()  # imports the metrics
OTHERS = [
    entry.datamodule.ImageShards, entry.datamodule.Seeds, entry.pictures.Pictures, entry.quality.SampleQuality,
    entry.EMA, entry.LossPerState, entry.Guard, entry.Checkpoint,
]  # fmt: skip
OURS = [
    cls
    for cls in dict.fromkeys([*below(Part), *below(DenoiserModule), *OTHERS])
    if cls.__module__.startswith("lightning_tdisent.") and not cls.__name__.startswith("_")
]


@pytest.mark.parametrize("cls", OURS, ids=lambda cls: cls.__name__)
def test_each_argument_has_a_sentence(cls):
    names = {name for name, p in inspect.signature(cls).parameters.items() if p.kind == p.POSITIONAL_OR_KEYWORD}
    found = sentences(cls)
    assert names <= found.keys()
    assert all(len(found[name]) > 3 for name in names)


def test_sentences_are_read_from_lines_lists_and_bases():
    class Base:
        """Do something.

        a: one
            line more. b, c: two
        things; d: 50 % of it.

        e: is not an argument.
        """

        def __init__(self, a, b, c, d): ...

    class Own(Base):
        """Another.

        a: mine.
        """

        def __init__(self, a, d): ...

    class Mapping(dict, Own):
        """Yet another."""

    assert sentences(Mapping)["a"] == "mine"
    assert sentences(Base) == {"a": "one line more", "b": "two things", "c": "two things", "d": "50 % of it"}
    assert sentences(Own) == {**sentences(Base), "a": "mine"}


def test_help_shows_them(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--model.help", "ReducedStates"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--model.lr LR learning rate of AdamW (type: float, default: 0.001)" in shown
    with pytest.raises(SystemExit):
        main(["fit", "--model", "ReducedStates", "--model.network.help", "UNet"])
    assert "self-attention between the two halves (type: bool" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    assert "largest number of curves" in capsys.readouterr().out
