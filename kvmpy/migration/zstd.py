"""zstd, by the host's own libzstd.so.1 (zstd.h, what is stable of version 1.4; frames are RFC 8878's).

Loaded when a migration with compression begins, and not before. Each run of pages is packed on its own, so a batch
that is lost or hostile says nothing of the next. A frame is unpacked in one go into room that its receiver has already,
so what it says of its window is nothing that anybody would make room for.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from kvmpy._native import ffi, lib
from kvmpy.errors import HostError, StreamError

LIBRARY: Final = b"libzstd.so.1"
LEVEL: Final = 1  # the others take longer than the network does
MAGIC: Final = b"\x28\xb5\x2f\xfd"
ZSTD_c_compressionLevel: Final = 100
FUNCTIONS: Final = {
    "ZSTD_isError": "unsigned(*)(size_t)",
    "ZSTD_getErrorName": "const char *(*)(size_t)",
    "ZSTD_createCCtx": "void *(*)(void)",
    "ZSTD_freeCCtx": "size_t(*)(void *)",
    "ZSTD_CCtx_setParameter": "size_t(*)(void *, int, int)",
    "ZSTD_compress2": "size_t(*)(void *, void *, size_t, const void *, size_t)",
    "ZSTD_createDCtx": "void *(*)(void)",
    "ZSTD_freeDCtx": "size_t(*)(void *)",
    "ZSTD_decompressDCtx": "size_t(*)(void *, void *, size_t, const void *, size_t)",
    "ZSTD_findFrameCompressedSize": "size_t(*)(const void *, size_t)",
}


@cache
def library() -> dict[str, Any]:
    """Its functions, by name. Raises HostError where there is none."""
    handle = lib.dlopen(LIBRARY, lib.RTLD_NOW)
    if not handle:
        raise _missing()
    found = {name: ffi.cast(kind, lib.dlsym(handle, name.encode())) for name, kind in FUNCTIONS.items()}
    if not all(found.values()):
        raise _missing()
    return found


def _missing() -> HostError:
    why = ffi.string(lib.dlerror()).decode(errors="replace")
    return HostError(f"compression zstd: {why}; apt install libzstd1, or choose none")


class Packer:
    """Packs. One thread at a time."""

    def __init__(self) -> None:
        """Raises HostError where there is no zstd."""
        zstd = library()
        self._compress = zstd["ZSTD_compress2"]
        self._is_error = zstd["ZSTD_isError"]
        self._context = _kept(zstd["ZSTD_createCCtx"](), zstd["ZSTD_freeCCtx"])
        zstd["ZSTD_CCtx_setParameter"](self._context, ZSTD_c_compressionLevel, LEVEL)

    def pack(self, data: Any, into: Any) -> int:
        """``data`` as one frame at the beginning of ``into``: its size, 0 where that is not room enough."""
        size = self._compress(self._context, ffi.from_buffer(into), len(into), ffi.from_buffer(data), len(data))
        return 0 if self._is_error(size) else int(size)


class Unpacker:
    """Unpacks. One thread at a time."""

    def __init__(self) -> None:
        """Raises HostError where there is no zstd."""
        self._zstd = zstd = library()
        self._context = _kept(zstd["ZSTD_createDCtx"](), zstd["ZSTD_freeDCtx"])

    def unpack(self, data: Any, into: Any) -> None:
        """The one frame ``data`` to fill ``into``. Raises StreamError where it does not, or is more than that."""
        if data[:4] != MAGIC:  # or it might be a format of long ago, or what is to be skipped
            raise StreamError("zstd: no frame begins there")
        source, room = ffi.from_buffer(data), ffi.from_buffer(into)
        frame = self._check(self._zstd["ZSTD_findFrameCompressedSize"](source, len(data)))
        if frame != len(data):
            raise StreamError(f"zstd: {len(data) - frame} bytes behind the frame")
        size = self._check(self._zstd["ZSTD_decompressDCtx"](self._context, room, len(into), source, frame))
        if size != len(into):
            raise StreamError(f"zstd: a frame of {size} bytes, not of the {len(into)} it should be")

    def _check(self, result: int) -> int:
        if self._zstd["ZSTD_isError"](result):
            raise StreamError(f"zstd: {ffi.string(self._zstd['ZSTD_getErrorName'](result)).decode()}")
        return result


def _kept(context: Any, free: Any) -> Any:
    """``context``, freed when nobody has it any more."""
    if not context:
        raise HostError("ENOMEM: no room for zstd's tables; free some of the host's memory, or choose none")
    return ffi.gc(context, free)
