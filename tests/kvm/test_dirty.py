"""The dirty log on the real kernel: a flat guest writes to known pages, and exactly those are in the log."""

from __future__ import annotations

import struct
import threading
from contextlib import ExitStack

import pytest

from kvmpy.abi import kvm as abi
from kvmpy.errors import IoctlError
from kvmpy.host.memory import Mapping
from kvmpy.kvm.dirty import MANUAL, KvmDirtyLog
from kvmpy.kvm.exits import Halted, PioWrite
from kvmpy.kvm.system import System
from kvmpy.memory import GuestMemory, Ram
from kvmpy.migration.checksum import checksums, compare
from kvmpy.migration.dirty import DirtyLog, DirtyPages
from kvmpy.migration.intake import PageReceiver
from kvmpy.migration.pages import PageSender
from kvmpy.pagebits import PAGE, PageBits
from tests.conftest import skip_or_fail
from tests.fakes.page_channel import channel_pairs
from tests.fakes.virtio_driver import Bytes
from tests.kvm.conftest import RAM_SIZE, FlatGuest, MakeGuest, run

HLT = b"\xf4"
SET_DX = b"\xba\xf8\x03"  # mov dx, 0x3f8
OUT = b"\xee"  # out dx, al


def store(gpa: int) -> bytes:
    """mov ax, segment; mov ds, ax; inc byte [offset]: of the first MiB"""
    return b"\xb8" + struct.pack("<H", gpa >> 4 & 0xF000) + b"\x8e\xd8\xfe\x06" + struct.pack("<H", gpa & 0xFFFF)


@pytest.fixture(params=[True, False], ids=["manual", "plain"])
def manual(request: pytest.FixtureRequest, system: System) -> bool:
    wanted = bool(request.param)
    if wanted and not system.check(MANUAL):
        skip_or_fail("kvm", f"this KVM has no {MANUAL}")
    return wanted


def logged(dirty: DirtyPages) -> set[int]:
    """The pages in a set, by gpa."""
    return {block.gpa + page * PAGE for block, bits, _ in dirty.blocks for page in range(bits.size) if page in bits}


class Source:
    """A flat guest, its log, and the first round behind it."""

    def __init__(self, guest: FlatGuest, *, manual: bool) -> None:
        self.guest = guest
        self.log = DirtyLog(guest.vm, guest.memory, manual=manual)
        self.dirty = DirtyPages(guest.memory)
        self.destination = GuestMemory()
        self.destination.add(Ram(0, RAM_SIZE, Bytes(RAM_SIZE)))
        self.number = 0

    def send(self, channels: int = 1) -> int:
        """A round of what is in the set; how many pages that were."""
        self.number += 1
        with channel_pairs(channels) as (ours, theirs):
            receiver = PageReceiver(self.destination, theirs)
            receiver.start()
            stats = PageSender(ours).send_round(self.dirty, self.number)
            receiver.wait_round(self.number, 60)
            receiver.close()
        return stats.pages

    def collect(self) -> set[int]:
        self.log.collect(self.dirty)
        return logged(self.dirty)


def test_log_begins_with_every_page_and_goes_on_with_those_that_are_written(
    make_guest: MakeGuest, manual: bool
) -> None:
    guest = make_guest()
    source = Source(guest, manual=manual)
    vcpu = guest.load(SET_DX + OUT + store(0x5000) + store(0x1_2345) + OUT + store(0xF_FFFF) + OUT + HLT)
    assert isinstance(run(vcpu), PioWrite)
    source.log.start()
    assert source.collect() == set(range(0, RAM_SIZE, PAGE))
    assert source.send() == RAM_SIZE // PAGE
    assert source.collect() == set()

    assert isinstance(run(vcpu), PioWrite)
    assert source.collect() == {0x5000, 0x1_2000}
    assert source.send() == 2
    assert isinstance(run(vcpu), PioWrite)
    assert source.collect() == {0xF_F000}
    source.send()
    assert run(vcpu) == Halted()
    assert source.collect() == set()
    compare(guest.memory, checksums(source.destination))
    source.log.stop()


def test_pages_that_are_collected_twice_before_they_are_sent_are_there_once(
    make_guest: MakeGuest, manual: bool
) -> None:
    guest = make_guest()
    source = Source(guest, manual=manual)
    vcpu = guest.load(SET_DX + store(0x5000) + OUT + store(0x7000) + OUT + store(0x5000) + OUT + HLT)
    source.log.start()
    source.collect()
    source.send()
    assert isinstance(run(vcpu), PioWrite)
    assert source.collect() == {0x5000}
    assert isinstance(run(vcpu), PioWrite)
    assert source.collect() == {0x5000, 0x7000}
    source.send()
    assert isinstance(run(vcpu), PioWrite)  # to a page that was sent: it is dirty again
    assert source.collect() == {0x5000}
    source.log.stop()


def test_what_we_write_is_in_the_set_too(make_guest: MakeGuest, manual: bool) -> None:
    guest = make_guest()
    source = Source(guest, manual=manual)
    vcpu = guest.load(SET_DX + store(0x5000) + OUT + HLT)
    source.log.start()
    source.collect()
    source.send()
    guest.memory.write(0x8FFF, b"xy")
    assert isinstance(run(vcpu), PioWrite)
    assert source.collect() == {0x5000, 0x8000, 0x9000}
    source.send()
    assert source.collect() == set()
    source.log.stop()


def test_second_migration_begins_with_every_page_again(make_guest: MakeGuest, manual: bool) -> None:
    guest = make_guest()
    source = Source(guest, manual=manual)
    vcpu = guest.load(SET_DX + store(0x5000) + OUT + store(0x6000) + OUT + store(0x7000) + OUT + HLT)
    for page in (0x5000, 0x6000, 0x7000):
        source.log.start()
        assert len(source.collect()) == RAM_SIZE // PAGE
        source.send()
        assert isinstance(run(vcpu), PioWrite)
        assert source.collect() == {page}
        source.log.stop()
        source.log.stop()
        assert guest.memory.log is None
        source.dirty.clear()


def test_log_that_is_started_anew_forgets_nothing(make_guest: MakeGuest, manual: bool) -> None:
    guest = make_guest()
    source = Source(guest, manual=manual)
    source.log.start()
    source.collect()
    source.send()
    source.log.start()
    assert len(source.collect()) == RAM_SIZE // PAGE
    source.log.stop()


def test_collection_that_fails_is_made_good_by_the_next(
    make_guest: MakeGuest, manual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = make_guest()
    source = Source(guest, manual=manual)
    source.log.start()
    source.collect()
    source.send()
    with monkeypatch.context() as patch:
        patch.setattr(guest.vm, "fd", -1)
        with pytest.raises(IoctlError, match="KVM_GET_DIRTY_LOG: EBADF"):
            source.collect()
    assert len(source.collect()) == RAM_SIZE // PAGE
    source.log.stop()


COUNTING = (  # in one page after the other, without end
    b"\xb8\x00\x20"  # start: mov ax, 0x2000
    b"\x8e\xd8"  # next: mov ds, ax
    b"\x66\xff\x06\x00\x00"  # inc dword [0]
    b"\x05\x00\x01"  # add ax, 0x100
    b"\x3d\x00\xf0"  # cmp ax, 0xf000
    b"\x72\xf1"  # jb next
    b"\xeb\xec"  # jmp start
)


def test_memory_that_a_running_guest_writes_is_the_same_in_the_end(make_guest: MakeGuest, manual: bool) -> None:
    guest = make_guest()
    source = Source(guest, manual=manual)
    vcpu = guest.load(COUNTING)
    runner = threading.Thread(target=vcpu.enter)
    source.log.start()
    source.log.collect(source.dirty)
    source.send()
    runner.start()
    again = 0
    try:
        while again < 1000:  # of 208 pages that it writes to
            source.log.collect(source.dirty)
            again += source.send()
    finally:
        vcpu.kick(runner.native_id or 0)
        runner.join(60)
    source.log.collect(source.dirty)
    source.send()
    assert guest.memory.read(0x2_0000, 4) != bytes(4)
    compare(guest.memory, checksums(source.destination))
    source.log.stop()


def test_log_that_cannot_be_started_leaves_nothing_logged(make_guest: MakeGuest, manual: bool) -> None:
    guest = make_guest()

    class Refuses:
        def log_started(self, log: object) -> None:
            raise IoctlError("VHOST_SET_LOG_BASE", 14)

        def log_stopped(self) -> None:
            pass

    log = DirtyLog(guest.vm, guest.memory, manual=manual)
    guest.memory.follow_log(follower := Refuses())
    with pytest.raises(IoctlError, match="VHOST_SET_LOG_BASE"):
        log.start()
    assert not log.started
    guest.memory.unfollow_log(follower)
    log.start()
    log.stop()


@pytest.mark.parametrize("channels", [1, 3])
def test_log_of_a_large_block_is_cleared_to_its_last_page(make_guest: MakeGuest, channels: int) -> None:
    guest = make_guest()
    size = (130 << 20) + 3 * PAGE  # whole chunks, and one that is no multiple of 64 pages
    with ExitStack() as stack:
        mapping = Mapping(size)
        stack.callback(mapping.close)
        stack.callback(guest.memory.close)
        guest.memory.add(Ram(1 << 32, size, mapping))
        source = Source(guest, manual=True)
        stack.callback(source.destination.close)
        source.destination.add(Ram(1 << 32, size, mapping))  # nothing but zeros comes
        source.log.start()
        source.log.collect(source.dirty)
        assert source.send(channels) == (RAM_SIZE + size) // PAGE
        assert source.collect() == set()
        guest.memory.write((1 << 32) + size - 1, b"x")
        assert source.collect() == {(1 << 32) + size - PAGE}
        source.log.stop()


def test_device_memory_is_not_logged(make_guest: MakeGuest, manual: bool) -> None:
    with ExitStack() as stack:
        guest = make_guest()
        shortcut = guest.vm.direct(0x100_0000, PAGE, guest.memory.blocks[0].hva)
        stack.callback(shortcut.close)
        log = KvmDirtyLog(guest.vm, guest.memory.blocks, manual=manual)
        log.start()
        with pytest.raises(IoctlError, match="KVM_GET_DIRTY_LOG: ENOENT"):
            _read_slot(guest, shortcut.number)
        log.stop()


def _read_slot(guest: FlatGuest, number: int) -> None:
    abi.KVM_GET_DIRTY_LOG(guest.vm.fd, abi.DirtyLog.new(slot=number, padding2=PageBits(64).address))
