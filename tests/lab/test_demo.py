"""`make demo` and `make demo-boot`, as a newcomer runs them: at a terminal."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import pytest

from scripts.lab import images

CHECKOUT: Final = Path(__file__).parents[2]
PATIENCE: Final = 400.0


class Terminal:
    """A command on a pseudo-terminal of its own."""

    def __init__(self, fd: int, process: subprocess.Popen[bytes]) -> None:
        self.fd, self.process, self.output = fd, process, ""

    def expect(self, pattern: str) -> None:
        """Wait until ``pattern`` is in the output, and forget all up to its end."""
        end = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, self.output)):
            assert time.monotonic() < end, f"{pattern!r} did not come; the output so far:\n{self.output}"
            assert self.read(), f"ended before {pattern!r}; the output so far:\n{self.output}"
        self.output = self.output[found.end() :]

    def read(self) -> bool:
        """Take what there is, waiting a second for it; False at the end."""
        if not select.select([self.fd], [], [], 1.0)[0]:
            return True
        try:
            self.output += os.read(self.fd, 65536).decode(errors="replace")
        except OSError:  # EIO: the other side is closed
            return False
        return True

    def type(self, line: str) -> None:
        os.write(self.fd, f"{line}\n".encode())


@contextmanager
def at_a_terminal(*argv: str) -> Iterator[Terminal]:
    ours, theirs = os.openpty()
    process = subprocess.Popen(argv, cwd=CHECKOUT, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    try:
        yield Terminal(ours, process)
    finally:
        process.terminate()
        process.wait(PATIENCE)
        os.close(ours)


def test_the_booted_guest_reaches_a_shell_that_echoes_and_powers_off(lab_images: images.Images) -> None:
    with at_a_terminal("make", "demo-boot") as demo:
        demo.expect(r"KVMPY-GUEST UP kernel=\S+ cpus=2 ")
        demo.expect("guest# ")
        demo.type("echo $((6 * 7)) typed")
        demo.expect(r"echo \$\(\(6 \* 7\)\) typed")
        demo.expect(r"\n42 typed")
        demo.type("poweroff")
        demo.expect(r"where the time went: first KVM_RUN [\d.]+ s, kernel [\d.]+ s, init [\d.]+ s")
        while demo.read():
            pass
        assert demo.process.wait(PATIENCE) == 0


def of_session(leader: int) -> list[int]:
    """The processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(ProcessLookupError):
            if os.getsid(int(path.name)) == leader:
                found.append(int(path.name))
    return found


@pytest.mark.timeout(1500)
def test_the_demo_moves_a_guest_with_its_nic_says_so_and_leaves_a_picture_alone(
    lab_images: images.Images, tmp_path: Path
) -> None:
    with at_a_terminal(sys.executable, "-m", "scripts.demo", str(tmp_path)) as demo:
        demo.expect(r"hostdev0 \([0-9a-f:]+\): in use\r\n +frames take the primary")
        demo.expect("waiting for the guest to let hostdev0 go, [0-9]+ s")
        demo.expect("the guest has hostdev0 in use, [0-9.]+ s after it ran; its frames take it")
        demo.expect(r"The guest's own pings of the station: [0-9]+ packets transmitted")
        demo.expect("it has let hostdev0 go; now its memory is sent")
        demo.expect("the blackout was [0-9]+ ms")
        demo.expect("it has the other host's NIC, hostdev0 there, in use")
        demo.expect("Of the station's pings: .*of [0-9]+ pings lost")
        while demo.read():
            pass
        assert demo.process.wait(PATIENCE) == 0
        assert of_session(demo.process.pid) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.html", "demo.json", "demo.svg"]
    told = json.loads((tmp_path / "demo.json").read_text())
    assert [wait["outcome"] for wait in told["waits"]] == ["released", "in use"]
    assert [stretch["path"] for stretch in told["paths"]] == ["primary", "standby", "primary"]
    assert told["pings"]["answered-ms"]
