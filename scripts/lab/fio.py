"""fio for a guest: Debian's, with the libraries it wants, on a disk of its own, for those who measure disks.

It is fetched when first asked for, unpacked below ``.lab/`` and nowhere installed; it wants more than all of a guest's
root disk, so it is not there. A guest that has the disk mounted at /root runs ``/root/fio``.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Final

from scripts.lab import disk
from scripts.lab.kernels import LAB, run

IMAGE: Final = LAB / "guest/fio.img"
PACKAGE: Final = "fio"
SIZE: Final = "128M"
WHERE: Final = "/root"
LIBRARIES: Final = ("usr/lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/ceph", "lib/x86_64-linux-gnu")


def make() -> Path:
    """The disk's image, made where it is missing."""
    if IMAGE.exists():
        return IMAGE
    LAB.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=LAB) as directory:
        work = Path(directory)
        plan = run("apt-get", "--simulate", "--no-install-recommends", "install", PACKAGE)
        missing = re.findall(r"^Inst (\S+)", plan, re.MULTILINE)
        run("apt-get", "download", *(missing or [PACKAGE]), cwd=work)
        tree = work / "tree"
        for deb in work.glob("*.deb"):
            run("dpkg", "-x", str(deb), str(tree))
        disk.write(IMAGE, _files(tree), SIZE)
    return IMAGE


def _files(tree: Path) -> disk.Tree:
    """fio, its libraries beside it, and what starts it with these."""
    program = tree / "usr/bin/fio"
    path = ":".join(str(tree / name) for name in LIBRARIES)
    found = disk.LIBRARY.findall(run("env", f"LD_LIBRARY_PATH={path}", "ldd", str(program)))
    files: disk.Tree = {f"lib/{Path(name).name}": Path(name) for name in found}
    script = f'#!/bin/busybox sh\nLD_LIBRARY_PATH={WHERE}/lib exec {WHERE}/fio.bin "$@"\n'
    return files | {"fio.bin": program, "fio": script.encode()}
