"""Archives in the "newc" cpio format, the one the kernel unpacks as an initramfs.

Written here instead of by cpio(1), so that an archive has the same bytes for the same content (no inode numbers, no
times, owner 0) and nothing is staged on disk. Specified in the kernel's
Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat

MAGIC = "070701"
TRAILER = "TRAILER!!!"
ALIGNMENT = 4


def _padding(length: int) -> bytes:
    return bytes(-length % ALIGNMENT)


class Archive:
    """An archive under construction. Add a directory before what is in it."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._entries = 0

    def directory(self, *names: str) -> None:
        for name in names:
            self._add(name, stat.S_IFDIR | 0o755, b"")

    def file(self, name: str, content: bytes, *, executable: bool = False) -> None:
        self._add(name, stat.S_IFREG | (0o755 if executable else 0o644), content)

    def symlink(self, name: str, target: str) -> None:
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def finish(self) -> bytes:
        self._add(TRAILER, 0, b"")
        return bytes(self._data)

    def _add(self, name: str, mode: int, content: bytes) -> None:
        self._entries += 1
        inode, owner, group, links, time, device, checksum = self._entries, 0, 0, 1, 0, (0, 0), 0
        path = name.encode() + b"\0"
        fields = (inode, mode, owner, group, links, time, len(content), *device, *device, len(path), checksum)
        header = (MAGIC + "".join(f"{field:08X}" for field in fields)).encode() + path
        self._data += header + _padding(len(header)) + content + _padding(len(content))
