"""The 16550A UART behind a PC's COM port: registers, FIFOs, loopback and interrupts.

Models the data sheet (National PC16550D, sections 8.0 to 8.8) as far as a driver can tell, with these simplifications:

- There is no line: bytes leave at once and no bit can be damaged, so divisor and line format are kept, never used, and
  parity, framing and break conditions do not occur. The modem inputs are wired "ready": CTS, DSR and DCD are on.
- Transmission is instantaneous while the host takes bytes. When ``room()`` says that it does not, bytes wait in the
  transmit FIFO and LSR says 'not empty' until `drained`, so a driver that waits for them loses nothing. A byte written
  into a full FIFO is lost, as on the chip, and traced.
- The character timeout interrupt comes at once. On the chip it means "fewer bytes than the trigger level, and the line
  has been silent for four characters". The host hands over all it has in one `receive`: the silence has passed already.

OUT2 enables the interrupt line, as PC boards wire it; in loopback that pin is inactive, and so is the line.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Annotated, Final

from msgspec import Meta

from kvmpy.devices.base import Device
from kvmpy.irq import IrqLine
from kvmpy.latch import Latch
from kvmpy.state import State, u8
from kvmpy.trace import Tracepoint

trace_lost = Tracepoint("serial.lost", "device value")

FIFO_SIZE: Final = 16
RX_TRIGGER: Final = (1, 4, 8, 14)  # bytes in the FIFO, by FCR bits 7:6

FifoBytes = Annotated[bytes, Meta(max_length=FIFO_SIZE)]


class Reg(IntEnum):
    DATA, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(8)


class Ier(IntEnum):
    RX_DATA = 0x01
    THR_EMPTY = 0x02
    LINE_STATUS = 0x04
    MODEM_STATUS = 0x08


class Iir(IntEnum):
    """What IIR bits 3:0 report; the first in this order wins."""

    LINE_STATUS = 0x06
    RX_DATA = 0x04
    RX_TIMEOUT = 0x0C
    THR_EMPTY = 0x02
    MODEM_STATUS = 0x00
    NONE = 0x01


class Fcr(IntEnum):
    ENABLE = 0x01
    CLEAR_RX = 0x02
    CLEAR_TX = 0x04
    DMA_MODE = 0x08
    TRIGGER = 0xC0


class Lcr(IntEnum):
    DLAB = 0x80


class Mcr(IntEnum):
    DTR = 0x01
    RTS = 0x02
    OUT1 = 0x04
    OUT2 = 0x08
    LOOP = 0x10


class Lsr(IntEnum):
    DATA_READY = 0x01
    OVERRUN = 0x02
    THR_EMPTY = 0x20
    TX_EMPTY = 0x40


class Msr(IntEnum):
    DELTA_CTS = 0x01
    DELTA_DSR = 0x02
    RI_ENDED = 0x04
    DELTA_DCD = 0x08
    CTS = 0x10
    DSR = 0x20
    RI = 0x40
    DCD = 0x80


IIR_FIFO: Final = 0xC0  # FIFOs present and enabled
IER_BITS: Final = 0x0F
MCR_BITS: Final = 0x1F


class SerialState(State):
    NAME = "serial16550"
    VERSION = 1
    ier: u8 = 0
    fcr: u8 = 0
    lcr: u8 = 0
    mcr: u8 = 0
    scr: u8 = 0
    dll: u8 = 12  # 9600 baud, as firmware leaves it: Linux divides by a divisor that it finds
    dlm: u8 = 0
    msr_delta: u8 = 0
    overrun: bool = False
    thr_empty_pending: bool = False
    rx: FifoBytes = b""
    tx: FifoBytes = b""  # only what the host has not taken yet


class Serial16550(Device[SerialState]):
    """One COM port. ``sink`` gets what the guest sends, ``room`` says whether it takes a byte now; neither may block.

    ``on_room`` is called, under the lock, once the guest has emptied a receive FIFO that had refused bytes: it may only
    post. Host side, any thread: `receive`, `drained`. Input waits with the host until `resume`, and while paused: what
    a fresh device had taken would be lost when another machine's state is loaded, and a saved one is not to change.
    """

    def __init__(
        self, name: str, irq: IrqLine, sink: Callable[[bytes], object], *, room: Callable[[], bool] = lambda: True
    ) -> None:
        super().__init__(name, SerialState())
        self._irq, self._sink, self._room = irq, sink, room
        self._refused = self._runs = False
        self.on_room: Callable[[], object] | None = None
        self.line_status = Latch(Reg.LSR, 1)
        self._follow()

    def receive(self, data: bytes) -> int:
        """Take what fits of the host's input and return how many bytes that was; the rest stays with the caller."""
        with self.lock:
            s = self.state
            takes = self._runs and not s.mcr & Mcr.LOOP
            taken = data[: max(self._fifo_size - len(s.rx), 0)] if takes else b""
            s.rx += taken
            self._refused = len(taken) < len(data)
            self._follow()
            return len(taken)

    def drained(self) -> None:
        """The host takes bytes again: send what waits."""
        with self.lock:
            s = self.state
            while s.tx and self._room():
                self._sink(s.tx[:1])
                s.tx = s.tx[1:]
                s.thr_empty_pending = not s.tx
            self._follow()

    def read(self, offset: int, size: int) -> int:
        s = self.state
        match Reg(offset):
            case Reg.DATA | Reg.IER if s.lcr & Lcr.DLAB:
                return s.dll if offset == Reg.DATA else s.dlm
            case Reg.DATA:
                value = s.rx[0] if s.rx else 0
                s.rx = s.rx[1:]
                self._follow()
                self._offer_room()
                return value
            case Reg.IER:
                return s.ier
            case Reg.IIR_FCR:
                return self._identify()
            case Reg.LCR:
                return s.lcr
            case Reg.MCR:
                return s.mcr
            case Reg.LSR:
                value = self._line_status()
                s.overrun = False
                self._follow()
                return value
            case Reg.MSR:
                value = self._modem_lines() | s.msr_delta
                s.msr_delta = 0
                self._follow()
                return value
            case Reg.SCR:
                return s.scr

    def write(self, offset: int, size: int, value: int) -> None:
        s = self.state
        value &= 0xFF
        match Reg(offset):
            case Reg.DATA if s.lcr & Lcr.DLAB:
                s.dll = value
            case Reg.DATA:
                self._transmit(value)
            case Reg.IER if s.lcr & Lcr.DLAB:
                s.dlm = value
            case Reg.IER:
                self._enable_interrupts(value & IER_BITS)
            case Reg.IIR_FCR:
                self._control_fifos(value)
            case Reg.LCR:
                s.lcr = value
            case Reg.MCR:
                self._control_modem(value & MCR_BITS)
            case Reg.LSR | Reg.MSR:
                pass  # read-only; the data sheet keeps writes for factory tests
            case Reg.SCR:
                s.scr = value
        self._follow()
        self._offer_room()

    def reset(self) -> None:
        super().reset()
        self._offer_room()

    def post_load(self) -> None:
        self._follow()

    def pause(self) -> None:
        with self.lock:
            self._runs = False

    def resume(self) -> None:
        with self.lock:
            self._runs = True
            self.drained()  # what waits may have waited for another host, of which nobody here will say so
            self._offer_room()

    @property
    def _fifo_size(self) -> int:
        return FIFO_SIZE if self.state.fcr & Fcr.ENABLE else 1

    def _identify(self) -> int:
        """IIR: the reported cause; reading acknowledges THR-empty, and only when that is what was reported."""
        cause = self._cause()
        if cause is Iir.THR_EMPTY:
            self.state.thr_empty_pending = False
            self._follow()
        return cause | (IIR_FIFO if self.state.fcr & Fcr.ENABLE else 0)

    def _transmit(self, value: int) -> None:
        s = self.state
        if s.mcr & Mcr.LOOP:
            if len(s.rx) < self._fifo_size:
                s.rx += bytes((value,))
            else:
                s.overrun = True
        elif not s.tx and self._room():
            self._sink(bytes((value,)))
        elif len(s.tx) < self._fifo_size:
            s.tx += bytes((value,))
        elif trace_lost:
            trace_lost(self.name, value)
        s.thr_empty_pending = not s.tx

    def _enable_interrupts(self, ier: int) -> None:
        """Enabling the THR-empty interrupt raises it anew if THR is empty, even when IIR has acknowledged it before.

        Not in the data sheet, but what chips do: Linux tests it (UART_BUG_THRE, UART_BUG_TXEN) and so starts to send.
        """
        s = self.state
        if (s.ier ^ ier) & Ier.THR_EMPTY:
            s.thr_empty_pending = bool(ier & Ier.THR_EMPTY) and not s.tx
        s.ier = ier

    def _control_fifos(self, fcr: int) -> None:
        """FCR: the other bits count only together with ENABLE; changing that clears both FIFOs."""
        s = self.state
        toggled = (s.fcr ^ fcr) & Fcr.ENABLE
        if toggled or (fcr & Fcr.ENABLE and fcr & Fcr.CLEAR_RX):
            s.rx = b""
        if s.tx and (toggled or (fcr & Fcr.ENABLE and fcr & Fcr.CLEAR_TX)):
            s.tx = b""
            s.thr_empty_pending = True
        s.fcr = fcr & (Fcr.ENABLE | Fcr.DMA_MODE | Fcr.TRIGGER) if fcr & Fcr.ENABLE else 0

    def _control_modem(self, mcr: int) -> None:
        """MCR: its outputs reach no modem, but loopback turns them into the inputs; a change leaves delta bits."""
        s = self.state
        before = self._modem_lines()
        s.mcr = mcr
        now = self._modem_lines()
        s.msr_delta |= (before ^ now) >> 4 & (Msr.DELTA_CTS | Msr.DELTA_DSR | Msr.DELTA_DCD)
        s.msr_delta |= (before & ~now) >> 4 & Msr.RI_ENDED

    def _modem_lines(self) -> int:
        mcr = self.state.mcr
        if not mcr & Mcr.LOOP:
            return Msr.CTS | Msr.DSR | Msr.DCD
        wires = ((Mcr.RTS, Msr.CTS), (Mcr.DTR, Msr.DSR), (Mcr.OUT1, Msr.RI), (Mcr.OUT2, Msr.DCD))
        return sum(line for output, line in wires if mcr & output)

    def _line_status(self) -> int:
        s = self.state
        return (
            (Lsr.DATA_READY if s.rx else 0)
            | (Lsr.OVERRUN if s.overrun else 0)
            | (0 if s.tx else Lsr.THR_EMPTY | Lsr.TX_EMPTY)
        )

    def _cause(self) -> Iir:
        """The highest enabled interrupt that is pending."""
        s = self.state
        if s.overrun and s.ier & Ier.LINE_STATUS:
            return Iir.LINE_STATUS
        if s.rx and s.ier & Ier.RX_DATA:
            below = s.fcr & Fcr.ENABLE and len(s.rx) < RX_TRIGGER[s.fcr >> 6]
            return Iir.RX_TIMEOUT if below else Iir.RX_DATA
        if s.thr_empty_pending and s.ier & Ier.THR_EMPTY:
            return Iir.THR_EMPTY
        if s.msr_delta and s.ier & Ier.MODEM_STATUS:
            return Iir.MODEM_STATUS
        return Iir.NONE

    def _follow(self) -> None:
        """After each change of the state: the interrupt, and what a driver reads before each byte that it sends."""
        self.line_status.set(self._line_status(), reads=not self.state.overrun)
        wired = self.state.mcr & (Mcr.OUT2 | Mcr.LOOP) == Mcr.OUT2
        self._irq.set(level=wired and self._cause() is not Iir.NONE)

    def _offer_room(self) -> None:
        if self._runs and self._refused and not self.state.rx and not self.state.mcr & Mcr.LOOP:
            self._refused = False
            if self.on_room is not None:
                self.on_room()
