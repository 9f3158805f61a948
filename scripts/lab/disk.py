"""Disks of the lab, ext4 images made without root: a guest's root disk, and the scratch space of an emulated host.

The root disk has busybox and a few of this machine's programs with the libraries they need. No kernel modules: those
come with the initramfs, so one disk serves every kernel.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from scripts.lab.kernels import program, run

PROGRAMS: Final = {
    "iperf3": "iperf3",
    "ethtool": "ethtool",
    "lspci": "pciutils",
    "setpci": "pciutils",
    "ip": "iproute2",
    "bridge": "iproute2",
}
"""What a guest with a disk has beside busybox, and the Debian packages that have it."""

ROOT_SIZE: Final = "48M"
SCRATCH_SIZE: Final = "8G"  # a sparse file: it takes what is written
LIBRARY: Final = re.compile(r"(/\S+) \(0x")
MKE2FS: Final = ("-q", "-F", "-t", "ext4", "-m", "0", "-E", "root_owner=0:0,lazy_itable_init=1,nodiscard")

Tree = dict[str, Path | str | bytes]
"""What is on a disk, by its path there: a copy of a file, a symbolic link to a target, or a program's text."""


def make_scratch(image: Path) -> None:
    """An empty file system, once: emulated hosts write to throw-away copies of it."""
    if not image.exists():
        write(image, {}, SCRATCH_SIZE, ("-O", "^has_journal"))


def make_root(image: Path, files: Mapping[str, bytes]) -> None:
    """A guest's root disk with ``files`` and PROGRAMS, made again when any of them changed."""
    busybox = program("busybox") or "busybox"
    commands = (name for name in run(busybox, "--list").split() if name not in PROGRAMS)
    tree: Tree = dict.fromkeys((f"bin/{name}" for name in commands), "busybox")
    tree |= {"bin/busybox": Path(busybox), **_programs(), **files}
    fingerprint = _fingerprint(tree)
    stamp = image.with_suffix(".made-from")
    if not image.exists() or not stamp.exists() or stamp.read_text() != fingerprint:
        write(image, tree, ROOT_SIZE)
        stamp.write_text(fingerprint)


def _programs() -> Tree:
    """PROGRAMS in /bin, and their libraries where the dynamic linker looks for them."""
    paths = {name: program(name) for name in PROGRAMS}
    libraries = LIBRARY.findall(run("ldd", *(path for path in paths.values() if path)))
    tree: Tree = {path[1:]: Path(path) for path in libraries}
    return tree | {f"bin/{name}": Path(path) for name, path in paths.items() if path}


def _fingerprint(tree: Tree) -> str:
    """Changes with the tree, found out without reading the files: their sizes and times say enough."""

    def lines() -> Iterable[str]:
        yield ROOT_SIZE
        for name, content in sorted(tree.items()):
            status = content.stat() if isinstance(content, Path) else None
            yield f"{name} {content!r} {(status.st_size, status.st_mtime_ns) if status else ''}"

    return hashlib.sha256("\n".join(lines()).encode()).hexdigest()


def write(image: Path, tree: Tree, size: str, options: tuple[str, ...] = ()) -> None:
    """Write an ext4 image; it appears complete or not at all."""
    image.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=image.parent) as directory:
        root, new = Path(directory, "tree"), Path(directory, "image")
        for name in ("dev", "proc", "root", "sys", "tmp") if tree else (".",):
            (root / name).mkdir(parents=True)
        for name, content in tree.items():
            _place(root / name, content)
        run(program("mke2fs") or "mke2fs", *MKE2FS, *options, "-d", str(root), str(new), size)
        new.rename(image)


def _place(path: Path, content: Path | str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    match content:
        case Path():
            shutil.copy2(content, path)
        case str():
            path.symlink_to(content)
        case bytes():
            path.write_bytes(content)
            path.chmod(0o755)
