"""zstd, where it is: Python's own from 3.14 on, else backports.zstd (`pip install kvmpy[zstd]`).

Imported when a migration with compression begins, and not before. Each run of pages is packed on its own, so a batch
that is lost or hostile says nothing of the next; what unpacking may cost is bounded beforehand.
"""

from __future__ import annotations

from typing import Any, Final

from kvmpy.errors import HostError, StreamError

LEVEL: Final = 1  # the others take longer than the network does
WINDOW_LOG: Final = 20  # of a batch's size: what is packed by us needs no more, and memory is the reader's


def _module() -> Any:
    try:
        from compression import zstd  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        try:
            from backports import zstd
        except ImportError as e:
            raise HostError(
                "compression zstd: this Python has no zstd; pip install backports.zstd, or choose none"
            ) from e
    return zstd


class Zstd:
    """Packs and unpacks. One thread at a time."""

    def __init__(self) -> None:
        """Raises HostError where there is no zstd."""
        self._zstd = _module()
        self._compressor = self._zstd.ZstdCompressor(level=LEVEL)
        self._limits = {self._zstd.DecompressionParameter.window_log_max: WINDOW_LOG}

    def pack(self, data: Any) -> bytes:
        """``data`` as one frame."""
        packed: bytes = self._compressor.compress(data, self._compressor.FLUSH_FRAME)
        return packed

    def unpack(self, data: Any, size: int) -> bytes:
        """The ``size`` bytes in one frame. Raises StreamError where there are more, or fewer, or none."""
        decompressor = self._zstd.ZstdDecompressor(options=self._limits)
        try:
            unpacked: bytes = decompressor.decompress(data, max_length=size + 1)
        except self._zstd.ZstdError as e:
            raise StreamError(f"zstd: {e}") from e
        if len(unpacked) != size or not decompressor.eof or decompressor.unused_data:
            raise StreamError(f"zstd: a frame that is not the {size} bytes it should be")
        return unpacked
