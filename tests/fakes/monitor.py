"""A machine for the monitor to command, without KVM, and a QMP client that sends what real ones send."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from msgspec.structs import astuple

from kvmpy.config.schema import Boot, Config
from kvmpy.config.values import Backend, HostPath, Name
from kvmpy.errors import CommandError
from kvmpy.host.reactor import Reactor
from kvmpy.machine.announce import Rounds
from kvmpy.machine.runstate import RunState
from tests.fakes.loop import BOUND, Inbox


class FakeMachine:
    """As much of a Machine as the commands touch; notes what is asked of it in ``asked``."""

    def __init__(self, control: Reactor) -> None:
        self.control = control
        self.begun: Inbox[str] = Inbox()
        self.go = threading.Event()
        self.go.set()
        self.refuses: Exception | None = None
        self.name = Name("web1")
        self.state = RunState.RUNNING
        self.listeners: list[Any] = []
        self.asked: list[str] = []
        self.pty: str | None = None
        self.threads = [
            SimpleNamespace(
                vcpu=SimpleNamespace(index=n, pio_exits=1, mmio_exits=2), native_id=100 + n, other_exits=3, faults=n
            )
            for n in range(2)
        ]
        self.board = SimpleNamespace(
            vcpus=(0, 1),
            memory=SimpleNamespace(size=512 << 20),
            acpi_pm=SimpleNamespace(power_button_enabled=True),
            inventory=SimpleNamespace(
                plugged={
                    "net1": SimpleNamespace(
                        driver="virtio-net-pci", standby=None, device=SimpleNamespace(info=lambda: {"link": "up"})
                    )
                }
            ),
            ports={},
            pci=SimpleNamespace(functions=lambda: [(1, 0, 0, SimpleNamespace(name="net1"))]),
        )
        self.handoff = SimpleNamespace(blockers=list, at_close=lambda close: None)
        self.pairs: list[Any] = []
        self.departure = None
        self.boot = SimpleNamespace(description="Linux 6.1")
        self.config = SimpleNamespace(
            console=SimpleNamespace(serial=Backend("stdio")),
            migration=SimpleNamespace(tls_creds=None),
            device=(),
            netdev=(),
            drive=(),
        )

    def current_config(self) -> Config:
        return Config(name=self.name, boot=Boot(kernel=HostPath("/boot/vmlinuz")))

    def emit(self, name: str, **data: Any) -> None:
        for listener in tuple(self.listeners):
            listener(name, data, time.time_ns())

    def pause(self) -> None:
        self.asked.append("pause")
        self.state = RunState.PAUSED
        self.emit("STOP")

    def resume(self, *, force: bool = False) -> None:
        self.asked.append("resume by force" if force else "resume")
        self.state = RunState.RUNNING
        self.emit("RESUME")

    def reset(self) -> None:
        self.asked.append("reset")

    def set_link(self, name: str, *, up: bool) -> None:
        self.asked.append(f"set_link {name} {up}")

    def device_add(self, table: dict[str, Any]) -> None:
        self._slowly(f"device_add {json.dumps(table)}")

    def device_del(self, name: str, *, force: bool = False) -> None:
        self._slowly(f"device_del {name} {force}")

    def netdev_add(self, table: dict[str, Any]) -> None:
        self._slowly(f"netdev_add {json.dumps(table)}")

    def netdev_del(self, name: str) -> None:
        self._slowly(f"netdev_del {name}")

    def _slowly(self, what: str) -> None:
        """As a host that takes until ``go`` is set; never in the control thread, which must not wait."""
        assert threading.current_thread() is not self.control.thread
        self.begun.put(what)
        assert self.go.wait(BOUND)
        self.asked.append(what)
        if self.refuses is not None:
            raise self.refuses

    def announce(self, rounds: Rounds, *, nics: Sequence[str] | None = None, id: str = "") -> None:  # noqa: A002
        self.asked.append(f"announce {astuple(rounds)} {nics} {id}")

    def powerdown(self, limit: float | None = None) -> bool:
        self.asked.append(f"powerdown {limit}")
        return True

    def stop(self) -> None:
        if self.state is RunState.SHUTDOWN:
            raise CommandError("the machine is not running: its state is shutdown")
        self.asked.append("stop")
        self.state = RunState.SHUTDOWN
        self.emit("SHUTDOWN", guest=False, reason="host-qmp-quit")


class Client:
    """A QMP session over a unix socket. It sends no newlines, as real clients do not."""

    def __init__(self, path: str, *, negotiate: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(BOUND)
        self.socket.connect(path)
        self._received = b""
        self.greeting = self.receive()
        if negotiate:
            assert self.ask({"execute": "qmp_capabilities"}) == {"return": {}}

    def send(self, *messages: Any) -> None:
        """Send raw bytes as they are, anything else as JSON."""
        self.socket.sendall(b"".join(m if isinstance(m, bytes) else json.dumps(m).encode() for m in messages))

    def send_with(self, message: Any, *fds: int) -> None:
        """Send JSON, and descriptors along with it."""
        socket.send_fds(self.socket, [json.dumps(message).encode()], fds)

    def receive(self) -> Any:
        """The next message."""
        while b"\r\n" not in self._received:
            piece = self.socket.recv(1 << 16)
            assert piece, f"hung up after {self._received!r}"
            self._received += piece
        line, _, self._received = self._received.partition(b"\r\n")
        return json.loads(line)

    def ask(self, message: Any) -> Any:
        self.send(message)
        return self.receive()

    def rest(self) -> bytes:
        """Everything until the monitor hangs up."""
        try:
            while piece := self.socket.recv(1 << 16):
                self._received += piece
        except ConnectionResetError:
            pass
        return self._received

    def close(self) -> None:
        self.socket.close()


Connect = Callable[..., Client]
