"""The main channel of a migration: messages, each whole, wanted, and within the limits of its kind."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, TypeVar

from kvmpy.errors import MigrationCancelled, MigrationError, StreamError
from kvmpy.migration.channel import Channel
from kvmpy.migration.messages import (
    KINDS,
    STATE_MAX,
    Cancel,
    Failed,
    Frame,
    Keepalive,
    Message,
    Reasoned,
    Refuse,
    Refused,
    Section,
    Sections,
    check_length,
    decode,
    title,
)
from kvmpy.migration.stop import Deadline
from kvmpy.migration.wire import FRAME_SIZE, FrameHeader
from kvmpy.trace import Tracepoint

trace_heard = Tracepoint("migration.heard", "channel kind waited_ms")

M = TypeVar("M", bound=Message)
# Where there is nothing left to send or to wait for but the reason why.
LAST_WORDS: Final = 1.0
BAD_NEWS: Final = (Refuse, Refused, Cancel, Failed)


class MainChannel:
    """Messages over ``channel``, in the stream's ``version``. ``said`` is when the last was sent, by time.monotonic().

    Nothing is read ahead: between two messages the channel can carry something else, such as page records. One thread
    sends and receives; any other may `say`, `fail` and `shutdown`.
    """

    def __init__(self, channel: Channel, version: int) -> None:
        self.channel = channel
        self.version = version
        self.said = time.monotonic()
        self._sending = threading.Lock()
        self._seen: dict[type[Message], int] = {}
        self._state = 0

    @property
    def can_answer(self) -> bool:
        """Whether what is sent here can be answered, or is answered from here."""
        return self.channel.can_answer

    def send_message(self, message: Message) -> None:
        """Raises MigrationError where it is too large, or with what the other side said before it hung up.

        By the thread that receives, for that is read then.
        """
        self.send_messages([message])

    def send_messages(self, messages: Sequence[Message | Frame]) -> None:
        """The same with many of them, at once: a way of small packets is a slow one."""
        try:
            self._send(*messages)
        except StreamError as e:
            self.explain(e)
            raise

    def say(self, message: Message) -> None:
        """Send, by any thread: nothing is read, so who receives hears why it is over. Raises MigrationError."""
        self._send(message)

    def receive_message(self, *kinds: type[M], timeout: float | None = None, limit: float | None = None) -> M:
        """The next message, one of ``kinds``. A KEEPALIVE begins the ``timeout`` again, but never the ``limit``.

        Raises StreamError where another or none comes, and MigrationError where the other side says that it is over.
        """
        seconds = self.channel.timeout if timeout is None else timeout
        whole = None if limit is None else Deadline(limit)
        while True:
            began = time.monotonic()
            message = self.next_message(*kinds, timeout=seconds if whole is None else min(seconds, whole.left))
            if trace_heard:
                trace_heard(self.channel.name, message.KIND.name, int((time.monotonic() - began) * 1000))
            if isinstance(message, kinds):
                return message
            if isinstance(message, BAD_NEWS):
                raise _as_error(message)

    def next_message(self, *kinds: type[Message], timeout: float | None = None, first: bytes = b"") -> Message:
        """The next message, one of ``kinds``, a KEEPALIVE or bad news; without ``kinds``, whichever it is.

        ``timeout`` is for its header; the rest comes as fast as everything does. ``first`` is what has been read of it
        already. Raises StreamError, before anything of another kind is read.
        """
        channel = self.channel
        start = channel.received - len(first)
        try:
            header = FrameHeader.unpack(first + channel.receive(FRAME_SIZE - len(first), timeout))
            check_length(header.kind, header.length, self.version)
            _check_due(KINDS[header.kind], kinds)
            payload = channel.receive(header.length)
            header.check(payload)
            message = decode(header.kind, payload, self.version)
            self._count(message, header.length)
        except StreamError as e:
            if str(e).startswith(channel.name):
                raise
            raise StreamError(f"{channel.name}: byte {start}: {e}") from e
        return message

    def fail(self, message: Reasoned | Refuse) -> None:
        """Tell the other side why it is over, if it still listens: nothing is raised, and nobody waited for long.

        Where it is over because we were told so, nobody at all.
        """
        if self.channel.can_answer or isinstance(message, Cancel):
            with suppress(MigrationError):
                self._send(message, timeout=LAST_WORDS, is_last=self.channel.stop.reason is not None)

    def explain(self, error: MigrationError) -> None:
        """Raise what the other side said before it hung up, where ``error`` is that it did; else it explains itself.

        Also for the error of a page channel: the reason, if there is one, is here.
        """
        if isinstance(error, MigrationCancelled) or not self.channel.can_answer:
            return
        deadline = Deadline(LAST_WORDS)
        try:
            while not isinstance(message := self.next_message(timeout=deadline.left), BAD_NEWS):
                if not deadline.left:  # it may go on for ever, and a guest may stand still
                    return
        except MigrationError:
            return
        raise _as_error(message) from error

    def finish(self) -> None:
        """After the last message: what the channel must do for it to stay. Raises StreamError."""
        self.channel.finish()

    def shutdown(self, reason: str = "the channel was shut down") -> None:
        """Wake whoever waits here. Any thread."""
        self.channel.shutdown(reason)

    def close(self) -> None:
        self.channel.close()

    def _send(self, *messages: Message | Frame, timeout: float | None = None, is_last: bool = False) -> None:
        frames: list[bytes] = []
        for message in messages:
            kind, payload = message if isinstance(message, Frame) else Frame.of(message, self.version)
            frames += FrameHeader.of(kind, payload).pack(), payload
        if not self._sending.acquire(timeout=-1 if timeout is None else timeout):
            raise StreamError(f"{self.channel.name}: another message is still being sent")
        try:
            if is_last:
                self.channel.send_last(*frames)
            else:
                self.channel.send(*frames, timeout=timeout)
            self.said = time.monotonic()
        finally:
            self._sending.release()

    def _count(self, message: Message, length: int) -> None:
        kind = type(message)
        self._seen[kind] = self._seen.get(kind, 0) + 1
        if kind.MOST is not None and self._seen[kind] > kind.MOST:
            raise StreamError(f"{title(message)}: one more than {kind.MOST} of its kind")
        if kind in (Section, Sections):
            self._state += length
            if self._state > STATE_MAX:
                raise StreamError(f"{title(message)}: all sections are more than {STATE_MAX} bytes")


def _check_due(kind: type[Message], kinds: tuple[type[Message], ...]) -> None:
    if kinds and not issubclass(kind, (*kinds, Keepalive, *BAD_NEWS)):
        raise StreamError(f"{kind.KIND.name} where {' or '.join(due.KIND.name for due in kinds)} was due")


def _as_error(message: Refuse | Refused | Cancel | Failed) -> MigrationError:
    said = "; ".join(message.problems) if isinstance(message, Refuse) else message.reason
    return MigrationError(f"the other side says: {printable(said) or 'nothing of why'}")


def printable(text: str) -> str:
    """What a terminal can be given, whatever the other side sent."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
