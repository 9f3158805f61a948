"""The QEMU that plays a host with igb, the NIC whose SR-IOV virtual functions are passed through.

Debian 13's has it. For Debian 12 the one in bookworm-backports is unpacked below ``.lab/``, from the mirror that apt
uses already, with apt's lists and cache of its own: nothing of the system is touched or installed. All other hosts are
played by the system's: guests boot a third faster in those of QEMU 7.2 than in those of 10.0.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from scripts.lab.errors import LabError
from scripts.lab.kernels import LAB, program, run

PROGRAM: Final = "qemu-system-x86_64"
MODEL: Final = "igb"
PACKAGES: Final = ("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios")
FIRMWARE: Final = ("share/qemu", "share/seabios", "lib/ipxe/qemu")
"""Where these packages, and one that they share with the system's QEMU, put firmware and the NICs' ROMs below usr."""


@dataclass(frozen=True)
class Qemu:
    """A QEMU: the system's, or one that is unpacked below ``root``."""

    root: Path | None = None

    @property
    def program(self) -> Path:
        """Its executable."""
        return self.root / "usr/bin" / PROGRAM if self.root else Path(program(PROGRAM) or PROGRAM)

    def command(self) -> list[str]:
        """The beginning of its command line. Firmware that was not unpacked with it is the system's."""
        if self.root is None:
            return [str(self.program)]
        firmware = [usr / name for usr in (self.root / "usr", Path("/usr")) for name in FIRMWARE]
        options = [word for directory in firmware if directory.exists() for word in ("-L", str(directory))]
        return [str(self.program), *options]

    def has(self, model: str) -> bool:
        """Whether it emulates a device of that name."""
        return f"{model} options:" in run(*self.command(), "-device", f"{model},help")


def fetch() -> Qemu:
    """A QEMU that has igb, fetched if the system's has none. Its directory appears complete or not at all."""
    root = LAB / "qemu"
    if root.exists():
        return Qemu(root)
    system = Qemu()
    if system.has(MODEL):
        return system
    LAB.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=LAB) as directory:
        work = Path(directory)
        print(f"lab: fetching a {PROGRAM} that has {MODEL}", file=sys.stderr)
        tree = work / "tree"
        for deb in _download(work):
            run("dpkg", "-x", str(deb), str(tree))
        if not Qemu(tree).has(MODEL):
            raise LabError(
                f"{PROGRAM}: neither the system's nor its backport has {MODEL}; Debian 12 and later have one"
            )
        tree.rename(root)
    return Qemu(root)


def _download(work: Path) -> list[Path]:
    """The packages from the backports, found with lists that are below ``work`` and go with it."""
    source = work / "sources.list"
    source.write_text(_backports())
    for name in ("lists/partial", "cache/archives/partial", "debs"):
        (work / name).mkdir(parents=True)
    settings = {
        "Dir::Etc::sourcelist": source,
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": work / "lists",
        "Dir::Cache": work / "cache",
    }
    options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
    run("apt-get", *options, "update")
    run("apt-get", *options, "download", *PACKAGES, cwd=work / "debs")
    return list((work / "debs").glob("*.deb"))


def _backports() -> str:
    """The line of a sources.list for this release's backports, on the mirror that has the release itself."""
    release = next(line.partition("=")[2].strip('"') for line in _os_release() if line.startswith("VERSION_CODENAME="))
    listed = run("apt-get", "indextargets", "--format", "$(CODENAME) $(COMPONENT) $(REPO_URI)", "Created-By: Packages")
    for line in listed.splitlines():
        codename, component, mirror = line.split(maxsplit=2)
        if (codename, component) == (release, "main"):
            return f"deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {mirror} {release}-backports main\n"
    raise LabError(f"apt knows no mirror of {release}; apt-get update may help")


def _os_release() -> list[str]:
    return Path("/etc/os-release").read_text().splitlines()
