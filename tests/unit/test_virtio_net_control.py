"""The control queue: each command does its one thing, and whatever else a driver writes there does nothing."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.abi import tun
from kvmpy.abi.virtio import Status, feature_mask
from kvmpy.devices.virtio.net_control import LIMIT, Class
from kvmpy.devices.virtio.net_state import BROADCAST, TABLE_LENGTH, NetFeature, NetState, RxMode, receive_filter
from kvmpy.errors import HostError
from kvmpy.state import load, save
from tests.counts import count
from tests.fakes.net_rig import CONTROLLED, ERR, MAC, OK, PLAIN, NetRig, net_rig

ON, OFF = b"\x01", b"\x00"
OTHER = bytes.fromhex("525400999999")
GROUP = bytes.fromhex("01005e000001")


@pytest.fixture
def rig() -> Iterator[NetRig]:
    with net_rig() as rig:
        rig.start(CONTROLLED)
        yield rig


def tables(unicast: list[bytes], multicast: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(table)) + b"".join(table) for table in (unicast, multicast))


def addresses(number: int, first: int) -> list[bytes]:
    return [bytes((first, 0, 0, 0, 0, index)) for index in range(number)]


def choosy(rig: NetRig, *, unicast: list[bytes], multicast: list[bytes]) -> None:
    assert rig.command(Class.RX, 0, OFF) == OK
    assert rig.command(Class.MAC, 0, tables(unicast, multicast)) == OK


def test_other_callbacks_get_their_turn_while_commands_are_done() -> None:
    with net_rig(size=32) as rig:
        rig.start(CONTROLLED)
        control = rig.guest.queues[2]
        heads = [control.offer([bytes((Class.RX, 0)), bytes([number % 2])], [1]) for number in range(10)]
        rig.guest.kick(2, run=False)
        done = []
        while rig.loop.once():
            done.append([head for head, _ in control.used()])
        assert [head for turn in done for head in turn] == heads
        assert max(map(len, done)) == 4
        assert {control.content(head) for head in heads} == {bytes([OK])}
        assert rig.command(Class.RX, 0, OFF) == OK


# The filter


def test_everything_passes_until_the_driver_says_otherwise(rig: NetRig) -> None:
    assert rig.tap.passes() == (None, False)


def test_without_promiscuous_mode_only_its_own_frames_and_broadcasts_pass(rig: NetRig) -> None:
    assert rig.command(Class.RX, 0, OFF) == OK
    assert rig.tap.passes() == ([MAC, BROADCAST], False)


def test_addresses_in_the_tables_pass(rig: NetRig) -> None:
    choosy(rig, unicast=[OTHER], multicast=[GROUP])
    assert rig.tap.passes() == ([MAC, OTHER, BROADCAST, GROUP], False)


def test_new_tables_replace_the_old_ones(rig: NetRig) -> None:
    choosy(rig, unicast=[OTHER], multicast=[GROUP])
    assert rig.command(Class.MAC, 0, tables([], [])) == OK
    assert rig.tap.passes() == ([MAC, BROADCAST], False)


def test_more_unicast_addresses_than_are_kept_let_everything_pass(rig: NetRig) -> None:
    choosy(rig, unicast=addresses(TABLE_LENGTH, 2), multicast=[])
    assert rig.tap.passes() == ([MAC, *addresses(TABLE_LENGTH, 2), BROADCAST], False)
    choosy(rig, unicast=addresses(TABLE_LENGTH + 1, 2), multicast=[])
    assert rig.tap.passes() == (None, False)


def test_more_multicast_addresses_than_are_kept_let_all_multicast_pass(rig: NetRig) -> None:
    choosy(rig, unicast=[], multicast=addresses(TABLE_LENGTH + 1, 1))
    assert rig.tap.passes() == ([MAC, BROADCAST], True)


@pytest.mark.parametrize(
    ("mode", "passes", "all_multicast"),
    [
        (RxMode.PROMISC, None, False),
        (RxMode.ALLMULTI, [MAC, OTHER, BROADCAST, GROUP], True),
        (RxMode.ALLUNI, None, False),
        (RxMode.NOMULTI, [MAC, OTHER, BROADCAST], False),
        (RxMode.NOUNI, [BROADCAST, GROUP], False),
        (RxMode.NOBCAST, [MAC, OTHER, GROUP], False),
    ],
    ids=lambda value: value.name if isinstance(value, RxMode) else "",
)
def test_each_mode_is_a_command(rig: NetRig, mode: RxMode, passes: list[bytes] | None, all_multicast: bool) -> None:
    choosy(rig, unicast=[OTHER], multicast=[GROUP])
    assert rig.command(Class.RX, mode.bit_length() - 1, ON) == OK
    assert rig.tap.passes() == (passes, all_multicast)
    assert rig.command(Class.RX, mode.bit_length() - 1, OFF) == OK
    assert rig.tap.passes() == ([MAC, OTHER, BROADCAST, GROUP], False)


def test_nothing_at_all_may_pass() -> None:
    state = NetState(rx_mode=int(RxMode.NOMULTI | RxMode.NOUNI | RxMode.NOBCAST))
    assert receive_filter(state, MAC) == ([], False)


def test_new_address_is_the_interfaces_until_a_reset(rig: NetRig) -> None:
    rig.command(Class.RX, 0, OFF)
    assert rig.command(Class.MAC, 1, OTHER) == OK
    assert rig.tap.passes() == ([OTHER, BROADCAST], False)
    assert rig.net.config()[:6] == OTHER
    rig.guest.start(CONTROLLED)
    assert rig.net.config()[:6] == MAC


@pytest.mark.parametrize("address", [GROUP, bytes(6), BROADCAST, OTHER[:5], OTHER + b"\0"], ids=lambda mac: mac.hex())
def test_address_that_no_interface_can_have_is_refused(rig: NetRig, address: bytes) -> None:
    assert rig.command(Class.MAC, 1, address) == ERR
    assert rig.net.mac == MAC


# The rest


def test_vlans_are_noted(rig: NetRig) -> None:
    assert rig.command(Class.VLAN, 0, b"\x05\x00") == OK
    assert rig.command(Class.VLAN, 0, b"\xff\x0f") == OK
    assert rig.command(Class.VLAN, 1, b"\x05\x00") == OK
    assert rig.command(Class.VLAN, 1, b"\x06\x00") == OK
    assert rig.net.state.vlans == bytes(511) + b"\x80"
    assert rig.command(Class.VLAN, 0, b"\x00\x10") == ERR


def test_offloads_can_be_switched_off_and_on_within_what_was_negotiated(rig: NetRig) -> None:
    csum, tso4 = feature_mask(NetFeature.GUEST_CSUM), feature_mask(NetFeature.GUEST_TSO4)
    assert rig.tap.offload == tun.TUN_F_CSUM | tun.TUN_F_TSO4
    assert rig.command(Class.GUEST_OFFLOADS, 0, csum.to_bytes(8, "little")) == OK
    assert rig.tap.offload == tun.TUN_F_CSUM
    assert rig.command(Class.GUEST_OFFLOADS, 0, (csum | tso4).to_bytes(8, "little")) == OK
    assert rig.tap.offload == tun.TUN_F_CSUM | tun.TUN_F_TSO4
    assert rig.command(Class.GUEST_OFFLOADS, 0, feature_mask(NetFeature.GUEST_TSO6).to_bytes(8, "little")) == ERR
    assert rig.command(Class.GUEST_OFFLOADS, 0, feature_mask(NetFeature.MAC).to_bytes(8, "little")) == ERR
    assert rig.tap.offload == tun.TUN_F_CSUM | tun.TUN_F_TSO4


def test_announcement_is_acknowledged_once(rig: NetRig) -> None:
    assert rig.net.announce()
    assert rig.net.config()[6] == 3
    assert rig.command(Class.ANNOUNCE, 0) == OK
    assert rig.net.config()[6] == 1


def test_command_of_a_feature_that_was_not_negotiated_is_refused(rig: NetRig) -> None:
    rig.start(PLAIN | feature_mask(NetFeature.CTRL_VQ))
    for class_, command, data in [(0, 0, OFF), (0, 2, ON), (1, 0, tables([], [])), (1, 1, OTHER), (2, 0, b"\1\0")]:
        assert rig.command(class_, command, data) == ERR
    assert rig.command(Class.ANNOUNCE, 0) == ERR
    assert rig.command(Class.GUEST_OFFLOADS, 0, bytes(8)) == ERR
    assert rig.command(Class.MQ, 0, b"\1\0") == ERR


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01\x00\x00",
        struct.pack("<I", 1) + OTHER,
        struct.pack("<I", 2**32 - 1) + OTHER,
        tables([OTHER], [GROUP])[:-1],
        tables([OTHER], [GROUP]) + b"\0",
    ],
)
def test_broken_tables_change_nothing(rig: NetRig, data: bytes) -> None:
    choosy(rig, unicast=[OTHER], multicast=[GROUP])
    assert rig.command(Class.MAC, 0, data) == ERR
    assert (rig.net.state.unicast, rig.net.state.multicast) == ([OTHER], [GROUP])


def test_host_that_fails_is_answered_with_an_error(rig: NetRig) -> None:
    rig.tap.refuses = HostError("tap is gone")
    assert rig.command(Class.RX, 0, OFF) == ERR
    assert rig.net.state.rx_mode == RxMode.PROMISC
    assert not rig.guest.status() & Status.NEEDS_RESET


def test_command_may_be_in_any_number_of_pieces(rig: NetRig) -> None:
    assert rig.raw_command([b"\x01", b"\x01", OTHER[:3], OTHER[3:]], [1]) == b"\x00"
    assert rig.net.mac == OTHER


def test_answer_is_one_byte_and_the_rest_stays(rig: NetRig) -> None:
    ring = rig.guest.queues[2]
    head = ring.offer([bytes((Class.RX, 0)), OFF], [4])
    rig.guest.kick(2)
    assert ring.used() == [(head, 1)]
    assert rig.guest.transport.take() == [2]


def test_command_without_room_for_an_answer_is_done_all_the_same(rig: NetRig) -> None:
    ring = rig.guest.queues[2]
    head = ring.offer([bytes((Class.RX, 0)), OFF])
    rig.guest.kick(2)
    assert ring.used() == [(head, 0)]
    assert rig.net.state.rx_mode == 0


@pytest.mark.parametrize("readable", [[], [b"\x00"]], ids=["nothing", "half a header"])
def test_command_without_a_header_is_refused(rig: NetRig, readable: list[bytes]) -> None:
    assert rig.raw_command(readable) == b"\x01"


def test_command_larger_than_any_is_refused_without_being_looked_at(rig: NetRig) -> None:
    ring = rig.guest.queues[2]
    ring.write_desc(0, 0x1000, LIMIT + 1, 1, 1)
    ring.write_desc(1, ring.end + 64, 1, 2)
    ring.put(0)
    ring.publish()
    rig.guest.kick(2)
    assert rig.memory.read(ring.end + 64, 1) == b"\x01"


GARBAGE = st.tuples(
    st.sampled_from([*Class, 6, 255]),
    st.integers(0, 7),
    st.one_of(
        st.binary(max_size=40),
        st.builds(lambda *sizes: tables(addresses(sizes[0], 2), addresses(sizes[1], 1)), *[st.integers(0, 80)] * 2),
        st.integers(0, 2**64 - 1).map(lambda number: number.to_bytes(8, "little")),
        st.integers(0, 2**16 - 1).map(lambda number: number.to_bytes(2, "little")),
    ),
)


@settings(max_examples=count(15, 3000), deadline=None)
@given(st.lists(GARBAGE, max_size=8))
def test_no_command_harms_the_device(commands: list[tuple[int, int, bytes]]) -> None:
    with net_rig(pairs=2, room=8192) as rig:
        rig.start(rig.net.features)
        for class_, command, data in commands:
            before = save(rig.net.state)
            answer = rig.command(class_, command, data)
            after = save(rig.net.state)
            assert load(NetState, after) == rig.net.state
            assert answer == OK or _told(before) == _told(after)
        assert not rig.guest.status() & Status.NEEDS_RESET


def _told(section: dict[str, object]) -> object:
    """What a command can change of a saved state."""
    state = section["state"]
    assert isinstance(state, dict)
    return {key: value for key, value in state.items() if key != "virtio"}
