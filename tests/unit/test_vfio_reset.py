"""Which reset a function gets: one that is known to reset it, or the function is refused."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from kvmpy.abi import ioctl
from kvmpy.devices.vfio.config import HostConfig
from kvmpy.devices.vfio.reset import BusReset, FunctionReset, choose
from kvmpy.devices.vfio.resetter import Resetter
from kvmpy.errors import HostError
from kvmpy.host.tree import Host
from tests.fakes.vfio import ADDRESS, VfioKernel, config_space


def chosen(root: Path, methods: str | None, *, flr: bool = False, resets: bool = True) -> tuple[type, str]:
    path = root / "bus/pci/devices" / ADDRESS
    path.mkdir(parents=True, exist_ok=True)
    if methods is not None:
        (path / "reset_method").write_text(methods)
    config = HostConfig(ADDRESS, bytes(config_space(flr=flr)))
    found = choose(ADDRESS, config, resets=resets, host=Host(sys=str(root)))
    return type(found), found.name


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        ("flr pm bus\n", (FunctionReset, "flr")),
        ("device_specific flr\n", (FunctionReset, "device_specific")),
        ("af_flr pm\n", (FunctionReset, "af_flr")),
        ("bus\n", (FunctionReset, "bus")),
        ("pm bus\n", (BusReset, "bus")),
        ("pm\n", (BusReset, "bus")),
        ("acpi flr\n", (BusReset, "bus")),
        ("\n", (BusReset, "bus")),
    ],
)
def test_the_kernels_first_method_is_used_where_it_is_one_that_resets(
    tmp_path: Path, methods: str, expected: tuple[type, str]
) -> None:
    assert chosen(tmp_path, methods) == expected


def test_a_kernel_that_does_not_say_is_believed_if_the_function_can_reset_itself(tmp_path: Path) -> None:
    assert chosen(tmp_path, None, flr=True) == (FunctionReset, "flr")
    assert chosen(tmp_path, None, flr=False) == (BusReset, "bus")
    assert chosen(tmp_path, None, flr=True, resets=False) == (BusReset, "bus")


def test_a_bus_reset_is_given_the_proof_that_the_group_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = VfioKernel(tmp_path)
    monkeypatch.setattr(ioctl, "sys_ioctl", kernel)
    fd = kernel.nic.open()
    with (tmp_path / "7").open("r+b") as group:
        BusReset(ADDRESS).check(fd)
        BusReset(ADDRESS).reset(fd, group.fileno())
        assert kernel.named("VFIO_DEVICE_PCI_HOT_RESET")[0]["group_fds"] == [group.fileno()]
        assert kernel.nic.resets == ["bus"]
        kernel.fail("VFIO_DEVICE_PCI_HOT_RESET", errno.EAGAIN)
        with pytest.raises(HostError, match="EAGAIN: its bus has not been reset"):
            BusReset(ADDRESS).reset(fd, group.fileno())
        kernel.fail("VFIO_DEVICE_GET_PCI_HOT_RESET_INFO", errno.ENOSPC)
        with pytest.raises(HostError, match=r"nor by its bus \(VFIO_DEVICE_GET_PCI_HOT_RESET_INFO: ENOSPC\)"):
            BusReset(ADDRESS).check(fd)


def test_a_resetter_runs_one_at_a_time_and_then_what_comes_after() -> None:
    ran: list[str] = []
    resetter = Resetter("x", lambda: ran.append("reset"))
    assert resetter.is_over
    for _ in range(3):
        resetter.start(lambda: ran.append("after"))
        resetter.join()
    assert ran == ["reset", "after"] * 3
    assert resetter.error is None


def test_a_resetter_keeps_why_it_failed_until_the_next() -> None:
    failures = [HostError("it hangs")]

    def reset() -> None:
        if failures:
            raise failures.pop()

    resetter = Resetter("x", reset)
    resetter.start()
    assert resetter.wait(20)
    assert str(resetter.error) == "it hangs"
    resetter.join()
    resetter.start()
    resetter.join()
    assert resetter.error is None


# What configuration space says


def test_a_chain_of_capabilities_that_runs_in_circles_ends() -> None:
    data = config_space()
    data[0x51] = 0xC8
    config = HostConfig(ADDRESS, bytes(data))
    assert config.capabilities == {0x01: 0xC8, 0x05: 0xD0, 0x10: 0xE0, 0x11: 0xA0, 0x09: 0x50}
    data[0x142:0x144] = (0x1000 | 1).to_bytes(2, "little")
    assert HostConfig(ADDRESS, bytes(data)).serial_number is not None


def test_a_conventional_device_has_no_extended_capabilities() -> None:
    config = HostConfig(ADDRESS, bytes(config_space()[:256]))
    assert (config.extended, config.serial_number) == ({}, None)


def test_nonsense_is_no_pin() -> None:
    assert HostConfig(ADDRESS, bytes(config_space(pin=200))).pin == 0
