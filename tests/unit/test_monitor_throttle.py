"""Events that a guest can cause at will reach a client at most once a second for each device, and the last always."""

from __future__ import annotations

from typing import Any

from kvmpy.monitor.throttle import Throttle
from tests.fakes.host import Clock


class Bench:
    def __init__(self) -> None:
        self.clock = Clock(0.0)
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.throttle = Throttle(self.clock.timer, lambda name, data, at_ns: self.sent.append((name, data)))

    def broken(self, device: str, reason: int) -> None:
        self.throttle.take("DEVICE_BROKEN", {"device": device, "reason": reason}, 0)

    def reasons(self, device: str) -> list[int]:
        return [data["reason"] for _, data in self.sent if data["device"] == device]


def test_the_first_goes_out_at_once_and_the_last_of_a_second_when_it_is_over() -> None:
    b = Bench()
    for number in range(100):
        b.broken("net1", number)
    assert b.reasons("net1") == [0]
    b.clock.pass_(1.5)
    assert b.reasons("net1") == [0, 99]
    b.broken("net1", 100)
    b.clock.pass_(1.0)
    assert b.reasons("net1") == [0, 99, 100]


def test_one_alone_is_not_repeated_and_the_next_is_not_late() -> None:
    b = Bench()
    b.broken("net1", 1)
    b.clock.pass_(5.0)
    b.broken("net1", 2)
    assert b.reasons("net1") == [1, 2]


def test_devices_do_not_hold_each_other_back() -> None:
    b = Bench()
    b.broken("net1", 1)
    b.broken("vd0", 1)
    assert [data["device"] for _, data in b.sent] == ["net1", "vd0"]


def test_a_guest_that_turns_its_primary_on_and_off_again_and_again_is_heard_once_a_second() -> None:
    b = Bench()
    for number in range(100):
        b.throttle.take("FAILOVER_PATH_CHANGED", {"device-id": "net1", "path": "primary"}, 0)
        b.throttle.take("FAILOVER_PRIMARY_RECEIVES", {"device-id": "hostdev0", "rx-gap-ms": number}, 0)
    assert [name for name, _ in b.sent] == ["FAILOVER_PATH_CHANGED", "FAILOVER_PRIMARY_RECEIVES"]
    b.clock.pass_(1.5)
    assert b.sent[-1] == ("FAILOVER_PRIMARY_RECEIVES", {"device-id": "hostdev0", "rx-gap-ms": 99})


def test_what_a_guest_cannot_repeat_without_us_is_never_held_back() -> None:
    b = Bench()
    for _ in range(3):
        b.throttle.take("RESET", {"guest": True, "reason": "guest-reset"}, 0)
    assert len(b.sent) == 3


def test_a_primary_that_comes_and_goes_again_and_again_is_heard_of_once_a_second() -> None:
    b = Bench()
    for _ in range(100):
        b.throttle.take("FAILOVER_PRIMARY_PLUGGED", {"device-id": "hostdev0"}, 0)
        b.throttle.take("FAILOVER_PRIMARY_RELEASED", {"device-id": "hostdev0"}, 0)
    assert [name for name, _ in b.sent] == ["FAILOVER_PRIMARY_PLUGGED", "FAILOVER_PRIMARY_RELEASED"]
    b.clock.pass_(1.5)
    assert [name for name, _ in b.sent][2:] == ["FAILOVER_PRIMARY_PLUGGED", "FAILOVER_PRIMARY_RELEASED"]
