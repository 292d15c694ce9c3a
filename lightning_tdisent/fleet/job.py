"""One training of many: what it is called, how it is started, what it waits for, when it is done."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_tdisent.errors import InputError
from lightning_tdisent.runs import CHECKPOINTS, CONFIG, PRIOR, WEIGHTS

if TYPE_CHECKING:
    from lightning_tdisent.models.expert import Card

Report = Callable[[int, int, dict[str, float]], None]  # step, of how many, and numbers worth showing
# runs command lines in this process, those of one call together; returns what ended each before its time
Train = Callable[[Sequence[list[str]], Sequence[Report]], list[BaseException | None]]


@dataclass(frozen=True)
class Job:
    """A command line of ``fit`` with the folder it fills and the names of the jobs whose weights it needs.

    images: how many it is to see, None where its config alone says so; expect: fields that the card of its weights
    must have, such as rows and fingerprint.
    """

    name: str
    argv: list[str]
    folder: Path
    needs: tuple[str, ...] = ()
    images: int | None = None
    expect: dict[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> Path:
        """What a whole training of a model leaves."""
        return self.folder / WEIGHTS

    @property
    def card(self) -> "Card | None":
        """Card of the weights there; refuses those of another training."""
        if not self.weights.exists():
            return None
        # and torch, which a watcher of others does without
        from lightning_tdisent.models.expert import read_card, refuse_foreign

        card = read_card(self.weights)
        refuse_foreign(self.weights, card)
        wrong = [f"{k} {getattr(card, k)}, not {v}" for k, v in self.expect.items() if getattr(card, k) != v]
        if wrong:
            run = any((self.folder / name).exists() for name in (CONFIG, CHECKPOINTS))
            raise InputError(
                f"{self.weights} is of another training: it has {', '.join(wrong)}. Put {self.folder if run else 'it'} "
                "elsewhere, and run the fleet again"
            )
        return card

    @property
    def done(self) -> bool:
        """Whether all its images have been seen; refuses the weights of another training."""
        if self.images is None and not self.expect:
            return self.weights.exists() or (self.folder / PRIOR).exists()
        card = self.card
        return card is not None and (self.images is None or card.images_seen >= self.images)
