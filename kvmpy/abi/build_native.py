"""Build kvmpy._native: the kernel's ABI as the compiler knows it, and the C of ours (cffi API mode)."""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent

ffi = FFI()
for name in ("kvm.cdef", "vhost.cdef", "vfio.cdef", "tun.cdef", "block.cdef", "dl.cdef", "native.cdef", "pages.cdef"):
    ffi.cdef((HERE / name).read_text())
ffi.set_source(
    "kvmpy._native",
    "".join((HERE / name).read_text() for name in ("native.c", "pages.c")),
    include_dirs=[str(HERE)],
    extra_compile_args=["-O2", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror=incompatible-pointer-types"],
    py_limited_api=True,
)

if __name__ == "__main__":
    ffi.compile(verbose=True)
