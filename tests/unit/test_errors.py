"""What a failure says: whichever call met it, an errno that can come from anywhere comes with what to do about it."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from contextlib import closing

import pytest

from kvmpy.errors import HostError, refusal
from kvmpy.host.console import Console
from kvmpy.host.eventfd import EventFd
from kvmpy.host.image import open_image
from kvmpy.host.interface import Interface
from kvmpy.host.reactor import Reactor
from kvmpy.host.vhost import VhostWorker
from kvmpy.host.visit import inside
from kvmpy.kvm.system import System


def listen() -> None:
    with closing(Reactor("test")) as reactor:
        Console(reactor).listen("/nowhere/socket")


def make_pty() -> None:
    with closing(Reactor("test")) as reactor:
        Console(reactor).open_pty()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (System, "/dev/kvm: EMFILE: KVM cannot be opened"),
        (listen, "/nowhere/socket: EMFILE: cannot listen there"),
        (EventFd, "eventfd: EMFILE: none can be made"),
        (make_pty, "pty: EMFILE: none can be made"),
        (lambda: Interface("tap0"), "socket: EMFILE: none can be made"),
        (lambda: VhostWorker("/dev/null"), "/dev/null: EMFILE: cannot be opened"),
        (lambda: open_image("/dev/null", readonly=True, direct=False), "/dev/null: EMFILE: cannot be opened"),
        (lambda: inside("/dev/null", lambda: None), "network namespace /dev/null: EMFILE: cannot enter it"),
    ],
)
def test_want_of_descriptors_is_told_with_how_to_have_more(
    call: Callable[[], object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    for module, name in ((os, "open"), (os, "eventfd"), (os, "openpty"), (socket, "socket")):
        if (
            call not in (listen, make_pty) or module is socket or name == "openpty"
        ):  # the reactor behind it is none of this
            monkeypatch.setattr(module, name, refused)
    with pytest.raises(HostError) as caught:
        call()
    assert str(caught.value) == f"{said}; raise the limit of open files (ulimit -n)"


def test_callers_advice_is_for_what_it_knows_more_of() -> None:
    assert refusal(errno.ENOENT, "cannot be opened", "make it") == "ENOENT: cannot be opened; make it"
    assert refusal(errno.ENOSPC, "cannot be written", "run as root") == (
        "ENOSPC: cannot be written; make room on that file system"
    )
    assert refusal(None, "failed") == "0: failed"
