"""The NICs of an emulated host (hardware.py), as its kernel calls them."""

from __future__ import annotations

from scripts.lab.errors import LabError
from scripts.lab.hardware import UPLINK_MAC, Hardware
from scripts.lab.host import EmulatedHost


def functions(host: EmulatedHost) -> list[str]:
    """The addresses of those that are there to be passed through, in their order."""
    listed = host.run(["lspci", "-Dnd", _hardware(host).passed], check=True).stdout
    return [line.split()[0] for line in listed.splitlines()]


def uplink(host: EmulatedHost) -> str:
    """The interface that is the bridge's way out."""
    return _interface(host, UPLINK_MAC)


def pf(host: EmulatedHost) -> str:
    """The interface whose NIC has virtual functions."""
    return _interface(host, _hardware(host).pf)


def _interface(host: EmulatedHost, mac: str) -> str:
    mac = _hardware(host).mac(mac)
    shown = host.run(["sh", "-c", f"grep -l {mac} /sys/class/net/e*/address"], check=True).stdout
    return shown.split("/")[4]


def _hardware(host: EmulatedHost) -> Hardware:
    if host.hardware is None:
        raise LabError("this emulated host has no NICs")
    return host.hardware
