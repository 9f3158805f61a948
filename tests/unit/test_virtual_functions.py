"""MAC and VLAN of virtual functions: what the network helper does at their PF, and what the VMM asks of it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest

from kvmpy.errors import HostError
from kvmpy.host import network
from kvmpy.host.changes import Refused
from kvmpy.host.companion import CONTROL
from kvmpy.host.links import Link, LinkError, Links, Vf
from kvmpy.host.netlink import Helper, answer
from kvmpy.host.network import Network, VfChange, VfSettings
from kvmpy.host.ownership import Mark, process_start
from kvmpy.host.virtual_functions import VirtualFunctions

PF, INDEX = "enp94s0f0", 7
MAC, OTHER, ZEROS = "52:54:00:6f:55:cc", "52:54:00:00:00:02", "00:00:00:00:00:00"
SET = {"do": "set-vf", "interface": PF, "number": 1, "mac": MAC, "vlan": 7}
BACK = {
    "do": "put-vf-back",
    "interface": PF,
    "number": 1,
    "ours_mac": MAC,
    "ours_vlan": 7,
    "ours_qos": 0,
    "was_mac": ZEROS,
    "was_vlan": 0,
    "was_qos": 0,
}


class FakeLinks(Links):
    """A PF with two virtual functions. Its driver takes what ``takes`` makes of a wish; ``refuses`` is an errno."""

    def __init__(self) -> None:
        self.functions = {0: Vf(ZEROS), 1: Vf(ZEROS, 0, 3)}
        self.takes: Callable[[Vf], Vf] = lambda wanted: wanted
        self.refuses = 0

    def find(self, name: str) -> Link | None:
        return Link(INDEX, PF) if name == PF else None

    def get(self, index: int) -> Link | None:
        return Link(INDEX, PF) if index == INDEX else None

    def vf(self, index: int, number: int) -> Vf | None:
        return self.functions.get(number)

    def change_vf(
        self, index: int, number: int, *, mac: str | None = None, vlan: tuple[int, int] | None = None
    ) -> None:
        if self.refuses:
            raise LinkError(self.refuses, "")
        now = self.functions[number]
        self.functions[number] = self.takes(Vf(mac or now.mac, *(vlan or now[1:])))


@pytest.fixture
def links() -> FakeLinks:
    return FakeLinks()


@pytest.fixture
def functions(links: FakeLinks) -> VirtualFunctions:
    return VirtualFunctions(links)


def test_settings_are_made_and_on_close_as_they_were(links: FakeLinks, functions: VirtualFunctions) -> None:
    functions.change(PF, 1, MAC, 7)
    assert links.functions == {0: Vf(ZEROS), 1: Vf(MAC, 7, 0)}
    functions.change(PF, 1, OTHER, None)
    assert links.functions[1] == Vf(OTHER, 7, 0)
    assert functions.close() == []
    assert links.functions[1] == Vf(ZEROS, 0, 3)


def test_request_for_nothing_reads_and_changes_nothing(links: FakeLinks, functions: VirtualFunctions) -> None:
    links.refuses = errno.EPERM
    said = Vf(ZEROS, 0, 3)._asdict()
    assert functions.change(PF, 1, None, None) == {"before": said, "after": said}
    assert functions.close() == []


def test_what_somebody_else_has_changed_since_is_left_alone(links: FakeLinks, functions: VirtualFunctions) -> None:
    functions.change(PF, 1, MAC, None)
    links.functions[1] = Vf(OTHER)
    assert functions.close() == []
    assert links.functions[1] == Vf(OTHER)


def test_put_back_is_done_once_and_only_to_what_is_ours(links: FakeLinks, functions: VirtualFunctions) -> None:
    request: dict[str, Any] = {key: value for key, value in BACK.items() if key != "do"}
    functions.put_back(**request)
    assert links.functions[1] == Vf(ZEROS, 0, 3), "it was not as in ours"
    functions.change(PF, 1, MAC, 7)
    functions.put_back(**request)
    assert links.functions[1] == Vf(ZEROS)
    functions.close()
    assert links.functions[1] == Vf(ZEROS)


@pytest.mark.parametrize(
    ("number", "advice"), [(errno.EPERM, "CAP_NET_ADMIN"), (errno.EOPNOTSUPP, "the PF's driver cannot set it")]
)
def test_refusal_of_the_kernel_says_what_to_do(
    links: FakeLinks, functions: VirtualFunctions, number: int, advice: str
) -> None:
    links.refuses = number
    with pytest.raises(Refused, match=f"{PF}: virtual function 1: .*{errno.errorcode[number]}: .*{advice}"):
        functions.change(PF, 1, MAC, None)
    assert links.functions[1] == Vf(ZEROS, 0, 3)


def test_half_a_change_is_undone(links: FakeLinks, functions: VirtualFunctions) -> None:
    links.takes = lambda wanted: wanted if wanted.vlan == 0 else wanted._replace(vlan=1)
    with pytest.raises(Refused):
        functions.change(PF, 1, MAC, 7)
    assert links.functions[1] == Vf(ZEROS, 0, 3)


def test_driver_that_takes_less_than_it_says_is_noticed(links: FakeLinks, functions: VirtualFunctions) -> None:
    links.takes = lambda wanted: wanted._replace(vlan=0)
    with pytest.raises(Refused, match="after it was made"):
        functions.change(PF, 1, MAC, 7)


@pytest.mark.parametrize(("interface", "number"), [("eth9", 1), (PF, 2)])
def test_function_that_is_not_there_is_refused(functions: VirtualFunctions, interface: str, number: int) -> None:
    with pytest.raises(Refused, match=f"{interface}: has no virtual function {number}"):
        functions.change(interface, number, MAC, None)


@pytest.mark.parametrize(
    ("request_", "key", "value"),
    [
        (SET, "interface", None),
        (SET, "interface", "a" * 16),
        (SET, "number", -1),
        (SET, "number", True),
        (SET, "number", 1 << 32),
        (SET, "mac", "52:54:00:6f:55"),
        (SET, "mac", f"{MAC}\n"),
        (SET, "vlan", 4095),
        (SET, "vlan", "7"),
        (SET, "more", 1),
        (BACK, "was_qos", 8),
        (BACK, "ours_mac", 5),
    ],
)
def test_request_with_something_wrong_is_refused(request_: dict[str, Any], key: str, value: object) -> None:
    helper = Helper(Mark("web1", os.getpid(), process_start(os.getpid())))
    assert answer(helper, json.dumps(request_ | {key: value}).encode())["key"] in (key, "")
    assert helper.close() == []


# What the VMM makes of it


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shell script that stands for the helper, its socket as descriptor 3."""
    lines: list[str] = []

    def spawn(control: int, *_: str) -> int:
        actions = [(os.POSIX_SPAWN_DUP2, control, CONTROL)]
        return os.posix_spawn("/bin/sh", ["sh", "-c", "\n".join(lines)], dict(os.environ), file_actions=actions)

    monkeypatch.setattr(network, "_spawn", spawn)
    return lines


def test_vmm_asks_as_the_helper_expects_and_is_told_both_states(script: list[str]) -> None:
    reply = {"ok": {"before": {"mac": ZEROS, "vlan": 0, "qos": 0}, "after": {"mac": MAC, "vlan": 7, "qos": 0}}}
    for request in (SET, BACK):
        text = json.dumps(request, separators=(",", ":"))
        script += ["read line <&3", f"""[ "$line" = '{text}' ] && echo '{json.dumps(reply)}' >&3"""]
    change = VfChange(before=VfSettings(ZEROS), after=VfSettings(MAC, 7))
    with closing(Network("web1")) as helper:
        assert helper.set_vf(PF, 1, mac=MAC, vlan=7) == change
        helper.put_vf_back(PF, 1, change)


def test_refusal_is_the_helpers(script: list[str]) -> None:
    script += ["read line <&3", """echo '{"error": "eth9: has none", "key": "host"}' >&3""", "read line <&3"]
    with closing(Network("web1")) as helper, pytest.raises(HostError, match=r"^eth9: has none$"):
        helper.set_vf("eth9", 0, mac=MAC)


def test_answer_that_is_none_ends_the_helper(script: list[str]) -> None:
    script += ["read line <&3", """echo '{"ok": {"before": {"mac": "none"}}}' >&3""", "read line <&3"]
    with closing(Network("web1")) as helper, pytest.raises(HostError, match=r"the network helper, process .* failed"):
        helper.set_vf(PF, 1, mac=MAC)
