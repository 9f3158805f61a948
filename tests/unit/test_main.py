"""The process around the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from textwrap import indent
from typing import Final

import pytest

# `kvmpy`, with a command of the test's.
PROGRAM: Final = """
import sys
import kvmpy.cli.main
from kvmpy.__main__ import main
from kvmpy.cli.detach import detach
from kvmpy.migration.stop import Stop
from kvmpy.migration.transport import connect

def command(_):
{}

kvmpy.cli.main.main = command
sys.exit(main())
"""
EXEC: Final = """
with Stop() as stop, connect("exec:cat >/dev/null; exit $0", stop=stop) as source:
    source.main.finish()
return 0
"""
DETACH: Final = """
ready = detach("web1", sys.argv[1])
return ready if isinstance(ready, int) else 2
"""


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (EXEC.replace("$0", "0"), 0, ""),
        (EXEC.replace("$0", "7"), 1, "the command has failed with status 7"),
        (DETACH, 2, ""),
    ],
    ids=["exec:", "exec: that fails", "--detach"],
)
def test_parent_that_ignores_its_children_does_not_matter(command: str, code: int, said: str, tmp_path: Path) -> None:
    program = PROGRAM.format(indent(command, "    "))
    argv = ["env", "--ignore-signal=CHLD", sys.executable, "-c", program, str(tmp_path / "web1.log")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr
