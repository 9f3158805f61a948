"""Disks, and with them the random numbers and the console, of a Debian guest: what was written is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import pytest

from scripts.lab.host import EmulatedHost
from scripts.lab.images import Images
from tests.lab import tables
from tests.lab.guest import FROM_DISK, Guest, root_disk

DATA, FIXED, HVC = "/scratch/data.img", "/scratch/fixed.img", "/run/disk-hvc"
MIB: Final = 1 << 20
DATA_MIB: Final = 8

TERMINAL = """
import socket, sys, threading
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
print("connected", flush=True)
def show():
    while data := connection.recv(4096):
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
threading.Thread(target=show, daemon=True).start()
for line in sys.stdin.buffer:
    connection.sendall(line)
"""


@dataclass
class Lab:
    """A guest with a root disk, a disk of two queues to write to (vdb), and one that cannot be written (vdc)."""

    guest: Guest
    root: str
    fixed_sum: str  # of what is on vdc

    def host_sum(self, path: str) -> str:
        return self.guest.host.run(["sha256sum", path], check=True).stdout.split()[0]

    def guest_sum(self, device: str) -> str:
        """Of what is on the disk, not in the guest's memory."""
        return self.guest.type(f"echo 3 >/proc/sys/vm/drop_caches; sha256sum {device}").split()[0]

    def fill(self, options: str = "") -> str:
        """Write random data to all of vdb; returns what there is to say of errors."""
        return self.guest.type(
            f"dd if=/dev/urandom of=/dev/vdb bs=64k count={DATA_MIB * 16} {options} 2>&1 | grep -v +0"
        )


@pytest.fixture(scope="module")
def lab(host: EmulatedHost, lab_images: Images) -> Iterator[Lab]:
    making = f"truncate -s {DATA_MIB}M {DATA}; head -c {MIB} /dev/urandom >{FIXED}"
    host.run(["sh", "-c", making], check=True)
    with root_disk(host, lab_images, "disk") as root:
        config = (
            tables.disk("root", root)
            + tables.disk("data", DATA, queues=2)
            + tables.disk("fixed", FIXED, readonly=True)
            + tables.rng("rng0")
            + tables.console("console0", f"unix:{HVC}")
        )
        with Guest(host, "disk", cpus=2, tables=config, words=FROM_DISK) as guest:
            guest.wait_shell()
            lab = Lab(guest, root, "")
            lab.fixed_sum = lab.host_sum(FIXED)
            yield lab
    host.run(["rm", DATA, FIXED], check=True)


def test_the_root_is_the_disk(lab: Lab) -> None:
    assert lab.guest.type("grep ' / ' /proc/mounts").startswith("/dev/vda / ext4 rw")


def test_a_disk_has_the_queues_size_and_name_of_the_configuration(lab: Lab) -> None:
    facts = lab.guest.type("cd /sys/block/vdb; ls mq; cat size serial; echo; cat queue/write_cache ro; cd")
    assert facts.split() == ["0", "1", str(DATA_MIB * MIB // 512), "data", "write", "back", "0"]
    (data,) = (device for device in lab.guest.status()["devices"] if device["id"] == "data")
    assert (data["size"], data["cache"], data["readonly"]) == (DATA_MIB * MIB, "none", False)


def test_what_is_written_and_flushed_is_in_the_file(lab: Lab) -> None:
    before = lab.guest.device("data")["requests"].get("flush", 0)
    assert lab.fill("conv=fsync") == ""
    assert lab.guest.device("data")["requests"]["flush"] > before
    assert lab.guest_sum("/dev/vdb") == lab.host_sum(DATA)


def test_a_pause_interrupts_writing_and_loses_nothing(lab: Lab) -> None:
    dd = f"dd if=/dev/urandom of=/dev/vdb bs=32k count={DATA_MIB * 32} oflag=direct 2>/tmp/dd"
    lab.guest.type(f"(until [ -e /tmp/enough ]; do {dd} || exit; done; echo 0 >/tmp/status) &")
    lab.guest.kvmpy("pause", "disk")
    paused = lab.guest.device("data")
    assert paused["under-way"] == 0
    assert lab.guest.device("data")["requests"] == paused["requests"]
    lab.guest.kvmpy("resume", "disk")
    assert lab.guest.type("touch /tmp/enough; wait; cat /tmp/status").endswith("0")
    assert lab.guest.device("data")["requests"]["out"] > paused["requests"]["out"]
    assert lab.guest_sum("/dev/vdb") == lab.host_sum(DATA)


def test_a_disk_that_cannot_be_written_is_read_and_refuses_to_be_written(lab: Lab) -> None:
    assert lab.guest.type("cat /sys/block/vdc/ro") == "1"
    assert lab.guest_sum("/dev/vdc") == lab.fixed_sum
    lab.guest.type("dd if=/dev/zero of=/dev/vdc bs=4k count=1 oflag=direct")
    assert lab.host_sum(FIXED) == lab.fixed_sum


def test_discarded_blocks_take_no_room(lab: Lab) -> None:
    def room() -> int:
        """In blocks of 512 bytes."""
        return int(lab.guest.host.run(["stat", "-c", "%b", DATA], check=True).stdout)

    assert lab.fill("conv=fsync") == ""
    assert room() * 512 >= DATA_MIB * MIB
    lab.guest.type(f"blkdiscard -o 0 -l {DATA_MIB // 2 * MIB} /dev/vdb")
    assert room() * 512 <= (DATA_MIB // 2 + 1) * MIB
    assert lab.guest.type(f"head -c {MIB} /dev/vdb | tr -d '\\0' | wc -c") == "0"


def test_the_guest_gets_random_numbers(lab: Lab) -> None:
    assert lab.guest.type("cat /sys/class/misc/hw_random/rng_current") == "virtio_rng.0"
    numbers = lab.guest.type("dd if=/dev/hwrng bs=1k count=1 2>&- | xxd -p | tr -d '\\n'; echo")
    assert len(set(re.findall("..", numbers))) > 200, "of 256, and seldom all"


def test_the_virtio_console_works_both_ways(lab: Lab) -> None:
    terminal = lab.guest.host.spawn(["python", "-I", "-S", "-c", TERMINAL, HVC])
    terminal.expect("connected")
    lab.guest.type('stty -F /dev/hvc0 -echo; (read -r line; echo "heard $line") </dev/hvc0 >/dev/hvc0 &')
    lab.guest.type("echo listening >/dev/hvc0")
    terminal.expect("listening")
    terminal.send("a word\n")
    terminal.expect("heard a word")
    terminal.close_stdin()
    assert terminal.wait() == 0


def test_a_disk_in_use_is_refused_to_another_machine(lab: Lab) -> None:
    other = lab.guest.host.run(["kvmpy", "run", "/run/disk.toml", "--name", "other"])
    assert other.returncode == 1
    assert re.search(rf"path: .*{lab.root}: locked by kvmpy \(pid \d+\)", other.stderr), other.stderr


def test_disks_survive_a_reboot_a_reset_while_writing_and_the_end(lab: Lab) -> None:
    assert lab.fill("conv=fsync") == ""
    written = lab.host_sum(DATA)
    lab.guest.type("echo kept >/kept; sync")
    lab.guest.process.send("reboot\n")
    lab.guest.wait_shell()
    assert lab.guest.type("cat /kept") == "kept"
    assert lab.guest_sum("/dev/vdb") == written

    lab.guest.type("(while :; do dd if=/dev/urandom of=/dev/vdb bs=64k oflag=direct; done) >/dev/null 2>&1 &")
    lab.guest.kvmpy("reset", "disk")
    lab.guest.wait_shell()
    assert lab.guest.type("cat /kept") == "kept"
    assert lab.fill() == ""
    written = lab.guest_sum("/dev/vdb")
    lab.guest.process.send("poweroff\n")
    assert lab.guest.wait_end() == 0
    assert lab.host_sum(DATA) == written
    assert lab.host_sum(FIXED) == lab.fixed_sum
    lab.guest.host.run(["e2fsck", "-fn", lab.root], check=True)
