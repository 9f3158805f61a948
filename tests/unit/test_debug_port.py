"""DebugPort: milestones with the host's time."""

from __future__ import annotations

from kvmpy.devices.debug_port import DebugPort
from tests.fakes.host import Clock


def test_each_value_is_stamped_when_it_is_first_written() -> None:
    clock = Clock(utc=1)
    port = DebugPort("debug", clock.ns)
    port.write(0, 1, 0x10)
    clock.pass_(0.5)
    port.write(0, 1, 0x20)
    clock.pass_(0.5)
    port.write(0, 1, 0x10)
    assert port.stamps == ((0x10, 1_000_000_000), (0x20, 1_500_000_000))


def test_there_are_never_more_stamps_than_bytes() -> None:
    port = DebugPort("debug", Clock().ns)
    for value in range(10_000):
        port.write(0, 1, value)
    assert len(port.stamps) == 256


def test_read_gives_the_last_value() -> None:
    port = DebugPort("debug", Clock().ns)
    port.write(0, 1, 0x55)
    port.write(0, 1, 0xAA)
    assert port.read(0, 1) == 0xAA


def test_reset_keeps_the_stamps_which_are_those_of_the_first_boot() -> None:
    clock = Clock(utc=1)
    port = DebugPort("debug", clock.ns)
    port.write(0, 1, 0x55)
    port.reset()
    clock.pass_(0.5)
    port.write(0, 1, 0x55)
    assert port.stamps == ((0x55, 1_000_000_000),)
    port.reset()
    assert port.read(0, 1) == 0
