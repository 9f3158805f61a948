"""Pvpanic: what the guest's pvpanic driver reports."""

from __future__ import annotations

from kvmpy.devices.pvpanic import Pvpanic
from tests.fakes.host import Switch


def make() -> tuple[Pvpanic, list[str]]:
    power = Switch()
    return Pvpanic("pvpanic", power, lambda: power.requests.append("crash loaded")), power.requests


def test_read_says_which_events_are_known() -> None:
    pvpanic, _ = make()
    assert pvpanic.read(0, 1) == 0x03


def test_panic_is_reported() -> None:
    pvpanic, reported = make()
    pvpanic.write(0, 1, 0x01)
    assert reported == ["panic"]


def test_loaded_crash_kernel_is_reported_as_such() -> None:
    pvpanic, reported = make()
    pvpanic.write(0, 1, 0x02)
    assert reported == ["crash loaded"]


def test_unknown_events_are_ignored() -> None:
    pvpanic, reported = make()
    pvpanic.write(0, 1, 0xFC)
    assert reported == []
