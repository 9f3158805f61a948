"""zstd, by the host's own libzstd.so.1 (zstd.h, what is stable of version 1.4; frames are RFC 8878's).

Loaded when a migration with compression begins, and not before. Each run of pages is packed on its own, so a batch
that is lost or hostile says nothing of the next. A frame is unpacked in one go into room that its receiver has already,
so what it says of its window is nothing that anybody would make room for.

The page pump (abi/pages.c) calls it, too, where bytes pass a descriptor as they are; what it refuses, this explains.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from kvmpy._native import ffi, lib
from kvmpy.errors import HostError, StreamError

LIBRARY: Final = b"libzstd.so.1"
LEVEL: Final = 1  # the others take longer than the network does
MAGIC: Final[bytes] = lib.KVMPY_ZSTD_MAGIC.to_bytes(4, "little")
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
    found = {}
    for name, kind in FUNCTIONS.items():
        function = lib.dlsym(handle, name.encode())
        if not function:
            raise _missing()
        found[name] = ffi.cast(kind, function)
    return found


def _missing() -> HostError:
    """At once after the call that failed: another forgets why."""
    why = lib.dlerror()
    said = ffi.string(why).decode(errors="replace") if why else "it cannot be loaded"
    return HostError(f"compression zstd: {said}; apt install libzstd1, or choose none")


class _Coder:
    """The library, and what of it is one thread's: a ``context``, and the function ``code`` that needs one."""

    def __init__(self, create: str, free: str, code: str) -> None:
        """Raises HostError where there is no zstd."""
        self._zstd = library()
        context = self._zstd[create]()
        if not context:
            raise HostError("ENOMEM: no room for zstd's tables; free some of the host's memory, or choose none")
        self._context, self._code = ffi.gc(context, self._zstd[free]), self._zstd[code]

    def native(self, batch: Any, packed: Any, most: int = 0) -> Any:
        """For the page pump, with room for a batch as it is and packed; whoever has it keeps these, and us. What is
        sent has ``most`` bytes.
        """
        return ffi.new(
            "struct kvmpy_zstd *",
            {
                "context": self._context,
                "code": self._code,
                "frame_size": self._zstd["ZSTD_findFrameCompressedSize"],
                "is_error": self._zstd["ZSTD_isError"],
                "batch": ffi.from_buffer(batch),
                "packed": ffi.from_buffer(packed),
                "most": most,
            },
        )


class Packer(_Coder):
    """Packs. One thread at a time."""

    def __init__(self) -> None:
        super().__init__("ZSTD_createCCtx", "ZSTD_freeCCtx", "ZSTD_compress2")
        self._zstd["ZSTD_CCtx_setParameter"](self._context, ZSTD_c_compressionLevel, LEVEL)

    def pack(self, data: Any, into: Any) -> int:
        """``data`` as one frame at the beginning of ``into``: its size, 0 where that is not room enough."""
        size = self._code(self._context, ffi.from_buffer(into), len(into), ffi.from_buffer(data), len(data))
        return 0 if self._zstd["ZSTD_isError"](size) else int(size)


class Unpacker(_Coder):
    """Unpacks. One thread at a time."""

    def __init__(self) -> None:
        super().__init__("ZSTD_createDCtx", "ZSTD_freeDCtx", "ZSTD_decompressDCtx")

    def unpack(self, data: Any, into: Any) -> None:
        """The one frame ``data`` to fill ``into``. Raises StreamError where it does not, or is more than that."""
        if data[:4] != MAGIC:  # or it might be a format of long ago, or what is to be skipped
            raise StreamError("zstd: no frame begins there")
        source, room = ffi.from_buffer(data), ffi.from_buffer(into)
        frame = self._check(self._zstd["ZSTD_findFrameCompressedSize"](source, len(data)))
        if frame != len(data):
            raise StreamError(f"zstd: {len(data) - frame} bytes behind the frame")
        size = self._check(self._code(self._context, room, len(into), source, frame))
        if size != len(into):
            raise StreamError(f"zstd: a frame of {size} bytes, not of the {len(into)} it should be")

    def _check(self, result: int) -> int:
        if self._zstd["ZSTD_isError"](result):
            raise StreamError(f"zstd: {ffi.string(self._zstd['ZSTD_getErrorName'](result)).decode()}")
        return result
