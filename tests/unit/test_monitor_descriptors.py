"""Descriptors that come along with commands: kept by name or in sets, bounded, and closed when nobody has a use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from kvmpy.host.descriptors import Allowance, Descriptors, DescriptorSets
from kvmpy.monitor.server import MonitorServer
from tests.fakes.loop import open_descriptors, settle
from tests.fakes.monitor import Client, Connect, FakeMachine

NOT_SUPPLIED = {"error": {"class": "GenericError", "desc": "No file descriptor supplied via SCM_RIGHTS"}}


def getfd(name: str) -> dict[str, Any]:
    return {"execute": "getfd", "arguments": {"fdname": name}}


def add_fd(**arguments: Any) -> dict[str, Any]:
    return {"execute": "add-fd", "arguments": {key.replace("_", "-"): value for key, value in arguments.items()}}


def desc(answer: Any) -> str:
    return str(answer["error"]["desc"])


class Sender:
    """A pipe whose writing end is sent: once every copy is closed, ``is_closed``."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)

    def give(self, client: Client, message: Any, copies: int = 1) -> Any:
        client.send_with(message, *[self.writer] * copies)
        return client.receive()

    def is_closed(self) -> bool:
        """Whether our copy was the last. It is closed for the question, so it is asked once."""
        os.close(self.writer)
        self.writer = -1
        try:
            return os.read(self.reader, 1) == b""
        except BlockingIOError:
            return False

    def close(self) -> None:
        for fd in {self.reader, self.writer} - {-1}:
            os.close(fd)


@pytest.fixture
def sender() -> Iterator[Sender]:
    sender = Sender()
    yield sender
    sender.close()


def test_a_named_descriptor_is_kept_until_it_is_closed_by_name(
    connect: Connect, server: MonitorServer, machine: FakeMachine, sender: Sender
) -> None:
    client = connect()
    assert sender.give(client, getfd("migration")) == {"return": {}}
    (session,) = server._sessions
    assert os.fstat(session.descriptors._named["migration"]).st_ino == os.fstat(sender.writer).st_ino
    closefd = {"execute": "closefd", "arguments": {"fdname": "migration"}}
    assert client.ask(closefd) == {"return": {}}
    assert desc(client.ask(closefd)) == "File descriptor named 'migration' not found"
    assert sender.is_closed()


def test_a_descriptor_is_not_inherited_by_programs(connect: Connect, server: MonitorServer, sender: Sender) -> None:
    sender.give(connect(), getfd("a"))
    assert not os.get_inheritable(server._sessions[0].descriptors._named["a"])


@pytest.mark.parametrize("message", [getfd("a"), add_fd(), add_fd(fdset_id=-1)])
def test_a_command_without_its_descriptor_says_so(connect: Connect, message: dict[str, Any]) -> None:
    assert connect().ask(message) == NOT_SUPPLIED


def test_a_name_that_is_given_again_closes_the_one_before(connect: Connect, sender: Sender) -> None:
    client, other = connect(), Sender()
    sender.give(client, getfd("a"))
    assert other.give(client, getfd("a")) == {"return": {}}
    assert sender.is_closed()
    assert not other.is_closed()
    other.close()


def test_names_belong_to_their_session_and_end_with_it(connect: Connect, machine: FakeMachine, sender: Sender) -> None:
    client, other = connect(), connect()
    sender.give(client, getfd("a"))
    assert desc(other.ask({"execute": "closefd", "arguments": {"fdname": "a"}})).endswith("'a' not found")
    client.close()
    settle(machine.control)
    assert sender.is_closed()


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (getfd("1a"), "Parameter 'fdname' expects a name not starting with a digit"),
        (add_fd(fdset_id=-1), "Parameter 'fdset-id' expects a non-negative value"),
    ],
)
def test_a_refused_descriptor_is_closed(connect: Connect, sender: Sender, message: dict[str, Any], text: str) -> None:
    client = connect()
    assert desc(sender.give(client, message)) == text
    assert client.ask(message) == NOT_SUPPLIED
    assert sender.is_closed()


def test_of_several_descriptors_the_first_counts_and_the_others_are_dropped(
    connect: Connect, server: MonitorServer, machine: FakeMachine, sender: Sender
) -> None:
    client = connect()
    before = len(open_descriptors())
    client.send_with(getfd("a"), sender.writer, *[sender.reader] * 60)
    assert client.receive() == {"return": {}}
    assert len(open_descriptors()) == before + 1
    assert os.fstat(server._sessions[0].descriptors._named["a"]).st_ino == os.fstat(sender.writer).st_ino


def test_a_descriptor_waits_for_its_command_until_another_comes(connect: Connect, sender: Sender) -> None:
    client, other = connect(), Sender()
    sender.give(client, {"execute": "query-name"})
    other.give(client, {"execute": "query-name"})
    assert sender.is_closed()
    assert client.ask(getfd("a")) == {"return": {}}
    assert not other.is_closed()
    other.close()


def test_a_descriptor_that_nobody_takes_is_closed_when_the_client_leaves(
    connect: Connect, machine: FakeMachine, sender: Sender
) -> None:
    client = connect()
    sender.give(client, {"execute": "query-name"})
    client.close()
    settle(machine.control)
    assert sender.is_closed()


def test_a_descriptor_that_comes_with_the_bytes_that_end_a_session_is_closed(
    connect: Connect, server: MonitorServer, machine: FakeMachine, sender: Sender
) -> None:
    client = connect()
    client.send(b'{"execute":"' + b"x" * 60_000)
    client.send_with("x" * 10_000, sender.writer)
    client.rest()
    settle(machine.control)
    assert server._sessions == []
    assert sender.is_closed()


def test_sets_are_shared_by_all_sessions_and_numbered_from_0(connect: Connect, sender: Sender) -> None:
    client, other = connect(), connect()
    first = sender.give(client, add_fd(opaque="disk"))["return"]
    second = sender.give(other, add_fd(fdset_id=7))["return"]
    third = sender.give(other, add_fd())["return"]
    fourth = sender.give(client, add_fd(fdset_id=7, opaque="x"))["return"]
    assert [answer["fdset-id"] for answer in (first, second, third, fourth)] == [0, 7, 1, 7]
    assert other.ask({"execute": "query-fdsets"})["return"] == [
        {"fdset-id": 0, "fds": [{"fd": first["fd"], "opaque": "disk"}]},
        {"fdset-id": 1, "fds": [{"fd": third["fd"]}]},
        {"fdset-id": 7, "fds": [{"fd": second["fd"]}, {"fd": fourth["fd"], "opaque": "x"}]},
    ]


def test_one_or_all_of_a_set_can_be_removed(connect: Connect, sender: Sender) -> None:
    client = connect()
    one, other = (sender.give(client, add_fd(fdset_id=3))["return"]["fd"] for _ in range(2))

    def remove(**arguments: int) -> Any:
        return client.ask({"execute": "remove-fd", "arguments": {"fdset-id": 3, **arguments}})

    assert remove(fd=one) == {"return": {}}
    assert desc(remove(fd=one)) == f"File descriptor named 'fdset-id:3, fd:{one}' not found"
    assert client.ask({"execute": "query-fdsets"})["return"] == [{"fdset-id": 3, "fds": [{"fd": other}]}]
    assert remove() == {"return": {}}
    assert desc(remove()) == "File descriptor named 'fdset-id:3' not found"
    assert sender.is_closed()


def test_sets_outlive_their_session_and_go_with_the_last(
    connect: Connect, machine: FakeMachine, sender: Sender
) -> None:
    client, other = connect(), connect()
    sender.give(client, add_fd())
    client.close()
    settle(machine.control)
    assert len(other.ask({"execute": "query-fdsets"})["return"]) == 1
    other.close()
    settle(machine.control)
    assert sender.is_closed()
    assert connect().ask({"execute": "query-fdsets"}) == {"return": []}


def test_one_that_a_slow_command_takes_while_all_are_closed_is_its_own() -> None:
    class Raced(dict[str, int]):
        def __iter__(self) -> Iterator[str]:
            names = list(super().__iter__())
            taken.append(named.take("a"))
            return iter(names)

    allowance, before, taken = Allowance(3), open_descriptors(), list[int]()
    named = Descriptors(allowance)
    named._named = Raced()
    for name in ("a", "b"):
        named.add(name, os.open(os.devnull, os.O_RDONLY))
    named.close()
    os.close(taken.pop())
    assert open_descriptors() == before
    assert allowance.kept == 0


def test_more_descriptors_than_are_allowed_are_refused_and_closed() -> None:
    allowance, before = Allowance(3), open_descriptors()
    named, sets = Descriptors(allowance), DescriptorSets(allowance)
    named.add("a", os.open(os.devnull, os.O_RDONLY))
    named.add("b", os.open(os.devnull, os.O_RDONLY))
    sets.add(os.open(os.devnull, os.O_RDONLY), None, None)
    full = open_descriptors()
    with pytest.raises(ValueError, match="3 descriptors of clients are kept, and more are not"):
        named.add("c", os.open(os.devnull, os.O_RDONLY))
    with pytest.raises(ValueError, match="more are not"):
        sets.add(os.open(os.devnull, os.O_RDONLY), 0, None)
    assert open_descriptors() == full
    named.add("a", os.open(os.devnull, os.O_RDONLY))
    os.close(named.take("b"))
    sets.add(os.open(os.devnull, os.O_RDONLY), 0, None)
    named.close()
    sets.close()
    assert open_descriptors() == before
    assert allowance.kept == 0
