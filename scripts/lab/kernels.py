"""Debian's stock kernels, unpacked below ``.lab/`` from their packages; nothing is installed.

A kernel is fetched once and then stays what it is; remove ``.lab/kernel`` for newer ones.
"""

from __future__ import annotations

import gzip
import lzma
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from scripts.lab import vmlinux
from scripts.lab.errors import LabError

CHECKOUT: Final = Path(__file__).resolve().parents[2]
LAB: Final = CHECKOUT / ".lab"

PACKAGES: Final = {"generic": "linux-image-amd64", "cloud": "linux-image-cloud-amd64"}
"""The kernels by the names used here. Only the generic one has e1000e and igbvf; the cloud one is smaller."""


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel package, with the ELF kernel and the module index added."""

    root: Path

    @property
    def vmlinuz(self) -> Path:
        (path,) = (self.root / "boot").glob("vmlinuz-*")
        return path

    @property
    def vmlinux(self) -> Path:
        return self.root / "boot/vmlinux"

    @property
    def modules(self) -> Path:
        """The directory that modprobe knows as /lib/modules/VERSION."""
        (path,) = (self.root / "lib/modules").iterdir()
        return path

    def load_order(self) -> dict[str, list[Path]]:
        """For each module, by its name with underscores: the files to insert, in order, its own last."""
        order = {}
        for line in (self.modules / "modules.dep").read_text().splitlines():
            path, _, dependencies = line.partition(":")
            files = [self.modules / name for name in (path, *dependencies.split())]
            order[module_name(files[0])] = files[::-1]  # depmod lists what a module needs before what that needs
        return order


def module_name(path: Path) -> str:
    """The kernel's name for a module file: kvm-amd.ko.xz is kvm_amd."""
    return path.name.partition(".")[0].replace("-", "_")


def module_content(path: Path) -> bytes:
    """A module ready to be inserted: later Debian releases pack theirs with xz, which busybox cannot insert."""
    data = path.read_bytes()
    match path.suffix:
        case ".ko":
            return data
        case ".xz":
            return lzma.decompress(data)
        case ".gz":
            return gzip.decompress(data)
    raise LabError(f"{path}: a module compressed in an unknown way")


def program(name: str) -> str | None:
    """Where a program is, looking also where a user's PATH may not."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def fetch(flavour: str) -> Kernel:
    """The kernel called ``flavour``, fetched if it is not there. Its directory appears complete or not at all."""
    root = LAB / "kernel" / flavour
    if root.exists():
        return Kernel(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent) as directory:
        work = Path(directory)
        package = _resolve(PACKAGES[flavour])
        print(f"lab: fetching {package}", file=sys.stderr)
        run("apt-get", "download", package, cwd=work)
        (deb,) = work.glob("*.deb")
        kernel = Kernel(work / "tree")
        run("dpkg", "-x", str(deb), str(kernel.root))
        run(program("depmod") or "depmod", "-b", str(kernel.root), kernel.modules.name)
        try:
            kernel.vmlinux.write_bytes(vmlinux.extract(kernel.vmlinuz.read_bytes()))
        except vmlinux.KernelFormatError as error:
            raise LabError(f"{package}: {error}") from error
        kernel.root.rename(root)
    return Kernel(root)


def _resolve(metapackage: str) -> str:
    """The package of one kernel version that ``metapackage`` stands for now."""
    for line in run("apt-cache", "depends", metapackage).splitlines():
        relation, _, name = line.strip().partition(": ")
        if relation == "Depends" and name.startswith("linux-image-"):
            return name
    raise LabError(f"{metapackage}: apt knows no kernel behind it; apt-get update may help")


def run(*command: str, cwd: Path | None = None) -> str:
    """What a command printed; a command that fails is a LabError with what it said."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout
