"""What Linux does with a 16550A's registers: drivers/tty/serial/8250/8250_port.c as a list of accesses.

Written from the driver's behaviour, function names kept: what autoconfig concludes is what the guest's dmesg will say.
"""

from __future__ import annotations

from kvmpy.devices.serial import Serial16550

RX = TX = DLL = 0
IER = DLM = 1
IIR = FCR = EFR = 2
LCR, MCR, LSR, MSR, SCR = 3, 4, 5, 6, 7

CONF_MODE_A, CONF_MODE_B = 0x80, 0xBF
LOOP = 0x10
THRI = 0x02
NO_INTERRUPT = 0x01


class Driver8250:
    def __init__(self, port: Serial16550) -> None:
        self.port = port

    def inb(self, register: int) -> int:
        return self.port.read(register, 1)

    def outb(self, register: int, value: int) -> None:
        self.port.write(register, 1, value)

    def autoconfig(self) -> str:
        self.outb(IER, 0)
        cleared = self.inb(IER) & 0x0F
        self.outb(IER, 0x0F)
        filled = self.inb(IER) & 0x0F
        self.outb(IER, 0)
        if (cleared, filled) != (0, 0x0F):
            return "IER test failed"
        mcr, lcr = self.inb(MCR), self.inb(LCR)
        self.outb(MCR, LOOP | 0x0A)
        looped = self.inb(MSR) & 0xF0
        self.outb(MCR, mcr)
        if looped != 0x90:
            return "LOOP test failed"
        self.outb(LCR, CONF_MODE_B)
        self.outb(EFR, 0)
        self.outb(LCR, 0)
        self.outb(FCR, 0x01)
        kind = (self.autoconfig_8250, lambda: "unknown", lambda: "16550", self.autoconfig_16550a)[self.inb(IIR) >> 6]()
        self.outb(LCR, lcr)
        self.outb(MCR, mcr)
        self.clear_fifos()
        self.inb(RX)
        self.outb(IER, 0)
        return kind

    def autoconfig_8250(self) -> str:
        self.outb(SCR, 0xA5)
        first = self.inb(SCR)
        self.outb(SCR, 0x5A)
        return "16450" if (first, self.inb(SCR)) == (0xA5, 0x5A) else "8250"

    def autoconfig_16550a(self) -> str:
        self.outb(LCR, CONF_MODE_A)
        if self.inb(EFR) == 0:
            return "ST16650 or Motorola"
        self.outb(LCR, CONF_MODE_B)
        if self.inb(EFR) == 0:
            return "has EFR"
        if self.natsemi():
            return "NS16550A"
        self.outb(LCR, 0)
        self.outb(FCR, 0x21)
        plain = self.inb(IIR) >> 5
        self.outb(FCR, 0x01)
        self.outb(LCR, CONF_MODE_A)
        self.outb(FCR, 0x21)
        with_dlab = self.inb(IIR) >> 5
        self.outb(FCR, 0x01)
        self.outb(LCR, 0)
        if (plain, with_dlab) == (6, 7):
            return "TI16750"
        ier = self.inb(IER)
        self.outb(IER, ier | 0x40)
        if self.inb(IER) & 0x40:
            return "XScale"
        self.outb(IER, ier)
        return "U6_16550A" if self.size_fifo() == 64 else "16550A"

    def natsemi(self) -> bool:
        self.outb(LCR, 0)
        mcr = self.inb(MCR)
        self.outb(LCR, 0xE0)
        if (self.inb(2) ^ mcr) & LOOP:
            return False
        self.outb(LCR, 0)
        self.outb(MCR, mcr ^ LOOP)
        self.outb(LCR, 0xE0)
        follows = (self.inb(2) ^ mcr) & LOOP
        self.outb(LCR, 0)
        self.outb(MCR, mcr)
        return bool(follows)

    def size_fifo(self) -> int:
        mcr = self.inb(MCR)
        self.outb(LCR, 0)
        self.outb(FCR, 0x07)
        self.outb(MCR, LOOP)
        self.outb(LCR, CONF_MODE_A)
        divisor = self.inb(DLL), self.inb(DLM)
        self.outb(DLL, 1)
        self.outb(DLM, 0)
        self.outb(LCR, 0x03)
        for value in range(256):
            self.outb(TX, value)
        count = 0
        while self.inb(LSR) & 0x01 and count < 256:
            self.inb(RX)
            count += 1
        self.outb(MCR, mcr)
        self.outb(LCR, CONF_MODE_A)
        self.outb(DLL, divisor[0])
        self.outb(DLM, divisor[1])
        self.outb(LCR, 0)
        return count

    def clear_fifos(self) -> None:
        for value in (0x01, 0x07, 0x00):
            self.outb(FCR, value)

    def thre_test(self) -> set[str]:
        """The bugs that serial8250_do_startup finds: it enables the THR interrupt twice, and once more for TXEN."""
        bugs = set()
        self.outb(IER, THRI)
        self.inb(IIR)
        self.outb(IER, 0)
        self.outb(IER, THRI)
        if self.inb(IIR) & NO_INTERRUPT:
            bugs.add("UART_BUG_THRE")
        self.outb(IER, 0)
        self.outb(IER, THRI)
        if self.inb(LSR) & 0x40 and self.inb(IIR) & NO_INTERRUPT:
            bugs.add("UART_BUG_TXEN")
        self.outb(IER, 0)
        return bugs

    def startup(self) -> None:
        """Open the port as for an interrupt-driven tty: 16550A FIFO settings, OUT2, receive interrupts."""
        self.clear_fifos()
        self.outb(LCR, 0x03)
        self.outb(MCR, 0x0B)
        self.outb(IER, 0x05)
        self.outb(FCR, 0x81)

    def interrupt(self, pending: bytearray) -> bytes:
        """serial8250_interrupt: until IIR says none, receive all there is and send up to 16 bytes of ``pending``."""
        received = bytearray()
        while not self.inb(IIR) & NO_INTERRUPT:
            while self.inb(LSR) & 0x01:
                received.append(self.inb(RX))
            self.inb(MSR)
            if self.inb(LSR) & 0x20 and self.inb(IER) & THRI:
                for value in pending[:16]:
                    self.outb(TX, value)
                del pending[:16]
                if not pending:
                    self.outb(IER, self.inb(IER) & ~THRI)
        return bytes(received)
