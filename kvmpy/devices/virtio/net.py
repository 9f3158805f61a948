"""virtio-net: an Ethernet interface whose other side is a tap of the host (Virtio 1.2, section 5.1).

Queues are rx0, tx0, rx1, tx1, ..., control. A pair of them is served by the kernel where it has vhost-net and the link
is up, else by `kvmpy.devices.virtio.net_frames`; which it is, the guest cannot tell, and it may change at any moment.

What both ways must obey is left to the tap, so it holds for both: the driver's filter, the offloads it accepted, how
many pairs it uses. While no driver is there, or the link is down, the tap's filter lets nothing pass: frames that
nobody will take are dropped in the kernel, at no cost, and no guest begins with those that were for the one before.

With ``standby`` it is one half of a failover pair (section 5.1.3, VIRTIO_NET_F_STANDBY): a driver that takes that
feature will use a second NIC with the same address in its place, so that one is kept from any other driver
(`kvmpy.devices.failover`). All else here is as ever.

VLANs are noted and migrate, and are not filtered: vhost would not, and a driver must bear more than it asked for.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, Protocol

from kvmpy.abi import tun
from kvmpy.abi.virtio import DeviceId, Status, feature_mask
from kvmpy.devices.vhost import HANDLED
from kvmpy.devices.virtio.device import Loop, QueueSpec, VirtioDevice
from kvmpy.devices.virtio.net_announce import rarp
from kvmpy.devices.virtio.net_control import Control
from kvmpy.devices.virtio.net_frames import FRAMING, HEADER_SIZE, LARGEST, Counters, Receiver, Sender, Wire
from kvmpy.devices.virtio.net_state import NetFeature, NetState, NetStatus, receive_filter
from kvmpy.devices.virtio.queue import Virtqueue
from kvmpy.errors import GuestError, HostError
from kvmpy.memory import GuestMemory
from kvmpy.trace import Tracepoint

trace_path = Tracepoint("virtio.net.path", "device pair path why")
trace_link = Tracepoint("virtio.net.link", "device up")

RING: Final = 256  # QEMU's default
CONTROL_RING: Final = 64
COMMANDS: Final = 4  # in a row, each some requests to the tap, before other callbacks of the io thread get a turn
DEFAULT_MTU: Final = 1500
CONFIG: Final = struct.Struct(
    "<6sHHH12x"
)  # mac, status, max_virtqueue_pairs, mtu; then nothing we have (section 5.1.4)

ALWAYS: Final = feature_mask(
    NetFeature.MAC,
    NetFeature.STATUS,
    NetFeature.CSUM,
    NetFeature.MRG_RXBUF,
    NetFeature.CTRL_VQ,
    NetFeature.CTRL_RX,
    NetFeature.CTRL_RX_EXTRA,
    NetFeature.CTRL_VLAN,
    NetFeature.CTRL_MAC_ADDR,
    NetFeature.CTRL_GUEST_OFFLOADS,
    NetFeature.GUEST_ANNOUNCE,
)
# What the driver lets us leave undone in frames for it, and so what the tap may leave to us.
GUEST_OFFLOADS: Final = {
    NetFeature.GUEST_CSUM: tun.TUN_F_CSUM,
    NetFeature.GUEST_TSO4: tun.TUN_F_TSO4,
    NetFeature.GUEST_TSO6: tun.TUN_F_TSO6,
    NetFeature.GUEST_ECN: tun.TUN_F_TSO_ECN,
    NetFeature.GUEST_USO4: tun.TUN_F_USO4,
    NetFeature.GUEST_USO6: tun.TUN_F_USO6,
}
# What we let the driver leave undone: a tap that can hand such frames over takes them too.
HOST_OFFLOADS: Final = {
    NetFeature.HOST_TSO4: tun.TUN_F_TSO4,
    NetFeature.HOST_TSO6: tun.TUN_F_TSO6,
    NetFeature.HOST_ECN: tun.TUN_F_TSO_ECN,
    NetFeature.HOST_USO: tun.TUN_F_USO4,
}
SEGMENTED: Final = feature_mask(
    NetFeature.GUEST_TSO4, NetFeature.GUEST_TSO6, NetFeature.GUEST_USO4, NetFeature.GUEST_USO6
)


class NetBackend(Protocol):
    """What is on the other side: a `kvmpy.host.tap.Tap`. Its requests raise HostError."""

    name: str
    fds: list[int]  # one a queue
    offloads: int  # the TUN_F_... it can do

    def set_offload(self, offloads: int) -> object:
        """Hand over frames with these TUN_F_... left undone, as far as it can."""

    def set_queues(self, count: int) -> None:
        """Spread frames over the first ``count`` queues."""

    def set_filter(self, addresses: Sequence[bytes] | None, *, all_multicast: bool = False) -> None:
        """Hand over frames to these addresses alone; None is all."""


class Lender(Protocol):
    """Who serves pairs of queues in our place: a `kvmpy.devices.vhost.VhostNet`."""

    def features(self) -> int:
        """Those of the features `HANDLED` that it can handle."""

    def lent(self, pair: int) -> bool:
        """Whether it has that pair now."""

    def take(
        self,
        pair: int,
        device: VirtioNet,
        rx: Virtqueue,
        tx: Virtqueue,
        *,
        tap: int,
        calls: Sequence[int],
        features: int,
    ) -> None:
        """Serve two stopped queues from now on. Raises GuestError, HostError, with the queues as they were."""

    def give_back(self, pair: int) -> None:
        """Leave them; they are stopped."""

    def set_call(self, pair: int, calls: Sequence[int]) -> None:
        """Signal other eventfds. Raises HostError."""


class Pair:
    """A receive and a transmit queue, and what serves them here."""

    def __init__(self, net: VirtioNet, index: int, scratch: memoryview) -> None:
        self.queues = net.queues[2 * index], net.queues[2 * index + 1]
        wire = Wire(net.tap.fds[index], net.io)
        wakes = [partial(net.guarded, partial(net.on_notify, 2 * index + side)) for side in range(2)]
        self.receiver = Receiver(self.queues[0], wire, net.counters, wakes[0], scratch)
        self.sender = Sender(self.queues[1], wire, net.counters, wakes[1])


class VirtioNet(VirtioDevice[NetState]):
    """The interface with address ``mac`` on ``tap``, with as many pairs of queues as that has.

    ``mtu`` is told to the driver, if given. ``vhost`` moves the frames where there is one. Neither it nor the tap is
    ours to close. Any thread: `set_link`, `announce`, `announce_from_here`, `info`.

    ``is_standby`` says whether a driver is there that knows of being one, ``standby_acks`` how often one has come.
    ``on_standby`` is told when that has changed: under the lock, so it may only post.
    """

    DEVICE_ID = DeviceId.NET
    FEATURES = NetFeature

    def __init__(
        self,
        name: str,
        memory: GuestMemory,
        io: Loop,
        tap: NetBackend,
        mac: bytes,
        *,
        mtu: int | None = None,
        vhost: Lender | None = None,
        standby: bool = False,
    ) -> None:
        pairs = range(len(tap.fds))
        queues = [QueueSpec(f"{kind}{pair}", RING) for pair in pairs for kind in ("rx", "tx")]
        super().__init__(name, NetState(), memory, io, [*queues, QueueSpec("control", CONTROL_RING)])
        self.tap, self.counters = tap, Counters()
        self._mac, self._mtu, self._vhost = mac, mtu, vhost
        scratch = memoryview(bytearray(LARGEST))
        self._pairs = [Pair(self, index, scratch) for index in pairs]
        self._control = Control(self)
        self._refused = ""  # why vhost did not take a pair
        self.is_standby, self.standby_acks = False, 0
        self.on_standby: Callable[[], object] = lambda: None
        self.features |= self._offered()
        if standby:  # R1: with it go VERSION_1 and MAC, which every device of ours offers
            self.features |= feature_mask(NetFeature.STANDBY)
        if vhost is not None:
            self.features &= ~HANDLED | vhost.features()
        try:
            self._set_tap(None)
        except BaseException:
            self.close()
            raise

    @property
    def mac(self) -> bytes:
        """The interface's address: the driver's choice, or else the configuration's."""
        return self.state.mac or self._mac

    def config(self) -> bytes:
        s = self.state
        status = (NetStatus.LINK_UP if s.link_up else 0) | (NetStatus.ANNOUNCE if s.announce else 0)
        return CONFIG.pack(self.mac, status, len(self._pairs), self._mtu or 0)

    # From outside

    def set_link(self, *, up: bool) -> None:
        """Plug the cable in, or pull it: the guest sees it, and with the link down no frame passes either way."""
        with self.lock:
            if self.state.link_up is up:
                return
            if trace_link:
                trace_link(self.name, up)
            self.state.link_up = up
            if self.running:
                self.withdraw()
                self._serve_again()
            self.config_changed()

    def announce(self) -> bool:
        """Have the guest tell the network where it is now; False if its driver cannot."""
        with self.lock:
            if not (self.running and self.acked(NetFeature.GUEST_ANNOUNCE)):
                return False
            self.state.announce = True
            self.config_changed()
            return True

    def announce_from_here(self) -> bool:
        """Tell the switches where the guest is now, as if it had; False if the link is down or the host takes none.

        The frame goes into the tap beside the guest's own, whoever moves those.
        """
        with self.lock:
            if not self.state.link_up:
                return False
            try:
                os.write(self.tap.fds[0], bytes(HEADER_SIZE) + rarp(self.mac))
            except OSError:  # full, or down: nobody hears anything there, and the next round asks again
                return False
            return True

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"mac": self._mac.hex(":"), "mtu": self._mtu}

    def info(self) -> dict[str, Any]:
        with self.lock:
            c = self.counters
            return super().info() | {
                "netdev": self.tap.name,
                "mac": self.mac.hex(":"),
                "link": "up" if self.state.link_up else "down",
                "path": self._path(),
                "vhost-refused": self._refused,
                "pairs": self.state.pairs,
                "queues": [
                    {"name": queue.name.removeprefix(f"{self.name} "), "size": queue.state.size}
                    | {"enabled": queue.state.enabled}
                    for queue in self.queues
                ],
                "userspace": {
                    "rx-frames": c.rx_frames,
                    "rx-dropped": c.rx_dropped,
                    "tx-frames": c.tx_frames,
                    "tx-dropped": c.tx_dropped,
                },
            }

    # The life cycle

    def agreed(self) -> None:
        self._follow_standby()

    def post_load(self) -> None:
        super().post_load()
        self._follow_standby()

    def serve(self) -> None:
        if self.state.pairs > len(self._pairs):
            raise GuestError(f"{self.name}: {self.state.pairs} pairs of queues in use, of {len(self._pairs)}")
        self._set_tap(self.state)
        for pair in range(self.state.pairs):
            self._serve_pair(pair)
        if self.queues[self._control_index].running:
            self.watch_queue(self._control_index)

    def withdraw(self) -> None:
        super().withdraw()
        for pair in range(len(self._pairs)):
            self._withdraw_pair(pair)

    def reset(self) -> None:
        link_up = self.state.link_up  # the cable is not the driver's
        super().reset()
        self.state.link_up = link_up
        with contextlib.suppress(HostError):  # the tap is gone; the next driver will hear of it
            self._set_tap(None)
        for pair in self._pairs:  # no guest begins with frames for the one before
            pair.receiver.forget()
            pair.receiver.drain()

    def calls_changed(self) -> None:
        for pair in range(len(self._pairs)):
            if self._vhost is not None and self._vhost.lent(pair):
                try:
                    self._vhost.set_call(pair, self._calls(pair))
                except HostError as e:
                    self.break_(str(e))

    def on_notify(self, index: int) -> None:
        queue = self.queues[index]
        if index == self._control_index:
            for done, chain in enumerate(queue.chains(), 1):
                queue.push(chain, self._control.run(chain))
                if done == COMMANDS:
                    queue.kick.signal()
                    break
        elif (pair := index // 2) < self.state.pairs:
            (self._pairs[pair].sender if index % 2 else self._pairs[pair].receiver).run()
        self.interrupt(index)

    # For the control queue

    def filter_changed(self) -> None:
        """The state says otherwise now which frames are for the guest."""
        if self.state.link_up:
            accepted = receive_filter(self.state, self.mac)
            self.tap.set_filter(accepted.addresses, all_multicast=accepted.all_multicast)

    def set_pairs(self, pairs: int) -> None:
        """Use the first ``pairs`` pairs of queues. Raises GuestError, HostError."""
        before = self.state.pairs
        if not 1 <= pairs <= len(self._pairs) or not all(q.state.enabled for q in self.queues[: 2 * pairs]):
            raise GuestError(f"{self.name}: {pairs} pairs of queues")
        for pair in range(pairs, before):
            self._withdraw_pair(pair)
        try:
            self.tap.set_queues(pairs)
        except HostError:
            for pair in range(pairs, before):
                self._serve_pair(pair)
            raise
        self.state.pairs = pairs
        for pair in range(before, pairs):
            self._serve_pair(pair)

    def set_offloads(self, features: int) -> None:
        """Leave undone in frames for the guest only these GUEST_... features. Raises GuestError, HostError."""
        if features & ~(self.virtio.driver_features & feature_mask(*GUEST_OFFLOADS)):
            raise GuestError(f"{self.name}: offloads {features:#x}")
        self.tap.set_offload(_tun_offloads(features))
        self.state.offloads = features

    # Within

    def _follow_standby(self) -> None:
        """A driver pairs by the address, so without that feature it drops STANDBY, as Linux does, and pairs nothing."""
        agreed = bool(self.virtio.status & Status.FEATURES_OK)
        is_standby = agreed and self.acked(NetFeature.STANDBY) and self.acked(NetFeature.MAC)
        if is_standby is not self.is_standby:
            self.is_standby = is_standby
            self.standby_acks += is_standby
            self.on_standby()

    @property
    def _control_index(self) -> int:
        """The control queue is behind the pairs that the driver knows of (section 5.1.2)."""
        return 2 * len(self._pairs) if self.acked(NetFeature.MQ) else 2

    def _offered(self) -> int:
        features = ALWAYS
        for number, needed in (GUEST_OFFLOADS | HOST_OFFLOADS).items():
            if self.tap.offloads & needed:
                features |= feature_mask(number)
        if self._mtu is not None:
            features |= feature_mask(NetFeature.MTU)
        if len(self._pairs) > 1:
            features |= feature_mask(NetFeature.MQ)
        return features

    def _set_tap(self, state: NetState | None) -> None:
        """Have the tap do what ``state`` says; None is that there is no driver. Raises HostError."""
        offloads = 0
        if state is not None:
            offloads = self.virtio.driver_features if state.offloads is None else state.offloads
        self.tap.set_offload(_tun_offloads(offloads))
        self.tap.set_queues(state.pairs if state is not None else 1)
        if state is not None and state.link_up:
            self.filter_changed()
        else:
            self.tap.set_filter([])

    def _serve_pair(self, index: int) -> None:
        if not (self.state.link_up and self._lend(index)):
            self._serve_here(index)

    def _serve_here(self, index: int) -> None:
        pair = self._pairs[index]
        usual = HEADER_SIZE + FRAMING + (self._mtu or DEFAULT_MTU)
        pair.receiver.start(
            link_up=self.state.link_up,
            mergeable=self.acked(NetFeature.MRG_RXBUF),
            usual=usual,
            largest=LARGEST if self.virtio.driver_features & SEGMENTED else usual,
        )
        pair.sender.start(link_up=self.state.link_up)
        for side, queue in enumerate(pair.queues):
            if queue.state.enabled:
                if not queue.running:  # it has been with vhost
                    self.start_queue(2 * index + side)
                self.watch_queue(2 * index + side)

    def _lend(self, index: int) -> bool:
        """Let vhost have a pair, if it can. Raises GuestError."""
        rx, tx = self._pairs[index].queues
        if self._vhost is None or not (rx.state.enabled and tx.state.enabled):
            return False
        if self._pairs[index].receiver.holding:  # a frame out of the tap: vhost could not deliver it
            return False
        rx.stop()
        tx.stop()
        try:
            self._vhost.take(
                index,
                self,
                rx,
                tx,
                tap=self.tap.fds[index],
                calls=self._calls(index),
                features=self.virtio.driver_features,
            )
        except HostError as e:
            self._refused = str(e)
        else:
            self._refused = ""
        if trace_path:
            trace_path(self.name, index, "userspace" if self._refused else "vhost", self._refused)
        return not self._refused

    def _withdraw_pair(self, index: int) -> None:
        for side in range(2):
            self.unwatch_queue(2 * index + side)
        if self._vhost is not None:
            self._vhost.give_back(index)
        self._pairs[index].receiver.stop()
        self._pairs[index].sender.stop()

    def _serve_again(self) -> None:
        try:
            self.serve()
        except Exception as e:  # noqa: BLE001  `failed` says it
            self.failed(e)

    def _calls(self, pair: int) -> list[int]:
        return [self.transport.call_event(2 * pair + side) for side in range(2)]

    def _path(self) -> str:
        if not self.running:
            return "stopped"
        return "vhost" if self._vhost is not None and self._vhost.lent(0) else "userspace"


def _tun_offloads(features: int) -> int:
    return sum(flag for number, flag in GUEST_OFFLOADS.items() if features >> number & 1)
