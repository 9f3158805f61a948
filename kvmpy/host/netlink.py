"""The network helper: a small process beside the VMM that has CAP_NET_ADMIN and pyroute2, and changes links for it.

    python -m kvmpy.host.netlink MACHINE PID STARTED        descriptor 3 is a socket to that process, the VMM

The VMM imports nothing while vCPUs run, and can do without what pyroute2 takes. A line of JSON comes in, one goes back:
{"do": "attach", ...} gives {"ok": {...}}, or {"error": "why not", "key": "bridge"}. When the socket closes, also
because the VMM was killed, the helper takes back what it has changed, says in a last line {"left": [...]} what it could
not, and ends. Where it is killed too, the marks of `kvmpy.host.ownership` tell the machine's next start what it left.

What it can do is in `kvmpy.host.ports`, `kvmpy.host.fdb` and `kvmpy.host.virtual_functions`; here are its requests, and
its life.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from kvmpy.errors import HostError
from kvmpy.host.changes import Refused
from kvmpy.host.companion import CONTROL
from kvmpy.host.links import Links
from kvmpy.host.netns import NetworkNamespace
from kvmpy.host.ownership import Mark
from kvmpy.host.ports import Namespace
from kvmpy.host.virtual_functions import VirtualFunctions

if TYPE_CHECKING:
    from kvmpy.host.fdb import Fdb

# Bytes of a request: it holds names and a path.
LONGEST_LINE: Final = 1 << 16
LONGEST_NAME: Final = 15
LONGEST_PATH: Final = 4096
LARGEST_MTU: Final = 65535
MOST_UPLINKS: Final = 256
LARGEST_VF, LARGEST_VLAN, LARGEST_QOS = 65535, 4094, 7
MAC: Final = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.ASCII)
MOST_DESCRIPTORS: Final = 1 << 20


class Helper:
    """The requests of one VMM, and what has to be taken back when it goes."""

    def __init__(self, owner: Mark) -> None:
        self._owner = owner
        self._namespaces: dict[str | None, Namespace] = {}
        self._functions: VirtualFunctions | None = None
        self._fdbs: dict[str | None, Fdb] = {}

    def attach(self, *, ifname: str, bridge: str | None, mtu: int | None, netns: str | None) -> dict[str, Any]:
        """See Namespace.attach; ``netns`` is the path of the namespace, None for our own. Raises HostError."""
        return self._namespace(netns).attach(ifname, bridge, mtu)

    def detach(self, *, ifname: str, netns: str | None) -> None:
        """See Namespace.detach. Raises HostError with what could not be taken back."""
        if left := self._namespace(netns).detach(ifname):
            raise HostError("; ".join(left))

    def set_vf(self, *, interface: str, number: int, mac: str | None, vlan: int | None) -> dict[str, Any]:
        """See VirtualFunctions.change. Raises HostError."""
        return self._virtual_functions().change(interface, number, mac, vlan)

    def put_vf_back(self, **request: Any) -> dict[str, Any]:
        """See VirtualFunctions.put_back. Raises HostError."""
        return self._virtual_functions().put_back(**request)

    def uplinks(self, *, ifname: str, netns: str | None) -> dict[str, Any]:
        """See Fdb.uplinks. Raises HostError."""
        return self._fdb(netns).uplinks(ifname)

    def steer(self, *, netns: str | None, **request: Any) -> dict[str, Any]:
        """See Fdb.steer. Raises HostError."""
        return self._fdb(netns).steer(**request)

    def close(self) -> list[str]:
        """Take everything back; returns what could not be."""
        left = self._functions.close() if self._functions else []
        left += [problem for fdb in self._fdbs.values() for problem in fdb.close()]
        return left + [problem for namespace in self._namespaces.values() for problem in namespace.close()]

    def _virtual_functions(self) -> VirtualFunctions:
        """Those of our own namespace: a PF that serves machines is the host's."""
        if self._functions is None:
            self._functions = VirtualFunctions(self._namespace(None).links)
        return self._functions

    def _fdb(self, path: str | None) -> Fdb:
        if path not in self._fdbs:
            from kvmpy.host.fdb import Fdb  # most machines have no failover pair

            self._fdbs[path] = Fdb(self._namespace(path))
        return self._fdbs[path]

    def _namespace(self, path: str | None) -> Namespace:
        if path not in self._namespaces:
            try:
                namespace = NetworkNamespace(path)
                self._namespaces[path] = Namespace(namespace, Links(namespace), self._owner)
            except HostError as e:
                raise Refused("netns", e) from e
        return self._namespaces[path]


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and 0 < len(value.encode()) <= LONGEST_NAME


def _is_path(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and value.startswith("/") and len(value) <= LONGEST_PATH


def _is_mtu(value: object) -> bool:
    return type(value) is int and 0 < value <= LARGEST_MTU


def _is_mac(value: object) -> bool:
    return isinstance(value, str) and MAC.fullmatch(value) is not None


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _are_names(value: object) -> bool:
    return isinstance(value, list) and len(value) <= MOST_UPLINKS and all(map(_is_name, value))


def _is_number(largest: int) -> Callable[[object], bool]:
    return lambda value: type(value) is int and 0 <= value <= largest


# What a request carries, each with its test: the VMM is trusted no more than it has to be. A guest may be in it.
Fields = dict[str, tuple[Callable[[object], bool], str]]
ATTACH: Final[Fields] = {
    "ifname": (_is_name, "an interface's name"),
    "bridge": (_is_name, "an interface's name"),
    "mtu": (_is_mtu, "an MTU"),
    "netns": (_is_path, "the path of a network namespace"),
}
VLAN: Final = (_is_number(LARGEST_VLAN), "a VLAN")
FUNCTION: Final[Fields] = {
    "interface": (_is_name, "an interface's name"),
    "number": (_is_number(LARGEST_VF), "a virtual function's number"),
}
SET_VF: Final[Fields] = {**FUNCTION, "mac": (_is_mac, "a MAC address"), "vlan": VLAN}
PUT_VF_BACK: Final[Fields] = FUNCTION | {
    f"{when}_{field}": test
    for when in ("ours", "was")
    for field, test in {
        "mac": (_is_mac, "a MAC address"),
        "vlan": VLAN,
        "qos": (_is_number(LARGEST_QOS), "a priority"),
    }.items()
}
OPTIONAL: Final = frozenset({"bridge", "mtu", "netns", "mac", "vlan"})  # may be null
DETACH: Final[Fields] = {"ifname": ATTACH["ifname"], "netns": ATTACH["netns"]}
STEER: Final[Fields] = DETACH | {
    "address": (_is_mac, "a MAC address"),
    "uplinks": (_are_names, "names of interfaces"),
    "here": (_is_flag, "true or false"),
    "learn": (_is_flag, "true or false"),
}
REQUESTS: Final[dict[str, tuple[Callable[..., dict[str, Any] | None], Fields]]] = {
    "attach": (Helper.attach, ATTACH),
    "detach": (Helper.detach, DETACH),
    "set-vf": (Helper.set_vf, SET_VF),
    "put-vf-back": (Helper.put_vf_back, PUT_VF_BACK),
    "uplinks": (Helper.uplinks, DETACH),
    "steer": (Helper.steer, STEER),
}


def serve(control: socket.socket, helper: Helper) -> None:
    """Answer each line until the socket closes, or a line is cut off or too long."""
    with control.makefile("rb") as lines:
        try:
            while (line := lines.readline(LONGEST_LINE)).endswith(b"\n"):
                control.sendall(_line(answer(helper, line)))
        except OSError:  # the VMM has gone, with an answer of ours unread or a question half asked
            return


def answer(helper: Helper, line: bytes) -> dict[str, Any]:
    """The reply to one line."""
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        return {"error": "expected a line of JSON", "key": ""}
    name = request.pop("do", None) if isinstance(request, dict) else None
    if not isinstance(name, str) or name not in REQUESTS:
        return {"error": "expected one of the requests " + ", ".join(REQUESTS), "key": ""}
    function, fields = REQUESTS[name]
    if request.keys() != fields.keys():
        return {"error": f"{name}: expected {', '.join(fields)}", "key": ""}
    for field, (is_good, what) in fields.items():
        value = request[field]
        if not is_good(value) and not (value is None and field in OPTIONAL):
            return {"error": f"{str(value)[:100]!a}: cannot be {what}", "key": field}
    try:
        return {"ok": function(helper, **request)}
    except HostError as e:
        return {"error": str(e), "key": e.key if isinstance(e, Refused) else ""}
    except Exception as e:  # noqa: BLE001  were it to end here, a running guest's network would be taken down
        return {"error": f"kvmpy's own mistake: {e!r}", "key": ""}


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def main(arguments: list[str]) -> int:
    """Serve the VMM named by ``arguments`` until it closes the socket."""
    os.closerange(CONTROL + 1, MOST_DESCRIPTORS)
    machine, pid, started = arguments
    helper = Helper(Mark(machine, int(pid), int(started)))
    with socket.socket(fileno=CONTROL) as control:
        try:
            serve(control, helper)
        finally:
            _say_left(control, helper.close())
    return 0


def _say_left(control: socket.socket, left: list[str]) -> None:
    """To the VMM, also where it is nothing; where that has been killed, to whoever reads its standard error."""
    try:
        control.sendall(_line({"left": left}))
    except OSError:
        sys.stderr.writelines(f"kvmpy: network: {problem}\n" for problem in left)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
