"""TLS for tcp: version 1.3 alone, and each side shows a certificate that the other's CA has signed.

A directory has the files that QEMU's tls-creds-x509 has: ca-cert.pem, and where it is there ca-crl.pem;
client-cert.pem and client-key.pem for the source, server-cert.pem and server-key.pem for the destination. The source
checks that the destination's certificate names the host it was told to reach; the destination takes any client that its
CA has signed: a CA of one's own, for migrations alone, is what says who may send a guest.

With TLS 1.3 a client is done before the server has looked at its certificate, so it hears the server's preamble before
it says anything: a refusal then reaches it, as an alert, rather than get lost in a reset connection.

Session keys are those of the handshake: Python's ssl cannot ask for new ones (it answers a peer that does). AES-GCM is
good for 2**24.5 records of 16 KiB, 388 GB a channel and direction (RFC 8446, 5.5).

Import this where TLS is configured, before vCPUs run: ssl and what it takes are not small.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401  else ssl imports it when it first sees a host's name
import os
import socket
import ssl
import threading
from collections.abc import Callable, Generator
from typing import Final, Literal

from kvmpy.errors import HostError, StreamError, refusal
from kvmpy.migration.channel import READ, WRITE, SocketChannel
from kvmpy.migration.stop import Stop

# What the alert of a peer means, by its name in OpenSSL, and what to do.
ALERTS: Final = {
    "TLSV1_ALERT_UNKNOWN_CA": "another CA than its own has signed it; give both sides one ca-cert.pem",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "it has expired, or its host's clock is wrong; sign a new one",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "it has been revoked; sign a new one",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it does not name the host that was asked for, or is damaged; give tls-hostname",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "it is not for this use (extended key usage)",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "there is none; put client-cert.pem and client-key.pem into tls-creds",
}
REASONS: Final = {
    "WRONG_VERSION_NUMBER": "the other side does not speak TLS; give it tls-creds",
    "HTTP_REQUEST": "the other side does not speak TLS, but HTTP",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the other side has no certificate; its tls-creds need client-cert.pem",
    "UNSUPPORTED_PROTOCOL": "the other side does not speak TLS 1.3",
    "TLSV1_ALERT_PROTOCOL_VERSION": "the other side does not speak TLS 1.3",
}
OTHER_NAME: Final = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH, and that of an IP address
Side = Literal["client", "server"]
SMALL: Final = 256
RECORD: Final = 16 << 10


class TlsCredentials:
    """A directory of certificates and keys, which are read when one side's are first wanted."""

    def __init__(self, directory: str) -> None:
        """Raises HostError where it has not even a CA."""
        self.directory = directory
        self._contexts: dict[str, ssl.SSLContext] = {}
        self._path("ca-cert.pem")

    def connected(self, name: str, stop: Stop, connection: socket.socket, host: str) -> TlsChannel:
        """The source's side of a connection to ``host``, which it takes over. Raises HostError, StreamError."""
        try:
            context = self.check("client")
            return TlsChannel(name, stop, _wrapped(name, context, connection, host), hears_first=True)
        except BaseException:
            connection.close()
            raise

    def accepted(self, name: str, stop: Stop, connection: socket.socket) -> TlsChannel:
        """The destination's side of a connection, which it takes over. Raises HostError, StreamError."""
        try:
            context = self.check("server")
            return TlsChannel(name, stop, _wrapped(name, context, connection, None), hears_first=False)
        except BaseException:
            connection.close()
            raise

    def check(self, side: Side) -> ssl.SSLContext:
        """What one side needs. Raises HostError where it lacks a file, or has one that cannot be used."""
        if side not in self._contexts:
            self._contexts[side] = self._context(side)
        return self._contexts[side]

    def _context(self, side: Side) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if side == "server" else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        if side == "server":
            context.num_tickets = 0  # nobody comes back: a ticket is only one more thing to be read
        certificate, key, ca = (
            self._path(f"{side}-cert.pem"),
            self._path(f"{side}-key.pem"),
            self._path("ca-cert.pem"),
        )
        _use(f"{certificate} with {side}-key.pem", lambda: context.load_cert_chain(certificate, key, _no_password))
        _use(ca, lambda: context.load_verify_locations(ca))
        crl = os.path.join(self.directory, "ca-crl.pem")
        if os.path.exists(crl):
            _use(crl, lambda: context.load_verify_locations(crl))
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        return context

    def _path(self, name: str) -> str:
        path = os.path.join(self.directory, name)
        try:
            with open(path, "rb"):
                return path
        except OSError as e:
            advice = "tls-creds is a directory with ca-cert.pem, {client,server}-cert.pem and {client,server}-key.pem"
            raise HostError(f"{path}: {refusal(e.errno, 'cannot be read', advice)}") from e


class TlsChannel(SocketChannel):
    """A connected socket under TLS, which it owns."""

    _socket: ssl.SSLSocket

    def __init__(self, name: str, stop: Stop, connection: ssl.SSLSocket, *, hears_first: bool) -> None:
        super().__init__(name, stop, connection)
        self.hears_first = hears_first
        # OpenSSL's object is one for both directions, and not for two threads at once; no call blocks.
        self._session = threading.Lock()
        self._wants = {READ: READ, WRITE: WRITE}

    @property
    def raw_fd(self) -> int | None:
        return None

    def greet(self) -> Generator[int, None, None]:
        while True:
            self.check()
            try:
                with self._session:
                    self._socket.do_handshake()
                    return
            except ssl.SSLWantReadError:
                wanted = READ
            except ssl.SSLWantWriteError:
                wanted = WRITE
            except OSError as e:
                self.check()
                raise StreamError(f"{self.name}: {_reason(e)}") from e
            yield wanted

    def read_some(self, view: memoryview) -> int | None:
        try:
            with self._session:
                return self._socket.recv_into(view)
        except ssl.SSLWantReadError:
            self._wants[READ] = READ
        except ssl.SSLWantWriteError:
            self._wants[READ] = WRITE
        return None

    def write_some(self, views: list[memoryview]) -> int | None:
        first = views[0]
        if len(first) < SMALL and len(views) > 1:  # a header has no record of its own
            first = memoryview(bytes(first) + bytes(views[1][:RECORD]))
        try:
            with self._session:
                return self._socket.send(first)
        except ssl.SSLWantReadError:
            self._wants[WRITE] = READ
        except ssl.SSLWantWriteError:
            self._wants[WRITE] = WRITE
        return None

    def wanted(self, events: int) -> int:
        return self._wants[events]

    def _broken(self, e: OSError, events: int) -> str:
        if isinstance(e, ssl.SSLError) and not isinstance(e, ssl.SSLEOFError):
            return f"{self.name}: {_reason(e)}"
        return super()._broken(e, events)


def _wrapped(name: str, context: ssl.SSLContext, connection: socket.socket, host: str | None) -> ssl.SSLSocket:
    """The TLS side of a connection, that of the server where there is no ``host``. Raises StreamError where whoever
    has connected is gone already, HostError where no certificate can name such a host.
    """
    if host is not None and not _is_name(host):
        raise HostError(f"tls-hostname: {host!a} is no host's name; give what the certificate there names")
    try:
        connection.getpeername()  # of one that has gone ssl would leave the socket open
        return context.wrap_socket(
            connection, server_side=host is None, server_hostname=host, do_handshake_on_connect=False
        )
    except OSError as e:
        raise StreamError(f"{name}: {_reason(e)}") from e


def _is_name(host: str) -> bool:
    """Whether ssl can ask for it."""
    try:
        return b"\0" not in host.encode("idna")
    except UnicodeError:
        return False


def _use(what: str, load: Callable[[], object]) -> None:
    try:
        load()
    except (ssl.SSLError, OSError, ValueError) as e:
        raise HostError(f"{what}: {_reason(e)}; sign it anew") from e


def _no_password() -> str:
    """Where a key has a pass phrase: there is nobody to ask, and OpenSSL would ask the terminal."""
    raise ValueError("the key has a pass phrase, which nobody can be asked for")


def _reason(e: Exception) -> str:
    """What went wrong in TLS, and what to do, in words."""
    if isinstance(e, ssl.SSLCertVerificationError):
        advice = "; give tls-hostname, or the host's name in its certificate" if e.verify_code in OTHER_NAME else ""
        return f"the other side's certificate is refused: {e.verify_message.rstrip('.')}{advice}"
    if isinstance(e, ssl.SSLEOFError):
        return "the other side has hung up in the TLS handshake; its log says why"
    if isinstance(e, ssl.SSLError):
        reason = e.reason or str(e)
        if reason in ALERTS:
            return f"the other side refuses this one's certificate: {ALERTS[reason]}"
        return REASONS.get(reason, f"TLS: {reason.lower().replace('_', ' ')}")
    if isinstance(e, OSError):
        return refusal(e.errno, "the other side has gone")
    return str(e)
