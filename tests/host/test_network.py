"""Bridges and their ports by the network helper, on the real kernel; what `ip` shows is the judge."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, Final

import pytest

from kvmpy.errors import HostError
from kvmpy.host.links import HALF_MADE, LinkError, Links
from kvmpy.host.netns import NetworkNamespace
from kvmpy.host.network import Network, Port
from kvmpy.host.ownership import Mark, process_start
from kvmpy.host.ports import Namespace as Changes
from kvmpy.host.tap import Tap
from tests.counts import count
from tests.host.conftest import Namespace

BOUND: Final = 60.0  # seconds that something may take on a busy machine
CYCLES: Final = count(6, soak=128)
KILLS: Final = count(8, soak=100)
FOREIGN_MAC: Final = "00:00:5e:00:53:01"
HIGHEST_MAC: Final = "fc:ff:ff:ff:ff:ff"  # that hardware has

# A VMM: attaches a tap to a bridge, says so, and lives until its standard input closes.
VMM: Final = """
import sys
from contextlib import closing
from kvmpy.errors import HostError
from kvmpy.host.network import Network
from kvmpy.host.tap import Tap
name, ifname, bridge, netns = sys.argv[1:]
with closing(Tap.open(ifname, netns=netns)), closing(Network(name)) as network:
    network.start()
    print("starting", network.pid, flush=True)
    network.attach("n1", ifname, bridge=bridge, netns=netns)
    print("ready", flush=True)
    sys.stdin.read()
"""
# Tries to attach, and says what comes of it.
ATTEMPT: Final = """
import sys
from contextlib import closing
from kvmpy.errors import HostError
from kvmpy.host.network import Network
with closing(Network("web1")) as network:
    try:
        print(network.attach("n1", "tap0", bridge="br0", netns=sys.argv[1]).state)
    except HostError as e:
        print(e)
"""

# Says what was imported by it all, and whether pyroute2 ever was.
IMPORTS: Final = """
import sys
from contextlib import closing
from kvmpy.host.network import Network
from kvmpy.host.tap import Tap
with closing(Tap.open("tap0", netns=sys.argv[1])):
    before = set(sys.modules)
    with closing(Network("web1")) as network:
        network.attach("n1", "tap0", bridge="br0", netns=sys.argv[1])
    print(sorted(set(sys.modules) - before), "pyroute2" in sys.modules)
"""


def links(netns: Namespace) -> dict[str, dict[str, Any]]:
    """What is there, as it was configured: without timers, the carrier, and the queue that the first UP brings."""
    shown = json.loads(netns.ip("-json", "-details", "link"))
    return {link["ifname"]: configured(link) for link in shown if link["ifname"] != "lo"}


def configured(value: Any) -> Any:
    if isinstance(value, list):
        return [item for item in value if item not in ("NO-CARRIER", "LOWER_UP")]
    if not isinstance(value, dict):
        return value
    left_out = ("qdisc", "operstate", "tso_max_size")  # the last follows from the ports that a bridge had
    return {key: configured(inner) for key, inner in value.items() if key not in left_out and "timer" not in key}


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def running(pid: int) -> bool:
    try:
        process_start(pid)
    except (ProcessLookupError, FileNotFoundError):
        return False
    return True


class Vm:
    """The network of a machine with one tap, in this process."""

    def __init__(self, netns: Namespace, name: str = "web1", ifname: str = "tap0") -> None:
        self.netns, self.ifname = netns, ifname
        self.tap = Tap.open(ifname, netns=netns.path)
        self.network = Network(name)

    def attach(self, bridge: str | None = "br0", mtu: int | None = None) -> Port:
        return self.network.attach("n1", self.ifname, bridge=bridge, mtu=mtu, netns=self.netns.path)

    def close(self) -> None:
        self.network.close()
        self.tap.close()

    def __enter__(self) -> Vm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def vmm(netns: Namespace, name: str, ifname: str, bridge: str = "br0") -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A VMM in a process of its own that has attached its tap, and its helper's process; both are gone afterwards."""
    command = [sys.executable, "-c", VMM, name, ifname, bridge, netns.path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        helper = int(process.stdout.readline().split()[1])
        try:
            assert process.stdout.readline() == "ready\n"
            yield process, helper
        finally:
            process.kill()
            until(lambda: not running(helper))


def leftover(netns: Namespace, name: str, ifname: str = "tap0") -> None:
    """What remains where a machine's VMM and helper are killed both."""
    with vmm(netns, name, ifname) as (process, helper):
        os.kill(helper, signal.SIGKILL)
        until(lambda: not running(helper))
        process.kill()


def attempt(netns: Namespace, *prefix: str) -> str:
    done = subprocess.run(
        [*prefix, sys.executable, "-c", ATTEMPT, netns.path], capture_output=True, text=True, check=False, timeout=BOUND
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# A bridge of ours


def test_absent_bridge_is_made_and_forwards_and_goes_with_the_machine(netns: Namespace) -> None:
    with Vm(netns) as vm:
        port = vm.attach()
        there = links(netns)
        bridge, tap = there["br0"], there["tap0"]
        assert port.state == "forwarding"
        assert port.bridge_owned
        assert port.bridge_up
        assert (port.mac, port.bridge_mac) == (tap["address"], bridge["address"])
        assert (tap["master"], "UP" in tap["flags"], "UP" in bridge["flags"]) == ("br0", True, True)
        settings = bridge["linkinfo"]["info_data"]
        assert (settings["stp_state"], settings["forward_delay"], settings["mcast_snooping"]) == (0, 0, 0)
        assert Mark.parse(bridge["ifalias"]) == Mark("web1", os.getpid(), process_start(os.getpid()))
        assert bridge["group"] == "default"
    assert netns.interfaces() == []


def test_bridge_keeps_its_own_address_whatever_its_ports_have(netns: Namespace) -> None:
    with Vm(netns) as vm, Vm(netns, "web2", "tap1") as other:
        mac = vm.attach().bridge_mac
        assert int(mac[:2], 16) & 3 == 2  # locally administered, one station's
        netns.ip("link", "set", "tap0", "address", "00:00:00:00:00:02")
        assert other.attach().bridge_mac == mac
        assert links(netns)["br0"]["address"] == mac


def test_two_bridges_of_one_machine_have_two_addresses(netns: Namespace) -> None:
    with Vm(netns) as vm, closing(Tap.open("tap1", netns=netns.path)):
        one = vm.attach("br0")
        two = vm.network.attach("n2", "tap1", bridge="br1", netns=netns.path)
        assert one.bridge_mac != two.bridge_mac
    assert netns.interfaces() == []


def test_two_namespaces_of_one_machine_have_a_bridge_each(netns: Namespace, other_netns: Namespace) -> None:
    with Vm(netns) as vm, closing(Tap.open("tap1", netns=other_netns.path)):
        vm.attach("br0")
        vm.network.attach("n2", "tap1", bridge="br0", netns=other_netns.path)
        assert (netns.interfaces(), other_netns.interfaces()) == (["br0", "tap0"], ["br0", "tap1"])
    assert (netns.interfaces(), other_netns.interfaces()) == ([], [])


def test_tap_without_a_bridge_is_taken_up(netns: Namespace) -> None:
    with Vm(netns) as vm:
        port = vm.attach(None, mtu=4000)
        assert (port.state, port.bridge_owned, port.mtu) == ("", False, 4000)
        assert "UP" in links(netns)["tap0"]["flags"]


def test_bridge_with_a_port_of_the_operators_stays(netns: Namespace) -> None:
    with Vm(netns) as vm:
        vm.attach()
        netns.ip("tuntap", "add", "dev", "other", "mode", "tap")
        netns.ip("link", "set", "other", "master", "br0")
    assert netns.interfaces() == ["br0", "other"]


def test_bridge_whose_mark_the_operator_cleared_stays(netns: Namespace) -> None:
    with Vm(netns) as vm:
        vm.attach()
        netns.ip("link", "set", "br0", "alias", "mine now")
    assert netns.interfaces() == ["br0"]


def test_half_made_bridge_that_a_killed_helper_left_goes(netns: Namespace) -> None:
    netns.ip("link", "add", "half", "group", str(HALF_MADE), "type", "bridge")
    with Vm(netns) as vm:
        vm.attach()
        assert netns.interfaces() == ["br0", "tap0"]


# A bridge of the operator's


@pytest.mark.parametrize("stp", ["0", "1"])
def test_bridge_that_existed_is_as_it_was(netns: Namespace, stp: str, caplog: pytest.LogCaptureFixture) -> None:
    netns.ip("link", "add", "br0", "address", FOREIGN_MAC, "type", "bridge", "stp_state", stp, "forward_delay", "400")
    netns.ip("link", "set", "br0", "up", "alias", "the operator's")
    before = links(netns)
    with Vm(netns) as vm:
        port = vm.attach()
        assert not port.bridge_owned
        assert port.state in (("forwarding",) if stp == "0" else ("listening", "learning"))
        during = links(netns)
        assert during["tap0"]["master"] == "br0"
        assert during["br0"]["ifalias"] == "the operator's"
        assert during["br0"]["address"] == FOREIGN_MAC
    assert links(netns) == before
    assert ("nothing passes until it is forwarding" in caplog.text) is (stp == "1")


def bridge_with_eth0(netns: Namespace) -> str:
    """A bridge that has its address from the host's only port, up; returns that address."""
    netns.ip("link", "add", "br0", "type", "bridge")
    netns.ip("tuntap", "add", "dev", "eth0", "mode", "tap")
    netns.ip("link", "set", "eth0", "address", HIGHEST_MAC, "master", "br0")
    netns.ip("link", "set", "br0", "up")
    mac: str = links(netns)["br0"]["address"]
    return mac


def test_tap_of_ours_does_not_change_the_address_of_a_bridge_that_follows_its_ports(
    netns: Namespace, caplog: pytest.LogCaptureFixture
) -> None:
    assert bridge_with_eth0(netns) == HIGHEST_MAC
    with Vm(netns) as vm:
        assert vm.attach().bridge_mac == HIGHEST_MAC
        assert links(netns)["br0"]["address"] == HIGHEST_MAC
    assert links(netns)["br0"]["address"] == HIGHEST_MAC
    assert caplog.messages == []


def test_tap_that_existed_keeps_its_address_and_what_that_does_to_a_bridge_is_told(
    netns: Namespace, caplog: pytest.LogCaptureFixture
) -> None:
    bridge_with_eth0(netns)
    persistent(netns, "tap0", "address", FOREIGN_MAC)
    with Vm(netns) as vm:
        assert vm.attach().bridge_mac == links(netns)["tap0"]["address"] == FOREIGN_MAC
    assert caplog.messages == [
        f"netdev.n1.bridge: br0: its address went from {HIGHEST_MAC} to {FOREIGN_MAC} with the port tap0; to keep it: "
        f"ip link set br0 address {HIGHEST_MAC}"
    ]
    assert links(netns)["br0"]["address"] == HIGHEST_MAC


def test_bridge_that_is_down_stays_down_and_that_is_told(netns: Namespace, caplog: pytest.LogCaptureFixture) -> None:
    netns.ip("link", "add", "br0", "address", FOREIGN_MAC, "type", "bridge")
    with Vm(netns) as vm:
        port = vm.attach()
        assert (port.bridge_up, port.state) == (False, "disabled")
        assert "UP" not in links(netns)["br0"]["flags"]
    assert caplog.messages == ["netdev.n1.bridge: br0 is down: nothing passes until it is set up"]


def test_bridge_with_a_foreign_alias_like_a_mark_is_not_ours(netns: Namespace) -> None:
    netns.ip("link", "add", "br0", "type", "bridge")
    netns.ip("link", "set", "br0", "up", "alias", "kvmpy:web1")
    with Vm(netns) as vm:
        assert not vm.attach().bridge_owned
    assert netns.interfaces() == ["br0"]


# MTU


def test_tap_takes_the_mtu_of_its_bridge(netns: Namespace) -> None:
    netns.ip("link", "add", "br0", "mtu", "3000", "type", "bridge")
    with Vm(netns) as vm:
        assert vm.attach().mtu == 3000
        there = links(netns)
        assert (there["tap0"]["mtu"], there["br0"]["mtu"]) == (3000, 3000)


def test_tap_and_a_new_bridge_take_the_mtu_that_is_configured(netns: Namespace) -> None:
    with Vm(netns) as vm:
        assert vm.attach(mtu=9000).mtu == 9000
        there = links(netns)
        assert (there["tap0"]["mtu"], there["br0"]["mtu"]) == (9000, 9000)


def test_mtu_that_the_tap_cannot_have_leaves_nothing_behind(netns: Namespace) -> None:
    with Vm(netns) as vm:
        before = links(netns)
        with pytest.raises(HostError, match=r"^netdev\.n1\.ifname: tap0: mtu 65535: EINVAL"):
            vm.attach(mtu=65535)
        assert links(netns) == before
        assert vm.attach().mtu == 1500  # and the next request is served


def test_mtu_below_that_of_a_bridge_lowers_it_while_it_lasts_and_that_is_told(
    netns: Namespace, caplog: pytest.LogCaptureFixture
) -> None:
    bridge_with_eth0(netns)
    with Vm(netns) as vm:
        assert vm.attach(mtu=1400).mtu == 1400
        assert links(netns)["br0"]["mtu"] == 1400
        assert caplog.messages == [
            "netdev.n1.bridge: br0: its mtu went from 1500 to 1400 with the port tap0; to keep it: "
            "ip link set br0 mtu 1500"
        ]
    assert links(netns)["br0"]["mtu"] == 1500


def test_mtu_below_that_of_a_bridge_that_was_given_one_is_the_taps_alone(
    netns: Namespace, caplog: pytest.LogCaptureFixture
) -> None:
    bridge_with_eth0(netns)
    for mtu in ("1400", "1500"):  # what it has already is no setting to the kernel
        netns.ip("link", "set", "br0", "mtu", mtu)
    with Vm(netns) as vm:
        assert vm.attach(mtu=1400).mtu == 1400
        assert links(netns)["br0"]["mtu"] == 1500
    assert caplog.messages == []


# A tap that existed


def persistent(netns: Namespace, name: str, *settings: str) -> None:
    netns.ip("tuntap", "add", "dev", name, "mode", "tap", "vnet_hdr")
    netns.ip("link", "set", name, *settings)


def test_tap_that_existed_is_as_it_was(netns: Namespace) -> None:
    netns.ip("link", "add", "br9", "type", "bridge")
    persistent(netns, "tap0", "mtu", "1400", "alias", "db, of rack: 7", "master", "br9")
    before = links(netns)
    with Vm(netns) as vm:
        vm.attach()
        during = links(netns)["tap0"]
        assert (during["master"], during["mtu"], "UP" in during["flags"]) == ("br0", 1500, True)
        assert "UP" not in during["ifalias"]
    assert links(netns) == before


def test_tap_whose_alias_leaves_no_room_for_a_mark_keeps_it(netns: Namespace) -> None:
    persistent(netns, "tap0", "alias", "x" * 240)
    before = links(netns)
    with Vm(netns) as vm:
        vm.attach()
        assert links(netns)["tap0"]["ifalias"] == "x" * 240
    assert links(netns) == before


def test_what_the_operator_changed_meanwhile_is_left(netns: Namespace) -> None:
    persistent(netns, "tap0", "mtu", "1400")
    with Vm(netns) as vm:
        vm.attach()
        netns.ip("link", "add", "br9", "type", "bridge")
        netns.ip("link", "set", "tap0", "master", "br9", "mtu", "1300")
    after = links(netns)
    assert sorted(after) == ["br9", "tap0"]
    assert (after["tap0"]["master"], after["tap0"]["mtu"], "UP" in after["tap0"]["flags"]) == ("br9", 1300, False)
    assert after["tap0"].get("ifalias", "") == ""


def test_tap_whose_earlier_bridge_has_gone_is_left_without_one(netns: Namespace) -> None:
    netns.ip("link", "add", "br9", "type", "bridge")
    persistent(netns, "tap0", "master", "br9")
    with Vm(netns) as vm:
        vm.attach()
        netns.ip("link", "del", "br9")
    after = links(netns)
    assert list(after) == ["tap0"]
    assert "master" not in after["tap0"]
    assert "UP" not in after["tap0"]["flags"]


def test_port_that_is_right_already_needs_no_rights_and_is_not_touched(netns: Namespace) -> None:
    netns.ip("link", "add", "br0", "type", "bridge")
    netns.ip("link", "set", "br0", "up")
    persistent(netns, "tap0", "master", "br0", "up")
    with closing(Tap.open("tap0", netns=netns.path)):
        until(lambda: links(netns)["tap0"]["linkinfo"]["info_slave_data"]["state"] == "forwarding")
        before = links(netns)
        assert attempt(netns, *WITHOUT_RIGHTS) == "forwarding"
        assert links(netns) == before


# What cannot be

WITHOUT_RIGHTS: Final = ("setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin")


def test_without_the_right_to_it_says_what_to_do(netns: Namespace) -> None:
    with closing(Tap.open("tap0", netns=netns.path)):
        said = attempt(netns, *WITHOUT_RIGHTS)
    assert said == "netdev.n1.bridge: br0: EPERM: changing it needs CAP_NET_ADMIN; run as root"
    assert netns.interfaces() == []


def test_name_that_is_no_bridge_is_refused_and_left(netns: Namespace) -> None:
    persistent(netns, "br0", "mtu", "1400")
    before = links(netns)
    with (
        Vm(netns) as vm,
        pytest.raises(HostError, match=r"^netdev\.n1\.bridge: br0: is a tun, not a bridge; choose another name"),
    ):
        vm.attach()
    assert links(netns) == before


def test_interface_that_is_not_there_is_refused(netns: Namespace) -> None:
    with (
        closing(Network("web1")) as network,
        pytest.raises(HostError, match=r"^netdev\.n1\.ifname: tap7: there is no such interface"),
    ):
        network.attach("n1", "tap7", bridge="br0", netns=netns.path)
    assert netns.interfaces() == []


@pytest.mark.parametrize("name", ["sixteen-bytes-0x", "", "new\nline"])
def test_name_that_no_interface_has_is_refused(netns: Namespace, name: str) -> None:
    with Vm(netns) as vm, pytest.raises(HostError, match=r"^netdev\.n1\.bridge: .*: cannot be an interface's name"):
        vm.attach(name)
    assert netns.interfaces() == []


@pytest.mark.parametrize("path", ["/proc/self/status", "/run/netns/there-is-none"])
def test_namespace_that_is_none_is_refused(path: str) -> None:
    with closing(Network("web1")) as network, pytest.raises(HostError, match=rf"^netdev\.n1\.netns: .*{path}"):
        network.attach("n1", "tap0", bridge="br0", netns=path)


def test_lock_that_somebody_keeps_is_waited_for_and_then_named(netns: Namespace) -> None:
    with (
        closing(NetworkNamespace(netns.path)) as holder,
        holder.locked(),
        closing(NetworkNamespace(netns.path, lock_limit=0.05)) as other,
        pytest.raises(HostError, match=rf"locked for 0.05 s by process {os.getpid()}"),
        other.locked(),
    ):
        pytest.fail("both have the lock")


class Failing(Links):
    """Links of which one request to the kernel fails."""

    def __init__(self, namespace: NetworkNamespace, fails: int) -> None:
        super().__init__(namespace)
        self.left = fails

    def talk(self, kind: int, request: Any, flags: int = 0) -> tuple[list[bytes], bool]:
        self.left -= 1
        if self.left == 0:
            raise LinkError(errno.EIO, "as the test wants it")
        return super().talk(kind, request, flags)


def test_request_that_fails_at_any_step_leaves_everything_as_it_was(netns: Namespace) -> None:
    netns.ip("link", "add", "br9", "type", "bridge")
    persistent(netns, "tap0", "mtu", "1400", "alias", "kept", "master", "br9")
    before = links(netns)
    me = Mark("web1", os.getpid(), process_start(os.getpid()))
    with closing(Tap.open("tap0", netns=netns.path)):
        steps = 0
        attached = False
        while not attached:
            steps += 1
            namespace = NetworkNamespace(netns.path)
            ours = Changes(namespace, Failing(namespace, steps), me)
            with contextlib.suppress(HostError):
                ours.attach("tap0", "br0", 1300)
                attached = True
            assert attached or links(netns) == before, steps
            ours.close()
            assert links(netns) == before, steps
    assert steps > 10


# Ends of all kinds


def test_killed_vmm_leaves_nothing(netns: Namespace) -> None:
    with vmm(netns, "web1", "tap0") as (process, helper):
        assert netns.interfaces() == ["br0", "tap0"]
        process.kill()
        until(lambda: not running(helper))
        assert netns.interfaces() == []


def test_vmm_killed_at_any_moment_leaves_nothing(netns: Namespace) -> None:
    chance = random.Random(5)
    for _ in range(KILLS):
        command = [sys.executable, "-c", VMM, "web1", "tap0", "br0", netns.path]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            helper = int(process.stdout.readline().split()[1])
            time.sleep(chance.uniform(0, 0.3))
            process.kill()
        until(lambda helper=helper: not running(helper))  # type: ignore[misc]
        assert netns.interfaces() == []


def test_vmm_and_helper_killed_at_any_moment_leave_what_the_next_start_clears(netns: Namespace) -> None:
    persistent(netns, "tap0", "mtu", "1400", "alias", "kept")
    before = links(netns)
    chance = random.Random(7)
    for _ in range(KILLS):
        command = [sys.executable, "-c", VMM, "web1", "tap0", "br0", netns.path]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            helper = int(process.stdout.readline().split()[1])
            time.sleep(chance.uniform(0, 0.3))
            os.kill(helper, signal.SIGKILL)
            process.kill()
        with Vm(netns, ifname="tap1") as vm:
            vm.attach("br1")
        assert links(netns) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_to_the_vmms_group_or_to_the_helper_does_not_end_it(netns: Namespace, number: signal.Signals) -> None:
    with Vm(netns) as vm:
        vm.network.start()
        os.kill(vm.network.pid, number)
        assert os.getsid(vm.network.pid) == os.getpgid(vm.network.pid) == vm.network.pid != os.getsid(0)
        assert vm.attach().state == "forwarding"
    assert netns.interfaces() == []


def test_helper_that_was_killed_is_told_of_and_its_leftovers_go_at_the_next_start(netns: Namespace) -> None:
    with Vm(netns) as vm:
        vm.attach()
        os.kill(vm.network.pid, signal.SIGKILL)
        with pytest.raises(HostError, match=r"^netdev\.n1\.bridge: the network helper, process \d+, failed: .*code -9"):
            vm.attach("br1")
        assert vm.attach("br1").state == "forwarding"  # by another helper
        vm.network.close()
        assert netns.interfaces() == ["br0", "tap0"]  # the mark is that of a machine that runs


def test_helper_that_was_killed_is_told_of_at_the_end(netns: Namespace, caplog: pytest.LogCaptureFixture) -> None:
    with Vm(netns) as vm:
        vm.attach()
        os.kill(vm.network.pid, signal.SIGKILL)
        vm.network.close()
        assert caplog.text.endswith("code -9; may be left as they are: br0, tap0\n")
        assert netns.interfaces() == ["br0", "tap0"]


def test_end_of_which_there_is_nothing_to_tell_is_silent(netns: Namespace, caplog: pytest.LogCaptureFixture) -> None:
    with Vm(netns) as vm:
        vm.attach()
    assert caplog.messages == []


def test_next_start_clears_what_the_machine_left(netns: Namespace) -> None:
    leftover(netns, "web1")
    assert netns.interfaces() == ["br0"]
    with Vm(netns) as vm:
        vm.attach("br1")
        assert netns.interfaces() == ["br1", "tap0"]


def test_next_start_leaves_what_others_left(netns: Namespace) -> None:
    leftover(netns, "web2")
    before = links(netns)
    with Vm(netns) as vm:
        vm.attach("br1")
        assert links(netns)["br0"] == before["br0"]
    assert links(netns) == before


def test_leftover_bridge_that_is_joined_goes_with_who_joined(netns: Namespace) -> None:
    leftover(netns, "web2")
    with Vm(netns) as vm:
        assert vm.attach("br0").bridge_owned
    assert netns.interfaces() == []


def test_next_start_puts_back_a_tap_that_existed(netns: Namespace) -> None:
    netns.ip("link", "add", "br9", "type", "bridge")
    persistent(netns, "tap0", "mtu", "1400", "alias", "kept", "master", "br9")
    before = links(netns)
    leftover(netns, "web1")
    assert links(netns)["tap0"]["master"] == "br0"
    with Vm(netns, ifname="tap1") as vm:
        vm.attach("br1")
        during = links(netns)
        assert sorted(during) == ["br1", "br9", "tap0", "tap1"]
        assert during["tap0"] == before["tap0"]


def test_restart_before_the_killed_vmms_helper_has_cleared_up_keeps_its_tap(netns: Namespace) -> None:
    persistent(netns, "tap0", "mtu", "1400")
    before = links(netns)
    with vmm(netns, "web1", "tap0") as (process, helper):
        os.kill(helper, signal.SIGSTOP)
        process.kill()
        process.wait()
        with Vm(netns) as vm:
            vm.attach()
            during = links(netns)
            os.kill(helper, signal.SIGCONT)
            until(lambda: not running(helper))
            assert links(netns) == during
    assert links(netns) == before


# Machines that share a bridge


def test_last_machine_out_removes_the_bridge_whoever_made_it(netns: Namespace) -> None:
    with vmm(netns, "web1", "tap0") as (first, helper), Vm(netns, "web2", "tap1") as second:
        assert second.attach().bridge_owned
        assert "kvmpy:web1:" in links(netns)["br0"]["ifalias"]
        assert first.stdin is not None
        first.stdin.close()
        until(lambda: not running(helper))
        there = links(netns)
        assert sorted(there) == ["br0", "tap1"]
        assert Mark.parse(there["br0"]["ifalias"]) == Mark("web2", os.getpid(), process_start(os.getpid()))
    assert netns.interfaces() == []


def test_living_machines_bridge_is_left_even_where_it_has_no_port_now(netns: Namespace) -> None:
    with vmm(netns, "web1", "tap0"):
        with Vm(netns, "web2", "tap1") as other:
            other.attach()
            netns.ip("link", "set", "tap0", "nomaster")
        assert netns.interfaces() == ["br0", "tap0"]


def test_machines_that_come_and_go_at_once_always_find_their_bridge(netns: Namespace) -> None:
    failures: list[BaseException] = []

    def make(name: str) -> Vm:
        # Another thread's helper, forked and about to execute, may hold our last tap for a moment.
        deadline = time.monotonic() + BOUND
        while True:
            try:
                return Vm(netns, name, f"tap-{name}")
            except HostError as e:
                if "another program is using it" not in str(e) or time.monotonic() > deadline:
                    raise

    def live(name: str) -> None:
        try:
            for _ in range(max(2, CYCLES // 4)):
                with make(name) as vm:
                    assert vm.attach().state == "forwarding"
                    assert links(netns)[vm.ifname]["master"] == "br0"
        except BaseException as e:  # noqa: BLE001  it is shown by the test
            failures.append(e)

    threads = [threading.Thread(target=live, args=(f"web{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert netns.interfaces() == []


def test_many_cycles_leave_no_interface_descriptor_process_or_lock(netns: Namespace) -> None:
    before = os.listdir("/proc/self/fd"), threading.active_count()
    for _ in range(CYCLES):
        with Vm(netns) as vm:
            vm.attach()
        assert not running(vm.network.pid)
    assert netns.interfaces() == []
    assert (os.listdir("/proc/self/fd"), threading.active_count()) == before
    with closing(NetworkNamespace(netns.path, lock_limit=0)) as namespace, namespace.locked():
        pass


def test_nothing_is_imported_from_the_helpers_start_to_its_end(netns: Namespace) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, netns.path], capture_output=True, text=True, check=True, timeout=BOUND
    )
    assert done.stdout == "[] False\n"
