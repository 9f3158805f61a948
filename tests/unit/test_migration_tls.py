"""TLS between the two sides of a migration: who is not known to the other is refused, and both sides know why."""

from __future__ import annotations

import random
import re
import shutil
import socket
import ssl
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from kvmpy.errors import HostError, KvmpyError, MigrationCancelled, MigrationError, StreamError
from kvmpy.migration.arrival import Incoming
from kvmpy.migration.messages import Go, Keepalive
from kvmpy.migration.stop import Stop
from kvmpy.migration.tls import TlsCredentials
from kvmpy.migration.transport import connect
from tests.fakes.certificates import Authority
from tests.fakes.loop import BOUND, open_descriptors
from tests.fakes.migration import SHORT, Thread, at, connected, listening, soon

URI = "tcp:localhost:0"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def good(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> str:
    return authority.credentials(tmp_path_factory.mktemp("pki") / "good")


@pytest.fixture
def stop() -> Iterator[Stop]:
    with Stop() as stop:
        yield stop


def refusals(source: TlsCredentials | None, destination: TlsCredentials | None, log: pytest.LogCaptureFixture) -> str:
    """What the source says of a connection that does not come about; the destination's word is in the log."""
    with listening(URI, destination) as incoming, Stop() as stop:
        accepting = Thread(incoming.accept)
        with pytest.raises(KvmpyError) as caught:
            connect(at(incoming), source, stop=stop, timeout=BOUND, insecure=True)
        wait_for(log)
        incoming.shutdown("over")
        with pytest.raises(MigrationCancelled):
            accepting.result()
    return str(caught.value)


def wait_for(log: pytest.LogCaptureFixture) -> None:
    with Stop() as clock:
        for _ in range(1000):
            if log.messages:
                return
            clock.wait_any({}, soon(0.02))
    raise AssertionError("the destination has said nothing")


def test_all_channels_are_encrypted_and_whole(good: str) -> None:
    data = random.randbytes(3 << 20)
    token = bytes(range(16))
    before = open_descriptors()
    with connected(URI, TlsCredentials(good), TlsCredentials(good)) as (source, destination):
        source.main.send_message(Keepalive())
        source.main.send_message(Go())
        assert destination.main.receive_message(Go) == Go()
        arriving = Thread(lambda: destination.accept_page_channels(2, token))
        senders = source.open_page_channels(2, token)
        for sender, receiver in zip(senders, arriving.result(), strict=True):
            assert (sender.raw_fd, receiver.raw_fd) == (None, None)
            sending = [Thread(lambda: sender.send(data[:5], data)), Thread(lambda: receiver.send(data))]  # noqa: B023
            there, back = Thread(lambda: receiver.receive(len(data) + 5)), Thread(lambda: sender.receive(len(data)))  # noqa: B023
            assert [there.result(), back.result()] == [data[:5] + data, data]
            for thread in sending:
                thread.result()
    assert open_descriptors() == before


def test_no_byte_of_the_stream_is_on_the_wire_as_it_is(good: str) -> None:
    """Seen by a listener in the middle."""
    seen = bytearray()
    with ExitStack() as stack:
        incoming = stack.enter_context(listening(URI, TlsCredentials(good)))
        stop = stack.enter_context(Stop())
        with socket.create_server(("127.0.0.1", 0)) as middle:

            def forward() -> None:
                near, _ = middle.accept()
                with near, socket.create_connection(("127.0.0.1", incoming.port)) as far:
                    back = Thread(lambda: pump(far, near))
                    pump(near, far)
                    back.result()

            def pump(source: socket.socket, sink: socket.socket) -> None:
                while data := source.recv(1 << 16):
                    seen.extend(data)
                    sink.sendall(data)
                sink.shutdown(socket.SHUT_WR)

            forwarding, accepting = Thread(forward), Thread(incoming.accept)
            uri = f"tcp:localhost:{middle.getsockname()[1]}"
            with connect(uri, TlsCredentials(good), stop=stop) as source, accepting.result() as destination:
                source.main.channel.send(b"secret" * 1000)
                assert destination.main.channel.receive(6000) == b"secret" * 1000
            forwarding.result()
    assert b"secret" not in seen
    assert b"KVMPYMIG" not in seen
    assert len(seen) > 6000


def test_destination_of_another_authority_is_refused(
    good: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, authority: Authority
) -> None:
    stranger = Authority().credentials(tmp_path / "stranger", trusts=authority)
    said = refusals(TlsCredentials(good), TlsCredentials(stranger), caplog)
    assert "the other side's certificate is refused: unable to get local issuer certificate" in said
    assert "the other side refuses this one's certificate: another CA than its own has signed it" in caplog.text


def test_source_of_another_authority_is_refused(
    good: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, authority: Authority
) -> None:
    stranger = Authority().credentials(tmp_path / "stranger", trusts=authority)
    said = refusals(TlsCredentials(stranger), TlsCredentials(good), caplog)
    assert "the other side refuses this one's certificate: another CA than its own has signed it" in said
    assert "the other side's certificate is refused: unable to get local issuer certificate" in caplog.text


def test_destination_whose_certificate_has_expired_is_refused(
    good: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, authority: Authority
) -> None:
    expired = authority.credentials(tmp_path / "expired", expired=True)
    said = refusals(TlsCredentials(good), TlsCredentials(expired), caplog)
    assert "the other side's certificate is refused: certificate has expired" in said
    assert "the other side refuses this one's certificate: it has expired" in caplog.text


def test_source_whose_certificate_has_expired_is_refused(
    good: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, authority: Authority
) -> None:
    expired = authority.credentials(tmp_path / "expired", expired=True)
    said = refusals(TlsCredentials(expired), TlsCredentials(good), caplog)
    assert "the other side refuses this one's certificate: it has expired" in said
    assert "the other side's certificate is refused: certificate has expired" in caplog.text


def test_source_without_a_certificate_is_refused(good: str, caplog: pytest.LogCaptureFixture) -> None:
    bare = TlsCredentials(good)
    bare._contexts["client"] = ssl.create_default_context(cafile=f"{good}/ca-cert.pem")
    said = refusals(bare, TlsCredentials(good), caplog)
    assert "the other side refuses this one's certificate: there is none; put client-cert.pem and" in said
    assert "the other side has no certificate" in caplog.text


def test_destination_by_another_name_is_refused(
    good: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, authority: Authority
) -> None:
    other = authority.credentials(tmp_path / "other", "host-b")
    said = refusals(TlsCredentials(good), TlsCredentials(other), caplog)
    assert "the other side's certificate is refused: Hostname mismatch" in said
    assert "'localhost'" in said
    assert "the other side refuses this one's certificate: it does not name the host that was asked for" in caplog.text


def test_destination_by_another_name_is_taken_where_that_name_is_expected(
    good: str, tmp_path: Path, stop: Stop, authority: Authority
) -> None:
    other = authority.credentials(tmp_path / "other", "host-b")
    with listening(URI, TlsCredentials(other)) as incoming:
        accepting = Thread(incoming.accept)
        source = connect(at(incoming), TlsCredentials(good), stop=stop, tls_hostname="host-b")
        with source, accepting.result() as destination:
            source.main.send_message(Go())
            assert destination.main.receive_message(Go) == Go()


def test_a_revoked_certificate_is_refused(
    good: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, authority: Authority
) -> None:
    strict = tmp_path / "strict"
    shutil.copytree(good, strict)
    authority.revoke(strict, Path(good) / "client-cert.pem")
    said = refusals(TlsCredentials(good), TlsCredentials(str(strict)), caplog)
    assert "the other side refuses this one's certificate: it has been revoked" in said
    assert "the other side's certificate is refused: certificate revoked" in caplog.text


def test_plain_source_learns_that_tls_is_wanted(good: str, caplog: pytest.LogCaptureFixture) -> None:
    said = refusals(None, TlsCredentials(good), caplog)
    assert "it may want TLS: give this side tls-creds" in said
    assert "does not speak TLS" in caplog.text


def test_source_with_tls_learns_that_the_destination_is_plain(good: str, caplog: pytest.LogCaptureFixture) -> None:
    said = refusals(TlsCredentials(good), None, caplog)
    assert "the other side does not speak TLS; give it tls-creds" in said
    assert "it speaks TLS, and this side does not" in caplog.text


def test_older_tls_is_refused(good: str, caplog: pytest.LogCaptureFixture) -> None:
    old = TlsCredentials(good)
    context = old.check("client")
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    said = refusals(old, TlsCredentials(good), caplog)
    assert "the other side does not speak TLS 1.3" in said
    assert "the other side does not speak TLS 1.3" in caplog.text


def test_destination_that_has_turned_somebody_away_takes_the_next(
    good: str, tmp_path: Path, stop: Stop, caplog: pytest.LogCaptureFixture, authority: Authority
) -> None:
    stranger = TlsCredentials(Authority().credentials(tmp_path / "stranger", trusts=authority))
    with listening(URI, TlsCredentials(good)) as incoming:
        accepting = Thread(incoming.accept)
        with pytest.raises(MigrationError, match="another CA"):
            connect(at(incoming), stranger, stop=stop)
        with connect(at(incoming), TlsCredentials(good), stop=stop), accepting.result():
            pass
    assert len(caplog.messages) == 1


def test_who_stops_in_the_handshake_keeps_nobody_out_and_is_turned_away(
    good: str, stop: Stop, caplog: pytest.LogCaptureFixture
) -> None:
    with listening(URI, TlsCredentials(good), timeout=0.5) as incoming:
        with socket.create_connection(("localhost", incoming.port)) as silent:
            silent.sendall(b"\x16\x03\x01")
            accepting = Thread(incoming.accept)
            with connect(at(incoming), TlsCredentials(good), stop=stop), accepting.result():
                pass
        with socket.create_connection(("localhost", incoming.port)) as silent:
            accepting = Thread(incoming.accept)
            wait_for(caplog)
            incoming.shutdown()
            with pytest.raises(MigrationCancelled):
                accepting.result()
    assert re.search(r"has not said who it is within 0.5 seconds", caplog.text)


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01"], ids=["silent", "with bytes on the way"])
def test_who_has_gone_before_it_is_attended_to_keeps_nobody_out(
    said: bytes, good: str, stop: Stop, caplog: pytest.LogCaptureFixture
) -> None:
    before = open_descriptors()
    with listening(URI, TlsCredentials(good)) as incoming:
        with socket.create_connection(("localhost", incoming.port)) as scanner:
            scanner.sendall(said)
            scanner.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, as of a scan
        accepting = Thread(incoming.accept)
        with connect(at(incoming), TlsCredentials(good), stop=stop), accepting.result():
            pass
    assert len(caplog.messages) == 1
    assert "turned away: tcp:localhost:0 from one that has left: " in caplog.text
    assert open_descriptors() == before


@pytest.mark.parametrize("name", [".example", "a" * 64, "a..b", "a\0b", "\udcff"])
def test_name_that_no_host_has_is_told(name: str, good: str, stop: Stop) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"tcp:localhost:{silent.getsockname()[1]}"
        with pytest.raises(HostError, match=r"^tls-hostname: '.*' is no host's name; give what the certificate"):
            connect(uri, TlsCredentials(good), stop=stop, tls_hostname=name)


def test_source_that_names_no_host_reaches_its_own(good: str, stop: Stop) -> None:
    with listening(URI, TlsCredentials(good)) as incoming:
        accepting = Thread(incoming.accept)
        with connect(f"tcp::{incoming.port}", TlsCredentials(good), stop=stop), accepting.result():
            pass


@pytest.mark.parametrize("cancelled", [True, False])
def test_handshake_that_is_not_answered_ends_in_time_or_when_it_is_cancelled(
    good: str, stop: Stop, *, cancelled: bool
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"tcp:localhost:{silent.getsockname()[1]}"
        timeout = BOUND if cancelled else SHORT
        connecting = Thread(lambda: connect(uri, TlsCredentials(good), stop=stop, timeout=timeout))
        if cancelled:
            stop.wait_any({}, soon())
            stop.set("by hand")
        with pytest.raises(MigrationCancelled if cancelled else StreamError) as caught:
            connecting.result()
    assert str(caught.value).endswith("by hand" if cancelled else "did not say who it is within 0.05 seconds")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda pki: (pki / "ca-cert.pem").unlink(),
            "ca-cert.pem: ENOENT: cannot be read; tls-creds is a directory with",
        ),
        (lambda pki: (pki / "client-cert.pem").unlink(), "client-cert.pem: ENOENT: cannot be read"),
        (lambda pki: (pki / "client-key.pem").unlink(), "client-key.pem: ENOENT: cannot be read"),
        (lambda pki: (pki / "client-key.pem").write_text("x"), "client-cert.pem with client-key.pem: TLS: "),
        (lambda pki: (pki / "ca-cert.pem").write_text("x"), "ca-cert.pem: TLS: no certificate or crl found"),
        (
            lambda pki: (pki / "client-key.pem").write_bytes((pki / "server-key.pem").read_bytes()),
            "client-cert.pem with client-key.pem: TLS: key values mismatch",
        ),
        (lambda pki: lock(pki / "client-key.pem"), "client-key.pem: the key has a pass phrase"),
    ],
    ids=["no CA", "no certificate", "no key", "no key in it", "no CA in it", "another's key", "pass phrase"],
)
def test_files_that_cannot_be_used_are_told_before_anything_is_connected(
    spoil: object, said: str, good: str, tmp_path: Path, stop: Stop
) -> None:
    pki = tmp_path / "pki"
    shutil.copytree(good, pki)
    assert callable(spoil)
    spoil(pki)
    with pytest.raises(HostError) as caught:
        connect("tcp:localhost:1", TlsCredentials(str(pki)), stop=stop)
    assert said in str(caught.value)


def lock(key: Path) -> None:
    """Give a key a pass phrase."""
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )


def test_destination_whose_files_cannot_be_used_does_not_listen(good: str, tmp_path: Path, stop: Stop) -> None:
    pki = tmp_path / "pki"
    shutil.copytree(good, pki)
    (pki / "server-key.pem").unlink()
    with pytest.raises(HostError, match=r"server-key.pem: ENOENT"):
        Incoming("tcp:localhost:0", TlsCredentials(str(pki)), stop=stop)


def test_tcp_without_tls_is_only_for_who_says_that_it_is_meant(stop: Stop) -> None:
    with pytest.raises(MigrationError, match=r"^tcp:localhost:1: without TLS anybody on the way .* give tls-creds"):
        connect("tcp:localhost:1", stop=stop)
    with pytest.raises(MigrationError, match=r"^tcp:localhost:0: without TLS anybody on the way"):
        Incoming("tcp:localhost:0", stop=stop)
