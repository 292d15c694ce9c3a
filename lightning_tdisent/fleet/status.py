"""Status of every job of a fleet, read from its files, shown as lines in a terminal or as HTML."""

import html
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from rich.text import Text

from lightning_tdisent.errors import InputError
from lightning_tdisent.fleet import lease
from lightning_tdisent.fleet.job import Job
from lightning_tdisent.fleet.state import Work
from lightning_tdisent.fleet.work import failures

COLOURS = {"done": "green", "training": "cyan", "silent": "yellow", "waiting": "bright_black", "failed": "red"}
HTML = {"done": "#2e7d32", "training": "#00838f", "silent": "#f9a825", "waiting": "#9e9e9e", "failed": "#c62828"}


@dataclass(frozen=True)
class Tile:
    """Status of one job.

    name: name of the job.
    state: done, training, silent (no heartbeat of its worker for longer than the ttl), waiting or failed.
    rows: rows that it owns.
    seen: images seen so far.
    images: images planned.
    loss: recent training loss.
    x0: held-out error of x0_hat.
    predicted: held-out error of x0_hat that an adaptive budget predicts for the end of the round.
    rate: images per second.
    eta: seconds until it is done.
    note: the worker, or the reason of the state.
    """

    name: str
    state: str
    rows: Sequence[int] = ()
    seen: int = 0
    images: int | None = None
    loss: float | None = None
    x0: float | None = None
    predicted: float | None = None
    rate: float | None = None
    eta: float | None = None
    note: str = ""

    def words(self) -> tuple[str, ...]:
        """Return the texts of its line: name, state, rows, images, rate, time left, errors, and note."""
        rows = f"row{'s' * (len(self.rows) > 1)} {_span(self.rows)}" if self.rows else ""
        of = f"/{self.images:,}" if self.images else ""
        errors = (("loss", self.loss), ("x0", self.x0), ("predicted", self.predicted))
        return (
            self.name,
            self.state,
            rows,
            f"{self.seen:,}{of} images",
            f"{self.rate:,.0f}/s" if self.rate is not None else "",
            f"eta {duration(self.eta)}" if self.eta is not None else "",
            " ".join(f"{name} {value:.4g}" for name, value in errors if value is not None),
            self.note,
        )


def tiles(work: Work, now: float | None = None) -> list[Tile]:
    """Return the status of all jobs from their files; now: seconds since the epoch, for the age of heartbeats."""
    now = time.time() if now is None else now
    failed, jobs = failures(work), work.jobs()
    out = []
    done: set[str] = set()
    foreseen, leases = work.foreseen(), work.store.names(lease.FOLDER)
    for job in jobs:
        tile = _tile(work, job, failed.get(job.name), done, leases, now)
        if tile.state == "done":
            done.add(job.name)
        out.append(replace(tile, predicted=foreseen.get(tile.name)))
    if not work.last():  # done experts wait for the next round; a shared model, which has no rows, stays done
        note = "for the next round"
        out = [replace(t, state="waiting", note=note) if t.state == "done" and t.rows else t for t in out]
    return out


def _tile(
    work: Work, job: Job, failed: dict[str, Any] | None, done: set[str], leases: Sequence[str], now: float
) -> Tile:
    rows = job.expect.get("rows", [])
    try:
        if work.done(job):
            card = job.card if not work.store.remote else None
            curve = _curve(work, job)
            seen = card.images_seen if card else job.images or 0
            return Tile(job.name, "done", rows, seen, job.images, x0=curve)
    except InputError as error:
        return Tile(job.name, "failed", rows, note=" ".join(str(error).split()))
    _, held = lease.current(work.store, job.name, leases)
    held = held or {}
    seen = int(held.get("images", 0))
    host = str(held.get("host", "?")).partition("/")[0]
    if held and not lease.gone(held):
        silent = now - held.get("written", 0)
        state = "silent" if silent > held.get("ttl", lease.TTL) else "training"
        rate = (held.get("rate") or None) if state == "training" else None
        eta = max(0, job.images - seen) / rate if job.images and rate else None
        who = f"process {held.get('pid')} on {host}" + (f", silent for {duration(silent)}" * (state == "silent"))
        errors = held.get("loss"), held.get("x0_mse")
        return Tile(job.name, state, rows, seen, job.images, *errors, rate=rate, eta=eta, note=who)
    if failed:
        return Tile(job.name, "failed", rows, seen, job.images, note=" ".join(str(failed["reason"]).split()))
    lost = "" if not held or held.get("released") else f"its worker on {host} died at step {held.get('step', 0)}"
    needs = [need for need in job.needs if need not in done]
    note = lost or (f"for {', '.join(needs)}" if needs else "")
    return Tile(job.name, "waiting", rows, seen, job.images, held.get("loss"), held.get("x0_mse"), note=note)


def _curve(work: Work, job: Job) -> float | None:
    """Return the held-out error of the exported weights: the last point of the curve, or the point at 0 if smaller."""
    try:
        points = (work.curve(job) or {})["points"]
        return min(fmean(errors) for n, errors in points if n == 0 or n == points[-1][0])
    except (OSError, ValueError, KeyError, TypeError, InputError):
        return None


@dataclass(frozen=True)
class Board:
    """The status of all jobs: a summary and a line for each job.

    On a terminal with fewer lines than jobs, failed and running jobs come first, and the rest is counted.
    """

    found: Sequence[Tile]
    title: str = ""

    def __rich_console__(self, console: Any, options: Any) -> Any:
        """Yield the lines."""
        room = max(1, console.height - 4) if console.is_terminal else len(self.found)
        shown = list(self.found)
        if len(shown) > room:
            order = ("failed", "silent", "training", "waiting", "done")
            shown = sorted(shown, key=lambda tile: order.index(tile.state))[:room]
        yield Text(" ".join(filter(None, [self.title, summary(self.found)])))
        rows = [tile.words() for tile in shown]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for tile, words in zip(shown, rows, strict=True):
            cells = [w.ljust(width) for w, width in zip(words, widths, strict=True) if width]
            yield Text("  ".join(cells).rstrip(), style=COLOURS[tile.state], overflow="fold")
        if rest := Counter(tile.state for tile in self.found) - Counter(tile.state for tile in shown):
            yield Text(f"and {', '.join(f'{count} {state}' for state, count in rest.items())}")


def summary(found: Sequence[Tile]) -> str:
    """Return a line with the number of jobs in each state and the images seen."""
    count = Counter(tile.state for tile in found)
    states = ", ".join(f"{count[state]} {state}" for state in COLOURS if count[state])
    seen, planned = sum(tile.seen for tile in found), sum(tile.images or 0 for tile in found)
    share = (
        f", {seen:,} of {planned:,} images ({seen / planned:.0%})" if planned else f", {seen:,} images" if seen else ""
    )
    rate = sum(tile.rate or 0 for tile in found)
    speed = f", {rate:,.0f} images/s" if rate and not seen >= planned > 0 else ""
    left = f", eta {duration((planned - seen) / rate)}" if rate and planned > seen else ""
    return f"{len(found)} jobs: {states}{share}{speed}{left}"


def page(found: Sequence[Tile], title: str) -> str:
    """Return the board as an HTML section that needs no style sheet."""
    boxes = []
    for tile in found:
        share = min(1.0, tile.seen / tile.images) if tile.images else float(tile.state == "done")
        lines = "<br>".join(html.escape(word) for word in tile.words()[1:] if word)
        boxes.append(
            f'<div style="border:2px solid {HTML[tile.state]};border-radius:6px;padding:6px 8px;font:12px sans-serif;'
            f'overflow-wrap:anywhere"><b>{html.escape(tile.name)}</b><div style="background:#eee;height:5px;margin:4px '
            f'0"><div style="background:{HTML[tile.state]};height:5px;width:{100 * share:.1f}%"></div></div>'
            f"{lines}</div>"
        )
    return (
        f"<section><h3>{html.escape(title)}</h3><p>{html.escape(summary(found))}</p>"
        '<div style="display:grid;grid-template-columns:repeat(auto-fill,minmax(190px,1fr));gap:8px">'
        + "".join(boxes)
        + "</div></section>"
    )


def _span(rows: Sequence[int]) -> str:
    whole = list(rows) == list(range(rows[0], rows[-1] + 1))
    return f"{rows[0]}..{rows[-1]}" if len(rows) > 1 and whole else ", ".join(map(str, rows))


def duration(seconds: float) -> str:
    """Return a duration as text, in hours and minutes, minutes and seconds, or seconds."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
