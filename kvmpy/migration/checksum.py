"""Checksums of all RAM, for a migration under test: both sides must have the same when no vCPU runs.

A checksum for each chunk, so that a difference has a place. zlib works without the GIL.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Final

from kvmpy.errors import MigrationError
from kvmpy.memory import GuestMemory

CHUNK: Final = 16 << 20
# Differences that are told one by one.
MOST_TOLD: Final = 8


def checksums(memory: GuestMemory) -> list[list[int]]:
    """For each block of RAM, the CRC-32 of each of its chunks."""
    return [
        [zlib.crc32(memory.view(at, min(CHUNK, block.end - at))) for at in range(block.gpa, block.end, CHUNK)]
        for block in memory.blocks
    ]


def compare(memory: GuestMemory, theirs: Sequence[Sequence[int]]) -> None:
    """Raises MigrationError that names every chunk of ``memory`` which differs from the other side's checksums."""
    ours = checksums(memory)
    if [len(block) for block in ours] != [len(block) for block in theirs]:
        raise MigrationError("the checksums of the other side's RAM are not as many as this machine's")
    different = [
        block.gpa + index * CHUNK
        for block, mine, other in zip(memory.blocks, ours, theirs, strict=True)
        for index, pair in enumerate(zip(mine, other, strict=True))
        if pair[0] != pair[1]
    ]
    if different:
        told = ", ".join(f"{gpa:#x}" for gpa in different[:MOST_TOLD]) + (", ..." if different[MOST_TOLD:] else "")
        raise MigrationError(f"RAM differs from the source's in {len(different)} chunks of {CHUNK:#x}, at gpa {told}")
