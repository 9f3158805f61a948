"""The operator's configuration: its schema, and the strict loader of the TOML file that holds it.

The tables below are the only place where keys, types and defaults are written, and the comment on a key is its entry
in docs/configuration.md. `load` goes through them key by key, so that it finds every mistake in one run and says where
each one is; `validate` has the rules that concern more than one key. Nothing here looks at the host: whether a file, a
bridge or a PCI function exists is found out by whoever opens it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from functools import partial
from posixpath import abspath, basename, dirname, splitext  # pathlib costs 5 ms of every start
from typing import Annotated, Any, Final, get_origin

import msgspec
from msgspec import Meta

from kvmpy.config.reader import Reader, Table
from kvmpy.config.toml_lines import Document, Message, Path, did_you_mean, key_text, parse_value, plain
from kvmpy.config.values import (
    Backend,
    CharacterDevice,
    Cpu,
    HostPath,
    Id,
    Interface,
    Mac,
    Name,
    NetworkNamespace,
    PciAddress,
    Serial,
    Size,
    UnixSocket,
    shown,
    size_text,
)
from kvmpy.errors import ConfigError

MEMORY_MIN: Final = 16 << 20  # a stock kernel and its initrd do not unpack in less
MEMORY_MAX: Final = 1 << 52  # what an x86-64 page table entry can address
RESERVED: Final = r"machine|vm|vcpu[0-9]+|com1|i8042|cmos|acpi-pm|reset|pvpanic|debug-port|pci-config-ports|host-bridge"
"""Ids that parts of every machine have; one more of that name could not be migrated."""


class HugePages(Enum):
    """The pages that back the guest's RAM."""

    OFF = "off"
    MIB2 = "2MiB"
    GIB1 = "1GiB"

    @property
    def page_size(self) -> Size:
        return Size("4KiB" if self is HugePages.OFF else self.value)


class Format(Enum):
    """What is in a drive's file."""

    RAW = "raw"


class Cache(Enum):
    """Whether the host's page cache holds a drive's blocks."""

    NONE = "none"
    WRITEBACK = "writeback"


class Machine(Table, frozen=True, kw_only=True):
    """The machine itself."""

    memory: Size = Size("512MiB")  # guest RAM: bytes, or a string with a unit (KiB, MiB, GiB, TiB or K, M, G, T)
    cpus: Annotated[int, Meta(ge=1, le=254)] = 1  # virtual CPUs
    cpu: Cpu = Cpu("host")  # the guest's processor: all that the host's can give, or what its fleet has in common
    hugepages: HugePages = HugePages.OFF  # huge pages to take RAM from, which is a multiple of them
    reserve: bool = False  # take all RAM from the host at start
    shared: bool = False  # RAM in a memfd, for backends that map it; a migration takes all of it from either host
    dirty_ring: bool = False  # log dirty pages in rings instead of a bitmap
    failover_hook: HostPath | None = None  # a program, run whenever the path of a failover pair changes; default: none
    failover_compat: bool = False  # as QEMU: MACs of pairs are not compared, a primary without its standby is visible


class Boot(Table, frozen=True, kw_only=True):
    """What the guest starts with."""

    kernel: HostPath  # a bzImage, or an ELF vmlinux with a PVH entry
    initrd: HostPath | None = None  # the initial RAM disk; default: none
    cmdline: str = "console=ttyS0"  # the kernel's command line


class Console(Table, frozen=True, kw_only=True):
    """The guest's first serial port."""

    serial: Backend = Backend("stdio")  # where it ends


class Monitor(Table, frozen=True, kw_only=True):
    """Where the machine is controlled from."""

    qmp: UnixSocket | None = None  # the QMP socket; default: qmp.sock in the machine's runtime directory


class Migration(Table, frozen=True, kw_only=True):
    """How the machine goes to another host, or comes from one. Its directory of certificates is like QEMU's:
    ca-cert.pem, with client-cert.pem and client-key.pem to go, server-cert.pem and server-key.pem to come."""

    tls_creds: HostPath | None = msgspec.field(default=None, name="tls-creds")  # what tcp needs; default: no tcp


class RootPort(Table, frozen=True, kw_only=True):
    """A PCIe port that one device can be plugged into, also while the guest runs. `chassis` is accepted because QEMU's
    ports have it, to tell them apart; here their ids do, and no register of a root port shows it."""

    id: Id  # what a device's `bus` says
    chassis: Annotated[int, Meta(ge=0, le=255)] | None = None  # accepted, no effect; default: none
    slot: Annotated[int, Meta(ge=1, le=0x1FFF)] | None = None  # its physical slot; default: by the order of the ports
    power_controller: bool = True  # the guest switches its power; without, Linux lets a device go a second sooner


class NetdevBase(Table, frozen=True, kw_only=True, tag_field="type"):
    """The host's side of a network device."""

    id: Id  # what a device's `netdev` says


class Tap(NetdevBase, frozen=True, kw_only=True, tag="tap"):
    """A tap interface of the host."""

    ifname: Interface  # made where it is absent and then removed on exit; one that existed is left as it was
    bridge: Interface | None = None  # the bridge it joins; made and removed likewise; default: none
    vhost: bool | None = None  # move frames in the host kernel; default: where /dev/vhost-net exists
    queues: Annotated[int, Meta(ge=1, le=256)] = 1  # pairs of queues, at most the kernel's MAX_TAP_QUEUES
    netns: NetworkNamespace | None = None  # the network namespace of tap and bridge; default: kvmpy's own


class Drive(Table, frozen=True, kw_only=True):
    """The host's side of a disk."""

    id: Id  # what a device's `drive` says
    path: HostPath  # a file or a block device
    format: Format  # what is in it: never guessed, for a guest could write what makes it look like something else
    cache: Cache = Cache.NONE  # none (O_DIRECT), or writeback, which blocks migration to another host
    readonly: bool = False  # refuse the guest's writes


class DeviceBase(Table, frozen=True, kw_only=True, tag_field="driver"):
    """What all devices have."""

    id: Id  # its name in the monitor and in a migration
    bus: Id | None = None  # the root port it is plugged into; default: none, and it is never hot-plugged


class VirtioNetPci(DeviceBase, frozen=True, kw_only=True, tag="virtio-net-pci"):
    """A virtio network device. With `failover`, it can be the standby of a passed-through NIC."""

    netdev: Id  # its netdev
    mac: Mac | None = None  # its address; default: made of the machine's name and the device's id
    host_mtu: Annotated[int, Meta(ge=68, le=65521)] | None = None  # the MTU of guest and tap; default: the tap's
    failover: bool = False  # offer VIRTIO_NET_F_STANDBY: a primary names this device in its failover_pair_id


class VfioPci(DeviceBase, frozen=True, kw_only=True, tag="vfio-pci"):
    """A PCI function of the host, passed through. A failover primary is hidden until the guest can pair it."""

    host: PciAddress  # its address on the host; the domain can be left out
    mac: Mac | None = None  # given to a VF through its PF; default: the standby's, or what the VF has
    vlan: Annotated[int, Meta(ge=0, le=4094)] | None = None  # likewise, 0 is none; default: what the VF has
    rombar: bool = True  # show the guest its expansion ROM, where it has one that the host can read
    failover_pair_id: Id | None = None  # makes it the primary of this standby; default: none


class VirtioBlkPci(DeviceBase, frozen=True, kw_only=True, tag="virtio-blk-pci"):
    """A virtio disk."""

    drive: Id  # its drive
    num_queues: Annotated[int, Meta(ge=1, le=256)] = msgspec.field(default=1, name="num-queues")  # request queues
    serial: Serial | None = None  # what the guest reads as the disk's serial number; default: the drive's id


class VirtioRngPci(DeviceBase, frozen=True, kw_only=True, tag="virtio-rng-pci"):
    """A source of random numbers."""


class VirtioSerialPci(DeviceBase, frozen=True, kw_only=True, tag="virtio-serial-pci"):
    """A virtio console: hvc0, hvc1 ... in the guest."""

    chardev: CharacterDevice = CharacterDevice("null")  # where it ends


Netdev = Tap
Device = VirtioNetPci | VfioPci | VirtioBlkPci | VirtioRngPci | VirtioSerialPci


class Config(Table, frozen=True, kw_only=True):
    """A whole configuration. Made by `load`, it knows where each of its keys was written."""

    name: Name  # what the machine is called; default: the file's name without its extension
    machine: Machine = Machine()
    boot: Boot
    console: Console = Console()
    monitor: Monitor = Monitor()
    migration: Migration = Migration()
    root_port: tuple[RootPort, ...] = ()
    netdev: tuple[Netdev, ...] = ()
    drive: tuple[Drive, ...] = ()
    device: tuple[Device, ...] = ()
    _origin: Document = Document("", "(no file)")

    def locate(self, key: str) -> str:
        """Where a key such as "device[0].bus" or "device.net1.bus" was written, else its table, else the file."""
        try:
            return self._origin.locate(self._origin.path(key))
        except ValueError:
            return self._origin.file

    def place(self, key: str, problem: str) -> str:
        """``problem`` with where ``key`` was written before it, and ``key`` itself unless that place names it."""
        try:
            named = self._origin.names(self._origin.path(key))
        except ValueError:
            named = False
        return f"{self.locate(key)}: {problem}" if named else f"{self.locate(key)}: {key}: {problem}"


def load(path: str | os.PathLike[str], overrides: Sequence[str] = (), *, name: str | None = None) -> Config:
    """The configuration in a file, after ``overrides`` such as "machine.memory=1GiB" and, if given, the ``name``.

    Raises ConfigError with every mistake there is; of very many, it only counts the last.
    """
    file = os.fspath(path)
    document = Document.read(file)
    refused = list(_override(document, overrides))
    if name is not None:
        document.set("name", name, "--name")
    document.data.setdefault("name", splitext(basename(file))[0])
    reader = Reader(abspath(dirname(file)))
    config: Config = reader.table((Config,), document.data, ())
    for place, message in validate(config):
        reader.refuse(place, message)
    if refused or reader.mistakes:
        raise ConfigError(*refused, *document.report(reader.mistakes))
    return msgspec.structs.replace(config, _origin=document)


def warnings(config: Config) -> list[str]:
    """What is allowed but hardly meant, located like a mistake."""
    return list(config._origin.report(dict(_odd_pairs(config))))


def validate(config: Config) -> Iterator[tuple[Path, Message]]:
    """The mistakes that concern more than one key, each with its path. Of two on one path, the first says more."""
    yield from _memory(config.machine)
    yield from _references(config)
    yield from _failover(config)
    yield from _repeated(config)


def _memory(machine: Machine) -> Iterator[tuple[Path, Message]]:
    memory, page = machine.memory, machine.hugepages.page_size
    if not MEMORY_MIN <= memory <= MEMORY_MAX:
        limits = f"{size_text(MEMORY_MIN)} to {size_text(MEMORY_MAX)}"
        yield ("machine", "memory"), f"expected {limits}, got {size_text(memory)}"
    elif memory % page:
        yield ("machine", "memory"), f"{size_text(memory)} is not a multiple of the page size, {size_text(page)}"


def _references(config: Config) -> Iterator[tuple[Path, Message]]:
    for key, table in (("bus", "root_port"), ("netdev", "netdev"), ("drive", "drive")):
        ids = {entry.id: None for entry in getattr(config, table)}  # a set, but in the order of the file
        for index, device in enumerate(config.device):
            target = getattr(device, key, None)
            if target is not None and target not in ids:
                yield ("device", index, key), partial(_no_such, table, target, ids)


def _no_such(table: str, target: str, ids: Iterable[str]) -> str:
    return f"no {table} has the id {shown(target)}{did_you_mean(target, ids)}"


def _failover(config: Config) -> Iterator[tuple[Path, Message]]:
    """Requirements R3 and R6; R2 is that every device has an id, R5 is in `_repeated`, R7 in `_odd_pairs`."""
    for index, primary, other, standby in _pairs(config):
        path = ("device", index)
        if primary.bus is None:
            yield (*path, "bus"), "missing: a failover primary is hot-plugged, so it needs a root port"
        if isinstance(standby, VirtioNetPci):
            if primary.bus and primary.bus == standby.bus:
                message = f"a primary and its standby need two root ports: '{primary.id}', '{standby.id}'"
                yield ("device", max(index, other), "bus"), message
            if standby.failover and primary.mac and not config.machine.failover_compat:
                yield from _macs(index, primary, other, standby)
        elif isinstance(standby, Device):
            key = "failover_pair_id" if index >= other else "id"
            yield ("device", max(index, other), key), f"'{standby.id}' is not a virtio-net-pci device"
        elif any(port.id == primary.failover_pair_id for port in config.root_port):
            yield (*path, "failover_pair_id"), f"'{primary.failover_pair_id}' is a root port, no virtio-net-pci device"


def _macs(index: int, primary: VfioPci, other: int, standby: VirtioNetPci) -> Iterator[tuple[Path, Message]]:
    """A guest pairs by the address: the later of the two is to blame."""
    if standby.mac is None:
        message = f"the standby '{standby.id}' has no mac: give it {primary.mac}, or leave this one out"
        yield ("device", index, "mac"), message
    elif primary.mac != standby.mac and index > other:
        yield ("device", index, "mac"), f"{primary.mac} is not that of the standby '{standby.id}', {standby.mac}"
    elif primary.mac != standby.mac:
        yield ("device", other, "mac"), f"{standby.mac} is not that of the primary '{primary.id}', {primary.mac}"


def _repeated(config: Config) -> Iterator[tuple[Path, Message]]:
    """Ids are unique among those of their kind, and much can be used once only."""
    for tables in (("root_port", "device"), ("netdev",), ("drive",)):
        for path, entry, earlier, _ in _again(config, tables, "id"):
            yield path, f"duplicate id '{entry.id}': {key_text(earlier)} has it"
    for name in ("root_port", "device"):
        for index, entry in enumerate(getattr(config, name)):
            if re.fullmatch(RESERVED, entry.id):
                yield (name, index, "id"), f"'{entry.id}' is what a part of every machine is called; choose another"
    for table, keys in (
        ("root_port", ("slot",)),
        ("netdev", ("ifname",)),
        ("device", ("bus", "netdev", "drive", "host", "failover_pair_id")),
    ):
        for key in keys:
            for path, entry, _, owner in _again(config, (table,), key):
                yield path, f"{shown(getattr(entry, key))} is taken by '{owner.id}', '{entry.id}' needs another"


def _again(config: Config, tables: Sequence[str], key: str) -> Iterator[tuple[Path, Any, Path, Any]]:
    """Each entry of the tables whose ``key`` has the value of an earlier one's, and that one, with their paths."""
    seen: dict[object, tuple[Path, Any]] = {}  # two namespaces may have a name each
    for table in tables:
        for index, entry in enumerate(getattr(config, table)):
            value = getattr(entry, key, None)
            if value is None:
                continue
            path = (table, index, key)
            earlier = seen.setdefault((value, getattr(entry, "netns", None)), (path, entry))
            if earlier[1] is not entry:
                yield path, entry, *earlier


def standby_of(config: Config, device: DeviceBase) -> Id | None:
    """The standby of a failover primary, which need not be there yet; None where ``device`` is an ordinary device."""
    if not isinstance(device, VfioPci) or device.failover_pair_id is None:
        return None
    standby = next((other for other in config.device if other.id == device.failover_pair_id), None)
    ordinary = config.machine.failover_compat if standby is None else not getattr(standby, "failover", False)
    return None if ordinary else device.failover_pair_id


def _pairs(config: Config) -> Iterator[tuple[int, VfioPci, int, DeviceBase | None]]:
    """Each failover primary and the device it names, if there is one, with their indices."""
    places: dict[str, tuple[int, DeviceBase]] = {device.id: (i, device) for i, device in enumerate(config.device)}
    for index, primary in enumerate(config.device):
        if isinstance(primary, VfioPci) and primary.failover_pair_id is not None:
            yield index, primary, *places.get(primary.failover_pair_id, (-1, None))


def _odd_pairs(config: Config) -> Iterator[tuple[Path, Message]]:
    ids = [device.id for device in config.device]
    for index, primary, _, standby in _pairs(config):
        path = ("device", index, "failover_pair_id")
        if standby is None:
            yield path, partial(_hidden, primary, ids, compat=config.machine.failover_compat)
        elif isinstance(standby, VirtioNetPci) and not standby.failover:
            yield path, f"'{standby.id}' does not have failover = true, so the guest sees both devices"


def _hidden(primary: VfioPci, ids: Iterable[str], *, compat: bool) -> str:
    missing = _no_such("device", primary.failover_pair_id or "", ids)
    if compat:
        return f"{missing}, so the guest sees '{primary.id}'"
    return f"{missing}, '{primary.id}' stays hidden until one is added"


def _override(document: Document, overrides: Sequence[str]) -> Iterator[str]:
    """Put the overrides into the document; gives those that cannot be, as one line each."""
    if overrides:
        for field in msgspec.structs.fields(Config):
            if get_origin(field.type) is tuple:  # or netdev.0.ifname would be a key of a new table
                document.data.setdefault(field.encode_name, [])
    for override in overrides:
        key, equals, value = override.partition("=")
        place = f"--set {plain(key.strip())}"
        try:
            if not equals:
                raise ValueError("expected KEY=VALUE")
            _require_table(document, key.strip())
            document.set(key, parse_value(value), place)
        except ValueError as e:
            yield f"{place}: {e}"


def _require_table(document: Document, key: str) -> None:
    """Who begins a key with an id, as in net1.mac, is told what it belongs to. Raises ValueError."""
    name = key.partition(".")[0]
    if name in {field.encode_name for field in msgspec.structs.fields(Config)}:
        return
    for array, items in document.data.items():
        if isinstance(items, list) and any(isinstance(item, dict) and item.get("id") == name for item in items):
            raise ValueError(f"unknown key '{plain(name)}' (did you mean {array}.{plain(key)}?)")
