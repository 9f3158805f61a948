"""How the two sides of a migration meet: every transport, every way not to, and nobody waits for ever."""

from __future__ import annotations

import errno
import os
import resource
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from signal import SIGPIPE, SIGUSR1, SIGXFSZ

import pytest

from kvmpy.errors import MigrationCancelled, MigrationError, StreamError
from kvmpy.migration import reception
from kvmpy.migration import uri as uris
from kvmpy.migration.arrival import TOLD_MAX, Incoming
from kvmpy.migration.messages import Accept, Go, Keepalive, Ready
from kvmpy.migration.stop import Stop
from kvmpy.migration.transport import connect
from kvmpy.migration.uri import Exec, Fd, File, Tcp, Unix
from kvmpy.migration.wire import OURS, PREAMBLE_SIZE, Preamble
from tests.fakes.loop import BOUND, open_descriptors
from tests.fakes.migration import SHORT, Relay, Thread, at, connected, listening, soon

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


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_listening_without_a_host_is_listening_at_every_address(host: str, stop: Stop) -> None:
    with listening("tcp::0") as incoming:
        accepting = Thread(incoming.accept)
        with connect(f"tcp:{host}:{incoming.port}", stop=stop, insecure=True), accepting.result():
            pass


def test_unix_socket_is_private_and_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with listening(f"unix:{path}"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


def test_source_that_comes_after_a_failed_one_is_taken(uri: str, stop: Stop) -> None:
    with listening(uri) as incoming:
        for _ in range(2):
            accepting = Thread(incoming.accept)
            with connect(at(incoming), stop=stop, insecure=True) as source, accepting.result() as destination:
                source.main.send_message(Go())
                assert destination.main.receive_message(Go) == Go()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("tcp:host-b:4444", Tcp("host-b", 4444)),
        ("tcp::4444", Tcp("", 4444)),
        ("tcp:[::1]:0", Tcp("::1", 0)),
        ("tcp:[fe80::1%eth0]:65535", Tcp("fe80::1%eth0", 65535)),
        ("unix:/run/a b", Unix("/run/a b")),
        ("fd:migrate", Fd("migrate")),
        ("fd:7", Fd("7")),
        ("exec:ssh host-b 'cat > x'", Exec("ssh host-b 'cat > x'")),
        ("file:a,b", File("a,b")),
        ("file:/a,offset=0x1000", File("/a", 4096)),
        ("file:/a,offset=010", File("/a", 10)),
    ],
)
def test_uris_are_as_qemu_has_them(text: str, address: object) -> None:
    assert uris.parse(text) == address


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ": expected tcp:HOST:PORT, unix:PATH"),
        ("host-b:4444", "host-b:4444: expected tcp:HOST:PORT, unix:PATH"),
        ("rdma:host-b:4444", "rdma:host-b:4444: expected tcp:HOST:PORT, unix:PATH"),
        ("tcp:host-b", "tcp:host-b: expected tcp:HOST:PORT"),
        ("tcp:host-b:65536", "tcp:host-b:65536: expected tcp:HOST:PORT"),
        ("tcp:::1:4444", "tcp:::1:4444: expected tcp:HOST:PORT, with [ and ]"),
        ("tcp:host-b:-1", "tcp:host-b:-1: expected"),
        ("unix:", "unix:: expected unix:PATH"),
        (f"unix:/{'x' * 107}", "of at most 107 bytes"),
        ("fd:", "fd:: expected fd:NAME"),
        ("exec: ", "exec: : expected exec:COMMAND"),
        ("file:", "file:: expected file:PATH"),
        ("file:,offset=1", "file:,offset=1: expected file:PATH"),
        ("file:/a,offset=-1", "file:/a,offset=-1: expected file:PATH,offset=BYTES"),
        ("file:/a\0b", "has a zero byte"),
        ("file:/\ud800", "has characters that no path can have"),
    ],
)
def test_uri_that_is_none_is_refused_with_what_was_expected(text: str, said: str) -> None:
    with pytest.raises(MigrationError) as caught:
        uris.parse(text)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("unix:{}/none", "ENOENT: cannot connect; start the destination first"),
        ("tcp:127.0.0.1:1", "ECONNREFUSED: cannot connect; nobody listens there; start the destination first"),
        ("tcp:b\u00fccher:1", "a host's name is ASCII; write xn--... for one that is not"),
        ("fd:none", "no descriptor has that name; send it with getfd first"),
        ("fd:999999999", "EBADF: no such descriptor is open here"),
        ("fd:99999999999999999999", "EBADF: no such descriptor is open here"),
        ("file:{}/none/saved", "ENOENT: cannot be opened; see that its directory is there"),
        ("file:{}", "EISDIR: cannot be opened; it is a directory"),
    ],
)
def test_place_that_cannot_be_reached_is_told_with_what_to_do(text: str, said: str, tmp_path: Path, stop: Stop) -> None:
    before = open_descriptors()
    uri = text.format(tmp_path)
    with pytest.raises(MigrationError) as caught:
        connect(uri, stop=stop, insecure=True)
    assert str(caught.value).startswith(f"{uri}: {said}")
    assert open_descriptors() == before


@pytest.mark.parametrize("text", ["tcp:{}", "unix:{}"])
def test_place_that_is_taken_is_told_with_what_to_do(text: str, tmp_path: Path, stop: Stop) -> None:
    uri = text.format("127.0.0.1:0" if text.startswith("tcp") else f"{tmp_path}/socket")
    said = "EADDRINUSE: cannot listen there; another process listens there"
    with listening(uri) as incoming, pytest.raises(MigrationError, match=said):
        Incoming(at(incoming), stop=stop, insecure=True)


def test_address_that_is_another_hosts_is_told(stop: Stop) -> None:
    with pytest.raises(MigrationError, match="EADDRNOTAVAIL: cannot listen there; this host has no such address"):
        Incoming("tcp:192.0.2.1:0", stop=stop, insecure=True)


def test_name_server_that_does_not_answer_is_waited_for_in_time_and_cancelled_at_once(
    stop: Stop, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = threading.Event()
    real = socket.getaddrinfo

    def slow(host: bytes, port: int, **how: int) -> object:
        if how["flags"] & socket.AI_NUMERICHOST:
            return real(host, port, **how)
        assert answered.wait(BOUND)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with pytest.raises(StreamError, match=r"^tcp:host-b:1: no name server has said who that is within 0.05 seconds$"):
        connect("tcp:host-b:1", stop=stop, timeout=SHORT, insecure=True)
    waiting = Thread(lambda: connect("tcp:host-b:1", stop=stop, timeout=BOUND, insecure=True))
    stop.set("by hand")
    with pytest.raises(MigrationCancelled):
        waiting.result()
    answered.set()
    with Stop() as another, pytest.raises(MigrationError, match=r"^tcp:host-b:1: Name or service not known: write its"):
        connect("tcp:host-b:1", stop=another, timeout=BOUND, insecure=True)


@pytest.fixture
def deaf() -> Iterator[str]:
    """Where connections are not even made: the backlog is full."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(3):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        yield f"tcp:127.0.0.1:{server.getsockname()[1]}"


def test_host_that_does_not_answer_is_given_up_in_time(deaf: str, stop: Stop) -> None:
    with pytest.raises(StreamError, match=r"no connection within 0.05 seconds"):
        connect(deaf, stop=stop, timeout=SHORT, insecure=True)


def test_connecting_is_cancelled_at_once(deaf: str, stop: Stop) -> None:
    connecting = Thread(lambda: connect(deaf, stop=stop, timeout=BOUND, insecure=True))
    stop.wait_any({}, soon())
    stop.set("by hand")
    with pytest.raises(MigrationCancelled, match="by hand"):
        connecting.result()


@pytest.mark.parametrize("timeout", [None, BOUND])
def test_accepting_is_cancelled_at_once(uri: str, timeout: float | None) -> None:
    with listening(uri) as incoming:
        accepting = Thread(lambda: incoming.accept(timeout))
        incoming.shutdown("by hand")
        with pytest.raises(MigrationCancelled, match="by hand"):
            accepting.result()


def test_source_that_does_not_come_is_waited_for_in_time(uri: str) -> None:
    said = r"no source has connected within 0.05 seconds"
    with listening(uri) as incoming, pytest.raises(StreamError, match=said):
        incoming.accept(SHORT)


def test_waiting_for_page_channels_ends_in_time_and_when_it_is_cancelled(uri: str) -> None:
    before = open_descriptors()
    with connected(uri) as (source, destination):
        arriving = Thread(lambda: destination.accept_page_channels(3, TOKEN, timeout=0.2))
        opening = Thread(lambda: source.open_page_channels(2, TOKEN))
        with pytest.raises(StreamError, match=r"only [0-2] of 3 page channels have come within 0.2 seconds"):
            arriving.result()
        source.shutdown()
        opening.over()
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "a web browser's request"),
        (bytes(36), "not a kvmpy migration stream: it begins with 00 00 00 00"),
        (OURS._replace(lowest=7, highest=9).pack(), "the other side speaks versions 7 to 9 of the stream"),
        (OURS._replace(channel=1, token=TOKEN).pack(), "a page channel of a migration that is over"),
        (b"KVMPYMIG", "the other side has ended the stream after byte 8; 28 more were due"),
        (b"", "the other side has ended the stream after byte 0; 36 more were due"),
    ],
)
def test_who_is_no_source_is_turned_away_and_the_next_one_taken(
    sent: bytes, said: str, stop: Stop, caplog: pytest.LogCaptureFixture
) -> None:
    with listening("tcp:127.0.0.1:0") as incoming:
        accepting = Thread(incoming.accept)
        with socket.create_connection(("127.0.0.1", incoming.port)) as stranger:
            stranger.sendall(sent)
            stranger.shutdown(socket.SHUT_WR)
            hear_out(stranger)
        with connect(at(incoming), stop=stop, insecure=True), accepting.result():
            pass
    assert said in caplog.text
    assert "migration: turned away: tcp:127.0.0.1:0 from 127.0.0.1:" in caplog.text


def hear_out(connection: socket.socket) -> None:
    """Until the other side hangs up."""
    connection.settimeout(BOUND)
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        return


def test_strangers_in_the_way_do_not_keep_the_source_out(stop: Stop, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than are attended to at once, all silent."""
    monkeypatch.setattr(reception, "GUESTS_MAX", 5)  # as many as there really are overflow the backlog, for a second
    with listening("tcp:127.0.0.1:0", timeout=0.3) as incoming, ExitStack() as stack:
        accepting = Thread(incoming.accept)
        for _ in range(reception.GUESTS_MAX + 2):
            stack.enter_context(socket.create_connection(("127.0.0.1", incoming.port)))
        with connect(at(incoming), stop=stop, insecure=True), accepting.result():
            pass


def test_stranger_who_is_turned_away_takes_nobody_along_who_has_begun_to_say_who_he_is() -> None:
    with listening("tcp:127.0.0.1:0") as incoming:
        accepting = Thread(incoming.accept)
        with socket.create_connection(("127.0.0.1", incoming.port)) as source:
            source.sendall(OURS.pack()[:20])
            assert len(source.recv(PREAMBLE_SIZE, socket.MSG_WAITALL)) == PREAMBLE_SIZE  # it is attended to
            with socket.create_connection(("127.0.0.1", incoming.port)) as stranger:
                stranger.sendall(OURS._replace(channel=1, token=TOKEN).pack())
                hear_out(stranger)
            source.sendall(OURS.pack()[20:])
            try:
                accepting.result().close()
            finally:
                incoming.shutdown()


def test_strangers_do_not_fill_the_log(stop: Stop, caplog: pytest.LogCaptureFixture) -> None:
    with listening("tcp:127.0.0.1:0") as incoming:
        accepting = Thread(incoming.accept)
        for _ in range(TOLD_MAX + 5):
            with socket.create_connection(("127.0.0.1", incoming.port)) as stranger:
                stranger.sendall(bytes(36))
                hear_out(stranger)
        with connect(at(incoming), stop=stop, insecure=True), accepting.result():
            pass
    assert len(caplog.messages) == TOLD_MAX
    assert caplog.messages[-1].endswith("of more like this nothing is said")


@pytest.mark.parametrize(
    "stranger",
    [
        OURS._replace(channel=1, token=bytes(16)),
        OURS._replace(channel=3, token=TOKEN),
        OURS._replace(channel=1, token=TOKEN[::-1]),
        OURS,
    ],
    ids=["no token", "no such channel", "another token", "another source"],
)
def test_page_channel_of_somebody_else_is_turned_away(stranger: Preamble, caplog: pytest.LogCaptureFixture) -> None:
    with listening("tcp:127.0.0.1:0") as incoming, Stop() as stop:
        accepting = Thread(incoming.accept)
        source = connect(at(incoming), stop=stop, insecure=True)
        with source, accepting.result() as destination:
            arriving = Thread(lambda: destination.accept_page_channels(2, TOKEN))
            with socket.create_connection(("127.0.0.1", incoming.port)) as connection:
                connection.sendall(stranger.pack())
                hear_out(connection)
            source.open_page_channels(2, TOKEN)[1].send(b"x")
            assert arriving.result()[1].receive(1) == b"x"
    assert "not a page channel of this migration" in caplog.text


def test_page_channel_that_comes_twice_is_turned_away_once(caplog: pytest.LogCaptureFixture) -> None:
    with listening("tcp:127.0.0.1:0") as incoming, Stop() as stop:
        accepting = Thread(incoming.accept)
        with connect(at(incoming), stop=stop, insecure=True) as source, accepting.result() as destination:
            arriving = Thread(lambda: destination.accept_page_channels(2, TOKEN))
            first = source.open_page_channels(1, TOKEN)
            assert first
            source.open_page_channels(2, TOKEN)
            assert len(arriving.result()) == 2
    assert "not a page channel of this migration" in caplog.text


def test_other_side_that_is_a_source_too_is_refused(stop: Stop) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        connecting = Thread(lambda: connect(f"tcp:127.0.0.1:{server.getsockname()[1]}", stop=stop, insecure=True))
        peer, _ = server.accept()
        with peer:
            peer.sendall(OURS._replace(channel=2, token=TOKEN).pack())
            with pytest.raises(StreamError, match="a source answers there, not a destination"):
                connecting.result()


def test_destination_of_a_newer_kvmpy_is_refused_by_its_version(stop: Stop) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        connecting = Thread(lambda: connect(f"tcp:127.0.0.1:{server.getsockname()[1]}", stop=stop, insecure=True))
        peer, _ = server.accept()
        with peer:
            peer.sendall(Preamble(7, 9).pack())
            with pytest.raises(StreamError, match="speaks versions 7 to 9 of the stream, this one 1 to 4; that side's"):
                connecting.result()


def test_connection_cut_in_both_directions_is_found_on_both_sides(tmp_path: Path) -> None:
    with Relay(tmp_path) as relay, relay.connected(timeout=0.3) as (source, destination):
        relay.cut(forward=True, back=True)
        waiting = Thread(lambda: destination.main.receive_message(Go))
        with pytest.raises(StreamError, match=r"within 0.3 seconds"):
            source.main.receive_message(Ready)
        with pytest.raises(StreamError, match=r"within 0.3 seconds"):
            waiting.result()


def test_cut_of_what_the_source_sends_is_found_by_both(tmp_path: Path) -> None:
    with Relay(tmp_path) as relay, relay.connected(timeout=0.3) as (source, destination):
        relay.cut(forward=True, back=False)
        destination.main.send_message(Keepalive())
        waiting = Thread(lambda: destination.main.receive_message(Go))
        with pytest.raises(StreamError, match=r"takes no more bytes after byte [0-9]+: .* within 0.3 seconds"):
            source.main.channel.send(bytes(1 << 26))
        with pytest.raises(StreamError, match=r"within 0.3 seconds"):
            waiting.result()


def test_cut_of_what_the_destination_answers_is_found_by_the_source(tmp_path: Path) -> None:
    with Relay(tmp_path) as relay, relay.connected(timeout=0.3) as (source, destination):
        relay.cut(forward=False, back=True)
        source.main.send_message(Go())
        assert destination.main.receive_message(Go) == Go()
        destination.main.send_message(Ready())
        with pytest.raises(StreamError, match=r"nothing more from the other side .* within 0.3 seconds"):
            source.main.receive_message(Ready)


def test_other_side_that_dies_is_found_at_once(uri: str) -> None:
    with connected(uri) as (source, destination):
        destination.close()
        with pytest.raises(StreamError, match=r"the other side has (ended|gone)"):
            source.main.receive_message(Ready)


def test_cancelling_wakes_both_whoever_waits_and_the_other_side(uri: str) -> None:
    with connected(uri) as (source, destination):
        waiting, other = Thread(lambda: source.main.receive_message(Go)), Thread(destination.main.next_message)
        source.shutdown("by hand")
        with pytest.raises(MigrationCancelled, match="by hand"):
            waiting.result()
        with pytest.raises(StreamError):
            other.result()


# One way: exec and file.


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("head -c 50; exit 3", "; the command has failed with status 3"),
        ("kill -9 $$", "; the command was killed by SIGKILL"),
        ("exec <&-; sleep 0.01", "; the command has closed its input"),
    ],
)
def test_command_that_stops_reading_is_an_error_with_how_it_ended(command: str, said: str, stop: Stop) -> None:
    with pytest.raises(StreamError) as caught, connect(f"exec:{command}", stop=stop) as source:
        source.main.channel.send(bytes(1 << 24))
    assert "EPIPE: the other side has gone" in str(caught.value)
    assert str(caught.value).endswith(said)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("cat >/dev/null; exit 7", "has failed with status 7"),
        ("cat; kill $$", "killed by SIGTERM"),
        ("cat; kill -40 $$", "killed by signal 40"),
    ],
)
def test_command_that_fails_after_the_stream_fails_the_migration(command: str, said: str, stop: Stop) -> None:
    with connect(f"exec:{command} >/dev/null", stop=stop) as source:
        source.main.send_message(Go())
        with pytest.raises(StreamError, match=said):
            source.main.finish()


def test_command_that_cannot_be_watched_is_not_left_alone(stop: Stop, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_descriptors()

    def refuse(_: int) -> int:
        raise OSError(errno.EMFILE, "no more")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    with pytest.raises(MigrationError, match="EMFILE: its process cannot be watched; raise the limit of open files"):
        connect("exec:sleep 1000", stop=stop)
    assert open_descriptors() == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_directory_is_no_stream_that_was_saved(stop: Stop, tmp_path: Path) -> None:
    with Incoming(f"file:{tmp_path}", stop=stop) as incoming, pytest.raises(StreamError) as caught:
        incoming.accept()
    assert str(caught.value) == f"file:{tmp_path}: EISDIR: no more can be read after byte 0; it is a directory"


def test_command_that_does_not_end_is_given_up_in_time_and_killed_with_its_children(tmp_path: Path, stop: Stop) -> None:
    pids = tmp_path / "pids"
    command = f"sleep 1000 & echo $! $$ > {pids}.new; mv {pids}.new {pids}; cat >/dev/null; wait"
    with connect(f"exec:{command}", stop=stop) as source:
        while not pids.exists():
            stop.wait_any({}, soon())
        source.main.channel.timeout = 0.2
        with pytest.raises(StreamError, match=r"the command has not ended within 0.2 seconds"):
            source.main.finish()
        processes = [int(pid) for pid in pids.read_text().split()]
    assert not any(map(runs, processes))


def runs(pid: int) -> bool:
    """A process that is there, and no zombie; one just killed has a moment."""
    with Stop() as clock:
        for _ in range(500):
            try:
                if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
                    return False
            except FileNotFoundError:
                return False
            clock.wait_any({}, soon(0.01))
    return True


def test_command_killed_while_it_writes_is_the_reason_that_the_stream_ends(stop: Stop, tmp_path: Path) -> None:
    (tmp_path / "half").write_bytes(Preamble(1, 1).pack() + b"half")
    incoming = Incoming(f"exec:cat {tmp_path}/half; kill -9 $$", stop=stop)
    with incoming.accept() as arrival, pytest.raises(StreamError) as caught:
        arrival.main.receive_message(Go)
    assert str(caught.value).endswith("after byte 40; 8 more were due; the command was killed by SIGKILL")


def test_command_that_is_none_says_so(stop: Stop, capfd: pytest.CaptureFixture[str]) -> None:
    said = "36 more were due; the command has failed with status 127"
    with Incoming("exec:/no/such/command", stop=stop) as incoming, pytest.raises(StreamError, match=said):
        incoming.accept()
    assert "/no/such/command" in capfd.readouterr().err


def test_command_has_the_signals_of_every_other_program(stop: Stop, tmp_path: Path) -> None:
    with connect(
        f"exec:grep -E '^Sig(Blk|Ign)' /proc/self/status > {tmp_path}/signals; cat >/dev/null", stop=stop
    ) as s:
        s.main.finish()
    masks = [int(line.split()[1], 16) for line in (tmp_path / "signals").read_text().splitlines()]
    assert [mask & (1 << SIGPIPE - 1 | 1 << SIGXFSZ - 1 | 1 << SIGUSR1 - 1) for mask in masks] == [0, 0]


def test_waiting_for_a_command_is_cancelled_at_once_and_it_is_killed(stop: Stop, tmp_path: Path) -> None:
    before = open_descriptors()
    pid = tmp_path / "pid"
    with Incoming(f"exec:echo $$ > {pid}.new; mv {pid}.new {pid}; exec sleep 1000", stop=stop) as incoming:
        accepting = Thread(incoming.accept)
        with Stop() as clock:
            while not pid.exists():
                clock.wait_any({}, soon())
        incoming.shutdown("by hand")
        with pytest.raises(MigrationCancelled, match="by hand"):
            accepting.result()
    assert open_descriptors() == before
    assert not runs(int(pid.read_text()))


def test_what_a_command_writes_after_the_stream_is_refused(stop: Stop, tmp_path: Path) -> None:
    (tmp_path / "stream").write_bytes(Preamble(1, 1).pack() + b"more")
    for uri, said in (
        (f"exec:cat {tmp_path}/stream", "the command writes on after the end of the stream"),
        (f"file:{tmp_path}/stream", "goes on after the end of the stream, at byte 36"),
    ):
        with Incoming(uri, stop=stop).accept() as arrival, pytest.raises(StreamError, match=said):
            arrival.main.finish()


@pytest.mark.parametrize("link", [False, True], ids=["file", "link"])
def test_what_somebody_has_left_where_a_guest_is_saved_is_not_written_to(
    tmp_path: Path, stop: Stop, *, link: bool
) -> None:
    theirs, left = tmp_path / "theirs", tmp_path / f"saved.part-{os.getpid()}"
    theirs.write_bytes(b"dear")
    theirs.chmod(0o644)
    left.symlink_to(theirs) if link else left.hardlink_to(theirs)
    with connect(f"file:{tmp_path}/saved", stop=stop) as source:
        source.main.send_message(Go())
        source.main.finish()
    assert theirs.read_bytes() == b"dear"
    assert (tmp_path / "saved").stat().st_mode & 0o777 == 0o600


def test_saved_guest_is_for_its_owner_alone_and_replaces_an_older_one_only_when_it_is_whole(
    tmp_path: Path, stop: Stop
) -> None:
    path = tmp_path / "saved"
    path.write_bytes(b"older")
    (tmp_path / "link").symlink_to(path)
    with connect(f"file:{tmp_path}/link", stop=stop) as source:
        source.main.send_message(Go())
    assert path.read_bytes() == b"older"
    assert sorted(os.listdir(tmp_path)) == ["link", "saved"]
    with connect(f"file:{tmp_path}/link", stop=stop) as source:
        source.main.send_message(Go())
        source.main.finish()
    assert path.read_bytes().startswith(b"KVMPYMIG")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "saved"]


def test_disk_that_is_full_leaves_what_was_there(tmp_path: Path, stop: Stop) -> None:
    path = tmp_path / "saved"
    path.write_bytes(b"older")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with connect(f"file:{path}", stop=stop) as source:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(StreamError, match=r"saved: EFBIG: no more can be written after byte 100000; raise the"):
                source.main.channel.send(bytes(1 << 20))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"older", ["saved"])


def test_device_that_is_full_is_told(stop: Stop) -> None:
    with pytest.raises(StreamError, match=r"^file:/dev/full: ENOSPC: no more can be sent after byte 0; make room"):
        connect("file:/dev/full", stop=stop)


def test_stream_behind_an_offset_leaves_what_is_before_it(tmp_path: Path, stop: Stop) -> None:
    path = tmp_path / "saved"
    path.write_bytes(b"the header of somebody else")
    with connect(f"file:{path},offset=100", stop=stop) as source:
        source.main.send_message(Go())
        source.main.finish()
    assert path.read_bytes().startswith(b"the header of somebody else\0")
    with Incoming(f"file:{path},offset=100", stop=stop) as incoming, incoming.accept() as arrival:
        assert arrival.main.receive_message(Go) == Go()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file ends after byte 0; 36 more were due"),
        (b"KVMPYMIG", "the file ends after byte 8; 28 more were due"),
        (b"\x7fELF".ljust(100), "not a kvmpy migration stream: it begins with 7f 45 4c 46"),
        (Preamble(5, 5).pack(), "the other side speaks versions 5 to 5 of the stream, this one 1 to 4"),
    ],
)
def test_file_that_is_no_stream_is_refused(content: bytes, said: str, tmp_path: Path, stop: Stop) -> None:
    before = open_descriptors()
    (tmp_path / "saved").write_bytes(content)
    with Incoming(f"file:{tmp_path}/saved", stop=stop) as incoming, pytest.raises(StreamError) as caught:
        incoming.accept()
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"file:{tmp_path}/saved: ")
    assert open_descriptors() == before


def test_fifo_without_a_reader_is_told(tmp_path: Path, stop: Stop) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(MigrationError, match="ENXIO: cannot be opened; nobody reads from that FIFO"):
        connect(f"file:{tmp_path}/fifo", stop=stop)


# Descriptors that somebody else has opened.


def named(fds: dict[str, int]) -> Callable[[str], int]:
    return fds.pop


def test_socket_that_was_given_carries_answers_too(stop: Stop) -> None:
    before = open_descriptors()
    here, there = socket.socketpair()
    fds = {"migrate": here.detach()}
    there.set_inheritable(True)  # as one that kvmpy was started with
    with Incoming(f"fd:{there.detach()}", stop=stop) as incoming:
        accepting = Thread(incoming.accept)
        with connect("fd:migrate", stop=stop, fds=named(fds)) as source, accepting.result() as destination:
            assert source.main.can_answer
            assert (source.has_page_channels, incoming.has_page_channels) == (False, False)
            destination.main.send_message(Accept(token=TOKEN, version=1))
            assert source.open_page_channels(4, source.main.receive_message(Accept).token) == []
            assert destination.accept_page_channels(4, TOKEN) == []
            assert not os.get_inheritable(source.main.channel.fd)
    assert open_descriptors() == before
    assert fds == {}


def test_pipe_that_was_given_goes_one_way(stop: Stop) -> None:
    before = open_descriptors()
    read_fd, write_fd = os.pipe()
    with connect("fd:out", stop=stop, fds=named({"out": write_fd})) as source:
        source.main.send_message(Go())
        source.main.finish()
    with Stop() as other, Incoming("fd:in", stop=other, fds=named({"in": read_fd})).accept() as arrival:
        assert arrival.main.receive_message(Go) == Go()
        assert not arrival.main.can_answer
    assert open_descriptors() == before


def test_descriptor_that_can_carry_no_stream_is_refused_and_one_that_was_named_is_closed(stop: Stop) -> None:
    before = open_descriptors()
    listener, datagrams = socket.create_server(("127.0.0.1", 0)), socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for fd, said in (
        (os.eventfd(0), "neither a socket nor a pipe or file"),
        (os.open(os.devnull, os.O_RDWR), "neither a socket nor a pipe or file"),
        (listener.detach(), "ENOTCONN: not a connected socket"),
        (datagrams[0].detach(), "not a stream socket"),
    ):
        with pytest.raises(MigrationError, match=said):
            connect("fd:x", stop=stop, fds=named({"x": fd}))
    datagrams[1].close()
    assert open_descriptors() == before


def test_descriptor_of_our_own_that_can_carry_no_stream_stays_open(stop: Stop) -> None:
    fd = os.eventfd(0)
    os.set_inheritable(fd, True)
    with pytest.raises(MigrationError, match=f"^fd:{fd}: neither a socket nor a pipe or file"):
        connect(f"fd:{fd}", stop=stop)
    os.close(fd)


def test_descriptor_that_we_have_opened_is_no_way_to_go_by_its_number(stop: Stop, tmp_path: Path) -> None:
    """Such as a guest's disk, or what has got the number of one that was used up."""
    disk = tmp_path / "disk"
    disk.write_bytes(b"precious")
    fd = os.open(disk, os.O_RDWR)
    with pytest.raises(MigrationError, match=f"^fd:{fd}: kvmpy's own, or in use already; give one that"):
        connect(f"fd:{fd}", stop=stop)
    assert os.read(fd, 8) == b"precious"
    os.close(fd)


def test_host_without_sockets_says_what_to_do(stop: Stop, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> socket.socket:
        raise OSError(errno.EMFILE, "no more")

    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(MigrationError, match=r"^unix:/x: EMFILE: no socket can be made; raise the limit of open files"):
        connect("unix:/x", stop=stop)
