"""The network helper without a network: whose a link is, what the helper answers, what the VMM makes of its answers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.errors import HostError
from kvmpy.host import netlink, network
from kvmpy.host.companion import CONTROL
from kvmpy.host.netlink import Helper, answer, serve
from kvmpy.host.network import Network, Port
from kvmpy.host.ownership import LONGEST, Before, Mark, process_start
from kvmpy.host.ports import bridge_mac

ME = Mark("web1", os.getpid(), process_start(os.getpid()))
GOOD = {"do": "attach", "ifname": "tap0", "bridge": "br0", "mtu": None, "netns": None}
PORT = Port(mtu=1500, mac="02:00:00:00:00:01", state="forwarding", bridge_mac="", bridge_up=True, bridge_owned=True)
FACTS = {name: getattr(PORT, name) for name in PORT.__struct_fields__}

names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", fullmatch=True)
numbers = st.integers(0, 2**31 - 1)
earlier = st.builds(Before, numbers, numbers, st.booleans(), st.text(max_size=40))


# Marks


@given(st.builds(Mark, names, numbers, numbers, st.none() | earlier))
def test_mark_is_read_as_it_was_written(mark: Mark) -> None:
    assert Mark.parse(mark.text) == mark


@given(st.text() | st.text().map("kvmpy:".__add__))
def test_any_alias_is_a_mark_or_none(alias: str) -> None:
    mark = Mark.parse(alias)
    assert mark is None or alias.startswith(mark.owner.text)


def test_mark_of_the_longest_name_leaves_room_for_an_alias() -> None:
    mark = Mark("x" * 64, 2**22, 2**40, Before(2**31, 65535, True, "a" * 100))
    assert len(mark.text) <= LONGEST


def test_process_that_runs_is_alive_and_one_of_its_number_before_is_not() -> None:
    assert ME.alive()
    assert not ME._replace(started=ME.started - 1).alive()


def test_process_that_nobody_has_reaped_is_not_alive() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        mark = Mark("web1", process.pid, process_start(process.pid))
        assert mark.alive()
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not mark.alive()
    assert not mark.alive()


# Addresses of bridges


def test_bridge_has_a_locally_administered_address_of_one_station() -> None:
    macs = {bridge_mac(f"br{number}", 4026531840) for number in range(256)}
    assert len(macs) == 256
    assert {int(mac[:2], 16) & 3 for mac in macs} == {2}


def test_bridges_of_one_name_differ_between_namespaces_and_stay_the_same_in_one() -> None:
    assert bridge_mac("br0", 1) == bridge_mac("br0", 1) != bridge_mac("br0", 2)


# What the helper answers


@pytest.fixture
def helper(monkeypatch: pytest.MonkeyPatch) -> Helper:
    """A helper that changes nothing: whatever is well formed is done."""
    attach = ((lambda _, **request: {"asked": request}), netlink.ATTACH)
    monkeypatch.setitem(netlink.REQUESTS, "attach", attach)
    return Helper(ME)


def test_good_request_is_passed_on(helper: Helper) -> None:
    asked = {key: value for key, value in GOOD.items() if key != "do"}
    assert answer(helper, json.dumps(GOOD).encode()) == {"ok": {"asked": asked}}


def test_a_mistake_of_the_helpers_own_is_answered_and_the_guests_network_stays(
    helper: Helper, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **request: object) -> dict[str, Any]:
        raise KeyError("eth0")

    monkeypatch.setitem(netlink.REQUESTS, "attach", (fail, netlink.ATTACH))
    assert answer(helper, json.dumps(GOOD).encode()) == {"error": "kvmpy's own mistake: KeyError('eth0')", "key": ""}


@given(st.binary() | st.sampled_from([b"{}", b"[]", b"null", b"1e999", b'"do"', b'{"do": {}}']))
def test_what_is_no_request_is_answered_so(line: bytes) -> None:
    assert "error" in answer(Helper(ME), line)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("do", "reboot"),
        ("do", ["attach"]),
        ("ifname", None),
        ("ifname", "sixteen-bytes-0x"),
        ("ifname", "nul\0"),
        ("ifname", "\udc80"),
        ("bridge", ""),
        ("bridge", 5),
        ("mtu", True),
        ("mtu", -1),
        ("mtu", 2**40),
        ("netns", "relative"),
        ("netns", "/nul\0"),
        ("netns", "/" + "x" * 5000),
        ("more", 1),
    ],
)
def test_request_with_something_wrong_is_refused(helper: Helper, key: str, value: object) -> None:
    assert "error" in answer(helper, json.dumps(GOOD | {key: value}).encode())


def test_request_that_nests_too_deep_is_refused(helper: Helper) -> None:
    assert "error" in answer(helper, b"[" * 60000)


@contextmanager
def served(helper: Helper) -> Iterator[socket.socket]:
    """The VMM's end of a socket that is served until it is closed."""
    ours, theirs = socket.socketpair()

    def run() -> None:
        with theirs:
            serve(theirs, helper)

    thread = threading.Thread(target=run)
    thread.start()
    with ours:
        yield ours
    thread.join()


def test_each_line_gets_a_line_and_the_end_of_the_socket_ends_it(helper: Helper) -> None:
    with served(helper) as vmm, vmm.makefile("rb") as answers:
        vmm.sendall(b"garbage\n" + json.dumps(GOOD).encode() + b"\n")
        assert "error" in json.loads(answers.readline())
        assert "ok" in json.loads(answers.readline())
        vmm.shutdown(socket.SHUT_WR)
        assert answers.readline() == b""


def test_line_that_never_ends_ends_the_service(helper: Helper) -> None:
    with served(helper) as vmm:
        vmm.sendall(b"x" * netlink.LONGEST_LINE)
        assert vmm.recv(1) == b""


def test_vmm_that_does_not_read_its_answers_ends_the_service(helper: Helper) -> None:
    with served(helper) as vmm:
        vmm.sendall(json.dumps(GOOD).encode() + b"\n" + b"half a line")


# What the VMM makes of it


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shell script that stands for the helper, its socket as descriptor 3."""
    lines = ["read line <&3"]

    def spawn(control: int, *_: str) -> int:
        actions = [(os.POSIX_SPAWN_DUP2, control, CONTROL)]
        return os.posix_spawn("/bin/sh", ["sh", "-c", "\n".join(lines)], dict(os.environ), file_actions=actions)

    monkeypatch.setattr(network, "_spawn", spawn)
    return lines


def ask(helper: Network) -> Port:
    return helper.attach("n1", "tap0", bridge="br0")


def test_facts_are_the_helpers_and_what_it_left_is_logged(script: list[str], caplog: pytest.LogCaptureFixture) -> None:
    script += [f"echo '{json.dumps({'ok': FACTS})}' >&3", "read line <&3", """echo '{"left": ["br0: EBUSY"]}' >&3"""]
    helper = Network("web1")
    assert ask(helper) == PORT
    helper.close()
    assert caplog.messages == ["network: br0: EBUSY"]
    helper.close()


def test_refusal_begins_with_the_key_it_is_about(script: list[str]) -> None:
    script += ["""echo '{"error": "tap0: busy", "key": "ifname"}' >&3""", "read line <&3"]
    with closing(Network("web1")) as helper, pytest.raises(HostError, match=r"^netdev\.n1\.ifname: tap0: busy$"):
        ask(helper)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("exit 3", r"it has ended, exit code 3: standard error says why"),
        ("kill -9 $$", r"it has ended, exit code -9"),
        ("echo garbage >&3", r"failed: JSON is malformed"),
        ("""echo '{"ok": {"mtu": "much"}}' >&3""", r"failed: .*mtu"),
        ("head -c 200000 /dev/zero >&3", r"failed: a line of more than 65536 bytes"),
    ],
)
def test_helper_that_fails_is_told_of(script: list[str], reply: str, said: str) -> None:
    script.append(reply)
    with (
        closing(Network("web1")) as helper,
        pytest.raises(HostError, match=rf"^netdev\.n1\.bridge: the network helper, process \d+, .*{said}"),
    ):
        ask(helper)


def test_helper_that_does_not_answer_is_given_up(script: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "ANSWER_LIMIT", 0.05)
    script.append("read line <&3")
    with closing(Network("web1")) as helper, pytest.raises(HostError, match=r"it has not answered in 0\.05 s"):
        ask(helper)


def test_close_does_not_wait_for_ever(
    script: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(network, "CLOSE_LIMIT", 0.05)
    monkeypatch.setattr(network, "REAP_LIMIT", 0.05)
    script.append("exec sleep 100")
    helper = Network("web1")
    helper.start()
    helper.close()
    assert f"process {helper.pid}, not done in 0.05 s" in caplog.text
    os.kill(helper.pid, 9)
    os.waitpid(helper.pid, 0)


def test_helper_that_cannot_start_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with closing(Network("web1")) as helper, pytest.raises(HostError, match=r"bridge: /nowhere/python: ENOENT"):
        ask(helper)


def test_helper_that_is_started_and_never_asked_ends_with_its_machine() -> None:
    helper = Network("web1")
    helper.start()
    helper.start()
    helper.close()
    with pytest.raises(ProcessLookupError):
        process_start(helper.pid)


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("kill -9 $$", "ended without a word, exit code -9"),
        ("exit 0", "ended without a word"),
        ("""echo '{"left": []}' >&3; exit 1""", "exit code 1: standard error says why"),
    ],
)
def test_helper_that_does_not_end_well_is_told_of_with_what_may_be_left(
    script: list[str], caplog: pytest.LogCaptureFixture, end: str, said: str
) -> None:
    script += ["""echo '{"error": "tap9: busy", "key": "ifname"}' >&3""", "read line <&3"]
    script += [f"echo '{json.dumps({'ok': FACTS})}' >&3", "read line <&3", end]
    helper = Network("web1")
    with pytest.raises(HostError, match="busy"):
        helper.attach("n1", "tap9", bridge="br9")
    ask(helper)
    helper.close()
    assert caplog.messages == [f"network: the helper, process {helper.pid}, {said}; may be left as they are: br0, tap0"]


def test_helper_that_hangs_up_on_a_request_is_told_of_by_its_errno(script: list[str]) -> None:
    script[:] = ["exec 3>&-; sleep 0"]
    with closing(Network("web1")) as helper:
        helper.start()
        os.waitid(os.P_PID, helper.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(HostError, match=r"failed: EPIPE; may be left as they are: br0, tap0$"):
            ask(helper)


def test_parent_that_ignores_its_children_does_not_matter(script: list[str]) -> None:
    script += [f"echo '{json.dumps({'ok': FACTS})}' >&3", "read line <&3", """echo '{"left": []}' >&3"""]
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        helper = Network("web1")
        ask(helper)
        helper.close()
    finally:
        signal.signal(signal.SIGCHLD, before)
