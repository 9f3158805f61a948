"""ssh between emulated hosts: Debian's OpenSSH, unpacked below ``.lab/`` and run in emulated hosts alone.

Fetched are those of its packages that this machine lacks, with the libraries they want; nothing is installed, and no
server of it ever runs on this machine. host_ssh.sh sets it up in a host, with keys that are made anew for each pair.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Final

from scripts.lab.kernels import LAB, run

PACKAGES: Final = ("openssh-server", "openssh-client")


def fetch() -> Path:
    """What this machine lacks of OpenSSH, in a tree like /, empty where it lacks nothing."""
    root = LAB / "ssh"
    if root.exists():
        return root
    LAB.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=LAB) as directory:
        work = Path(directory)
        tree = work / "tree"
        tree.mkdir()
        if missing := _missing():
            print(f"lab: fetching {' '.join(missing)}", file=sys.stderr)
            run("apt-get", "download", *missing, cwd=work)
        for deb in work.glob("*.deb"):
            run("dpkg", "-x", str(deb), str(tree))
        tree.rename(root)
    return root


def _missing() -> list[str]:
    """The packages that an installation would bring; nothing is installed."""
    plan = run("apt-get", "--simulate", "--no-install-recommends", "install", *PACKAGES)
    return re.findall(r"^Inst (\S+)", plan, re.MULTILINE)
