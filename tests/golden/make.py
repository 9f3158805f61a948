"""Write the golden files that are missing: python -m tests.golden.make"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from kvmpy.state import State, save
from tests.fakes.rigs import RIGS, Parts, Rig

HERE: Final = Path(__file__).parent


def path(kind: type[State], version: int) -> Path:
    return HERE / f"{kind.NAME}-v{version}.json"


def _write(rig: Rig, *accesses: tuple[int, int]) -> None:
    for offset, value in accesses:
        rig.bus.write(offset, 1, value)


def _busy_serial(rig: Rig) -> None:
    """FIFOs on, both half full, an overrun, deltas, every interrupt enabled."""
    rig.screen.room_left = 0
    _write(rig, (3, 0x83), (0, 0x01), (3, 0x03), (7, 0xA5), (2, 0x81), (4, 0x1B))
    _write(rig, *((0, value) for value in range(17)))
    _write(rig, (4, 0x0B), (0, 0x41), (0, 0x42), (1, 0x0F))


def _busy_cmos(rig: Rig) -> None:
    """Another time, an alarm, binary mode, two interrupts, a flag pending."""
    for index, value in ((0x0B, 0x86), (0x09, 30), (0x07, 1), (0x0B, 0x06), (1, 5), (3, 0xFF), (5, 7), (0x40, 0x77)):
        _write(rig, (0, index), (1, value))
    _write(rig, (0, 0x0B), (1, 0x36))
    rig.clock.pass_(1.5)


def _busy_acpi_pm(rig: Rig) -> None:
    rig.bus.write(2, 2, 0x0121)
    rig.bus.write(4, 2, 5 << 10)
    rig.host["press"](0)
    rig.clock.pass_(1000)


BUSY: Final[dict[str, Callable[[Rig], object]]] = {
    "serial": _busy_serial,
    "cmos": _busy_cmos,
    "acpi_pm": _busy_acpi_pm,
    "i8042": lambda rig: _write(rig, (4, 0x60), (0, 0x47), (4, 0xAA), (4, 0xD1)),
    "reset_register": lambda rig: _write(rig, (0, 0x02)),
    "pvpanic": lambda rig: _write(rig, (0, 0x01)),
    "debug_port": lambda rig: _write(rig, (0, 0x55)),
}


def sections(name: str) -> dict[str, Any]:
    rig = RIGS[name](Parts())
    power_on = save(rig.device.state)
    BUSY[name](rig)
    rig.before_save()
    return {"power_on": power_on, "busy": save(rig.device.state)}


def main() -> None:
    for name, make_rig in RIGS.items():
        kind = type(make_rig(Parts()).device.state)
        file = path(kind, kind.VERSION)
        if not file.exists():
            file.write_text(json.dumps(sections(name), indent=1) + "\n")


if __name__ == "__main__":
    main()
