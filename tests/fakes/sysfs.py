"""A host's PCI functions as files: what sysfs shows, and what the kernel does when its attributes are written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from kvmpy.host import pci_function
from kvmpy.host.tree import Host

NIC, BRIDGE = 0x020000, 0x060400
REMAPPED = "  1:  5  IR-IO-APIC   1-edge  i8042\n"


class FakeSysfs:
    """A host below ``root``. ``refuse`` are drivers whose probe fails, with an errno."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = Host(str(root / "dev"), str(root / "proc"), str(root / "sys"))
        self.sys, self.dev, self.proc = root / "sys", root / "dev", root / "proc"
        self.devices, self.drivers = self.sys / "bus/pci/devices", self.sys / "bus/pci/drivers"
        for directory in (self.devices, self.drivers, self.dev / "vfio", self.proc):
            directory.mkdir(parents=True)
        (self.proc / "interrupts").write_text(REMAPPED)
        self.refuse: dict[str, int] = {}
        self.writes: list[str] = []
        for name in ("vfio-pci", "igbvf", "igb", "e1000e"):
            self.add_driver(name)
        monkeypatch.setattr(pci_function, "sysfs_write", self.write)

    def add_driver(self, name: str) -> None:
        (self.drivers / name).mkdir()
        for file in ("bind", "unbind"):
            (self.drivers / name / file).touch()

    def add(
        self,
        address: str,
        *,
        group: int | None = 0,
        driver: str = "",
        kind: int = NIC,
        below: str = "",
        methods: str = "flr",
    ) -> Path:
        """A function, on a root bus unless it is ``below`` a bridge; returns its directory. Resets: ``methods``."""
        path = self.devices / address
        if below:
            path.symlink_to(self.devices / below / address)
            path = path.readlink()
        path.mkdir(parents=True)
        if methods:
            (path / "reset_method").write_text(f"{methods}\n")
        (path / "config").write_bytes(bytes(64))
        (path / "class").write_text(f"{kind:#08x}\n")
        (path / "driver_override").write_text("(null)\n")
        if group is not None:
            members = self.sys / f"kernel/iommu_groups/{group}/devices"
            members.mkdir(parents=True, exist_ok=True)
            (members / address).symlink_to(path)
            (path / "iommu_group").symlink_to(members.parent)
        if driver:
            self._attach(address, driver)
        return path

    def add_vf(self, address: str, pf: str, number: int, *, group: int) -> Path:
        """A virtual function of ``pf``, which is there."""
        path = self.add(address, group=group, driver="igbvf")
        (path / "physfn").symlink_to(self.devices / pf)
        (self.devices / pf / f"virtfn{number}").symlink_to(path)
        return path

    def add_interface(self, address: str, name: str, *, place: str = "net") -> Path:
        """A network interface of the function's, which is down; returns its directory."""
        path = self.devices / address / place / name
        path.mkdir(parents=True)
        (path / "flags").write_text("0x1002\n")
        return path

    def driver(self, address: str) -> str:
        link = self.devices / address / "driver"
        return os.readlink(link).rpartition("/")[2] if link.is_symlink() else ""

    def override(self, address: str) -> str:
        return (self.devices / address / "driver_override").read_text().strip()

    def state(self, address: str) -> tuple[str, str]:
        return self.driver(address), self.override(address)

    def write(self, path: str, text: str) -> None:
        """What the kernel does."""
        self.writes.append(f"{path.removeprefix(str(self.sys))} {text.strip()}")
        name = os.path.basename(path)
        if name == "driver_override":
            Path(path).write_text(text.strip() + "\n" if text.strip() else "(null)\n")
            return
        directory = os.path.realpath(os.path.dirname(path))
        if name == "unbind":
            (self.devices / text / "driver").unlink()
            return
        driver = os.path.basename(directory)
        allowed = self.override(text)
        if number := self.refuse.get(driver, 0 if allowed in ("(null)", driver) else errno.ENODEV):
            raise OSError(number, os.strerror(number))
        self._attach(text, driver)

    def _attach(self, address: str, driver: str) -> None:
        path = self.devices / address
        (path / "driver").symlink_to(self.drivers / driver)
        if driver == "vfio-pci":
            (self.dev / "vfio" / os.readlink(path / "iommu_group").rpartition("/")[2]).touch()
