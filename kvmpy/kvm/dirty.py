"""KVM's dirty log: which pages of RAM have been written by vCPUs, or by KVM for them.

Two ways, and the kernel says which it has (Documentation/virt/kvm/api.rst, 4.35, 4.117 and 7.18):

- With KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 reading the log changes nothing. A page is taken out of it, and made to fault
  at its next write, by KVM_CLEAR_DIRTY_LOG, which is for who reads the page to do, chunk by chunk just before: so the
  guest does not wait for all of RAM at once, and a page that is written again meanwhile is sent once and not twice.
  With INITIALLY_SET all of it begins as dirty, and the start costs nothing whatever the size.
- Without it, reading the log clears it.

RAM alone is logged: what a passed-through device shows of its own memory is not the guest's to keep. What is written
past KVM (by devices of ours, by vhost) is not in here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvmpy.abi import kvm as abi
from kvmpy.errors import IoctlError
from kvmpy.kvm.vm import Vm
from kvmpy.memory import Ram
from kvmpy.pagebits import PageBits, pages

MANUAL = "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"


class ToClear(NamedTuple):
    """Where KVM_CLEAR_DIRTY_LOG is issued before pages are read: the VM's descriptor and the slot's number."""

    vm_fd: int
    slot: int


class KvmDirtyLog:
    """The log of ``vm``'s slots for ``blocks``. One thread at a time."""

    def __init__(self, vm: Vm, blocks: Sequence[Ram], *, manual: bool = True) -> None:
        """``manual`` is whether to use manual protection where it is."""
        self._vm, self._blocks = vm, blocks
        self._wanted = manual
        self._flags = 0
        self._logging: dict[Ram, int] = {}
        self._read = {block: PageBits(pages(block.size)) for block in blocks}

    @property
    def manual(self) -> bool:
        """Whether reading leaves the log as it is, and pages must be cleared before they are read."""
        return bool(self._flags)

    def start(self) -> None:
        """Log from now on. Raises IoctlError, and then nothing is logged."""
        self._choose()
        try:
            for block in self._blocks:
                number = self._vm.slot_at(block.gpa)
                self._vm.set_logging(number, enabled=True)
                self._logging[block] = number
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Log nothing any more; allowed at any time. Raises IoctlError, having tried every slot."""
        failed: IoctlError | None = None
        for block, number in list(self._logging.items()):
            try:
                self._vm.set_logging(number, enabled=False)
                del self._logging[block]
            except IoctlError as e:
                failed = e
        if failed is not None:
            raise failed

    def to_clear(self, block: Ram) -> ToClear | None:
        """What is to be cleared before pages of ``block`` are read; None where reading the log has done it."""
        return ToClear(self._vm.fd, self._logging[block]) if self.manual else None

    def collect(self, block: Ram, into: PageBits) -> None:
        """Set the bits of the pages that have been written. Raises IoctlError."""
        read = self._read[block]
        log = abi.DirtyLog.new(slot=self._logging[block], padding2=read.address)
        abi.KVM_GET_DIRTY_LOG(self._vm.fd, log)
        into.merge(read)

    def _choose(self) -> None:
        """Manual protection, as much of it as there is. It cannot change while anything is logged."""
        known = abi.DIRTY_LOG_MANUAL_PROTECT | abi.DIRTY_LOG_INITIALLY_SET
        flags = self._vm.system.check(MANUAL) & known if self._wanted else 0
        if flags != self._flags:
            abi.KVM_ENABLE_CAP(self._vm.fd, abi.EnableCap.new(cap=abi.capability(MANUAL), args=[flags, 0, 0, 0]))
            self._flags = flags
