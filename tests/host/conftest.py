"""What this tier stands on: root, /dev/net/tun, and network namespaces that tests make and that vanish with them."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest

from kvmpy.host.visit import inside
from tests.conftest import skip_or_fail

T = TypeVar("T")


class Namespace:
    """A private network namespace, empty but for a loopback interface that is down."""

    def __init__(self, path: str) -> None:
        self.path = path

    def run(self, call: Callable[[], T]) -> T:
        """What ``call`` returns, called inside; a program that it starts is inside too."""
        return inside(self.path, call)

    def interfaces(self) -> list[str]:
        """The names of what is there, but for the loopback."""
        return sorted(name for _, name in self.run(socket.if_nameindex) if name != "lo")

    def ip(self, *arguments: str) -> str:
        """What `ip ...` prints, run inside."""
        command = ["ip", *arguments]
        return self.run(lambda: subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


@contextmanager
def private_namespace() -> Iterator[Namespace]:
    """A namespace that lives while a process of ours sits in it, doing nothing."""
    with subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "echo ready; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as inhabitant:
        assert inhabitant.stdin is not None
        assert inhabitant.stdout is not None
        if (said := inhabitant.stdout.readline().strip()) != "ready":
            skip_or_fail("netns", f"no network namespace can be made here: {said}")
        try:
            yield Namespace(f"/proc/{inhabitant.pid}/ns/net")
        finally:
            inhabitant.stdin.close()  # its end


@pytest.fixture
def netns() -> Iterator[Namespace]:
    """A network namespace of the test's own."""
    with private_namespace() as namespace:
        yield namespace


@pytest.fixture
def other_netns() -> Iterator[Namespace]:
    """A second one."""
    with private_namespace() as namespace:
        yield namespace


@pytest.fixture(autouse=True)
def tun() -> None:
    """The device that taps come from."""
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        skip_or_fail("netns", "needs /dev/net/tun: `modprobe tun`, and root")
