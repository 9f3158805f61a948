"""Descriptors that clients have sent us over a unix socket, kept by name or in numbered sets until they are used.

As with QEMU's monitor: a name (getfd) belongs to one session and ends with it, a set (add-fd) to all, and sets go when
the last session does. How many are kept is bounded: each takes one of the process's own descriptors.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress


class Allowance:
    """How many descriptors of clients may be kept, all together."""

    def __init__(self, most: int) -> None:
        self.most, self.kept = most, 0
        self._lock = threading.Lock()  # a slow command has a thread of its own

    def take(self) -> None:
        """Account for one more. Raises ValueError where there are too many."""
        with self._lock:
            if self.kept >= self.most:
                raise ValueError(f"{self.kept} descriptors of clients are kept, and more are not")
            self.kept += 1

    def give_back(self) -> None:
        """One less."""
        with self._lock:
            self.kept -= 1


class Descriptors:
    """Those of one session, by name. Owned until `take` hands one out."""

    def __init__(self, allowance: Allowance) -> None:
        self._allowance = allowance
        self._named: dict[str, int] = {}

    def add(self, name: str, fd: int) -> None:
        """Keep ``fd``, instead of one that had the name. Raises ValueError where there are too many: it is closed."""
        if name in self._named:
            os.close(self.take(name))
        try:
            self._allowance.take()
        except ValueError:
            os.close(fd)
            raise
        self._named[name] = fd

    def take(self, name: str) -> int:
        """The descriptor with that name, the caller's from now on. Raises KeyError."""
        fd = self._named.pop(name)
        self._allowance.give_back()
        return fd

    def close(self) -> None:
        """Close all. A slow command may take one meanwhile, which is its own then."""
        for name in tuple(self._named):
            with suppress(KeyError):
                os.close(self.take(name))


class DescriptorSets:
    """Sets of descriptors, by number; a descriptor has what its sender said of it."""

    def __init__(self, allowance: Allowance) -> None:
        self._allowance = allowance
        self._sets: dict[int, dict[int, str | None]] = {}

    def __iter__(self) -> Iterator[tuple[int, dict[int, str | None]]]:
        return iter(sorted(self._sets.items()))

    def add(self, fd: int, number: int | None, opaque: str | None) -> int:
        """Keep ``fd`` in set ``number``, None is the first that is free; returns the number.

        Raises ValueError where there are too many: it is closed.
        """
        try:
            self._allowance.take()
        except ValueError:
            os.close(fd)
            raise
        if number is None:
            number = next(n for n in range(len(self._sets) + 1) if n not in self._sets)
        self._sets.setdefault(number, {})[fd] = opaque
        return number

    def remove(self, number: int, fd: int | None) -> None:
        """Close a descriptor of a set, None is all of them. Raises KeyError."""
        members = self._sets[number]
        for gone in (fd,) if fd is not None else tuple(members):
            del members[gone]
            os.close(gone)
            self._allowance.give_back()
        if not members:
            del self._sets[number]

    def close(self) -> None:
        """Close all."""
        for number in tuple(self._sets):
            self.remove(number, None)
