"""The VMM's side of its network: the helper process that makes bridges, and puts taps into them, for it.

    network = Network("web1")
    network.start()                                 # the helper starts while we do something else
    port = network.attach("hostnet1", "tap-web1", bridge="br0")
    network.set_vf("enp94s0f0", 2, mac="52:54:00:6f:55:cc")
    network.close()                                 # bridges, interfaces and virtual functions as they were

The work is netlink's, by pyroute2, and that is not for a process with vCPUs (`kvmpy.host.netlink` says why). The helper
lives as long as our end of its socket (`kvmpy.host.companion`), so however we end, it takes back what it did.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Annotated, Any, Final, Generic, TypeVar

import msgspec
from msgspec import Meta

from kvmpy.errors import HostError, errno_name, refusal
from kvmpy.host.companion import spawn
from kvmpy.host.ownership import process_start
from kvmpy.log import Log

log = Log(__name__)

LONGEST_LINE: Final = 1 << 16
# Seconds: importing takes some on an emulated host, and other helpers may be before ours.
ANSWER_LIMIT: Final = 120.0
CLOSE_LIMIT: Final = 30.0
REAP_LIMIT: Final = 5.0
REAP_POLL: Final = 0.002

MacText = Annotated[str, Meta(pattern=r"^[0-9a-f]{2}(:[0-9a-f]{2}){5}\Z")]


class Port(msgspec.Struct, frozen=True, kw_only=True):
    """What the kernel says of an interface that was attached. All of it was read back.

    ``state`` is what its bridge does with it, such as "forwarding", or "learning" for the first half minute in a bridge
    that runs STP; empty without a bridge. ``bridge_owned``: it is kvmpy's, and goes with the last of its machines.
    ``bridge_changed`` is, a sentence each, what became of another's because it has this port.
    """

    mtu: int
    mac: str
    state: str
    bridge_mac: str
    bridge_up: bool
    bridge_owned: bool
    bridge_changed: list[str] = []


class VfSettings(msgspec.Struct, frozen=True):
    """What a PF holds one of its virtual functions to. A MAC of zeros leaves it to the function, VLAN 0 is none."""

    mac: MacText
    vlan: Annotated[int, Meta(ge=0, le=4095)] = 0
    qos: Annotated[int, Meta(ge=0, le=7)] = 0


class VfChange(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of a virtual function before a request, and as they were read back after it."""

    before: VfSettings
    after: VfSettings


class Uplinks(msgspec.Struct, frozen=True):
    """The interfaces beside a tap, in its bridge or below one that is, whose NIC has a switch of its own."""

    uplinks: list[str]


class Steered(msgspec.Struct, frozen=True):
    """What came of a request to steer frames: what could not be done, a sentence each, and where an entry is new."""

    problems: list[str]
    made: list[str]


T = TypeVar("T")


class Answer(msgspec.Struct, Generic[T], frozen=True):
    """A line from the helper. ``left`` is in its last: what it could not take back."""

    ok: T | None = None
    error: str = ""
    key: str = ""
    left: list[str] | None = None


class Network:
    """The helper of the machine ``name``, started when it is needed. Any thread; a call waits for the one before.

    ``pid`` is the helper's process, 0 where it was never started.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self.pid = 0
        # What the helper that runs now was asked to change, for a message.
        self._changed: set[str] = set()
        self._unread = b""
        # Made now: nothing is built, and nothing imported, beside running vCPUs.
        self._decode_port = msgspec.json.Decoder(Answer[Port]).decode
        self._decode_vf = msgspec.json.Decoder(Answer[VfChange]).decode
        self._decode_uplinks = msgspec.json.Decoder(Answer[Uplinks]).decode
        self._decode_steered = msgspec.json.Decoder(Answer[Steered]).decode
        self._encode = msgspec.json.Encoder().encode

    def start(self) -> None:
        """Start the helper and do not wait for it; where it has been started, nothing happens. Raises HostError."""
        with self._lock:
            self._start()

    def attach(
        self, netdev: str, ifname: str, *, bridge: str | None = None, mtu: int | None = None, netns: str | None = None
    ) -> Port:
        """Take ``ifname``, in the namespace at the path ``netns``, up as a port of ``bridge``, which is made if absent.

        It gets an MTU of ``mtu`` bytes, else its bridge's. Raises HostError that begins with the configuration's key,
        such as netdev.hostnet1.bridge, with everything as it was.
        """
        with self._lock:
            try:
                self._start()
                before = self._changed
                self._changed = before | {name for name in (bridge, ifname) if name}
                request = {"do": "attach", "ifname": ifname, "bridge": bridge, "mtu": mtu, "netns": netns}
                answer = self._ask(request, self._decode_port)
            except HostError as e:
                raise HostError(f"netdev.{netdev}.bridge: {e}") from e
            if answer.ok is None:
                self._changed = before
        if answer.ok is None:
            raise HostError(f"netdev.{netdev}.{answer.key or 'bridge'}: {answer.error}")
        for change in answer.ok.bridge_changed:
            log.warning("netdev.%s.bridge: %s", netdev, change)
        if bridge is not None and answer.ok.state != "forwarding":
            _warn(f"netdev.{netdev}.bridge: {bridge}", answer.ok)
        return answer.ok

    def detach(self, ifname: str, *, netns: str | None = None) -> None:
        """Take back what `attach` did for ``ifname``, and its bridge if nobody needs that. Failures are logged."""
        with self._lock:
            if self._socket is None:
                return
            try:
                problem = self._ask({"do": "detach", "ifname": ifname, "netns": netns}, self._decode_port).error
            except HostError as e:
                problem = str(e)
        if problem:
            log.warning("network: %s: %s", ifname, problem)

    def set_vf(self, interface: str, number: int, *, mac: str | None = None, vlan: int | None = None) -> VfChange:
        """Have the PF with that interface hold its virtual function ``number`` to a MAC, to a VLAN; None leaves it.

        It is put back on close, or when we are killed. Raises HostError, with everything as it was.
        """
        return self._change_vf({"do": "set-vf", "interface": interface, "number": number, "mac": mac, "vlan": vlan})

    def put_vf_back(self, interface: str, number: int, change: VfChange) -> None:
        """Undo ``change``, unless somebody else has changed it since. Raises HostError."""
        request: dict[str, Any] = {"do": "put-vf-back", "interface": interface, "number": number}
        for when, settings in (("ours", change.after), ("was", change.before)):
            request |= {f"{when}_{name}": getattr(settings, name) for name in settings.__struct_fields__}
        self._change_vf(request)

    def _change_vf(self, request: dict[str, Any]) -> VfChange:
        with self._lock:
            self._start()
            self._changed = self._changed | {f"VF {request['number']} of {request['interface']}"}
            answer = self._ask(request, self._decode_vf)
        if answer.ok is None:
            raise HostError(answer.error)
        return answer.ok

    def uplinks(self, ifname: str, *, netns: str | None = None) -> list[str]:
        """The interfaces by which the bridge of ``ifname`` hangs on a NIC with virtual functions. Raises HostError."""
        request = {"do": "uplinks", "ifname": ifname, "netns": netns}
        return self._require(request, self._decode_uplinks).uplinks

    def steer(
        self, ifname: str, mac: str, uplinks: list[str], *, here: bool, learn: bool, netns: str | None = None
    ) -> Steered:
        """Have the bridge of ``ifname``, and the switches of ``uplinks``, send what is for ``mac`` there, or no longer.

        With ``learn`` the bridge learns from it what it did before. Raises HostError.
        """
        request = {"do": "steer", "ifname": ifname, "netns": netns, "address": mac, "uplinks": uplinks}
        return self._require(request | {"here": here, "learn": learn}, self._decode_steered)

    def _require(self, request: dict[str, Any], decode: Callable[[bytes], Answer[T]]) -> T:
        with self._lock:
            self._start()
            self._changed = self._changed | {request["ifname"]}
            answer = self._ask(request, decode)
        if answer.ok is None:
            raise HostError(answer.error)
        return answer.ok

    def close(self) -> None:
        """Have everything taken back, and wait for that; what cannot be is logged. Closing twice is allowed."""
        with self._lock:
            if self._socket is None:
                return
            why = self._dismiss()
            if why := why + self._abandon():
                log.warning("network: the helper, process %d%s%s", self.pid, why, self._left())
            self._changed = set()

    def _dismiss(self) -> str:
        """Have the helper take everything back, and log what it could not; returns why we do not know, if so."""
        assert self._socket is not None
        left = None
        try:
            self._socket.shutdown(socket.SHUT_WR)
            self._socket.settimeout(CLOSE_LIMIT)
            while line := self._line():
                left = self._decode_port(line).left
        except TimeoutError:
            return f", not done in {CLOSE_LIMIT:g} s"
        except (OSError, HostError, msgspec.DecodeError) as e:
            return f": {_reason(e)}"
        for problem in left or ():
            log.warning("network: %s", problem)
        return ", ended without a word" if left is None else ""

    def _left(self) -> str:
        """What may still be as the helper made it, for it is gone; the end of a sentence."""
        names, self._changed = ", ".join(sorted(self._changed)), set()
        return names and f"; may be left as they are: {names}"

    def _start(self) -> None:
        if self._socket is not None:
            return
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                pid = os.getpid()
                self.pid = _spawn(theirs.fileno(), self._name, str(pid), str(process_start(pid)))
            except OSError as e:
                ours.close()
                raise HostError(f"{sys.executable}: {refusal(e.errno, 'the network helper cannot start')}") from e
        ours.settimeout(ANSWER_LIMIT)
        self._socket, self._unread = ours, b""

    def _ask(self, request: dict[str, Any], decode: Callable[[bytes], Answer[T]]) -> Answer[T]:
        """The helper's answer. Raises HostError where there is none; then it takes everything back, and is done."""
        assert self._socket is not None
        try:
            self._socket.sendall(self._encode(request) + b"\n")
            if line := self._line():
                return decode(line)
            why = "it has ended"
        except TimeoutError:
            why = f"it has not answered in {ANSWER_LIMIT:g} s"
        except (OSError, HostError, msgspec.DecodeError) as e:
            why = _reason(e)
        why += self._abandon()
        raise HostError(f"the network helper, process {self.pid}, failed: {why}{self._left()}")

    def _line(self) -> bytes:
        """The next line, without its end; empty where the helper has closed the socket."""
        assert self._socket is not None
        while b"\n" not in self._unread:
            if len(self._unread) > LONGEST_LINE:
                raise HostError(f"a line of more than {LONGEST_LINE} bytes")
            if not (data := self._socket.recv(LONGEST_LINE)):
                return b""
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _abandon(self) -> str:
        """Close our end, which ends the helper if it has not, and reap it; returns how it ended, for a message."""
        assert self._socket is not None
        self._socket.close()
        self._socket = None
        deadline = time.monotonic() + REAP_LIMIT
        while time.monotonic() < deadline:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # a program that uses us ignores SIGCHLD, and the kernel has reaped it
                return ""
            if pid:
                code = os.waitstatus_to_exitcode(status)
                advice = ": standard error says why" if code > 0 else ""
                return f", exit code {code}{advice}" if code else ""
            time.sleep(REAP_POLL)
        return ""


def _reason(e: Exception) -> str:
    return errno_name(e.errno or 0) if isinstance(e, OSError) else str(e)


def _warn(bridge: str, port: Port) -> None:
    """Say that nothing passes, and what that waits for."""
    if not port.bridge_up:
        log.warning("%s is down: nothing passes until it is set up", bridge)
    else:
        log.warning("%s: the port is %s: nothing passes until it is forwarding (STP?)", bridge, port.state)


def _spawn(control: int, *arguments: str) -> int:
    return spawn("kvmpy.host.netlink", control, *arguments)
