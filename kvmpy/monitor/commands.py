"""What can be said to a running machine: the table of commands.

Names and fields are QEMU's where QEMU has the command. Each runs in the control thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated, Any, Final, TypeVar

import msgspec

from kvmpy import __version__
from kvmpy.errors import CommandError
from kvmpy.machine.machine import Machine
from kvmpy.machine.runstate import RunState

Handler = Callable[[Machine, Any], Any]
Arguments = TypeVar("Arguments", bound=msgspec.Struct)


class NoArguments(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A command that takes none."""


class Negotiation(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """qmp_capabilities: which of the greeting's capabilities the client wants."""

    enable: list[str] = []


class Powerdown(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Seconds until the machine is stopped if the guest has not powered off; absent: never (ours, not QEMU's)."""

    limit: Annotated[float, msgspec.Meta(ge=0)] | None = None


class Trace(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """trace (ours): a glob over the names of tracepoints."""

    name: Annotated[str, msgspec.Meta(max_length=200)]


class SetLink(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """set_link: the id of a network device or of its netdev, and whether its cable is plugged in."""

    name: str
    up: bool


def _version(machine: Machine, _: NoArguments) -> dict[str, Any]:
    return version()


def _commands(machine: Machine, _: NoArguments) -> list[dict[str, str]]:
    return [{"name": name} for name in sorted([*COMMANDS, *OF_A_SESSION])]


def _name(machine: Machine, _: NoArguments) -> dict[str, str]:
    return {"name": machine.name}


def _status(machine: Machine, _: NoArguments) -> dict[str, Any]:
    return {"status": machine.state.value, "running": machine.state is RunState.RUNNING}


def _cpus(machine: Machine, _: NoArguments) -> list[dict[str, Any]]:
    return [
        {"cpu-index": thread.vcpu.index, "thread-id": thread.native_id, "target": "x86_64"}
        for thread in machine.threads
    ]


def _machine(machine: Machine, _: NoArguments) -> dict[str, Any]:
    """Ours: what `kvmpy status` shows."""
    threads = machine.threads
    return {
        "name": machine.name,
        "pid": os.getpid(),
        "status": machine.state.value,
        "cpus": len(machine.board.vcpus),
        "memory": machine.board.memory.size,
        "kernel": machine.boot.description,
        "serial": machine.pty or str(machine.config.console.serial),
        "power-button-enabled": machine.board.acpi_pm.power_button_enabled,
        "exits": {
            "pio": sum(thread.pio_exits for thread in threads),
            "mmio": sum(thread.mmio_exits for thread in threads),
            "other": sum(thread.other_exits for thread in threads),
        },
        "devices": _devices(machine),
        "device-faults": sum(thread.faults for thread in threads),
    }


def _devices(machine: Machine) -> list[dict[str, Any]]:
    """Those of the configuration: driver, PCI address now, and what each says of itself."""
    drivers = {name: plugged.driver for name, plugged in machine.board.inventory.plugged.items()}
    places = {f.name: f"{bus:02x}:{device:02x}.{number:x}" for bus, device, number, f in machine.board.pci.functions()}
    return [
        {"id": name, "driver": drivers[name], "address": places.get(name), **device.info()}
        for name, device in machine.board.by_id.items()
    ]


def _set_link(machine: Machine, arguments: SetLink) -> dict[str, Any]:
    machine.set_link(arguments.name, up=arguments.up)
    return {}


def _powerdown(machine: Machine, arguments: Powerdown) -> dict[str, Any]:
    machine.powerdown(arguments.limit)
    return {}


def _nothing(change: Callable[[Machine], object]) -> Handler:
    """A handler whose reply is empty."""

    def handle(machine: Machine, _: NoArguments) -> dict[str, Any]:
        change(machine)
        return {}

    return handle


COMMANDS: Final[dict[str, tuple[type[msgspec.Struct], Handler]]] = {
    "query-version": (NoArguments, _version),
    "query-commands": (NoArguments, _commands),
    "query-name": (NoArguments, _name),
    "query-status": (NoArguments, _status),
    "query-cpus-fast": (NoArguments, _cpus),
    "query-machine": (NoArguments, _machine),
    "stop": (NoArguments, _nothing(lambda machine: machine.pause())),
    "cont": (NoArguments, _nothing(lambda machine: machine.resume())),
    "system_reset": (NoArguments, _nothing(lambda machine: machine.reset())),
    "system_powerdown": (Powerdown, _powerdown),
    "set_link": (SetLink, _set_link),
    "quit": (NoArguments, _nothing(lambda machine: machine.stop())),
}


def _device_del(machine: Machine, arguments: dict[str, Any]) -> None:
    machine.device_del(str(arguments.get("id")), force=arguments.get("force") is True)


# Their arguments are tables of the configuration.
PLUGGING: Final[dict[str, Callable[[Machine, dict[str, Any]], None]]] = {
    "device_add": lambda machine, arguments: machine.device_add(arguments),
    "device_del": _device_del,
    "netdev_add": lambda machine, arguments: machine.netdev_add(arguments),
    "netdev_del": lambda machine, arguments: machine.netdev_del(str(arguments.get("id"))),
}

# What concerns the client's own session, which knows how: server.py
OF_A_SESSION: Final = ("qmp_capabilities", "trace")


def version() -> dict[str, Any]:
    """QMP's version block. ``qemu`` is the version of QMP's vocabulary that clients look for; ``package`` is ours."""
    return {"qemu": {"major": 10, "minor": 0, "micro": 0}, "package": f"kvmpy {__version__}"}


def execute(machine: Machine, name: str, arguments: dict[str, Any]) -> Any:
    """Run a command. Raises CommandError as QEMU words it."""
    if name in PLUGGING:
        PLUGGING[name](machine, arguments)
        return {}
    if name not in COMMANDS:
        raise CommandError(f"The command {name} has not been found", "CommandNotFound")
    kind, handler = COMMANDS[name]
    return handler(machine, parse_arguments(kind, arguments))


def parse_arguments(kind: type[Arguments], arguments: dict[str, Any]) -> Arguments:
    """``arguments`` as ``kind``. Raises CommandError as QEMU words it."""
    for key in arguments:
        if key not in kind.__struct_fields__:
            raise CommandError(f"Parameter '{key}' is unexpected")
    try:
        return msgspec.convert(arguments, kind, strict=True)
    except msgspec.ValidationError as e:
        raise CommandError(f"Invalid arguments: {e}") from e
