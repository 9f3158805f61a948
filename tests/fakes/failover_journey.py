"""A guest with failover pairs goes from one machine to another, asked by QMP on either side; hosts and NICs are fakes.

journey = FailoverJourney(directory, stack, monkeypatch)
source = journey.begin()
source.ack()
there = journey.wait_at()
source.ask("migrate", uri=there.uri)
source.until(Status.WAIT_UNPLUG)
source.guests[0].serve()  # it lets its primary go
source.wait(Status.COMPLETED)
there.ready()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final

import pytest

from kvmpy.devices.virtio.device import VirtioDevice
from kvmpy.errors import CommandError
from kvmpy.migration.messages import Kind
from kvmpy.migration.status import Status
from kvmpy.monitor.server import MonitorServer
from tests.counts import count
from tests.fakes.failover_host import ADDRESSES, FailoverHost, NicGuest
from tests.fakes.journey import Journey, Stop
from tests.fakes.loop import poll
from tests.fakes.middle import Harm, Middle
from tests.fakes.monitor import Client
from tests.fakes.virtio_rig import Guest

RINGS: Final = 0xE0_0000
"""Where the standbys' drivers would have them: above what the guest counts in."""


def standby(n: int = 0, *, failover: bool = True) -> str:
    """The tables of one, with its port."""
    return f"""\
[[root_port]]
id = "root{2 * n}"
[[netdev]]
type = "tap"
id = "hostnet{n}"
ifname = "tap-m{n}"
vhost = false
[[device]]
driver = "virtio-net-pci"
id = "standby{n}"
netdev = "hostnet{n}"
mac = "52:54:00:6f:55:c{n}"
bus = "root{2 * n}"
failover = {str(failover).lower()}
"""


def primary(n: int = 0) -> str:
    """The same of a primary."""
    return f"""\
[[root_port]]
id = "root{2 * n + 1}"
power_controller = false
[[device]]
driver = "vfio-pci"
id = "primary{n}"
host = "{ADDRESSES[n]}"
bus = "root{2 * n + 1}"
failover_pair_id = "standby{n}"
"""


class Place:
    """One machine on a host of its own, its monitor, and its guest's side of the ports that are for primaries."""

    def __init__(self, stop: Stop, host: FailoverHost, socket: str, stack: ExitStack) -> None:
        self.stop, self.host = stop, host
        self.machine, self.migrations, self.uri = stop.machine, stop.migrations, stop.uri
        self._monitor = MonitorServer(self.machine, socket, self.migrations)
        self._client = Client(socket)
        stack.callback(self.close)
        self.guests: list[NicGuest] = []

    def close(self) -> None:
        """End it, and its host. Twice is allowed."""
        self._client.close()
        self._monitor.close()
        self.host.let_go()
        self.machine.close()
        self.host.close()

    # The guest

    def boot(self) -> None:
        """A kernel has come up as far as binding pciehp; or it has come here, and goes on."""
        ports = [port for port in self.machine.board.ports if int(port[-1]) % 2]
        self.guests = [NicGuest.of(self.machine, port) for port in ports]
        for guest in self.guests:
            guest.bind()

    def ack(self, n: int = 0, *, takes: Callable[[int], int] = lambda offered: offered) -> None:
        """The standby's driver comes, and ``takes`` its features."""
        device: VirtioDevice[Any] = self.machine.board.by_id[f"standby{n}"]  # type: ignore[assignment]
        transport = device.transport
        guest = Guest(device, self.machine.board.memory, gpa=RINGS, room=64, size=8)
        device.transport = transport
        guest.start(takes(device.features), enable=set(), go=False)

    def ready(self, n: int = 0) -> None:
        """The guest does what it is asked for, until it uses the primary of a pair."""
        poll(lambda: self._uses(n))

    def _uses(self, n: int) -> bool:
        self.guests[n].serve()
        return bool(self.pair(n)["state"] == "plugged")

    def begins(self, n: int = 0) -> None:
        """The guest hears that it is asked, and begins to let the primary go."""
        poll(self.guests[n].answer)

    # The monitor

    def ask(self, command: str, **arguments: Any) -> Any:
        """What it returns. Raises CommandError."""
        answer = self._client.ask({"execute": command, "arguments": arguments})
        while "event" in answer:
            answer = self._client.receive()
        if "error" in answer:
            raise CommandError(answer["error"]["desc"])
        return answer["return"]

    @property
    def status(self) -> str:
        """query-migrate's."""
        return str(self.ask("query-migrate").get("status"))

    def stays(self, status: str) -> None:
        """That is what query-migrate says, however often it is asked."""
        for _ in range(count(30, 5000)):
            assert (now := self.status) == status, f"{now}: {self.stop.error}"

    def pair(self, n: int = 0) -> dict[str, Any]:
        """query-failover's answer for it."""
        self._let_posted_be_done()  # a client's question may come before what the guest did a moment ago
        return next(pair for pair in self.ask("query-failover") if pair["standby-id"] == f"standby{n}")

    def visible(self) -> set[str]:
        """query-pci's devices behind root ports."""
        (bus,) = self.ask("query-pci")
        behind = [each for port in bus["devices"] for each in port.get("pci_bridge", {}).get("devices", ())]
        return {device["qdev_id"] for device in behind}

    # Events, all there were

    def told(self, *events: str) -> list[tuple[str, str]]:
        """Event and device, or status, of these ``events``; of all, if none is named."""
        self._let_posted_be_done()
        return [(name, _subject(data)) for name, data in tuple(self.stop.events) if not events or name in events]

    def _let_posted_be_done(self) -> None:
        with suppress(CommandError):  # it is closed, and does no more
            self.machine.in_control(lambda: None)

    def statuses(self) -> list[str]:
        """All that there were."""
        return [status for _, status in self.told("MIGRATION")]

    def until(self, wanted: Status | str) -> None:
        """A status of its migration, or an event."""
        word = wanted.value if isinstance(wanted, Status) else wanted
        poll(lambda: any(word in (name, subject) for name, subject in self.told()))

    def wait(self, status: Status) -> None:
        """For its migration to end so."""
        self.stop.wait(status)


class FailoverJourney:
    """``devices`` are the tables that all of its machines have."""

    def __init__(
        self, directory: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch, devices: str = standby() + primary()
    ) -> None:
        self._directory, self._stack, self._monkeypatch = directory, stack, monkeypatch
        self._journey = Journey(directory, stack, extra=devices)
        self.places: list[Place] = []

    def begin(self, *, ack: bool = True, **parameters: Any) -> Place:
        """A machine whose guest has booted, and uses its primaries if it knows of pairs, ``ack``."""
        place = self._at(self._journey.begin, parameters)
        place.boot()
        for n in range(len(place.guests) if ack else 0):
            place.ack(n)
            place.ready(n)
        return place

    def wait_at(self, *, devices: str | None = None, lacking: bool = False, **parameters: Any) -> Place:
        """A machine that waits for one that comes, at a ``uri`` or a place of its own; with other ``devices``, or on a
        host that cannot give it its primaries.
        """
        if devices is not None:
            self._journey.extra = devices
        return self._at(self._journey.wait_at, parameters, lacking=lacking)

    def middle(
        self,
        there: Place,
        hooks: Mapping[Kind, Callable[[], object]],
        *,
        cuts: Kind | None = None,
        version: int | None = None,
    ) -> str:
        """The URI of somebody between here and ``there``, who calls ``hooks`` at messages of their kind, ``cuts`` the
        connection at the first of that kind, and lets neither side speak a newer ``version``.
        """
        here = self._journey.socket("middle")
        middle = Middle(here, there.uri.removeprefix("unix:"), cuts, Harm.CUT, hooks=hooks, version=version)
        self._stack.callback(middle.close)
        return f"unix:{here}"

    @property
    def nowhere(self) -> Path:
        """A socket that is not there."""
        return self._directory / "nowhere.sock"

    def check(self) -> None:
        """The guest has run in one place at a time, and has missed nothing."""
        self._journey.check()

    def _at(self, make: Callable[..., Stop], parameters: dict[str, Any], *, lacking: bool = False) -> Place:
        name = f"host{len(self.places)}"
        host = FailoverHost(self._directory / name, self._monkeypatch, lacking=lacking)
        place = Place(make(**parameters), host, self._journey.socket(f"{name}.qmp"), self._stack)
        self.places.append(place)
        return place


def _subject(data: dict[str, Any]) -> str:
    keys = ("status", "device-id", "device", "path")
    return next((str(data[key]) for key in keys if key in data), "")
