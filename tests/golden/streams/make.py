"""Write the golden streams that are missing: python -m tests.golden.streams.make"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from kvmpy.migration.messages import (
    Accept,
    Arrived,
    BlockChecksums,
    Cancel,
    Checksums,
    Compression,
    EndOfState,
    Failed,
    Go,
    Header,
    Keepalive,
    Message,
    Origin,
    Outcome,
    Phase,
    Prepared,
    Ready,
    Refuse,
    Refused,
    Round,
    RoundEnd,
    Section,
    Sections,
    Started,
    encode,
)
from kvmpy.migration.records import BATCH, DATA, END, RECORD, ZERO, ZSTD
from kvmpy.migration.wire import NEWEST, FrameHeader, Preamble

HERE: Final = Path(__file__).parent
STOPPED: Final = 1_800_000_000_123_456_789
PHASES: Final = (Phase(name="stop vCPUs", start_ns=STOPPED, ns=1_500_000),)
# A frame of zstd as RFC 8878 has it, of one block that is not compressed: the record below.
ZEROS: Final = RECORD.pack(0x20_0000, 3, ZERO)
PACKED: Final = bytes.fromhex("28B52FFD 20 10 810000") + ZEROS
PAGES: Final = RECORD.pack(0x1000, 2, DATA) + b"".join(bytes([byte]) * 4096 for byte in (1, 0xFF))

# What the RAM has afterwards, at these addresses.
CONTENT: Final = {0x1000: b"\x01" * 4096 + b"\xff" * 4096, 0x10_0000: bytes(4 << 20), 0x20_0000: bytes(3 * 4096)}

SOURCE: Final[tuple[Message | bytes, ...]] = (
    Header(
        description={"memory": [[0, 1 << 20]], "devices": {"vd0": "virtio-blk"}, "tsc-khz": 2_400_000.5},
        channels=0,
        compression=Compression.ZSTD,
        checksum=True,
        source=Origin(host="host-a", version="1.0", name="web1"),
    ),
    Keepalive(),
    Round(number=1, remaining_bytes=9 * 4096),
    PAGES,
    RECORD.pack(0x10_0000, 1024, ZERO),
    RECORD.pack(len(PAGES + ZEROS), len(PAGES + ZEROS), BATCH) + PAGES + ZEROS,
    RECORD.pack(len(ZEROS), len(PACKED), ZSTD) + PACKED,
    RECORD.pack(1, 0, END),
    RoundEnd(number=1),
    Round(number=2, remaining_bytes=0),
    RECORD.pack(2, 0, END),
    Checksums(blocks=(BlockChecksums.of(0, 1 << 20, (1, 2**64 - 1)),)),
    Section(device="com1", section={"name": "serial16550", "version": 1, "state": {"ier": 5, "rx": "a2V5"}}),
    Section(device="disk ✓", section={"name": "virtio-blk", "version": 3, "state": {}}),
    Sections(
        sections=(
            Section(device="com2", section={"name": "serial16550", "version": 1, "state": {"ier": 1, "rx": ""}}),
            Section(device="vd1", section={"name": "virtio-blk", "version": 3, "state": {}}),
        )
    ),
    EndOfState(sections=4, stopped_ns=STOPPED, phases=PHASES, primaries=("hostdev0",)),
    Go(),
    Cancel(reason="by hand"),
)
DESTINATION: Final[tuple[Message | bytes, ...]] = (
    Accept(token=bytes(range(16)), version=NEWEST, rehearsal_ns=12_345_678),
    Prepared(primaries=(Outcome.of("hostdev0", 1_234_567_890, None), Outcome.of("hostdev1", 5, "it is gone"))),
    Arrived(number=1),
    Keepalive(),
    Ready(),
    Started(first_run_ns=STOPPED + 5_000_000, phases=PHASES),
    Refuse(problems=("cpus: 2 here, 4 there", "memory: 1 GiB here, 2 GiB there")),
    Refused(reason="KVM_SET_SREGS2: EINVAL"),
    Failed(reason="ENOMEM: no memory"),
)
STREAMS: Final = {"source": SOURCE, "destination": DESTINATION}


def path(name: str, version: int) -> Path:
    return HERE / f"{name}-v{version}.stream"


def written(parts: tuple[Message | bytes, ...]) -> bytes:
    """What a connection carries when these are sent."""
    return Preamble(NEWEST, NEWEST).pack() + b"".join(_bytes(part) for part in parts)


def frame(kind: int, payload: bytes) -> bytes:
    """Any payload, with the right checksum."""
    return FrameHeader.of(kind, payload).pack() + payload


def _bytes(part: Message | bytes) -> bytes:
    return part if isinstance(part, bytes) else frame(part.KIND, encode(part))


def main() -> None:
    for name, parts in STREAMS.items():
        file = path(name, NEWEST)
        if not file.exists():
            file.write_bytes(written(parts))


if __name__ == "__main__":
    main()
