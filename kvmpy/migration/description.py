"""What two machines must have alike for a guest to go from one to the other, compared before any of its RAM moves.

Each side describes itself; the destination finds *every* difference at once, named so that an operator can mend it.
What need not be alike is left out (host addresses, names of taps), or only warned of: kernel, initrd and command line
are in the guest's RAM already, and are loaded anew only at its next reset.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Annotated, Any, Final, NamedTuple

import msgspec
from msgspec import Meta

from kvmpy import __version__
from kvmpy.config.schema import Cache, standby_of
from kvmpy.errors import HostError, IncompatibleError, refusal
from kvmpy.host.memory import StrPath
from kvmpy.kvm.cpu_model import CpuDescription, differences
from kvmpy.machine import layout
from kvmpy.machine.check import huge_page, mmio64
from kvmpy.machine.inventory import Plugged
from kvmpy.machine.machine import Machine
from kvmpy.state import StateError, load, save

BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"
MOST: Final = 4096
PIECES, PIECE = 8, 32768  # of a file, and bytes of each
# Facts of a failover primary
PAIR: Final = "failover_pair_id"
BAR: Final = "BAR "
UNUSABLE: Final = "unusable"

Text = Annotated[str, Meta(max_length=4096)]
Names = Annotated[list[Text], Meta(max_length=MOST)]


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A device: where it is, what must be alike of it, and of its features those offered and those in use."""

    driver: Text
    place: Text
    facts: Annotated[dict[Text, Any], Meta(max_length=64)]
    offered: Names = []
    accepted: Names = []


class Host(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the machine is; ``boot`` tells one running kernel from every other."""

    name: Text
    boot: Text
    kvmpy: Text


class Description(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A machine, as far as a guest can tell, and what its disks need to be moved."""

    name: Text
    host: Host
    cpus: int
    cpu: dict[Text, Any]
    memory: Annotated[dict[Text, list[int]], Meta(max_length=64)]
    root_bus: Annotated[dict[Text, Text], Meta(max_length=256)]
    ports: Annotated[dict[Text, dict[Text, Any]], Meta(max_length=256)]
    devices: Annotated[dict[Text, Part], Meta(max_length=MOST)]
    buffered: Names
    boot: Annotated[dict[Text, Text], Meta(max_length=16)]


class Findings(NamedTuple):
    """``problems`` forbid the migration, ``warnings`` do not."""

    problems: list[str]
    warnings: list[str]


def describe(machine: Machine, cpu: CpuDescription) -> Description:
    """``machine`` now, with the processor ``cpu``. Reads its kernel and initrd."""
    board = machine.board
    root_bus = {f"{d:02x}.{f:x}": str(each.name) for bus, d, f, each in board.pci.functions() if not bus}
    return Description(
        name=str(machine.name),
        host=Host(name=os.uname().nodename, boot=_boot_id(), kvmpy=__version__),
        cpus=len(board.vcpus),
        cpu=save(cpu),
        memory=_memory(machine),
        root_bus=root_bus,
        ports={str(port.id): {"slot": board.ports[port.id].slot} for port in machine.config.root_port},
        devices=_lacking(machine)
        | {str(name): _part(name, plugged, root_bus) for name, plugged in board.inventory.plugged.items()},
        buffered=[str(drive.id) for drive in machine.config.drive if drive.cache is Cache.WRITEBACK],
        boot=_boot(machine),
    )


def to_json(description: Description) -> dict[str, Any]:
    """For the stream; what is more than a string or a number to the configuration is just that."""
    return msgspec.to_builtins(description, enc_hook=_plain)  # type: ignore[no-any-return]


def parse(data: object) -> Description:
    """A description as it came. Raises IncompatibleError where it is none."""
    try:
        return msgspec.convert(data, Description, strict=True)
    except msgspec.ValidationError as e:
        raise IncompatibleError(f"the machine's description cannot be read: {str(e)[:200]}") from e


def processor(description: Description) -> CpuDescription:
    """The processor that is described. Raises IncompatibleError where it is none."""
    try:
        return load(CpuDescription, description.cpu)
    except StateError as e:
        raise IncompatibleError(f"the processor's description cannot be read: {e}") from e


def compare(source: Description, destination: Description, *, require_primaries: bool = True) -> Findings:
    """Every difference that matters. Of processors, what the guest has and the destination's host cannot give it.

    Without ``require_primaries`` it is only a warning that a failover primary would be missed.
    """
    cpus = differences(processor(source), processor(destination))
    problems, warnings = [*_problems(source, destination), *cpus], list(_warnings(source, destination))
    (problems if require_primaries else warnings).extend(_primaries(source, destination))
    return Findings(problems, warnings)


def _problems(source: Description, here: Description) -> Iterator[str]:
    if source.cpus != here.cpus:
        yield f"machine.cpus: the source has {source.cpus}, the destination {here.cpus}"
    yield from _unequal("memory map: ", source.memory, here.memory, _extent)
    yield from _unequal("root bus: device ", source.root_bus, here.root_bus)
    yield from _unequal("root_port ", source.ports, here.ports)
    for name in sorted(source.devices.keys() | here.devices.keys()):
        there, mine = source.devices.get(name), here.devices.get(name)
        if there is not None and mine is not None and _is_primary(there) and _is_primary(mine):
            yield from _unequal(f"device {name}: ", _seat(there), _seat(mine))
        elif not all(part is None or _is_primary(part) for part in (there, mine)):
            yield from _device(f"device {name}", there, mine)
    if source.host.boot != here.host.boot:
        for side, buffered in (("source", source.buffered), ("destination", here.buffered)):
            for drive in buffered:
                yield (
                    f'drive {drive}: the {side} has cache = "writeback", whose page cache another host does not see; '
                    'use cache = "none"'
                )


def _primaries(source: Description, here: Description) -> Iterator[str]:
    """Why the guest would be without a failover primary here. One more than it had it gets: that is no problem."""
    for name, there in sorted(source.devices.items()):
        if not _is_primary(there):
            continue
        what, mine = f"device {name}", here.devices.get(name)
        if mine is None:
            yield f"{what}: is a failover primary, and the destination has none; give it one with that id"
        elif unusable := mine.facts.get(UNUSABLE):
            yield f"{what}: the destination's cannot be used: {unusable}"
        elif _is_primary(mine):
            sizes = ((key, there.facts.get(key, 0), size) for key, size in mine.facts.items() if key.startswith(BAR))
            yield from (
                f"{what}: {key} has {size} bytes at the destination, and {old} at the source: there is no room for it"
                for key, old, size in sizes
                if isinstance(old, int) and isinstance(size, int) and size > old
            )


def _is_primary(part: Part) -> bool:
    return PAIR in part.facts


def _seat(part: Part) -> dict[str, Any]:
    """What must be alike of a primary, whichever NIC it is."""
    return {"driver": part.driver, "bus": part.place, PAIR: part.facts[PAIR]}


def _device(what: str, source: Part | None, here: Part | None) -> Iterator[str]:
    if source is None or here is None:
        has, lacks = ("destination", "source") if source is None else ("source", "destination")
        yield f"{what}: the {has} has it, the {lacks} does not; give both the same [[device]] tables"
        return
    for key in ("driver", "place"):
        if getattr(source, key) != getattr(here, key):
            word = "bus" if key == "place" else key
            yield f"{what}: {word}: the source has {getattr(source, key)}, the destination {getattr(here, key)}"
    if source.driver != here.driver:
        return
    yield from _unequal(f"{what}: ", source.facts, here.facts)
    for feature in source.accepted:
        if feature not in here.offered:
            yield f"{what}: the guest uses its feature {feature}, which the destination cannot give it"


def _unequal(
    what: str, source: Mapping[str, Any], here: Mapping[str, Any], show: Any = lambda value: str(value)
) -> Iterator[str]:
    """Each key whose values differ, or that one side has not."""
    for key in sorted(source.keys() | here.keys()):
        there, mine = source.get(key), here.get(key)
        if there != mine:
            values = ["nothing" if value is None else str(show(value))[:200] for value in (there, mine)]
            yield f"{what}{key}: the source has {values[0]}, the destination {values[1]}"


def _extent(extent: object) -> str:
    if isinstance(extent, list) and len(extent) == 2:
        return f"{extent[0]:#x}+{extent[1]:#x}"
    return str(extent)


def _warnings(source: Description, here: Description) -> Iterator[str]:
    for key in sorted(source.boot.keys() | here.boot.keys()):
        if source.boot.get(key) != here.boot.get(key):
            yield f"boot.{key}: not the same here and there; a reset of the guest loads the destination's"


def _memory(machine: Machine) -> dict[str, list[int]]:
    blocks = {f"RAM {index}": [block.gpa, block.size] for index, block in enumerate(machine.board.memory.blocks)}
    windows = {"ECAM": layout.ECAM, "32-bit MMIO": layout.MMIO32, "64-bit MMIO": mmio64(machine.config)}
    page = {"1 GiB pages": [int(huge_page(machine.config) == layout.GIB)]}
    return blocks | {name: list(extent) for name, extent in windows.items()} | page


def _part(name: str, plugged: Plugged, root_bus: Mapping[str, str]) -> Part:
    device = plugged.device
    with device.lock:
        offered, accepted = device.negotiated()
        on_root_bus = next((place for place, other in root_bus.items() if other == name), "")
        return Part(
            driver=plugged.driver,
            place=f"root bus {on_root_bus}" if plugged.table.bus is None else str(plugged.table.bus),
            facts=device.facts() if plugged.standby is None else _primary(plugged),
            offered=offered,
            accepted=accepted,
        )


def _primary(plugged: Plugged) -> dict[str, Any]:
    """What is of interest of a failover primary: the guest had windows made for its BARs."""
    function = plugged.function
    facts: dict[str, Any] = {PAIR: str(plugged.standby)}
    facts |= {f"{BAR}{index}": bar.size for index, bar in function.bars.items()}
    if problem := getattr(function, "problem", None):
        facts[UNUSABLE] = str(problem)
    return facts


def _lacking(machine: Machine) -> dict[str, Part]:
    """The primaries that a machine should have and has not: where they would be, and why they are not."""
    lacking = machine.board.plugger.lacking
    return {
        str(table.id): Part(
            driver=str(table.__struct_config__.tag),
            place=str(table.bus),
            facts={PAIR: str(standby_of(machine.config, table)), UNUSABLE: lacking[table.id]},
        )
        for table in machine.config.device
        if table.id in lacking and table.id not in machine.board.inventory.plugged
    }


def _boot(machine: Machine) -> dict[str, str]:
    """A sum of what the guest is started with: against mistakes, not malice."""
    plan = machine.boot
    sums = {"kernel": sum_of(plan.kernel.path), "cmdline": f"{zlib.crc32(plan.command_line.encode()):08x}"}
    return sums | ({} if plan.initrd is None else {"initrd": sum_of(plan.initrd.path)})


def sum_of(path: StrPath) -> str:
    """Of pieces all over a file, and its size: to read all of a kernel takes longer than to compare the rest."""
    try:
        found = os.stat(path)
        return f"{_crc(os.fspath(path), found.st_ino, found.st_size, found.st_mtime_ns):08x}, {found.st_size} bytes"
    except OSError:
        return "cannot be read"


@lru_cache(maxsize=8)  # a destination has read its own before the source comes
def _crc(path: str, inode: int, size: int, mtime_ns: int) -> int:
    crc, rest = 0, max(size - PIECE, 0)
    with open(path, "rb", buffering=0) as reader:
        for number in range(PIECES):  # the last of them is the end of it
            crc = zlib.crc32(os.pread(reader.fileno(), PIECE, number * rest // (PIECES - 1)), crc)
    return crc


def _plain(value: object) -> str | int:
    if isinstance(value, int):
        return int(value)
    return str(value)


def _boot_id() -> str:
    try:
        with open(BOOT_ID, "rb") as file:  # as text it would import a codec
            return file.read().decode("ascii").strip()
    except OSError as e:
        raise HostError(f"{BOOT_ID}: {refusal(e.errno, 'cannot be read')}") from e
