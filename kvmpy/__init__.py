"""kvmpy: a hypervisor userspace for KVM in Python.

`load`, `Machine`, `RunState` and `Outcome` are the public API. They are imported when first asked for, so that a
command which needs none pays for none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Machine", "Outcome", "RunState", "__version__", "load"]

if TYPE_CHECKING:
    from kvmpy.config.schema import load
    from kvmpy.machine.machine import Machine
    from kvmpy.machine.runstate import Outcome, RunState


_HOMES = {
    "load": "kvmpy.config.schema",
    "Machine": "kvmpy.machine.machine",
    "Outcome": "kvmpy.machine.runstate",
    "RunState": "kvmpy.machine.runstate",
}


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
