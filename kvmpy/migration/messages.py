"""What the two sides of a migration say to each other: the payload of each kind of frame, as JSON of one Struct.

    source           HEADER, ROUND and ROUND_END ..., CHECKSUMS, SECTIONS or SECTION ..., END_OF_STATE, GO;
                     CANCEL before it
    destination      ACCEPT or REFUSE, ARRIVED ..., READY, STARTED or REFUSED; FAILED before READY is answered;
                     PREPARED, once, anywhere after ACCEPT
    both             KEEPALIVE, from whoever keeps the other waiting

A kind is declared once: its number, the most bytes of one, the most of them in a stream and the most values in its
JSON (of which each takes far more room decoded than written). What is read must have exactly the fields of the stream's
version; what is written is checked against the same limits, so that nothing is sent that would be refused.

To add a field: a new version in `wire`, and ``since(new version)`` on the field, which needs a default. To add a kind:
SINCE. The fields of the Structs in a message do not change: they get a new name.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Sequence
from enum import Enum, IntEnum
from functools import cache
from typing import Annotated, Any, ClassVar, Final, NamedTuple, Self, TypeVar, get_args, get_type_hints

import msgspec
from msgspec import Meta
from msgspec.structs import force_setattr

from kvmpy.errors import MigrationError, StreamError
from kvmpy.migration.wire import CHANNELS_MAX, NEWEST
from kvmpy.state import Since, since

KIB: Final = 1 << 10
MIB: Final = 1 << 20
SECTIONS_MAX: Final = 4096
STATE_MAX: Final = 256 * MIB  # all sections together
REASON_MAX: Final = 2000  # characters
PROBLEMS_MAX: Final = 1000
PROBLEM_MAX: Final = 500  # characters
DEPTH_MAX: Final = 32  # of arrays and objects in each other: who walks through them may do so by recursion

# Of JSON: a string; all brackets alike; what is no bracket; what is neither that nor of a string's ends.
STRING: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
ALIKE: Final = bytes.maketrans(b"{}", b"[]")
NO_BRACKET: Final = bytes(set(range(256)) - set(b"{}[]"))
NO_MARK: Final = bytes(set(range(256)) - set(b'{}[]"\\'))

M = TypeVar("M", bound="Message")
Natural = Annotated[int, Meta(ge=0, le=2**63 - 1)]
ShortText = Annotated[str, Meta(max_length=256)]
Token = Annotated[bytes, Meta(min_length=16, max_length=16)]


class Kind(IntEnum):
    """The number of each kind, for ever."""

    HEADER = 1
    ACCEPT = 2
    REFUSE = 3
    ROUND = 4
    CHECKSUMS = 5
    SECTION = 6
    END_OF_STATE = 7
    READY = 8
    GO = 9
    STARTED = 10
    REFUSED = 11
    CANCEL = 12
    FAILED = 13
    KEEPALIVE = 14
    ROUND_END = 15
    ARRIVED = 16
    PREPARED = 17
    SECTIONS = 18


class TooMuchError(MigrationError):
    """A message that has not the room it would take."""


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What messages are made of."""


class Message(Part, frozen=True, kw_only=True):
    """Base of every message."""

    KIND: ClassVar[Kind]
    SINCE: ClassVar[int] = 1
    CAP: ClassVar[int] = 64 * KIB
    MOST: ClassVar[int | None] = 1  # in one direction of one stream; None: any number
    VALUES: ClassVar[int] = 4096


class Compression(Enum):
    """How runs of pages are sent."""

    NONE = "none"
    ZSTD = "zstd"


class Origin(Part, frozen=True, kw_only=True):
    """Who sends, for people to read."""

    host: ShortText
    version: ShortText
    name: ShortText


class Phase(Part, frozen=True, kw_only=True):
    """A part of the switchover: when it began, by CLOCK_REALTIME, and how long it took."""

    name: Annotated[str, Meta(max_length=64)]
    start_ns: Natural
    ns: Natural


Phases = Annotated[tuple[Phase, ...], Meta(max_length=256)]


class Header(Message, frozen=True, kw_only=True):
    """The machine that wants to come. ``channels`` 0: pages travel in the main channel.

    ``require_primaries``: not to where it would not find a failover primary for each that it has.
    """

    KIND = Kind.HEADER
    CAP = MIB
    VALUES = 64 * KIB
    description: dict[str, Any]
    channels: Annotated[int, Meta(ge=0, le=CHANNELS_MAX)]
    compression: Compression = Compression.NONE
    checksum: bool = False
    check_only: bool = False
    source: Origin
    require_primaries: Annotated[bool, since(2)] = True


class Accept(Message, frozen=True, kw_only=True):
    """It may come. ``token`` is what its page channels show; ``version`` that of the stream from here on.

    ``warnings`` are what differs and does no harm yet. ``rehearsal_ns`` is how long it takes there to decode and load a
    state of such a machine, 0 where that was not measured.
    """

    KIND = Kind.ACCEPT
    token: Token
    version: Annotated[int, Meta(ge=1, le=2**32 - 1)]
    warnings: Annotated[tuple[Annotated[str, Meta(max_length=PROBLEM_MAX)], ...], Meta(max_length=64)] = ()
    rehearsal_ns: Annotated[Natural, since(2)] = 0


class Refuse(Message, frozen=True, kw_only=True):
    """It cannot come, for these reasons, all there are."""

    KIND = Kind.REFUSE
    CAP = 4 * MIB
    problems: tuple[str, ...]

    def __post_init__(self) -> None:
        problems = self.problems
        if len(problems) > PROBLEMS_MAX:
            kept = PROBLEMS_MAX - 1
            problems = (*problems[:kept], f"and {len(problems) - kept} more")
        force_setattr(self, "problems", tuple(clipped(problem, PROBLEM_MAX) for problem in problems))


class Outcome(Part, frozen=True, kw_only=True):
    """A failover primary of the destination: how long its preparation took, and why it cannot be used, "" if it can."""

    device: ShortText
    ns: Natural
    problem: Annotated[str, Meta(max_length=PROBLEM_MAX)] = ""

    @classmethod
    def of(cls, device: str, ns: int, problem: str | None) -> Self:
        return cls(device=device, ns=ns, problem=clipped(problem or "", PROBLEM_MAX))


class Prepared(Message, frozen=True, kw_only=True):
    """What has become of all failover primaries: each is reset, and RAM mapped for it, or cannot be used."""

    KIND = Kind.PREPARED
    SINCE = 3
    CAP = MIB
    VALUES = 64 * KIB
    primaries: Annotated[tuple[Outcome, ...], Meta(max_length=256)]


class Round(Message, frozen=True, kw_only=True):
    """A round of pages begins."""

    KIND = Kind.ROUND
    MOST = None
    number: Natural
    remaining_bytes: Natural


class RoundEnd(Message, frozen=True, kw_only=True):
    """All pages of a round are on their way: the other side says when they are there."""

    KIND = Kind.ROUND_END
    SINCE = 2
    MOST = None
    number: Natural


class Arrived(Message, frozen=True, kw_only=True):
    """They are. What is between us is empty then, and how long that took is what it takes."""

    KIND = Kind.ARRIVED
    SINCE = 2
    MOST = None
    number: Natural


class BlockChecksums(Part, frozen=True, kw_only=True):
    """A block of RAM: a 64-bit sum of each ``chunk`` bytes of it, packed."""

    gpa: Natural
    chunk: Annotated[int, Meta(ge=4096, le=1 << 40)]
    values: bytes

    @classmethod
    def of(cls, gpa: int, chunk: int, sums: Sequence[int]) -> Self:
        return cls(gpa=gpa, chunk=chunk, values=struct.pack(f"<{len(sums)}Q", *sums))

    @property
    def sums(self) -> tuple[int, ...]:
        return struct.unpack(f"<{len(self.values) // 8}Q", self.values)

    def __post_init__(self) -> None:
        if len(self.values) % 8:
            raise ValueError("64-bit sums are 8 bytes each")


class Checksums(Message, frozen=True, kw_only=True):
    """What all RAM is when the last page has been sent."""

    KIND = Kind.CHECKSUMS
    CAP = 16 * MIB
    blocks: Annotated[tuple[BlockChecksums, ...], Meta(max_length=512)]


class Section(Message, frozen=True, kw_only=True):
    """The state of one device, as `kvmpy.state.save` gives it, for `kvmpy.state.load` to check."""

    KIND = Kind.SECTION
    CAP = 16 * MIB
    MOST = SECTIONS_MAX
    VALUES = 256 * KIB
    device: ShortText
    section: dict[str, Any]


class Sections(Message, frozen=True, kw_only=True):
    """All of them in one frame, where that has room: while a guest stands still a frame costs more than most states."""

    KIND = Kind.SECTIONS
    SINCE = 4
    CAP = Section.CAP
    VALUES = Section.VALUES
    sections: Annotated[tuple[Section, ...], Meta(max_length=SECTIONS_MAX)]


class EndOfState(Message, frozen=True, kw_only=True):
    """There were so many sections; the last vCPU stopped at ``stopped_ns`` by CLOCK_REALTIME.

    ``primaries`` are the ids of failover primaries that the guest had, and is to have when it runs.
    """

    KIND = Kind.END_OF_STATE
    CAP = 128 * KIB
    sections: Annotated[int, Meta(ge=0, le=SECTIONS_MAX)]
    stopped_ns: Natural
    phases: Phases = ()
    primaries: Annotated[tuple[ShortText, ...], Meta(max_length=256), since(2)] = ()


class Ready(Message, frozen=True, kw_only=True):
    """Everything is loaded and waits for GO."""

    KIND = Kind.READY


class Go(Message, frozen=True, kw_only=True):
    """The guest is yours: the commit point."""

    KIND = Kind.GO


class Started(Message, frozen=True, kw_only=True):
    """The first vCPU ran at ``first_run_ns`` by CLOCK_REALTIME."""

    KIND = Kind.STARTED
    first_run_ns: Natural
    phases: Phases = ()


class Reasoned(Message, frozen=True, kw_only=True):
    """What ends a migration, and why, in words."""

    reason: str

    def __post_init__(self) -> None:
        force_setattr(self, "reason", clipped(self.reason, REASON_MAX))


class Refused(Reasoned, frozen=True, kw_only=True):
    """After GO: no vCPU has run here, and none will."""

    KIND = Kind.REFUSED


class Cancel(Reasoned, frozen=True, kw_only=True):
    """The source keeps its guest."""

    KIND = Kind.CANCEL


class Failed(Reasoned, frozen=True, kw_only=True):
    """The destination gives up."""

    KIND = Kind.FAILED


class Keepalive(Message, frozen=True, kw_only=True):
    """Still here, still at work."""

    KIND = Kind.KEEPALIVE
    MOST = None


KINDS: Final[dict[int, type[Message]]] = {
    kind.KIND: kind
    for kind in (
        *(Header, Accept, Refuse, Round, Checksums, Section, EndOfState),
        *(Ready, Go, Started, Refused, Cancel, Failed, Keepalive, RoundEnd, Arrived, Prepared, Sections),
    )
}
TO_SOURCE: Final = (Accept, Refuse, Prepared, Arrived, Ready, Started, Refused, Failed, Keepalive)
"""What a destination says."""


def clipped(text: str, most: int) -> str:
    """Text that fits, and that JSON can hold: a path may have bytes that are no UTF-8."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= most else f"{text[: most - 3]}..."


def kind_of(number: int, version: int) -> type[Message]:
    """Raises StreamError where that version has no such kind."""
    kind = KINDS.get(number)
    if kind is None or version < kind.SINCE:
        raise StreamError(f"frame of kind {number}, which version {version} of the stream does not have")
    return kind


def due(version: int, *kinds: type[M]) -> tuple[type[M], ...]:
    """Those of the kinds that there are in that version."""
    return tuple(kind for kind in kinds if version >= kind.SINCE)


def encode(message: Message, version: int = NEWEST) -> bytes:
    """The payload. Raises MigrationError where it is more than the other side would take."""
    kind = type(message)
    assert version >= kind.SINCE, kind.__name__
    try:
        payload = msgspec.json.encode({name: getattr(message, name) for name in _fields(kind, version)})
        _check_depth(payload)
    except (UnicodeEncodeError, RecursionError, ValueError, TypeError) as e:
        raise MigrationError(f"{title(message)}: cannot be sent: {e}") from e
    if (refusal := _too_much(kind, payload)) is not None:
        raise TooMuchError(f"{title(message)}: cannot be sent: {refusal}")
    return payload


class Frame(NamedTuple):
    """A message as it travels."""

    kind: Kind
    payload: bytes

    @classmethod
    def of(cls, message: Message, version: int = NEWEST) -> Self:
        """Raises as `encode`."""
        return cls(message.KIND, encode(message, version))


def decode(number: int, payload: bytes | bytearray, version: int = NEWEST) -> Message:
    """The message in a frame of kind ``number``. Raises StreamError naming what is refused."""
    kind = kind_of(number, version)
    if (refusal := _too_much(kind, payload)) is not None:
        raise StreamError(f"{kind.KIND.name}: {refusal}")
    try:
        return _convert(kind, version, payload)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, ValueError) as e:
        raise StreamError(f"{kind.KIND.name}: {str(e)[:200]}") from e


def prepare(version: int, heard: Iterable[type[Message]] = tuple(KINDS.values())) -> None:
    """Find out now what each kind is made of, and how those ``heard`` are read: it takes milliseconds, and some come
    first while a guest stands still.
    """
    for kind in KINDS.values():
        if version >= kind.SINCE:
            _fields(kind, version)
    for kind in heard:
        _decoder(kind)


def title(message: Message) -> str:
    """What an error calls it."""
    name = message.KIND.name
    return f"{name} of {message.device}" if isinstance(message, Section) else name


def check_length(number: int, length: int, version: int = NEWEST) -> None:
    """Before a payload is read: raises StreamError where there is no such kind, or none so long."""
    kind = kind_of(number, version)
    if length > kind.CAP:
        raise StreamError(f"{kind.KIND.name}: {length} bytes, more than {kind.CAP}")


def _too_much(kind: type[Message], payload: bytes | bytearray) -> str | None:
    if len(payload) > kind.CAP:
        return f"{len(payload)} bytes, more than {kind.CAP}"
    # An upper bound: those in strings count too. Each takes 10 to 100 bytes decoded, for 2 or 3 here.
    if (values := sum(map(payload.count, (b",", b"[", b"{")))) > kind.VALUES:
        return f"about {values} values, more than {kind.VALUES}"
    return None


def _convert(kind: type[Message], version: int, payload: bytes | bytearray) -> Message:
    names = _fields(kind, version)
    if len(names) < len(kind.__struct_fields__):
        fields = msgspec.json.decode(payload, type=dict[str, msgspec.Raw], strict=True)
        if newer := fields.keys() - set(names):
            raise ValueError(f"version {version} of the stream does not have {clipped(newer.pop(), 40)!r}")
        payload = msgspec.json.encode(fields)
    message: Message = _decoder(kind).decode(payload)
    _check_depth(payload)
    return message


def _check_depth(payload: bytes | bytearray) -> None:
    """Raises ValueError where arrays and objects are too deep in each other: the innermost go first, all at once."""
    if payload.count(b"{") + payload.count(b"[") <= DEPTH_MAX:
        return  # as in most, and quickly seen
    left = payload.translate(ALIKE, NO_MARK).replace(b'""', b"")
    if b'"' in left or b"\\" in left:  # a bracket in a string leaves a quote; to take strings out takes far longer
        left = STRING.sub(b"", payload).translate(ALIKE, NO_BRACKET)
    for _ in range(DEPTH_MAX):
        left = left.replace(b"[]", b"")
        if not left:
            return
    raise ValueError(f"more than {DEPTH_MAX} arrays and objects in each other")


@cache
def _decoder(kind: type[M]) -> msgspec.json.Decoder[M]:
    return msgspec.json.Decoder(kind, strict=True)


@cache
def _fields(kind: type[Message], version: int) -> tuple[str, ...]:
    """The fields that a message has in streams of that version."""
    if version >= NEWEST:
        return kind.__struct_fields__  # the hints take longest to find
    hints = get_type_hints(kind, include_extras=True)
    return tuple(name for name in kind.__struct_fields__ if _born(get_args(hints[name])) <= version)


def _born(marks: Iterable[object]) -> int:
    return next((mark.version for mark in marks if isinstance(mark, Since)), 1)
