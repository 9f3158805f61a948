"""virtio-net's control queue: commands of the driver, each answered with one byte (Virtio 1.2, section 5.1.6.5).

A command is a class, a number within it, and data of exactly the right size; anything else is answered ERR and changes
nothing, as is a command of a feature that was not negotiated.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import IntEnum
from functools import partial
from typing import Final, Protocol

from kvmpy.devices.virtio.net_state import MAC_SIZE, TABLE_LENGTH, VLANS, NetFeature, NetState, RxMode
from kvmpy.devices.virtio.queue import Chain
from kvmpy.errors import GuestError, HostError
from kvmpy.trace import Tracepoint

trace_command = Tracepoint("virtio.net.command", "device class_ command size ack")

# Bytes of one command: the largest, two filter tables of some 5000 addresses each. More than any driver has.
LIMIT: Final = 64 << 10

HEADER: Final = 2
FLAG: Final = struct.Struct("<B")
WORD: Final = struct.Struct("<H")
COUNT: Final = struct.Struct("<I")
OFFLOADS: Final = struct.Struct("<Q")


class Class(IntEnum):
    """VIRTIO_NET_CTRL_..."""

    RX = 0
    MAC = 1
    VLAN = 2
    ANNOUNCE = 3
    MQ = 4
    GUEST_OFFLOADS = 5


MAC_TABLE_SET, MAC_ADDR_SET = 0, 1
VLAN_ADD, VLAN_DEL = 0, 1
ANNOUNCE_ACK = 0
MQ_VQ_PAIRS_SET = 0
GUEST_OFFLOADS_SET = 0


class Ack(IntEnum):
    """VIRTIO_NET_OK, VIRTIO_NET_ERR."""

    OK = 0
    ERR = 1


class Controlled(Protocol):
    """The device that commands are for. What cannot be done raises GuestError or HostError, with nothing changed."""

    name: str
    state: NetState

    def acked(self, number: int) -> bool:
        """Whether the driver has accepted feature ``number``."""

    def filter_changed(self) -> None:
        """The state says otherwise now which frames are for the guest."""

    def set_pairs(self, pairs: int) -> None:
        """Use the first ``pairs`` pairs of queues."""

    def set_offloads(self, features: int) -> None:
        """Leave undone, of what was negotiated, only these GUEST_... features."""


class Control:
    """Carries out commands for ``net``, under its lock."""

    def __init__(self, net: Controlled) -> None:
        self._net = net
        self._commands: dict[tuple[int, int], tuple[NetFeature, Callable[[bytes], None]]] = {
            (Class.MAC, MAC_TABLE_SET): (NetFeature.CTRL_RX, self._set_tables),
            (Class.MAC, MAC_ADDR_SET): (NetFeature.CTRL_MAC_ADDR, self._set_mac),
            (Class.VLAN, VLAN_ADD): (NetFeature.CTRL_VLAN, partial(self._set_vlan, wanted=True)),
            (Class.VLAN, VLAN_DEL): (NetFeature.CTRL_VLAN, partial(self._set_vlan, wanted=False)),
            (Class.ANNOUNCE, ANNOUNCE_ACK): (NetFeature.GUEST_ANNOUNCE, self._announced),
            (Class.MQ, MQ_VQ_PAIRS_SET): (NetFeature.MQ, lambda data: net.set_pairs(_number(WORD, data))),
            (Class.GUEST_OFFLOADS, GUEST_OFFLOADS_SET): (
                NetFeature.CTRL_GUEST_OFFLOADS,
                lambda data: net.set_offloads(_number(OFFLOADS, data)),
            ),
        }
        for command, mode in enumerate(RxMode):
            feature = NetFeature.CTRL_RX if mode <= RxMode.ALLMULTI else NetFeature.CTRL_RX_EXTRA
            self._commands[Class.RX, command] = (feature, partial(self._set_mode, mode))

    def run(self, chain: Chain) -> int:
        """Do the command in ``chain`` and answer; returns how many bytes the answer has, 0 where it has no room."""
        ack = Ack.ERR
        if HEADER <= chain.readable_size <= LIMIT:
            command = b"".join(chain.readable)  # copied once: the guest may go on changing its own
            ack = self._do(command[0], command[1], command[HEADER:])
        if not chain.writable_size:
            return 0
        chain.writable[0][0] = ack
        return 1

    def _do(self, class_: int, command: int, data: bytes) -> Ack:
        ack = Ack.ERR
        feature, call = self._commands.get((class_, command), (None, None))
        if feature is not None and call is not None and self._net.acked(feature):
            try:
                call(data)
                ack = Ack.OK
            except (GuestError, HostError):
                pass  # what the driver hears of it is ERR
        if trace_command:
            trace_command(self._net.name, class_, command, len(data), ack.name)
        return ack

    def _set_mode(self, mode: RxMode, data: bytes) -> None:
        self._refilter(rx_mode=self._net.state.rx_mode & ~mode | (mode if _number(FLAG, data) else 0))

    def _set_tables(self, data: bytes) -> None:
        unicast, rest = _table(data)
        multicast, rest = _table(rest)
        if rest:
            raise GuestError(f"{len(rest)} bytes behind the address tables")
        self._refilter(unicast=unicast, multicast=multicast)

    def _set_mac(self, data: bytes) -> None:
        if len(data) != MAC_SIZE or data[0] & 1 or not any(data):
            raise GuestError(f"{data[:16].hex(':')} is no address of an interface")
        self._refilter(mac=data)

    def _refilter(self, **fields: object) -> None:
        """Change these fields of the state, and the filter with them; neither, where the host cannot."""
        s = self._net.state
        before = {name: getattr(s, name) for name in fields}
        _assign(s, fields)
        try:
            self._net.filter_changed()
        except HostError:
            _assign(s, before)
            raise

    def _set_vlan(self, data: bytes, *, wanted: bool) -> None:
        if (vlan := _number(WORD, data)) >= VLANS:
            raise GuestError(f"VLAN {vlan}")
        vlans = bytearray(self._net.state.vlans)
        vlans[vlan // 8] = vlans[vlan // 8] & ~(1 << vlan % 8) | wanted << vlan % 8
        self._net.state.vlans = bytes(vlans)

    def _announced(self, data: bytes) -> None:
        if data:
            raise GuestError("an acknowledgement with data")
        self._net.state.announce = False


def _assign(state: NetState, fields: dict[str, object]) -> None:
    for name, value in fields.items():
        setattr(state, name, value)


def _number(layout: struct.Struct, data: bytes) -> int:
    if len(data) != layout.size:
        raise GuestError(f"{len(data)} bytes instead of {layout.size}")
    number: int = layout.unpack(data)[0]
    return number


def _table(data: bytes) -> tuple[list[bytes] | None, bytes]:
    """A table of addresses at the start of ``data``, None if it is too long to keep, and what follows it."""
    count = _number(COUNT, data[: COUNT.size])
    end = COUNT.size + count * MAC_SIZE
    if end > len(data):
        raise GuestError(f"a table of {count} addresses in {len(data)} bytes")
    if count > TABLE_LENGTH:
        return None, data[end:]
    return [data[at : at + MAC_SIZE] for at in range(COUNT.size, end, MAC_SIZE)], data[end:]
