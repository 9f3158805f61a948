"""What the host does with a function at the moment, as far as sysfs tells, and would do without: network interfaces.

They are the function's own, or a virtio device's on it. One in another network namespace has no entry in this one's
sysfs; the directory that its entry would be in is there all the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from kvmpy.host.pci_function import SysfsFunction
from kvmpy.host.tree import read

IFF_UP: Final = 0x1  # linux/if.h


class Use(NamedTuple):
    """``what`` is used, an interface if it is seen, ``how``, and what to do before the function is taken away."""

    what: str
    how: str
    remedy: str


def uses(function: SysfsFunction) -> Iterator[Use]:
    """All that are seen."""
    for directory in (Path(function.path, "net"), *sorted(Path(function.path).glob("virtio*/net"))):
        if not directory.is_dir():
            continue
        interfaces = sorted(path for path in directory.iterdir() if path.is_dir())
        for path in interfaces:
            yield from _use(path)
        if not interfaces:
            yield Use(
                function.address,
                "has a network interface in another network namespace, which may use it",
                "see that nobody there needs it (ip netns; lsns -t net)",
            )


def _use(path: Path) -> Iterator[Use]:
    master = os.path.basename(os.path.realpath(path / "master")) if (path / "master").exists() else ""
    up = int(read(f"{path}/flags") or "0", 16) & IFF_UP
    found = [*(["is up"] if up else []), *([f"is a port of {master}"] if master else [])]
    if found:
        how = f"{' and '.join(found)}: the host uses the function"
        yield Use(path.name, how, f"see that the host does without it (ip link set {path.name} down)")
