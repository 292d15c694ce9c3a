"""What the data modules of several fits in one process have in common: sets decoded once, batches read once."""

import itertools
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol

from lightning_tdisent.data.shards import Sample

WINDOW = 4  # batches kept: fits in step are at most two apart, since Lightning asks for one in advance


class Loader(Protocol):
    """Batches, an epoch at a time, going on where the last one ended."""

    def __iter__(self) -> Iterator[Sample]: ...

    def close(self) -> None:
        """Let workers go."""


class Reader:
    """The batches of an order from the first-th on, each read once; the last ``WINDOW`` stay for who comes later."""

    def __init__(self, loader: Loader, first: int) -> None:
        self.loader, self.next = loader, first
        self.users: set[int] = set()
        self._stream = itertools.chain.from_iterable(itertools.repeat(loader))
        self._recent: dict[int, Sample] = {}

    def has(self, number: int) -> bool:
        """Whether it can give this one without reading others first."""
        return number in self._recent or number == self.next

    def batch(self, number: int) -> Sample:
        """One of those that it has, in a dict of the caller's own."""
        if number == self.next:
            self._recent[number] = next(self._stream)
            self._recent.pop(number - WINDOW, None)
            self.next += 1
        return dict(self._recent[number])


class Shared:
    """Sets by what they are made of, and readers by the order that they read in."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}
        self._readers: dict[Hashable, list[Reader]] = {}

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What was made first under this key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def batches(self, order: Hashable, first: int, user: int, start: Callable[[int], Loader]) -> Iterator[Sample]:
        """Endless batches of an order from the first-th on: as another user has read them, or from a loader started.

        A user who is elsewhere in the order, having begun there or being faster, has a loader to himself.
        """
        readers = self._readers.setdefault(order, [])
        for number in itertools.count(first):
            reader = next((r for r in readers if r.has(number)), None)
            if reader is None:
                readers.append(reader := Reader(start(number), number))
            if user not in reader.users:
                self.leave(user)
                reader.users.add(user)
            try:
                batch = reader.batch(number)
            except BaseException:  # the next one to come sees for himself
                readers.remove(reader)
                reader.loader.close()
                raise
            yield batch

    def leave(self, user: int) -> None:
        """Close what nobody else reads."""
        for readers in self._readers.values():
            for reader in [r for r in readers if user in r.users]:
                reader.users.discard(user)
                if not reader.users:
                    reader.loader.close()
                    readers.remove(reader)
