"""How the two sides of a migration meet: every transport, every way not to, and nobody waits for ever."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmpy.errors import MigrationError
from kvmpy.migration.arrival import Incoming
from kvmpy.migration.messages import Accept, Go, Ready
from kvmpy.migration.stop import Stop
from kvmpy.migration.transport import connect
from tests.fakes.loop import open_descriptors
from tests.fakes.migration import Thread, connected

TOKEN = bytes(range(16))


@pytest.fixture
def stop() -> Iterator[Stop]:
    with Stop() as stop:
        yield stop


@pytest.fixture(params=["tcp:127.0.0.1:0", "tcp:[::1]:0", "unix"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"unix:{tmp_path}/socket" if request.param == "unix" else request.param


def test_both_sides_hear_each_other_and_pages_have_channels_of_their_own(uri: str) -> None:
    before = open_descriptors()
    with connected(uri) as (source, destination):
        source.main.send_message(Ready())
        assert destination.main.receive_message(Ready) == Ready()
        destination.main.send_message(Accept(token=TOKEN, version=1))
        token = source.main.receive_message(Accept).token
        arriving = Thread(lambda: destination.accept_page_channels(3, TOKEN))
        sending = source.open_page_channels(3, token)
        for number, (sender, receiver) in enumerate(zip(sending, arriving.result(), strict=True)):
            sender.send(bytes([number]) * 100_000)
            assert receiver.receive(100_000) == bytes([number]) * 100_000
    assert open_descriptors() == before


@pytest.mark.parametrize("place", ["exec:cat > {}", "file:{}"])
def test_what_went_one_way_comes_back_the_same(place: str, tmp_path: Path, stop: Stop) -> None:
    path = tmp_path / "saved"
    with connect(place.format(path), stop=stop) as source:
        assert not source.main.can_answer
        assert source.open_page_channels(4, TOKEN) == []
        source.main.send_message(Ready())
        source.main.channel.send(b"pages" * 100_000)
        source.main.send_message(Go())
        source.main.finish()
    with Incoming(place.replace("cat >", "cat").format(path), stop=stop) as incoming, incoming.accept() as arrival:
        assert arrival.main.receive_message(Ready) == Ready()
        assert arrival.main.channel.receive(500_000) == b"pages" * 100_000
        assert arrival.main.receive_message(Go) == Go()
        arrival.main.finish()
        with pytest.raises(MigrationError, match="has been read already"):
            incoming.accept()
    assert os.listdir(tmp_path) == ["saved"]
