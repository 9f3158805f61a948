"""Frames of zstd as we make them, in a line."""

from __future__ import annotations

from kvmpy.migration.zstd import Packer


def packed(data: bytes) -> bytes:
    """``data`` as one frame."""
    room = bytearray(len(data) + 1024)
    return bytes(room[: Packer().pack(data, room)])
