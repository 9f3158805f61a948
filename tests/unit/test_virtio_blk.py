"""A virtio disk as its driver sees it: what each request does, and what a wrong one gets."""

from __future__ import annotations

import errno
import logging
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmpy.devices.virtio.blk import BATCH, SEGMENTS, BlkFeature
from kvmpy.devices.virtio.blk_request import MOST_DISCARDED, MOST_RANGES, MOST_ZEROED, Answer, Disk, Kind
from kvmpy.host.disk import Disk as HostDisk
from tests.counts import count
from tests.fakes.blk_rig import BlkRig, cut, header
from tests.fakes.disk import FakeDisk

SECTOR = 512
TEXT = bytes(n * 7 & 0xFF for n in range(251)) * 600

MakeRig = Callable[..., BlkRig]


@pytest.fixture
def make_rig() -> Iterator[MakeRig]:
    rigs: list[BlkRig] = []

    def make(disk: Disk | None = None, queues: int = 1) -> BlkRig:
        rigs.append(BlkRig(FakeDisk() if disk is None else disk, queues=queues))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture
def disk() -> FakeDisk:
    disk = FakeDisk()
    disk.content[:] = TEXT[: len(disk.content)]
    return disk


@pytest.fixture
def rig(make_rig: MakeRig, disk: FakeDisk) -> BlkRig:
    return make_rig(disk)


def ranges(*each: tuple[int, int, int]) -> bytes:
    return b"".join(struct.pack("<QII", *one) for one in each)


# What each request does


def test_read_gives_the_sectors_and_says_how_much(rig: BlkRig) -> None:
    head = rig.offer([header(Kind.IN, 3)], [1024, 1])
    assert rig.wait() == {head: 1025}
    assert rig.ring.content(head) == TEXT[3 * SECTOR : 5 * SECTOR] + bytes([Answer.OK])


def test_write_stores_the_sectors(rig: BlkRig, disk: FakeDisk) -> None:
    head = rig.offer([header(Kind.OUT, 126), b"w" * 1024], [1])
    assert rig.wait() == {head: 1}
    assert disk.content == TEXT[: 126 * SECTOR] + b"w" * 1024


@pytest.mark.parametrize("kind", [Kind.IN, Kind.OUT])
def test_disk_is_given_the_data_s_buffers_and_no_piece_of_another(kind: Kind, make_rig: MakeRig) -> None:
    """Direct I/O wants all of them aligned, which headers and status bytes are not."""

    class Measured(FakeDisk):
        def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
            sizes.append([len(buffer) for buffer in buffers])
            super().read(offset, buffers)

        def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
            sizes.append([len(buffer) for buffer in buffers])
            super().write(offset, buffers)

    sizes: list[list[int]] = []
    rig, data = make_rig(Measured()), [512, 1024]
    sent = [bytes(size) for size in data] if kind is Kind.OUT else []
    rig.offer([header(kind), *sent], [*(data if kind is Kind.IN else []), 1])
    rig.wait()
    assert sizes == [data]


def test_serial_number_is_padded_to_twenty_bytes(rig: BlkRig) -> None:
    assert rig.ask(Kind.GET_ID, into=20) == (Answer.OK, b"serial-7".ljust(20, b"\0"))


def test_long_serial_number_is_cut(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.device._serial = b"x" * 20
    assert rig.ask(Kind.GET_ID, into=7) == (Answer.OK, b"x" * 7)


def test_bytes_that_are_not_filled_are_not_said_to_be(rig: BlkRig) -> None:
    head = rig.offer([header(Kind.GET_ID)], [30, 1])
    assert rig.wait() == {head: 20}


def test_request_without_data_is_done(rig: BlkRig, disk: FakeDisk) -> None:
    assert rig.ask(Kind.IN, 5) == (Answer.OK, b"")
    assert rig.ask(Kind.OUT, 128) == (Answer.OK, b"")


def test_unknown_request_is_unsupported(rig: BlkRig, disk: FakeDisk) -> None:
    for kind in (2, 3, 5, 10, 14, 15, 16, 0x80000000, 0xFFFFFFFF):
        assert rig.ask(kind, 0, b"a" * 512)[0] is Answer.UNSUPP
    assert disk.calls == []


@pytest.mark.parametrize(
    ("sector", "size"),
    [(128, 512), (127, 1024), (1 << 63, 512), (2**64 - 1, 512), (2**64 - 1, 1024), (2**55, 512), (0, 513), (0, 511)],
)
def test_request_outside_the_disk_or_of_half_sectors_is_an_error(
    sector: int, size: int, rig: BlkRig, disk: FakeDisk
) -> None:
    before = bytes(disk.content)
    head = rig.offer([header(Kind.IN, sector)], [size, 1])
    assert rig.wait() == {head: 0}
    assert rig.ring.content(head)[-1] == Answer.IOERR
    assert rig.ask(Kind.OUT, sector, bytes(size))[0] is Answer.IOERR
    assert disk.calls == []
    assert disk.content == before


def test_last_sector_is_there(rig: BlkRig) -> None:
    assert rig.ask(Kind.IN, 127, into=512) == (Answer.OK, TEXT[127 * SECTOR : 128 * SECTOR])


# The whole of the disk, end to end


def test_file_has_in_the_end_what_was_written(tmp_path: Path, make_rig: MakeRig) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(64 * SECTOR))
    disk = HostDisk.open(str(path), readonly=False, direct=False)
    rig = make_rig(disk)
    assert rig.ask(Kind.OUT, 8, TEXT[:4096])[0] is Answer.OK
    assert rig.ask(Kind.WRITE_ZEROES, 0, ranges((9, 2, 0), (13, 1, 1)))[0] is Answer.OK
    assert rig.ask(Kind.FLUSH)[0] is Answer.OK
    wanted = bytearray(bytes(4096) + TEXT[:4096])
    wanted[9 * SECTOR : 11 * SECTOR] = bytes(1024)
    wanted[13 * SECTOR : 14 * SECTOR] = bytes(512)
    assert rig.ask(Kind.IN, 0, into=8192) == (Answer.OK, bytes(wanted))
    rig.close()
    disk.close()
    assert path.read_bytes() == bytes(wanted) + bytes(48 * SECTOR)


# No layout of the buffers means anything


Cuts = st.lists(st.integers(0, 1100), max_size=12)


@given(kind=st.sampled_from([Kind.IN, Kind.OUT, Kind.WRITE_ZEROES, Kind.GET_ID]), front=Cuts, back=Cuts)
@settings(max_examples=count(25, 1000), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_however_a_request_is_cut_it_is_the_same(kind: Kind, front: list[int], back: list[int]) -> None:
    data = {Kind.OUT: TEXT[:1024], Kind.WRITE_ZEROES: ranges((5, 2, 1), (9, 1, 0))}.get(kind, b"")
    space = {Kind.IN: 1024, Kind.GET_ID: 20}.get(kind, 0)
    results = []
    for cuts in (([], []), (front, back)):
        disk = FakeDisk()
        disk.content[:] = TEXT[: len(disk.content)]
        rig = BlkRig(disk)
        readable = cut(header(kind, 3) + data, cuts[0])
        writable = [len(part) for part in cut(bytes(space + 1), cuts[1])]
        head = rig.offer(readable, writable)
        used = rig.wait()
        results.append((used[head], rig.ring.content(head), bytes(disk.content), disk.calls))
        rig.close()
    assert results[0] == results[1]


def test_header_that_changes_behind_our_back_is_read_once(rig: BlkRig, disk: FakeDisk) -> None:
    disk.go.clear()
    head = rig.offer([header(Kind.OUT, 1), b"n" * 512], [1])
    disk.log.wait()
    rig.memory.write(rig.gpa_of(head), header(Kind.OUT, 2**64 - 1))
    disk.go.set()
    assert rig.wait() == {head: 1}
    assert disk.content[SECTOR : 2 * SECTOR] == b"n" * 512


# What cannot be a request breaks the device, and nothing else


@pytest.mark.parametrize(
    ("readable", "writable"),
    [([], [1]), ([b"short"], [1]), ([bytes(15)], [513]), ([bytes(16)], []), ([bytes(16), bytes(512)], [])],
    ids=["no header", "short header", "15 bytes", "no status", "write without status"],
)
def test_chain_that_cannot_hold_a_request_breaks_the_device_until_a_reset(
    readable: list[bytes], writable: list[int], rig: BlkRig
) -> None:
    rig.offer(readable, writable)
    rig.wait_until_broken()
    assert "a request without a header or a status" in rig.guest.broken[0]
    rig.guest.start()
    assert rig.ask(Kind.IN, 0, into=512) == (Answer.OK, TEXT[:512])


@given(
    chains=st.lists(
        st.tuples(
            st.integers(0, 20), st.integers(0, 2**64 - 1), st.binary(max_size=600), st.lists(st.integers(0, 700))
        ),
        max_size=6,
    )
)
@settings(max_examples=count(20, 1000), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_requests_are_answered_or_break_the_device(
    chains: list[tuple[int, int, bytes, list[int]]],
) -> None:
    disk = FakeDisk()
    rig = BlkRig(disk)
    for kind, sector, data, writable in chains:
        if rig.guest.broken:
            break
        head = rig.offer([header(kind, sector & 0x8000_0000_0000_007F), data], writable[:6])
        if not sum(writable[:6]):
            rig.wait_until_broken()
        else:
            written = rig.wait()[head]
            assert written <= sum(writable[:6])
            assert rig.ring.content(head)[-1] in (Answer.OK, Answer.IOERR, Answer.UNSUPP)
    rig.guest.start()
    assert rig.ask(Kind.FLUSH)[0] is Answer.OK
    rig.close()


# Ranges


@pytest.mark.parametrize(
    ("flags", "call"), [(0, "zero"), (1, "unmap")], ids=["keep the space", "space may be given back"]
)
def test_zeroes_are_written(flags: int, call: str, rig: BlkRig, disk: FakeDisk) -> None:
    assert rig.ask(Kind.WRITE_ZEROES, 0, ranges((1, 2, flags), (64, 64, flags)))[0] is Answer.OK
    assert disk.calls == [f"{call} 1+2", f"{call} 64+64"]


def test_ranges_are_discarded(rig: BlkRig, disk: FakeDisk) -> None:
    assert rig.ask(Kind.DISCARD, 0, ranges((8, 8, 0), (0, 128, 0)))[0] is Answer.OK
    assert disk.calls == ["discard 8+8", "discard 0+128"]


@pytest.mark.parametrize(
    ("kind", "data", "answer"),
    [
        (Kind.DISCARD, ranges((0, 1, 1)), Answer.UNSUPP),
        (Kind.DISCARD, ranges((0, 1, 2)), Answer.UNSUPP),
        (Kind.WRITE_ZEROES, ranges((0, 1, 3)), Answer.UNSUPP),
        (Kind.WRITE_ZEROES, ranges((0, 1, 0), (0, 1, 0x8000_0000)), Answer.UNSUPP),
        (Kind.WRITE_ZEROES, ranges((0, 1, 0), (128, 1, 0)), Answer.IOERR),
        (Kind.WRITE_ZEROES, ranges((2**64 - 1, 2, 0)), Answer.IOERR),
        (Kind.DISCARD, ranges((120, 9, 0)), Answer.IOERR),
        (Kind.DISCARD, ranges((0, 2**32 - 1, 0)), Answer.IOERR),
        (Kind.DISCARD, b"", Answer.IOERR),
        (Kind.DISCARD, ranges((0, 1, 0))[:15], Answer.IOERR),
        (Kind.WRITE_ZEROES, ranges((0, 1, 0)) + b"x", Answer.IOERR),
        (Kind.WRITE_ZEROES, ranges(*[(0, 1, 0)] * (MOST_RANGES + 1)), Answer.IOERR),
    ],
)
def test_wrong_ranges_do_nothing_at_all(kind: Kind, data: bytes, answer: Answer, rig: BlkRig, disk: FakeDisk) -> None:
    assert rig.ask(kind, 0, data)[0] is answer
    assert disk.calls == []


def test_range_longer_than_was_told_is_an_error(make_rig: MakeRig) -> None:
    disk = FakeDisk(sectors=MOST_ZEROED + 2)
    rig = make_rig(disk)
    assert rig.ask(Kind.WRITE_ZEROES, 0, ranges((0, MOST_ZEROED + 1, 0)))[0] is Answer.IOERR
    assert disk.calls == []


def test_kinds_of_features_that_were_not_accepted_are_unsupported(rig: BlkRig, disk: FakeDisk) -> None:
    rig.guest.start(1 << BlkFeature.FLUSH)
    for kind in (Kind.DISCARD, Kind.WRITE_ZEROES):
        assert rig.ask(kind, 0, ranges((0, 1, 0)))[0] is Answer.UNSUPP
    assert disk.calls == []


# Read-only


def test_readonly_disk_refuses_every_way_to_write(make_rig: MakeRig) -> None:
    disk = FakeDisk(readonly=True)
    rig = make_rig(disk)
    for kind in (Kind.OUT, Kind.DISCARD, Kind.WRITE_ZEROES):
        assert rig.ask(kind, 0, ranges((0, 1, 0)) * 32)[0] is Answer.IOERR
    assert disk.calls == []
    assert rig.ask(Kind.IN, 0, into=512) == (Answer.OK, bytes(512))


def test_readonly_disk_says_so_and_offers_no_way_to_write(make_rig: MakeRig) -> None:
    features = make_rig(FakeDisk(readonly=True)).device.features
    assert offered(features) == {"RO", "SEG_MAX", "BLK_SIZE", "TOPOLOGY", "FLUSH"}


def offered(features: int) -> set[str]:
    return {feature.name for feature in BlkFeature if features >> feature & 1}


# The configuration


def field(rig: BlkRig, offset: int, size: int) -> int:
    return rig.device.config_read(offset, size)


def test_configuration_says_what_the_disk_is(make_rig: MakeRig) -> None:
    rig = make_rig(FakeDisk(), queues=3)
    assert field(rig, 0, 8) == 128  # capacity
    assert field(rig, 12, 4) == SEGMENTS
    assert field(rig, 20, 4) == 512  # blk_size
    assert [field(rig, 24, 1), field(rig, 25, 1), field(rig, 26, 2), field(rig, 28, 4)] == [3, 0, 8, 0]  # topology
    assert field(rig, 34, 2) == 3  # num_queues
    assert [field(rig, at, 4) for at in (36, 40, 44)] == [MOST_DISCARDED, MOST_RANGES, 8]
    assert [field(rig, at, 4) for at in (48, 52)] == [MOST_ZEROED, MOST_RANGES]
    assert field(rig, 56, 4) == 1  # write_zeroes_may_unmap, and padding
    assert field(rig, 60, 4) == 0


def test_discard_is_offered_where_the_host_takes_space_back(make_rig: MakeRig) -> None:
    assert "DISCARD" in offered(make_rig(FakeDisk()).device.features)
    rig = make_rig(FakeDisk(can_unmap=False))
    assert "DISCARD" not in offered(rig.device.features)
    assert [field(rig, at, 4) for at in (36, 40, 44, 56)] == [0, 0, 0, 0]


def test_many_queues_are_offered_and_each_is_served(make_rig: MakeRig) -> None:
    rig = make_rig(FakeDisk(), queues=4)
    assert "MQ" in offered(rig.device.features)
    for index in range(4):
        assert rig.ask(Kind.OUT, index, b"%d" % index * 512, queue=index)[0] is Answer.OK
    assert rig.ask(Kind.IN, 0, into=2048)[1] == b"0" * 512 + b"1" * 512 + b"2" * 512 + b"3" * 512


def test_more_than_a_batch_is_served_to_the_last(rig: BlkRig) -> None:
    heads = [rig.offer([header(Kind.IN, n)], [512, 1], kick=False) for n in range(2 * BATCH + 3)]
    rig.kick()
    assert set(rig.wait(len(heads))) == set(heads)


# Durability


def test_flush_is_answered_once_the_disk_has_flushed(rig: BlkRig, disk: FakeDisk) -> None:
    assert rig.ask(Kind.OUT, 0, b"d" * 512)[0] is Answer.OK
    assert disk.durable[:512] != b"d" * 512
    disk.go.clear()
    head = rig.offer([header(Kind.FLUSH)], [1])
    disk.log.wait(2)
    assert rig.ring.used() == []
    disk.go.set()
    assert rig.wait() == {head: 1}
    assert disk.durable[:512] == b"d" * 512


def test_without_a_flush_command_every_write_is_durable_when_it_is_done(rig: BlkRig, disk: FakeDisk) -> None:
    rig.guest.start(1 << BlkFeature.WRITE_ZEROES)
    assert rig.ask(Kind.OUT, 0, b"d" * 512)[0] is Answer.OK
    assert rig.ask(Kind.WRITE_ZEROES, 0, ranges((1, 1, 0)))[0] is Answer.OK
    assert disk.calls == ["write 0+1", "flush", "zero 1+1", "flush"]
    assert disk.durable == disk.content


def test_write_that_cannot_be_made_durable_has_failed(rig: BlkRig, disk: FakeDisk) -> None:
    rig.guest.start(0)
    disk.fails["flush"] = OSError(errno.EIO, "Input/output error")
    assert rig.ask(Kind.OUT, 0, b"d" * 512)[0] is Answer.IOERR


def test_cache_is_what_the_driver_can_deal_with(rig: BlkRig) -> None:
    assert field(rig, 32, 1) == 1
    rig.guest.start(1 << BlkFeature.CONFIG_WCE)
    assert field(rig, 32, 1) == 0


def test_driver_may_switch_the_cache(rig: BlkRig, disk: FakeDisk) -> None:
    rig.device.config_write(32, 1, 0)
    assert field(rig, 32, 1) == 0
    assert rig.ask(Kind.OUT, 0, b"d" * 512)[0] is Answer.OK
    assert disk.calls == ["write 0+1", "flush"]
    rig.device.config_write(32, 1, 1)
    assert rig.ask(Kind.OUT, 0, b"e" * 512)[0] is Answer.OK
    assert disk.calls[2:] == ["write 0+1"]


def test_switch_is_ignored_where_it_was_not_negotiated(rig: BlkRig) -> None:
    rig.guest.start(1 << BlkFeature.FLUSH)
    rig.device.config_write(32, 1, 0)
    assert field(rig, 32, 1) == 1


def test_rest_of_the_configuration_is_not_writable(rig: BlkRig) -> None:
    before = rig.device.config()
    for offset in range(64):
        for size in (1, 2, 4):
            if (offset, size) != (32, 1):
                rig.device.config_write(offset, size, 0)
    assert rig.device.config() == before


def test_reset_forgets_the_drivers_choice(rig: BlkRig) -> None:
    rig.device.config_write(32, 1, 0)
    rig.guest.start()
    assert field(rig, 32, 1) == 1


# The host's troubles


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_disks_error_is_the_requests_and_the_operator_hears_once(
    number: int, rig: BlkRig, disk: FakeDisk, caplog: pytest.LogCaptureFixture
) -> None:
    disk.fails["write"] = OSError(number, os.strerror(number))
    for _ in range(3):
        assert rig.ask(Kind.OUT, 0, bytes(512))[0] is Answer.IOERR
    assert [record.getMessage() for record in caplog.records] == [
        f"vd0/virtio-blk: disk.raw: out: {errno.errorcode[number]}; the guest sees an I/O error; said once"
    ]
    del disk.fails["write"]
    assert rig.ask(Kind.OUT, 0, bytes(512))[0] is Answer.OK
    assert rig.device.info()["requests"] == {"out": 4, "failed": 3}


def test_bug_of_ours_is_logged_and_answered(rig: BlkRig, disk: FakeDisk, caplog: pytest.LogCaptureFixture) -> None:
    disk.fails["read"] = ZeroDivisionError("a bug")
    with caplog.at_level(logging.ERROR):
        assert rig.ask(Kind.IN, 0, into=512)[0] is Answer.IOERR
    assert "a request failed" in caplog.text
    caplog.clear()
    assert rig.ask(Kind.FLUSH)[0] is Answer.OK


def test_operator_is_shown_the_disk(rig: BlkRig) -> None:
    shown = rig.device.info()
    wanted = {"kind": "block", "file": "disk.raw", "size": 65536, "readonly": False, "cache": "none", "under-way": 0}
    assert wanted.items() <= shown.items()
