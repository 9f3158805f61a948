"""Arbitrary accesses on a whole machine's buses: none escapes as an exception, no device leaves its contract."""

from __future__ import annotations

import random
from contextlib import ExitStack
from pathlib import Path

from kvmpy.bus import Bus
from kvmpy.config.schema import load
from kvmpy.host.console import Console
from kvmpy.host.reactor import Reactor
from kvmpy.kvm.system import System
from kvmpy.machine.build import build
from kvmpy.state import load as load_state
from kvmpy.state import save
from tests.counts import count
from tests.fakes.host import Switch
from tests.fakes.pvh_kernel import POWER_OFF, pvh_kernel

SIZES = (1, 2, 4, 8)
SEED = 20240229


def pick_address(dice: random.Random, bus: Bus, limit: int) -> int:
    """Mostly in or beside a window, sometimes anywhere."""
    if bus.windows and dice.random() < 0.9:
        window = dice.choice(bus.windows)
        return max(window.base + dice.randrange(-4, window.size + 4), 0)
    return dice.randrange(limit)


def test_a_machine_survives_arbitrary_accesses(system: System, tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(pvh_kernel(POWER_OFF))
    (tmp_path / "m.toml").write_text(
        '[boot]\nkernel = "kernel"\n[machine]\nmemory = "16MiB"\n[console]\nserial = "null"\n'
    )
    dice = random.Random(SEED)
    power = Switch()
    with ExitStack() as resources:
        io = Reactor("io")
        resources.callback(io.close)
        io.start()
        console = Console(io)
        resources.callback(console.close)
        board = build(load(tmp_path / "m.toml"), power, console, io, io, lambda event, **data: None, resources)
        for turn in range(count(40_000, 1_000_000)):
            bus, limit = (board.pio, 1 << 16) if dice.random() < 0.8 else (board.mmio, 1 << 48)
            addr, size = pick_address(dice, bus, limit), dice.choice(SIZES)
            if dice.random() < 0.5:
                value = bus.read(addr, size)
                assert 0 <= value < 1 << 8 * size, f"seed {SEED}, turn {turn}: {addr:#x} gave {value:#x}"
            else:
                bus.write(addr, size, dice.getrandbits(8 * size))
            if turn % 1000 == 0:
                board.serial.receive(dice.randbytes(20))
                board.acpi_pm.press_power_button()
        for device in board.devices:
            with device.lock:
                section = save(device.state)
                assert save(load_state(type(device.state), section)) == section
    assert set(power.requests) == {"reset", "shutdown", "panic"}
