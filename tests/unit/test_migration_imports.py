"""A migration imports nothing on the way: it runs beside vCPUs, and an import holds the GIL for milliseconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.certificates import Authority

PROGRAM = """
import contextlib, socket, sys, threading
from kvmpy.errors import MigrationError
from kvmpy.migration import dirty, intake, pages  # what a machine has
from kvmpy.migration.arrival import Incoming
from kvmpy.migration.messages import Accept, Failed, Go, Header, Origin, Section
from kvmpy.migration.stop import Stop
from kvmpy.migration.transport import connect
directory, credentials = sys.argv[1:]
tls = None
if credentials:
    from kvmpy.migration.tls import TlsCredentials
    tls = TlsCredentials(credentials)
before = set(sys.modules)
stop = Stop()
for uri in ("tcp:localhost:0", f"unix:{directory}/socket"):
    incoming = Incoming(uri, tls, stop=stop, insecure=True)
    arrivals = []
    thread = threading.Thread(target=lambda: arrivals.append(incoming.accept()))
    thread.start()
    where = f"tcp:localhost:{incoming.port}" if uri.startswith("tcp") else uri
    with connect(where, tls, stop=stop, insecure=True) as source:
        thread.join()
        there = arrivals[0].main
        source.main.send_message(Header(description={}, channels=1, source=Origin(host="", version="", name="")))
        there.receive_message(Header)
        there.send_message(Accept(token=bytes(16), version=1))
        source.main.receive_message(Accept)
        source.main.send_message(Section(device="x", section={"x": [1]}))
        there.receive_message(Section)
        there.fail(Failed(reason="x"))
        with contextlib.suppress(MigrationError):
            source.main.receive_message(Go)
    arrivals[0].close()
    incoming.close()
for uri in (f"file:{directory}/saved", f"exec:cat > {directory}/piped"):
    with connect(uri, stop=stop) as source:
        source.main.send_message(Go())
        source.main.finish()
for uri in (f"file:{directory}/saved", f"exec:cat {directory}/piped"):
    with Incoming(uri, stop=stop).accept() as arrival:
        arrival.main.receive_message(Go)
        arrival.main.finish()
for uri in ("tcp:localhost:1", "tcx:", f"unix:{directory}/none", "fd:x", "file:/no/where"):
    try:
        connect(uri, stop=stop, insecure=True)
    except MigrationError:
        pass
print(sorted(set(sys.modules) - before))
"""


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
def test_a_migration_imports_nothing_on_the_way(tmp_path: Path, *, tls: bool) -> None:
    credentials = Authority().credentials(tmp_path / "pki") if tls else ""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), credentials],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
