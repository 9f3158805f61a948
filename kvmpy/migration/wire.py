"""The bytes of a migration stream: preambles and frames. What is in a frame is `messages`' business.

    connection      preamble, and then on channel 0 frames, on the others page records
    preamble        "KVMPYMIG", u32 lowest and u32 highest version its writer speaks, u32 channel, 16 bytes token
    frame           u16 kind, u16 flags (0), u32 length, u32 CRC-32 of these and the payload, payload
    page record     as `records` has it

All integers are little-endian. On connections with a way back the destination speaks first, then each side has one
preamble. The channel is 0 for the main one, whose token is zeros; page channels count from 1 and show the token that
ACCEPT gave. Where pages have no channel of their own (HEADER says 0 channels), each ROUND is followed by page records,
up to and with an END, and then by frames again.

A version is a stream's as a whole. This kvmpy writes NEWEST, or the older one that the other side asks for, and reads
from OLDEST on: the one before, at least. A change of any byte here or in `messages` takes a new version, and the golden
streams of each version from OLDEST on load for ever (tests/golden/streams).

Everything that is read is hostile: lengths are compared with caps before a byte is allocated for them.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple, Self
from zlib import crc32

from kvmpy.errors import StreamError

NEWEST: Final = 4
OLDEST: Final = 1
MAGIC: Final = b"KVMPYMIG"
MAGIC_SIZE: Final = len(MAGIC)
NO_TOKEN: Final = bytes(16)
MAIN: Final = 0
CHANNELS_MAX: Final = 64  # page channels; far more than there are queues in a NIC that one migration can use

_PREAMBLE: Final = struct.Struct("<8sIII16s")
_FRAME: Final = struct.Struct("<HHII")
_FRAME_SUMMED: Final = struct.Struct("<HHI")
PREAMBLE_SIZE: Final = _PREAMBLE.size
FRAME_SIZE: Final = _FRAME.size

# What somebody else's first bytes look like, and what to do about it.
STRANGERS: Final = (
    (b"\x16\x03", "it speaks TLS, and this side does not; give this side tls-creds, or both none"),
    (b"\x15\x03", "it refuses with a TLS alert: it wants TLS; give this side tls-creds"),
    (b"QEVM", "it is QEMU's migration stream, which kvmpy cannot read"),
    (b"SSH-", "an SSH server answers there"),
    (b"HTTP", "a web server answers there"),
    (b"GET ", "it is a web browser's request"),
)


class Preamble(NamedTuple):
    """The first bytes of a connection."""

    lowest: int
    highest: int
    channel: int = MAIN
    token: bytes = NO_TOKEN

    def pack(self) -> bytes:
        return _PREAMBLE.pack(MAGIC, self.lowest, self.highest, self.channel, self.token)

    @classmethod
    def unpack(cls, data: bytes | bytearray) -> Self:
        """Raises StreamError where it is not one, saying what it is if that can be told."""
        magic, lowest, highest, channel, token = _PREAMBLE.unpack(data)
        check_magic(magic)
        if not 1 <= lowest <= highest:
            raise StreamError(f"versions {lowest} to {highest} are none")
        if channel > CHANNELS_MAX:
            raise StreamError(f"channel {channel} of {CHANNELS_MAX}")
        if channel == MAIN and token != NO_TOKEN:
            raise StreamError("a main channel has no token")
        return cls(lowest, highest, channel, token)


def check_magic(start: bytes | bytearray) -> None:
    """Raises StreamError where these first bytes, or more, are no preamble's; fewer than MAGIC_SIZE tell nothing."""
    magic = bytes(start[:MAGIC_SIZE])
    if len(magic) == MAGIC_SIZE and magic != MAGIC:
        stranger = next((f": {said}" for mark, said in STRANGERS if magic.startswith(mark)), "")
        raise StreamError(f"not a kvmpy migration stream: it begins with {magic.hex(' ')}{stranger}")


def agree(ours: Preamble, theirs: Preamble) -> int:
    """The newest version that both sides speak; raises StreamError where there is none."""
    version = min(ours.highest, theirs.highest)
    if version < max(ours.lowest, theirs.lowest):
        newer, older = ("that", "this") if theirs.lowest > ours.highest else ("this", "that")
        raise StreamError(
            f"the other side speaks versions {theirs.lowest} to {theirs.highest} of the stream, this one {ours.lowest} "
            f"to {ours.highest}; {newer} side's kvmpy is too new for {older} one's: go by a release in between"
        )
    return version


OURS: Final = Preamble(OLDEST, NEWEST)


class FrameHeader(NamedTuple):
    """What is before a frame's payload; ``checksum`` is of this header and the payload."""

    kind: int
    length: int
    checksum: int

    @classmethod
    def of(cls, kind: int, payload: bytes) -> Self:
        return cls(kind, len(payload), _sum(kind, len(payload), payload))

    def pack(self) -> bytes:
        return _FRAME.pack(self.kind, 0, self.length, self.checksum)

    @classmethod
    def unpack(cls, data: bytes | bytearray) -> Self:
        kind, flags, length, checksum = _FRAME.unpack(data)
        if flags:
            raise StreamError(f"frame of kind {kind}: flags {flags:#x}, where there are none yet")
        return cls(kind, length, checksum)

    def check(self, payload: bytes | bytearray) -> None:
        """Raises StreamError where the payload is not what was sent."""
        if (found := _sum(self.kind, self.length, payload)) != self.checksum:
            raise StreamError(f"frame of kind {self.kind}: its checksum is {found:#010x}, not {self.checksum:#010x}")


def _sum(kind: int, length: int, payload: bytes | bytearray) -> int:
    return crc32(payload, crc32(_FRAME_SUMMED.pack(kind, 0, length)))
