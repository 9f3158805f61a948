"""kvmpy as an operator has it: a wheel of this checkout, in an environment with what it needs to run and nothing else.

What lies in an environment is paid for at every start, wanted or not. Where there is typing_extensions, which type
checkers bring, msgspec imports it, and with it inspect, ast and dis; setuptools has a .pth file that imports more. So
what is measured is not what `make setup` has made for the tests, but made as pipx would: without pip, without tools,
for the distribution's Python, as the peer is the distribution's QEMU. One that somebody has compiled without profiles
and with a shared library, as version managers do, runs a fifth more instructions until a guest runs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Final

CHECKOUT: Final = Path(__file__).parents[1]
DIRECTORY: Final = CHECKOUT / ".lab" / "installed"
DISTRIBUTION: Final = "/usr/bin"


@cache
def interpreter() -> str:
    """The distribution's Python; where that is too old, or without its library, the one that runs this."""
    found = shutil.which("python3", path=DISTRIBUTION)
    can = found and not subprocess.run([found, "-c", "import tomllib, venv"], capture_output=True).returncode
    return found if found and can else sys.executable


@cache
def environment() -> Path:
    """The directory of its programs, made anew by each process that measures: it takes some 5 s."""
    install(CHECKOUT, DIRECTORY)
    return DIRECTORY / "bin"


def install(checkout: Path, directory: Path) -> None:
    """Raises CalledProcessError; pip has said why.

    Without PYTHONPATH, where `bench.compare` has a checkout: pip would find kvmpy there, and install none.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    with tempfile.TemporaryDirectory() as wheels:
        build = ("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", wheels, str(checkout))
        subprocess.run([*pip, *build], env=clean, check=True)
        subprocess.run([interpreter(), "-m", "venv", "--clear", "--without-pip", str(directory)], check=True)
        (wheel,) = Path(wheels).glob("*.whl")
        into = ("--python", str(directory / "bin" / "python"))
        subprocess.run([*pip, *into, "install", str(wheel)], env=clean, check=True)
