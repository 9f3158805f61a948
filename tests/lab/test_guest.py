"""Stock Debian kernels under `kvmpy run`, on real KVM in an emulated host."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator
from typing import Final

import pytest

from scripts.lab.host import EmulatedHost
from tests.counts import count
from tests.lab.guest import PROMPT, Guest

NAME: Final = "resident"


@pytest.mark.parametrize(
    ("kernel", "image", "cpus"),
    # The guests of the other modules are those of vmlinux.
    [("generic", "vmlinuz", 2), ("cloud", "vmlinuz", 4), ("generic", "vmlinux", 1), ("cloud", "vmlinux", 2)][
        : count(2, 4)
    ],
)
def test_a_stock_kernel_boots_to_a_shell_and_powers_off(host: EmulatedHost, kernel: str, image: str, cpus: int) -> None:
    with Guest(host, "boot", kernel=kernel, image=image, cpus=cpus) as guest:
        up = guest.wait_shell()
        assert int(up[2]) == cpus
        assert guest.type("echo $((6 * 7))") == "42"
        assert guest.type("dmesg | grep -c 'ttyS0 at I/O 0x3f8 (irq = 4, base_baud = 115200) is a 16550A'") == "1"
        assert guest.type("dmesg | grep -c 'rtc_cmos.*setting system clock'") == "1"
        assert guest.type("dmesg | grep -iE 'acpi (bios )?(error|warning|exception)|firmware (bug|warn)'") == ""
        guest.process.send("poweroff\n")
        assert guest.wait_end() == 0
        assert re.search(r"first KVM_RUN [\d.]+ s, kernel [\d.]+ s, init [\d.]+ s", guest.process.output)


def test_a_reboot_starts_the_kernel_anew_and_the_power_button_ends_it(host: EmulatedHost) -> None:
    with Guest(host, "reboot", cpus=2) as guest:
        first = guest.wait_shell()
        guest.type("echo changed > /etc-was-here")
        for _ in range(count(1, 20)):
            guest.process.send("reboot\n")
            again = guest.wait_shell()
            assert (again[1], again[2]) == (first[1], "2")
        assert guest.type("ls /etc-was-here 2>&1 | grep -c 'No such file'") == "1"
        guest.kvmpy("reset", "reboot")
        guest.wait_shell()
        guest.kvmpy("powerdown", "reboot")
        assert guest.wait_end() == 0


def test_a_guest_runs_on_huge_pages_and_gives_them_back(host: EmulatedHost) -> None:
    def free_pages() -> int:
        meminfo = host.run(["cat", "/proc/meminfo"], check=True).stdout
        return int(re.findall(r"HugePages_Free: *(\d+)", meminfo)[0])

    host.run(["sh", "-c", "echo 128 > /proc/sys/vm/nr_hugepages"], check=True)
    try:
        with Guest(host, "huge", options="--set machine.hugepages=2MiB --set machine.reserve=true") as guest:
            guest.wait_shell()
            assert free_pages() == 0
            second = host.run(["kvmpy", "run", "examples/demo.toml", "--name", "b", "--set", "machine.hugepages=2MiB"])
            assert second.returncode == 1
            assert "machine.hugepages: ENOMEM: 256 huge pages of 2048 KiB are not free" in second.stderr
        assert free_pages() == 128
    finally:
        host.run(["sh", "-c", "echo 0 > /proc/sys/vm/nr_hugepages"], check=True)


def test_a_panic_is_exit_code_3(host: EmulatedHost) -> None:
    with Guest(host, "panic", mode="panic") as guest:
        guest.wait_up()
        guest.process.expect("Kernel panic - not syncing")
        assert guest.wait_end() == 3
        assert "kernel panicked" in guest.process.output


def test_sigterm_presses_the_power_button_and_the_terminal_is_put_back(host: EmulatedHost) -> None:
    settings = "echo TTY $(stty -g); "
    with Guest(host, "sigterm", before=settings, after=settings) as guest:
        guest.wait_shell()
        pid = json.loads(guest.kvmpy("ps", "--json").stdout)[0]["pid"]
        host.run(["kill", f"-{int(signal.SIGTERM)}", str(pid)], check=True)
        guest.process.expect("SIGTERM: pressed the power button")
        assert guest.wait_end() == 0
    first, last = re.findall(r"TTY (\S+)", guest.process.output)
    assert first == last


def test_the_escape_key_ends_the_machine_and_nothing_is_left(host: EmulatedHost) -> None:
    with Guest(host, "escape") as guest:
        guest.wait_shell()
        guest.process.send(b"\x01h")
        guest.process.expect("stop the guest and leave")
        guest.process.send(b"\x01x")
        assert guest.wait_end() == 0
    assert host.run(["ls", "/run/kvmpy"], check=True).stdout == ""


@pytest.fixture(scope="module")
def resident(host: EmulatedHost) -> Iterator[Guest]:
    """A guest for the tests below; the last of them ends it."""
    with Guest(host, NAME, cpus=2) as guest:
        guest.wait_shell()
        yield guest


def test_the_guests_clock_is_right_after_a_pause(resident: Guest, host: EmulatedHost) -> None:
    guest = resident

    def guest_minus_host() -> tuple[float, float]:
        """At least, and at most: the guest has whole seconds, and the host goes on meanwhile."""
        before = float(host.run(["date", "+%s.%N"], check=True).stdout)
        guest_time = float(guest.type("date +%s"))
        return guest_time - float(host.run(["date", "+%s.%N"], check=True).stdout), guest_time + 1 - before

    first, last = guest_minus_host()
    guest.kvmpy("pause", NAME)
    assert json.loads(guest.kvmpy("status", "--json", NAME).stdout)["status"] == "paused"
    guest.process.send("echo typed while paused\n")
    time.sleep(10)  # the pause itself, longer than what the host takes between two readings
    assert "\ntyped while paused" not in guest.process.output
    guest.kvmpy("resume", NAME)
    guest.process.expect("\ntyped while paused")
    guest.process.expect(PROMPT)
    least, most = guest_minus_host()
    assert most >= first - 1, "it has lost time"
    assert least <= last + 1, "it has gained time"
    assert guest.type("dmesg | grep -ciE 'soft lockup|stall'") == "0"


def test_a_second_terminal_attaches_and_leaves(resident: Guest, host: EmulatedHost) -> None:
    guest = resident
    other = host.spawn(["kvmpy", "console", NAME], tty=True)
    other.expect("attached")
    other.send("echo from terminal $((1 + 1))\n")
    other.expect("\nfrom terminal 2")
    guest.process.expect("\nfrom terminal 2")
    other.send(b"\x01x")
    assert other.wait() == 0
    assert NAME in guest.kvmpy("ps").stdout
    again = host.run(["kvmpy", "run", "examples/demo.toml", "--name", NAME])
    assert again.returncode == 1
    assert f"'{NAME}' is running already" in again.stderr
    guest.kvmpy("stop", NAME)
    assert guest.wait_end() == 0
