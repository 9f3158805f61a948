"""Attends to all who connect to a listening socket at once, until each has said who it is or has taken too long."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from typing import Final, NamedTuple, Self

from kvmpy.errors import MigrationError, StreamError, refusal
from kvmpy.migration.channel import READ, WRITE, Channel
from kvmpy.migration.greeting import Steps, introduce
from kvmpy.migration.main_channel import MainChannel
from kvmpy.migration.stop import Deadline, Stop
from kvmpy.migration.wire import OURS, Preamble

GUESTS_MAX: Final = 64  # who have connected and not yet said who they are; more wait in the backlog


class Guest(NamedTuple):
    """One who has connected: what it does next when one of ``events`` comes, and by when it must be done."""

    channel: Channel
    steps: Steps[Preamble]
    events: int
    limit: Deadline


class Reception:
    """Guests of ``listener``. ``greet`` makes a channel of a connection, ``turn_away`` hangs up and says why."""

    def __init__(
        self,
        listener: socket.socket,
        stop: Stop,
        timeout: float,
        greet: Callable[[socket.socket], Channel],
        turn_away: Callable[[Channel | None, MigrationError], object],
        main: MainChannel | None = None,
    ) -> None:
        """``main`` is that of those who are waited for: when its other side hangs up, they do not come."""
        self._listener, self._stop, self._timeout = listener, stop, timeout
        self._greet, self._turn_away, self._main = greet, turn_away, main
        self._guests: dict[int, Guest] = {}

    def next(self, deadline: Deadline | None, late: str) -> tuple[Channel, Preamble]:
        """The next who has introduced itself. Raises StreamError, "``late`` within n seconds", MigrationError."""
        while True:
            for fd in self._stop.wait_any(self._waits(), self._first_limit(deadline)):
                if self._main is not None and fd == self._main.channel.fd:
                    self._hung_up(self._main)
                elif fd == self._listener.fileno():
                    self._accept()
                elif (met := self._step(fd)) is not None:
                    return met
            self._expire()
            if deadline is not None and not deadline.left:
                raise StreamError(f"{late} within {deadline.seconds:g} seconds")

    def _waits(self) -> dict[int, int]:
        waits = {fd: guest.events for fd, guest in self._guests.items()}
        if len(waits) < GUESTS_MAX:
            waits[self._listener.fileno()] = READ
        if self._main is not None:
            waits[self._main.channel.fd] = select.POLLRDHUP  # what it says may come before the last of them
        return waits

    def _hung_up(self, main: MainChannel) -> None:
        gone = StreamError(f"{main.channel.name}: the other side has hung up before its page channels came")
        main.explain(gone)
        raise gone

    def _first_limit(self, deadline: Deadline | None) -> Deadline | None:
        limits = [guest.limit for guest in self._guests.values()] + ([deadline] if deadline else [])
        return min(limits, key=lambda limit: limit.left, default=None)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as e:
            raise MigrationError(f"a connection: {refusal(e.errno, 'cannot be accepted')}") from e
        try:
            channel = self._greet(connection)
        except StreamError as e:
            self._turn_away(None, e)
            return
        channel.timeout = self._timeout
        self._guests[channel.fd] = Guest(channel, introduce(channel, OURS), READ | WRITE, Deadline(self._timeout))

    def _step(self, fd: int) -> tuple[Channel, Preamble] | None:
        guest = self._guests.pop(fd)
        try:
            self._guests[fd] = guest._replace(events=next(guest.steps))
        except StopIteration as e:
            return guest.channel, e.value
        except StreamError as e:
            self._turn_away(guest.channel, e)
        except BaseException:
            guest.channel.close()
            raise
        return None

    def _expire(self) -> None:
        for fd, guest in tuple(self._guests.items()):
            if not guest.limit.left:
                del self._guests[fd]
                late = f"{guest.channel.name}: has not said who it is within {guest.limit.seconds:g} seconds"
                self._turn_away(guest.channel, StreamError(late))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for guest in self._guests.values():
            guest.channel.close()
        self._guests.clear()
