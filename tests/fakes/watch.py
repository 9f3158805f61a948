"""Who has written guest memory: it was compared, and the log says the same or more."""

from __future__ import annotations

from kvmpy.memory import GuestMemory
from kvmpy.pagebits import PAGE, PageBits, pages


class Watch:
    """Guest memory as it was, and the log of what has been written since."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.begin()

    def begin(self) -> None:
        """From here on, it is the device that writes."""
        self.log = self.memory.start_log()
        self._before = [bytes(block.view) for block in self.memory.blocks]

    def changed(self) -> set[int]:
        """The pages, by gpa, that are not as they were."""
        return {
            block.gpa + at
            for block, before in zip(self.memory.blocks, self._before, strict=True)
            if (now := bytes(block.view)) != before
            for at in range(0, block.size, PAGE)
            if now[at : at + PAGE] != before[at : at + PAGE]
        }

    def logged(self) -> set[int]:
        """The pages that are in the log, which are then in it no more."""
        found: set[int] = set()
        for block in self.memory.blocks:
            bits = PageBits(pages(block.size))
            self.log.take(block.gpa, bits)
            if bits.count():
                found |= {block.gpa + page * PAGE for page in range(bits.size) if page in bits}
        return found

    def check(self) -> set[int]:
        """Every changed page is in the log; which those are."""
        changed = self.changed()
        assert changed <= self.logged()
        return changed


class Mirror:
    """A second guest memory that gets the pages in a log, as a migration's destination does."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self._log = memory.start_log()
        self._copies = [bytearray(block.view) for block in memory.blocks]

    def follow(self) -> int:
        """Copy the pages that have been written since the last call; how many those were."""
        count = 0
        for block, copy in zip(self.memory.blocks, self._copies, strict=True):
            bits = PageBits(pages(block.size))
            self._log.take(block.gpa, bits)
            if bits.count():
                for page in (page for page in range(bits.size) if page in bits):
                    at = slice(page * PAGE, (page + 1) * PAGE)
                    copy[at] = block.view[at]
                    count += 1
        return count

    def differences(self) -> set[int]:
        """The pages, by gpa, that are not as they should be."""
        return {
            block.gpa + at
            for block, copy in zip(self.memory.blocks, self._copies, strict=True)
            for at in range(0, block.size, PAGE)
            if bytes(block.view[at : at + PAGE]) != copy[at : at + PAGE]
        }
