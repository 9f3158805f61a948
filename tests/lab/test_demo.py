"""`make demo`, as a newcomer runs it: at a terminal."""

from __future__ import annotations

import os
import re
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

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
        process.wait(60)
        os.close(ours)


def test_the_demo_reaches_a_shell_that_echoes_and_powers_off(lab_images: images.Images) -> None:
    with at_a_terminal("make", "demo") as demo:
        demo.expect(r"KVMPY-GUEST UP kernel=\S+ cpus=2 ")
        demo.expect("guest# ")
        demo.type("echo $((6 * 7)) typed")
        demo.expect(r"echo \$\(\(6 \* 7\)\) typed")
        demo.expect(r"\n42 typed")
        demo.type("poweroff")
        demo.expect(r"where the time went: first KVM_RUN [\d.]+ s, kernel [\d.]+ s, init [\d.]+ s")
        while demo.read():
            pass
        assert demo.process.wait(60) == 0
