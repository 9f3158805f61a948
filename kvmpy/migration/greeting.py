"""How two sides of a connection find out who the other is: TLS where it is wanted, then a preamble each.

Written as generators that yield what they wait for, so that one thread can attend to many who connect at once: of those
at a listening socket, anybody may be one, and who says nothing must not keep the others out.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from typing import TypeVar

from kvmpy.errors import StreamError
from kvmpy.migration.channel import READ, WRITE, Channel
from kvmpy.migration.stop import Deadline
from kvmpy.migration.wire import OURS, PREAMBLE_SIZE, Preamble, agree, check_magic

T = TypeVar("T")
Steps = Generator[int, None, T]


def introduce(channel: Channel, ours: Preamble) -> Steps[Preamble]:
    """Say who we are and hear who they are, each as soon as it can but for the one who `hears_first`.

    Where only the source can speak, the destination only hears. Raises StreamError.
    """
    yield from channel.greet()
    if channel.can_answer and not channel.hears_first:
        yield from _say(channel, ours)
    theirs = yield from _hear(channel)
    if channel.hears_first:
        yield from _say(channel, ours)
    return theirs


def version_of(channel: Channel, theirs: Preamble) -> int:
    """The version to speak with them. Raises StreamError where there is none."""
    return _understood(channel, partial(agree, OURS, theirs))


def drive(steps: Steps[T], channel: Channel, deadline: Deadline) -> T:
    """Go through ``steps``, waiting where they do."""
    try:
        while True:
            channel.stop.wait(
                channel.fd, next(steps), deadline, f"{channel.name}: the other side did not say who it is"
            )
            channel.check()
    except StopIteration as e:
        result: T = e.value
        return result


def _say(channel: Channel, ours: Preamble) -> Steps[None]:
    left = memoryview(ours.pack())
    while left:
        taken = channel.attempt(channel.write_some, [left], WRITE)
        if taken is None:
            yield channel.wanted(WRITE)
        else:
            channel.sent += taken
            left = left[taken:]


def _hear(channel: Channel) -> Steps[Preamble]:
    data = bytearray()
    while len(data) < PREAMBLE_SIZE:
        piece = bytearray(PREAMBLE_SIZE - len(data))
        taken = channel.attempt(channel.read_some, memoryview(piece), READ)
        if taken is None:
            yield channel.wanted(READ)
        elif taken == 0:
            raise StreamError(channel.ended(len(piece)))
        else:
            channel.received += taken
            data += piece[:taken]
            _understood(channel, partial(check_magic, data))
    return _understood(channel, partial(Preamble.unpack, data))


def _understood(channel: Channel, read: Callable[[], T]) -> T:
    try:
        return read()
    except StreamError as e:
        raise StreamError(f"{channel.name}: {e}") from e
