"""Write the streams that are missing: python -m tests.fuzz.streams.make; look at the .txt of each before it stays."""

from __future__ import annotations

import re
import struct
from contextlib import closing
from pathlib import Path
from typing import Final

from kvmpy.migration.messages import Kind
from kvmpy.migration.records import BATCH, DATA, END, RECORD, ZERO, ZSTD
from kvmpy.migration.stop import Stop
from kvmpy.migration.wire import FrameHeader, Preamble
from tests.golden.streams.make import SOURCE, frame, written

HERE: Final = Path(__file__).parent
START: Final = Preamble(1, 1).pack()
PAGES: Final = Preamble(1, 1, 1, bytes(range(16))).pack()
ROUND: Final = written(SOURCE[:3])
HEADER: Final = written(SOURCE[:1])[len(START) :]


def _section(state: bytes) -> bytes:
    return START + frame(Kind.SECTION, b'{"device":"x","section":{"a":' + state + b"}}")


STREAMS: Final = {
    "nothing": b"",
    "no-magic": b"KVMPYMIX" + bytes(28),
    "versions-of-none": Preamble(0, 0).pack(),
    "versions-upside-down": Preamble(3, 2).pack(),
    "version-of-tomorrow": Preamble(2**32 - 1, 2**32 - 1).pack(),
    "channel-too-many": Preamble(1, 1, 2**32 - 1).pack(),
    "token-on-main": Preamble(1, 1, 0, bytes([1] * 16)).pack(),
    "kind-of-none": START + frame(0, b"{}"),
    "flags-of-tomorrow": START + struct.pack("<HHII", Kind.GO, 0x8000, 2, 0) + b"{}",
    "length-of-4-gib": START + FrameHeader(Kind.SECTION, 2**32 - 1, 0).pack(),
    "length-up-to-the-cap": START + FrameHeader(Kind.SECTION, 16 << 20, 0).pack() + b"{",
    "checksum-of-another": START + FrameHeader(Kind.GO, 2, 0).pack() + b"{}",
    "json-deep": _section(b"[" * 60_000),
    "json-deep-and-right": _section(b"[" * 900 + b"]" * 900),
    "json-number-of-5000-digits": _section(b"9" * 5000),
    "json-exponent": _section(b"1e99999"),
    "json-surrogate": _section(b'"\\ud800"'),
    "json-bad-utf-8": _section(b'"\xc3("'),
    "json-twice-the-same-key": START + frame(Kind.ROUND, b'{"number":1,"number":2,"remaining_bytes":-1}'),
    "json-cut": START + frame(Kind.SECTION, b'{"device":"x","section":{"a'),
    "json-escape-sequence": START + frame(Kind.SECTION, b'{"device":"\\u001b[2J","section":{"\\u0007":0,"x":[}}'),
    "json-checksums-of-7-bytes": START
    + frame(Kind.CHECKSUMS, b'{"blocks":[{"gpa":0,"chunk":4096,"values":"AAAAAAAAAA=="}]}'),
    "header-twice": START + HEADER + HEADER,
    "sections-miscounted": START + frame(Kind.END_OF_STATE, b'{"sections":3,"stopped_ns":1,"phases":[]}'),
    "round-without-an-end": ROUND + RECORD.pack(0, 1, ZERO),
    "record-of-no-kind": ROUND + struct.pack("<QII", 0, 1, 0),
    "record-of-16-tib": PAGES + struct.pack("<QII", 0, 2**32 - 1, DATA),
    "record-past-the-end": PAGES + struct.pack("<QII", 2**64 - 4096, 2, ZERO),
    "record-not-aligned": PAGES + struct.pack("<QII", 0x1001, 1, DATA),
    "record-of-no-pages": PAGES + struct.pack("<QII", 0x1000, 0, ZERO),
    "zstd-of-4-gib": PAGES + RECORD.pack(2**32, 1, ZSTD),
    "zstd-longer-than-a-batch": PAGES + RECORD.pack(16, (1 << 20) + 1, ZSTD),
    "zstd-of-nothing": PAGES + RECORD.pack(0, 16, ZSTD),
    "batch-of-4-gib": PAGES + RECORD.pack(2**32 - 1, 2**32 - 1, BATCH),
    "batch-of-two-sizes": PAGES + RECORD.pack(32, 16, BATCH),
    "batch-in-a-batch": PAGES + RECORD.pack(32, 32, BATCH) + RECORD.pack(16, 16, BATCH) + bytes(16),
    "batch-that-ends-the-round": PAGES + RECORD.pack(16, 16, BATCH) + RECORD.pack(1, 0, END),
    "batch-that-cuts-a-record": PAGES + RECORD.pack(17, 17, BATCH) + RECORD.pack(0, 1, ZERO) + b"x",
    "batch-that-cuts-pages": PAGES + RECORD.pack(20, 20, BATCH) + RECORD.pack(0, 1, DATA) + bytes(4),
    "round-of-2-to-the-32": PAGES + RECORD.pack(2**32, 0, END),
}


def main() -> None:
    from tests.fuzz.test_streams import read

    with closing(Stop()) as stop:
        for name, data in STREAMS.items():
            stream = HERE / f"{name}.stream"
            if not stream.exists():
                stream.write_bytes(data)
                stream.with_suffix(".txt").write_text(ours(name, read(stop, data)) + "\n")


def ours(name: str, said: str) -> str:
    """Without what JSON's decoder says, for others word it."""
    return re.sub(r"(byte \d+: [A-Z_]+:).*", r"\1", said) if name.startswith("json-") else said


if __name__ == "__main__":
    main()
