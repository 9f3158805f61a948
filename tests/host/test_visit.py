"""Work inside another network namespace: what is opened there stays there, and this process stays here."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from kvmpy.errors import HostError
from kvmpy.host.visit import inside
from tests.host.conftest import Namespace


def own() -> str:
    return os.readlink("/proc/thread-self/ns/net")


def test_call_runs_in_the_namespace_and_its_caller_stays(netns: Namespace) -> None:
    before = own()
    there = inside(netns.path, own)
    assert there == os.readlink(netns.path)
    assert own() == before != there


def test_no_thread_stays_behind(netns: Namespace) -> None:
    before = threading.active_count()
    inside(netns.path, own)
    assert threading.active_count() == before


def test_socket_opened_inside_sees_the_interfaces_there(netns: Namespace) -> None:
    netns.ip("tuntap", "add", "dev", "only-there", "mode", "tap")
    assert "only-there" in netns.interfaces()
    assert "only-there" not in [name for _, name in socket.if_nameindex()]


def test_none_is_where_we_are() -> None:
    assert inside(None, own) == own()


def test_what_the_call_raises_is_raised(netns: Namespace) -> None:
    with pytest.raises(ZeroDivisionError):
        inside(netns.path, lambda: 1 // 0)


def test_missing_namespace_is_named_with_what_makes_one() -> None:
    with pytest.raises(HostError, match=r"^network namespace /run/netns/kvmpy-none: ENOENT: .*ip netns add"):
        inside("kvmpy-none", own)


def test_file_that_is_no_namespace_is_refused() -> None:
    with pytest.raises(HostError, match=r"^network namespace /dev/null: EINVAL: is no network namespace$"):
        inside("/dev/null", own)


def test_namespace_of_another_kind_is_refused() -> None:
    with pytest.raises(HostError, match=r"EINVAL"):
        inside("/proc/self/ns/mnt", own)
