from typing import Any

# cffi gives these their shape at build time; kvmpy.abi puts types on what passes through.
ffi: Any
lib: Any
