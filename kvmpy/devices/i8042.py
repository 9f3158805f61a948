"""The i8042 keyboard controller without keyboard or mouse: what is left is the PC's oldest reset line.

Models the commands of the IBM PS/2 Technical Reference ("Keyboard/Auxiliary Device Controller") by which a kernel looks
for the controller and resets the machine. Left out: the devices behind it, so nothing sent to them is answered and no
interrupt comes. The FADT should not announce an 8042 (IAPC_BOOT_ARCH bit 1), so that Linux does not search for a
keyboard; a reset by command 0xFE works all the same.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from kvmpy.devices.base import Device, Power
from kvmpy.state import State, u8


class Reg(IntEnum):
    """Offsets from port 0x60. Between them lies port 0x61, which is somebody else's."""

    DATA = 0
    COMMAND = 4


class Command(IntEnum):
    NONE = 0x00
    READ_COMMAND_BYTE = 0x20
    WRITE_COMMAND_BYTE = 0x60
    DISABLE_AUX = 0xA7
    ENABLE_AUX = 0xA8
    TEST_AUX = 0xA9
    SELF_TEST = 0xAA
    TEST_KEYBOARD = 0xAB
    DISABLE_KEYBOARD = 0xAD
    ENABLE_KEYBOARD = 0xAE
    READ_OUTPUT_PORT = 0xD0
    WRITE_OUTPUT_PORT = 0xD1
    WRITE_OUTPUT_BUFFER = 0xD2
    LOOP_AUX = 0xD3


class Status(IntEnum):
    OUTPUT_FULL = 0x01
    SYSTEM = 0x04
    COMMAND = 0x08  # the last write went to the command port
    UNLOCKED = 0x10


class CommandByte(IntEnum):
    SYSTEM = 0x04
    KEYBOARD_OFF = 0x10
    AUX_OFF = 0x20


class OutputPort(IntEnum):
    RUN = 0x01  # low: the CPU is held in reset
    A20 = 0x02


PULSE_OUTPUT_PORT: Final = 0xF0  # 0xF0 to 0xFF: pulses low the output lines whose bit is 0
SELF_TEST_PASSED: Final = 0x55
TEST_PASSED: Final = 0x00
CLOCK_STUCK_LOW: Final = 0x01

TAKES_DATA: Final = frozenset(
    {Command.WRITE_COMMAND_BYTE, Command.WRITE_OUTPUT_PORT, Command.WRITE_OUTPUT_BUFFER, Command.LOOP_AUX}
)


class I8042State(State):
    NAME = "i8042"
    VERSION = 1
    command_byte: u8 = CommandByte.SYSTEM | CommandByte.KEYBOARD_OFF | CommandByte.AUX_OFF
    output_port: u8 = OutputPort.RUN | OutputPort.A20
    output: u8 = 0
    output_full: bool = False
    waiting: u8 = Command.NONE  # the command whose data byte comes next
    last_was_command: bool = False


class Port:
    """One of the controller's ports as a bus target of its own: a window of one byte, with the controller's lock."""

    def __init__(self, controller: I8042, reg: Reg) -> None:
        self.name, self.lock = controller.name, controller.lock
        self._controller, self._reg = controller, reg

    def read(self, offset: int, size: int) -> int:
        """What the controller answers on this port."""
        return self._controller.read(self._reg, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Give the controller what the guest writes to this port."""
        self._controller.write(self._reg, size, value)


class I8042(Device[I8042State]):
    """Map ``data_port`` at 0x60 and ``command_port`` at 0x64, one byte each."""

    def __init__(self, name: str, power: Power) -> None:
        super().__init__(name, I8042State())
        self._power = power
        self.data_port = Port(self, Reg.DATA)
        self.command_port = Port(self, Reg.COMMAND)

    def read(self, offset: int, size: int) -> int:
        s = self.state
        match offset:
            case Reg.DATA:
                s.output_full = False
                return s.output
            case Reg.COMMAND:
                return (
                    Status.UNLOCKED
                    | (Status.OUTPUT_FULL if s.output_full else 0)
                    | (Status.SYSTEM if s.command_byte & CommandByte.SYSTEM else 0)
                    | (Status.COMMAND if s.last_was_command else 0)
                )
            case _:
                return super().read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        match offset:
            case Reg.DATA:
                command, self.state.waiting = self.state.waiting, Command.NONE
                self.state.last_was_command = False
                self._take_data(command, value)
            case Reg.COMMAND:
                self.state.waiting = value if value in TAKES_DATA else Command.NONE
                self.state.last_was_command = True
                self._command(value)

    def _command(self, command: int) -> None:
        s = self.state
        match command:
            case Command.READ_COMMAND_BYTE:
                self._answer(s.command_byte)
            case Command.SELF_TEST:
                s.command_byte |= CommandByte.SYSTEM
                self._answer(SELF_TEST_PASSED)
            case Command.TEST_KEYBOARD | Command.TEST_AUX:  # the latter fails, so that Linux stops looking for a mouse
                self._answer(TEST_PASSED if command == Command.TEST_KEYBOARD else CLOCK_STUCK_LOW)
            case Command.DISABLE_AUX:
                s.command_byte |= CommandByte.AUX_OFF
            case Command.ENABLE_AUX:
                s.command_byte &= ~CommandByte.AUX_OFF
            case Command.DISABLE_KEYBOARD:
                s.command_byte |= CommandByte.KEYBOARD_OFF
            case Command.ENABLE_KEYBOARD:
                s.command_byte &= ~CommandByte.KEYBOARD_OFF
            case Command.READ_OUTPUT_PORT:
                self._answer(s.output_port)
            case _ if command >= PULSE_OUTPUT_PORT and not command & OutputPort.RUN:
                self._power.request_reset()

    def _take_data(self, command: int, value: int) -> None:
        match command:
            case Command.WRITE_COMMAND_BYTE:
                self.state.command_byte = value
            case Command.WRITE_OUTPUT_PORT if not value & OutputPort.RUN:
                self._power.request_reset()
            case Command.WRITE_OUTPUT_PORT:
                self.state.output_port = value
            case Command.WRITE_OUTPUT_BUFFER | Command.LOOP_AUX:
                self._answer(value)  # never marked as the mouse's: there is no auxiliary port
            case _:
                pass  # for the keyboard, which is absent

    def _answer(self, value: int) -> None:
        self.state.output, self.state.output_full = value, True
