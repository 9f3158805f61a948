"""Logging is imported with the first message, and goes where standard error is then and later."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
from kvmpy.host.stderr import lossy_stderr
from kvmpy.log import Log, to_stderr
log = Log("kvmpy.test")
to_stderr()
print("logging" in sys.modules)
with lossy_stderr():
    log.info("%d within", 1)
    lossy = sys.stderr
log.warning("after")
try:
    1 / 0
except ZeroDivisionError as e:
    log.error("told of %s", "it", exc_info=e)
print("logging" in sys.modules, lossy.closed)
"""


def test_the_first_message_imports_logging_and_all_of_them_arrive() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout == "False\nTrue True\n"
    first, second, third, *traceback = done.stderr.splitlines()
    assert [first, second, third] == ["kvmpy: 1 within", "kvmpy: after", "kvmpy: told of it"]
    assert traceback[-1] == "ZeroDivisionError: division by zero"
