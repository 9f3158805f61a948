"""What the lab boots: for emulated hosts and for guests, a kernel, an initramfs of busybox and modules, and disks.

Archives are put together anew each time, which takes a fraction of a second, and written only when they changed.
Both are uncompressed: software emulation would spend more time on unpacking than a page copy costs.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from scripts.lab import cpio, disk, qemu, ssh
from scripts.lab.errors import LabError
from scripts.lab.kernels import LAB, PACKAGES, Kernel, fetch, module_content, module_name, program, run

SOURCES: Final = Path(__file__).parent

NEEDS: Final = {
    qemu.PROGRAM: "qemu-system-x86",
    "busybox": "busybox-static",
    "depmod": "kmod",
    "dpkg": "dpkg",
    "mke2fs": "e2fsprogs",
    **disk.PROGRAMS,
}
"""Programs the lab runs, and the Debian packages that have them."""

HOST_MODULES: Final = (
    *("virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay"),  # the agent's port and the root
    *("virtio_blk", "crc32c_generic", "ext4"),  # the scratch space
    *("kvm_amd", "vhost_net", "tun", "bridge", "vfio_pci", "vfio_iommu_type1"),  # what kvmpy works with
)
GUEST_MODULES: Final = (
    *("button", "evdev", "pvpanic", "pvpanic-mmio", "pvpanic-pci"),
    *("virtio_pci", "virtio_net", "virtio_blk", "virtio_console", "virtio-rng"),
    *("net_failover", "e1000e", "igbvf"),
    *("crc32c_generic", "ext4"),  # what ext4 asks the crypto layer for is not among its dependencies
)

# x86-64 Linux. Asks for a leaf of CPUID that nobody has, with the character in it, and writes the character to a port
# without /dev/port, which Debian's cloud kernel lacks. The leaf is what a tracepoint of the host's KVM sees of any VMM.
STAMP_LEAF: Final = 0x4B56_4D00
STAMP_CODE: Final = (
    b"\x48\x8b\x74\x24\x10"  # mov rsi, [rsp + 16] (argv[1])
    b"\x0f\xb6\x06"  #         movzx eax, byte [rsi]
    b"\x0d"
    + STAMP_LEAF.to_bytes(4, "little")  # or eax, STAMP_LEAF
    + b"\x0f\xa2"  #             cpuid
    b"\xb8\xac\x00\x00\x00"  # mov eax, 172 (iopl)
    b"\xbf\x03\x00\x00\x00"  # mov edi, 3
    b"\x0f\x05"  #             syscall
    b"\xac"  #                 lodsb
    b"\xe6\x80"  #             out 0x80, al
    b"\xb8\x3c\x00\x00\x00"  # mov eax, 60 (exit)
    b"\x31\xff"  #             xor edi, edi
    b"\x0f\x05"  #             syscall
)
STAMP_ADDRESS: Final = 0x40_0000


@dataclass(frozen=True)
class Boot:
    """What one machine boots: the packaged bzImage, the ELF kernel inside it, and an initramfs."""

    vmlinuz: Path
    vmlinux: Path
    initrd: Path


@dataclass(frozen=True)
class Images:
    igb_qemu: qemu.Qemu  # for the hosts that need one with igb
    ssh: Path  # OpenSSH as far as this machine lacks it, for pairs of hosts
    host: Boot
    host_modules: Path  # a lib/modules, for modprobe in an emulated host
    host_scratch: Path  # an empty file system
    guests: dict[str, Boot]  # "generic" and "cloud"
    guest_root: Path  # a root disk for either, to be copied


def missing_packages() -> list[str]:
    """The Debian packages whose programs the lab needs and does not find."""
    return sorted({package for name, package in NEEDS.items() if program(name) is None})


def make() -> Images:
    """Make what is not there or not current, and say where everything is."""
    if missing := missing_packages():
        raise LabError(f"the lab needs programs that are not here: apt-get install {' '.join(missing)}")
    LAB.mkdir(exist_ok=True)
    with _one_at_a_time():
        kernels = {flavour: fetch(flavour) for flavour in PACKAGES}
        generic = kernels["generic"]
        scratch, guest_root = LAB / "host/scratch.img", LAB / "guest/root.img"
        disk.make_scratch(scratch)
        disk.make_root(guest_root, _guest_files())
        return Images(
            igb_qemu=qemu.fetch(),
            ssh=ssh.fetch(),
            host=_boot(LAB / "host", generic, _host_archive(generic)),
            host_modules=generic.modules.parent,
            host_scratch=scratch,
            guests={
                name: _boot(LAB / "guest" / name, kernel, _guest_archive(kernel)) for name, kernel in kernels.items()
            },
            guest_root=guest_root,
        )


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Keep two runs of the lab from making the same files at the same time."""
    with (LAB / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _boot(directory: Path, kernel: Kernel, initrd: bytes) -> Boot:
    """Fill ``directory``: links to the kernel's files, and the initramfs."""
    directory.mkdir(parents=True, exist_ok=True)
    boot = Boot(directory / "vmlinuz", directory / "vmlinux", directory / "initrd.img")
    _link(boot.vmlinuz, kernel.vmlinuz)
    _link(boot.vmlinux, kernel.vmlinux)
    if not boot.initrd.exists() or boot.initrd.read_bytes() != initrd:
        new = boot.initrd.with_suffix(".new")
        new.write_bytes(initrd)
        new.rename(boot.initrd)
    return boot


def _link(link: Path, target: Path) -> None:
    relative = os.path.relpath(target, link.parent)
    if not link.is_symlink() or os.readlink(link) != relative:
        link.unlink(missing_ok=True)
        link.symlink_to(relative)


def _skeleton(init: str) -> cpio.Archive:
    """An archive with busybox's commands and the script ``init`` as pid 1."""
    busybox = program("busybox") or "busybox"
    archive = cpio.Archive()
    archive.directory("bin", "dev", "etc", "lib", "lib/modules", "proc", "root", "sys")
    archive.file("bin/busybox", Path(busybox).read_bytes(), executable=True)
    for command in run(busybox, "--list").split():
        if command != "busybox":
            archive.symlink(f"bin/{command}", "busybox")
    archive.file("init", (SOURCES / init).read_bytes(), executable=True)
    return archive


def _add_modules(archive: cpio.Archive, files: Sequence[Path]) -> None:
    for file in dict.fromkeys(files):
        archive.file(f"lib/modules/{module_name(file)}.ko", module_content(file))


def _host_archive(kernel: Kernel) -> bytes:
    archive = _skeleton("host_init.sh")
    archive.directory("outside", "overlay")
    order = kernel.load_order()
    files = list(dict.fromkeys(file for name in HOST_MODULES for file in order[name]))
    _add_modules(archive, files)
    archive.file("lib/modules/load", "".join(f"{module_name(file)}.ko\n" for file in files).encode())
    return archive.finish()


def _guest_archive(kernel: Kernel) -> bytes:
    """The same guest for every kernel, with those of GUEST_MODULES that the kernel has."""
    archive = _skeleton("guest_init.sh")
    archive.directory("newroot", "sbin")
    for name, content in _guest_files().items():
        archive.file(name, content, executable=True)
    order = kernel.load_order()
    wanted = {name: order[key] for name in GUEST_MODULES if (key := name.replace("-", "_")) in order}
    _add_modules(archive, [file for files in wanted.values() for file in files])
    lines = (f"{name} {' '.join(f'{module_name(file)}.ko' for file in files)}\n" for name, files in wanted.items())
    archive.file("lib/modules/load", "".join(lines).encode())
    return archive.finish()


def _guest_files() -> dict[str, bytes]:
    """What a guest has beside programs, in its initramfs and on its root disk."""
    return {
        "sbin/init": (SOURCES / "guest_main.sh").read_bytes(),
        "etc/profile": (SOURCES / "guest_profile.sh").read_bytes(),
        "bin/garble": (SOURCES / "guest_garble.sh").read_bytes(),
        "bin/stamp": _elf(STAMP_CODE),
    }


def _elf(code: bytes) -> bytes:
    """The smallest program: an ELF header, one segment, ``code``."""
    header_size, segment_size = 64, 56
    start = header_size + segment_size
    ident = b"\x7fELF" + bytes((2, 1, 1)) + bytes(9)  # 64 bits, little-endian, version 1
    executable, x86_64 = 2, 62
    header = struct.pack(
        *("<16sHHIQQQIHHHHHH", ident, executable, x86_64, 1, STAMP_ADDRESS + start, header_size, 0),
        *(0, header_size, segment_size, 1, 0, 0, 0),
    )
    load, read_and_execute, size, page = 1, 5, start + len(code), 0x1000
    segment = struct.pack("<IIQQQQQQ", load, read_and_execute, 0, STAMP_ADDRESS, STAMP_ADDRESS, size, size, page)
    return header + segment + code
