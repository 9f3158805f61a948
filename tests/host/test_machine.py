"""Whole machines with every kind of device: what they take of the host they give back, however they end."""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from kvmpy.config.schema import Config, load
from kvmpy.errors import ConfigError, HostError
from kvmpy.kvm.system import System
from kvmpy.machine.machine import Machine
from kvmpy.machine.runstate import Outcome
from tests.conftest import skip_or_fail
from tests.counts import count
from tests.fakes.pvh_kernel import POWER_OFF, SMALL_MACHINE, SPIN, pvh_kernel
from tests.host.conftest import Namespace
from tests.kvm.test_imports import COMMANDS, PROGRAM

ENDS: Final = 60.0

MACHINE: Final = (
    SMALL_MACHINE
    + """\
[[root_port]]
id = "root1"
[[netdev]]
id = "hostnet1"
type = "tap"
ifname = "tap-m"
bridge = "br-m"
queues = 2
netns = "{netns}"
[[drive]]
id = "disk0"
path = "disk.raw"
format = "raw"
cache = "writeback"
[[device]]
driver = "virtio-net-pci"
id = "net1"
netdev = "hostnet1"
bus = "root1"
host_mtu = 1400
[[device]]
driver = "virtio-blk-pci"
id = "vd0"
drive = "disk0"
num-queues = 2
[[device]]
driver = "virtio-rng-pci"
id = "rng0"
[[device]]
driver = "virtio-serial-pci"
id = "con0"
chardev = "pty"
"""
)

MakeConfig = Callable[..., Config]


@pytest.fixture(autouse=True)
def kvm() -> None:
    try:
        System().close()
    except HostError as e:
        skip_or_fail("kvm", str(e))


@pytest.fixture
def here(netns: Namespace, tmp_path: Path) -> Path:
    """A directory with m.toml, its kernel and its disk."""
    (tmp_path / "m.toml").write_text(MACHINE.format(netns=netns.path))
    (tmp_path / "kernel").write_bytes(pvh_kernel(POWER_OFF))
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    return tmp_path


@pytest.fixture
def make_config(here: Path) -> MakeConfig:
    """``make_config("key=value", code=...)``"""

    def make(*overrides: str, code: bytes = POWER_OFF) -> Config:
        (here / "kernel").write_bytes(pvh_kernel(code))
        return load(here / "m.toml", overrides)

    return make


def run_to_end(config: Config) -> None:
    with Machine(config) as machine:
        machine.start()
        assert machine.wait(ENDS) is Outcome.POWER_OFF


def footprint() -> tuple[list[str], list[str]]:
    """What this process has open, and its threads."""
    gc.collect()
    open_now = [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]
    return (
        sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in open_now),
        sorted(thread.name for thread in threading.enumerate()),
    )


def is_locked(path: Path) -> bool:
    with path.open("r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def test_starting_and_stopping_leaves_nothing_behind(make_config: MakeConfig, netns: Namespace, here: Path) -> None:
    config = make_config()
    run_to_end(config)
    before = footprint()
    for _ in range(count(6, soak=128)):
        run_to_end(config)
    assert footprint() == before
    assert netns.interfaces() == []
    assert not is_locked(here / "disk.raw")


def test_a_machine_is_on_its_bridge_and_has_its_disk_while_it_runs(
    make_config: MakeConfig, netns: Namespace, here: Path
) -> None:
    with Machine(make_config(code=SPIN)) as machine:
        machine.start()
        assert netns.interfaces() == ["br-m", "tap-m"]
        assert " mtu 1400 " in netns.ip("link", "show", "master", "br-m")
        assert is_locked(here / "disk.raw")
        with pytest.raises(HostError, match=r"m\.toml:19: drive\.disk0\.path: .*/disk\.raw: locked by "):
            Machine(make_config("netdev=[]", "device=[{driver='virtio-blk-pci',id='v',drive='disk0'}]", code=SPIN))


@pytest.fixture
def victims(here: Path, netns: Namespace) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts `kvmpy run` on a guest that spins; what is left at the end is ended."""
    environment = {**os.environ, "KVMPY_RUNTIME_DIR": str(here / "run"), "PYTHONPATH": str(Path(__file__).parents[2])}
    started: list[subprocess.Popen[bytes]] = []
    (here / "kernel").write_bytes(pvh_kernel(b"\x66\xba\xf8\x03\xb0\x4b\xee" + SPIN))  # out 0x3f8, 'K'

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "kvmpy", "run", str(here / "m.toml"), "--set", "console.serial=stdio"]
        pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
        started.append(subprocess.Popen(command, stdin=nothing, stdout=pipe, stderr=pipe, env=environment))
        assert started[-1].stdout
        if started[-1].stdout.read(1) != b"K":
            pytest.fail(started[-1].communicate()[1].decode())
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_a_killed_machine_starts_again_and_then_leaves_nothing(
    victims: Callable[[], subprocess.Popen[bytes]], netns: Namespace, here: Path
) -> None:
    for _ in range(count(2, soak=20)):
        victim = victims()
        victim.kill()
        victim.wait()  # as whoever starts it again does: until then its name is taken
    last = victims()
    assert netns.interfaces() == ["br-m", "tap-m"]
    last.send_signal(signal.SIGTERM)  # the power button, which this guest has not got
    assert last.stderr
    assert any(b"power button" in line for line in last.stderr)
    last.send_signal(signal.SIGTERM)  # and then the plug
    assert last.wait(ENDS) == 0
    assert netns.interfaces() == []
    assert not is_locked(here / "disk.raw")


def test_a_running_machine_with_devices_imports_nothing(here: Path) -> None:
    (here / "kernel").write_bytes(pvh_kernel(SPIN))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(here / "m.toml"), *COMMANDS],
        env={**os.environ, "KVMPY_RUNTIME_DIR": str(here / "run")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]", "what came in once clients could ask"


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["drive.disk0.path=absent"], "--set drive.disk0.path: {here}/absent: ENOENT: "),
        (["drive.disk0.path=odd"], "--set drive.disk0.path: {here}/odd: "),
        (["drive.disk0.path=/dev/null"], "--set drive.disk0.path: /dev/null: "),
        (["netdev.hostnet1.bridge=lo"], "--set netdev.hostnet1.bridge: lo: is a network interface of another kind"),
        (["netdev.hostnet1.ifname=lo"], "--set netdev.hostnet1.ifname: "),
        (["netdev.hostnet1.netns=absent"], "--set netdev.hostnet1.netns: "),
        (["device.con0.chardev=file:absent/x"], "--set device.con0.chardev: {here}/absent/x: ENOENT: "),
    ],
    ids=["no disk", "odd size", "no disk at all", "no bridge", "no tap", "no namespace", "no place"],
)
def test_what_the_host_cannot_do_is_said_where_it_was_asked_for_and_nothing_stays(
    make_config: MakeConfig, here: Path, netns: Namespace, overrides: list[str], problem: str
) -> None:
    (here / "odd").write_bytes(bytes(1000))
    config = make_config(*overrides)
    before = footprint()
    with pytest.raises((HostError, ConfigError)) as caught:
        Machine(config)
    assert str(caught.value).startswith(problem.format(here=here))
    assert "\n" not in str(caught.value)
    del caught
    assert footprint() == before
    assert netns.interfaces() == []
