"""Share decoded data sets and batches between the data modules of several trainings in one process."""

import itertools
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol

from lightning_tdisent.data.image_set import Sample

WINDOW = 4  # recent batches kept: co-trained runs are at most two batches apart, as Lightning prefetches one


class Loader(Protocol):
    """Loader whose iteration is one epoch, and the next iteration the next epoch."""

    def __iter__(self) -> Iterator[Sample]: ...

    def close(self) -> None:
        """Shut down the workers."""


class Reader:
    """Read each batch of an order once, from number ``first`` on, and keep the last ``WINDOW`` for other users."""

    def __init__(self, loader: Loader, first: int) -> None:
        self.loader, self.next = loader, first
        self.users: set[int] = set()
        self._stream = itertools.chain.from_iterable(itertools.repeat(loader))
        self._recent: dict[int, Sample] = {}

    def has(self, number: int) -> bool:
        """Return whether batch ``number`` is available without reading others first."""
        return number in self._recent or number == self.next

    def batch(self, number: int) -> Sample:
        """Return batch ``number``, for which `has` is true, as a new dict."""
        if number == self.next:
            self._recent[number] = next(self._stream)
            self._recent.pop(number - WINDOW, None)
            self.next += 1
        return dict(self._recent[number])


class Shared:
    """Cache of data sets by the key of their content, and of readers by the order of their batches."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}
        self._readers: dict[Hashable, list[Reader]] = {}

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return the object stored under ``key``; call ``make`` to create it the first time."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def batches(self, order: Hashable, first: int, user: int, start: Callable[[int], Loader]) -> Iterator[Sample]:
        """Yield the batches of an order without end, from number ``first`` on; each is read once for all users.

        user: identifies the caller. start: opens a loader at the number of a batch. A user at another position of the
        order, because it began there or is faster, gets a loader of its own.
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
            except BaseException:  # the next user opens a new reader
                readers.remove(reader)
                reader.loader.close()
                raise
            yield batch

    def leave(self, user: int) -> None:
        """Remove a user from all readers, and close those that have no other user."""
        for readers in self._readers.values():
            for reader in [r for r in readers if user in r.users]:
                reader.users.discard(user)
                if not reader.users:
                    reader.loader.close()
                    readers.remove(reader)
