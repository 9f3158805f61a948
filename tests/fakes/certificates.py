"""Directories of certificates as QEMU and kvmpy name them, signed by authorities of a test's own."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

NAMES = ("localhost", "127.0.0.1")


class Authority:
    """A CA, and what it signs."""

    def __init__(self) -> None:
        self._ca = trustme.CA(key_type=trustme.KeyType.ECDSA)

    def credentials(self, directory: Path, *names: str, expired: bool = False, trusts: Authority | None = None) -> str:
        """A directory with both sides' certificates for ``names``; it trusts this authority, or another."""
        directory.mkdir()
        (trusts or self)._ca.cert_pem.write_to_path(directory / "ca-cert.pem")
        now = datetime.now(UTC)
        not_after = now - timedelta(days=1) if expired else now + timedelta(days=1)
        for side in ("client", "server"):
            leaf = self._ca.issue_cert(
                *(names or NAMES),
                not_before=now - timedelta(days=2),
                not_after=not_after,
                key_type=trustme.KeyType.ECDSA,
            )
            leaf.private_key_pem.write_to_path(directory / f"{side}-key.pem")
            leaf.cert_chain_pems[0].write_to_path(directory / f"{side}-cert.pem")
        return str(directory)

    def revoke(self, directory: Path, certificate: Path) -> None:
        """Write a list of revoked certificates into ``directory``, with that one on it."""
        key = serialization.load_pem_private_key(self._ca.private_key_pem.bytes(), None)
        assert isinstance(key, EllipticCurvePrivateKey)
        now = datetime.now(UTC)
        serial = x509.load_pem_x509_certificate(certificate.read_bytes()).serial_number
        revoked = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
        crl = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(x509.load_pem_x509_certificate(self._ca.cert_pem.bytes()).subject)
            .last_update(now - timedelta(days=1))
            .next_update(now + timedelta(days=1))
            .add_revoked_certificate(revoked)
            .sign(key, hashes.SHA256())
        )
        (directory / "ca-crl.pem").write_bytes(crl.public_bytes(serialization.Encoding.PEM))
