"""What a machine has changed at the host's PCI functions, written down before it is: pci.json in its runtime directory.

What it has told the NICs beside its failover standbys is there too (`kvmpy.host.standby_port`).

A machine that ends gives everything back and removes it. After a crash the next start of that machine finds it, and
does that (`kvmpy.host.pci.recover`). It names the process as the marks of `kvmpy.host.ownership` do, and the boot: a
reboot has undone it all.

A machine of `kvmpy run` has that directory as long as it runs, a program's from its first function of the host on.

Each change is a new file that takes the old one's place, so that there is always a whole one. One process writes, the
one that has the machine's name; its threads take turns.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from kvmpy.errors import HostError, errno_name
from kvmpy.host import rundir
from kvmpy.host.network import MacText, VfChange
from kvmpy.host.ownership import Mark, process_start
from kvmpy.host.rundir import PCI_JOURNAL, PCI_JOURNAL_NEW

BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"
LARGEST: Final = 1 << 20
AddressText = Annotated[str, Meta(pattern=r"^[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]\Z")]
DriverText = Annotated[str, Meta(pattern=r"^([A-Za-z0-9_][A-Za-z0-9_.-]{0,63})?\Z")]


class VfRecord(msgspec.Struct, frozen=True):
    """What was changed at a virtual function, by way of the PF with that network interface."""

    interface: Annotated[str, Meta(min_length=1, max_length=15)]
    number: Annotated[int, Meta(ge=0, le=65535)]
    change: VfChange


class Record(msgspec.Struct, frozen=True):
    """One function. ``rebound``: it had ``driver`` and ``override`` (empty for none) and was given to vfio-pci."""

    address: AddressText
    rebound: bool = False
    driver: DriverText = ""
    override: DriverText = ""
    vf: VfRecord | None = None


class EntryRecord(msgspec.Struct, frozen=True):
    """Entries for ``mac`` at the tap ``ifname``, in the namespace ``netns``, and at the NICs of ``uplinks``."""

    ifname: Annotated[str, Meta(min_length=1, max_length=15)]
    netns: Annotated[str, Meta(max_length=4096)] | None
    mac: MacText
    uplinks: Annotated[list[Annotated[str, Meta(min_length=1, max_length=15)]], Meta(max_length=256)]


class Journal(msgspec.Struct, frozen=True):
    """The whole file."""

    boot: str
    machine: str
    pid: int
    started: int
    records: list[Record]
    entries: list[EntryRecord] = []

    def from_this_boot(self) -> bool:
        """Whether what it says can still be so."""
        return self.boot == _boot()

    def alive(self) -> bool:
        """Whether its process runs."""
        return Mark(self.machine, self.pid, self.started).alive()


_writing = threading.Lock()
_made: Final[set[str]] = set()  # directories that were not there
# Made now: nothing is built beside running vCPUs.
_decode: Final = msgspec.json.Decoder(Journal).decode
_encode: Final = msgspec.json.Encoder().encode


def load(directory: str) -> Journal | None:
    """The journal in a runtime directory; None where there is none. Raises HostError where it cannot be understood."""
    path = os.path.join(directory, PCI_JOURNAL)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as e:
        raise HostError(f"{path}: {errno_name(e.errno or 0)}: cannot be read; see what it is, and remove it") from e
    with os.fdopen(fd, "rb") as file:
        data = file.read(LARGEST)
    try:
        return _decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise HostError(
            f"{path}: is not what kvmpy wrote: {e}; give back by hand what it names (docs/passthrough.md), remove it"
        ) from e


def put(directory: str, record: Record) -> None:
    """Write ``record`` down, in the place of an earlier one of its function. Raises HostError."""
    with _writing:
        others, entries = _others(directory, record.address)
        _save(directory, [*others, record], entries)


def drop(directory: str, address: str) -> None:
    """Forget a function; with the last one the file goes. Raises HostError."""
    with _writing:
        _save(directory, *_others(directory, address))


def put_entry(directory: str, entry: EntryRecord) -> None:
    """Write ``entry`` down, in the place of an earlier one of its tap. Raises HostError."""
    with _writing:
        records, entries = _other_entries(directory, entry)
        _save(directory, records, [*entries, entry])


def drop_entry(directory: str, entry: EntryRecord) -> None:
    """Forget the one of that tap. Raises HostError."""
    with _writing:
        _save(directory, *_other_entries(directory, entry))


def find(directory: str, address: str) -> Record | None:
    """The record of a function. Raises HostError."""
    journal = load(directory)
    return next((record for record in journal.records if record.address == address), None) if journal else None


def _others(directory: str, address: str) -> tuple[list[Record], list[EntryRecord]]:
    journal = load(directory)
    if journal is None:
        return [], []
    return [record for record in journal.records if record.address != address], journal.entries


def _other_entries(directory: str, entry: EntryRecord) -> tuple[list[Record], list[EntryRecord]]:
    journal = load(directory)
    if journal is None:
        return [], []
    others = [other for other in journal.entries if (other.ifname, other.netns) != (entry.ifname, entry.netns)]
    return journal.records, others


def _save(directory: str, records: list[Record], entries: list[EntryRecord]) -> None:
    path = os.path.join(directory, PCI_JOURNAL)
    try:
        if not records and not entries:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            _remove(directory)
            return
        if rundir.make(directory):
            _made.add(directory)
        pid = os.getpid()
        journal = Journal(_boot(), os.path.basename(directory), pid, process_start(pid), records, entries)
        new = os.path.join(directory, PCI_JOURNAL_NEW)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(_encode(journal))
            file.flush()
            os.fsync(fd)
        os.rename(new, path)
        _sync(directory)
    except OSError as e:
        if not os.path.lexists(path):
            _remove(directory)
        raise HostError(f"{path}: {errno_name(e.errno or 0)}: cannot be written; see the runtime directory") from e


def _remove(directory: str) -> None:
    """If it was made for the journal, and nobody has put anything else there."""
    if directory in _made:
        _made.discard(directory)
        with contextlib.suppress(OSError):
            os.rmdir(directory)


def _sync(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _boot() -> str:
    with open(BOOT_ID) as file:
        return file.read().strip()
