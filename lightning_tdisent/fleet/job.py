"""One training job: its name, command line, dependencies and completion test."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_tdisent.errors import InputError
from lightning_tdisent.runs import CHECKPOINTS, CONFIG, PRIOR, WEIGHTS

if TYPE_CHECKING:
    from lightning_tdisent.models.card import Card

Report = Callable[[int, int, dict[str, float]], None]  # (step, total steps, numbers to show)
# runs the command lines of one call at the same time in this process; returns for each the exception that ended it
# early, or None
Train = Callable[[Sequence[list[str]], Sequence[Report]], list[BaseException | None]]


@dataclass(frozen=True)
class Job:
    """A ``fit`` command line with its run folder and the jobs whose weights it requires.

    name: name of the job.
    argv: the command line, without the program.
    folder: run folder that the command line writes.
    needs: names of the jobs that must be done first.
    images: number of images to train on; None if only the config defines it.
    expect: values that the card of the exported weights must have, such as rows and fingerprint.
    """

    name: str
    argv: list[str]
    folder: Path
    needs: tuple[str, ...] = ()
    images: int | None = None
    expect: dict[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> Path:
        """Path of the weights that a completed training exports."""
        return self.folder / WEIGHTS

    @property
    def card(self) -> "Card | None":
        """Card of the exported weights, or None if there are none; raises InputError for those of another training."""
        if not self.weights.exists():
            return None
        # imported here because it imports torch, which a process that only shows the status does not need
        from lightning_tdisent.models.card import read_card, refuse_foreign

        card = read_card(self.weights)
        refuse_foreign(self.weights, card)
        wrong = [f"{k} {getattr(card, k)}, not {v}" for k, v in self.expect.items() if getattr(card, k) != v]
        if wrong:
            run = any((self.folder / name).exists() for name in (CONFIG, CHECKPOINTS))
            raise InputError(
                f"{self.weights} belongs to another training: it has {', '.join(wrong)}. Move "
                f"{self.folder if run else 'it'} elsewhere, and run the fleet again"
            )
        return card

    @property
    def done(self) -> bool:
        """Return True if the job has seen all its images; raises InputError for the weights of another training."""
        if self.images is None and not self.expect:
            return self.weights.exists() or (self.folder / PRIOR).exists()
        card = self.card
        return card is not None and (self.images is None or card.images_seen >= self.images)
