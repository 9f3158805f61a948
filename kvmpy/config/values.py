"""The values a configuration is made of: sizes, names, addresses and places on the host, each a checked type.

A type is its own parser: called with what TOML gave, it makes a value or raises ValueError, which says what was
expected and what came instead. `Text` needs no more than a pattern for it.
"""

from __future__ import annotations

import os
import re
from posixpath import join  # pathlib costs 5 ms of every start
from typing import ClassVar, Final, Self

from kvmpy.config.toml_lines import did_you_mean, plain

UNITS: Final = {
    "": 1,
    **dict.fromkeys(("KiB", "K"), 1 << 10),  # the single letters as QEMU means them
    **dict.fromkeys(("MiB", "M"), 1 << 20),
    **dict.fromkeys(("GiB", "G"), 1 << 30),
    **dict.fromkeys(("TiB", "T"), 1 << 40),
}
IN_PATHS: Final = r"[^\0\ud800-\udc7f\udd00-\udfff]"
"""A pattern for what a path may have. The surrogates left stand for bytes that are no UTF-8 (os.fsencode)."""
SOCKET_PATH_MAX: Final = 107  # bytes: sockaddr_un.sun_path without its zero


class Size(int):
    """Bytes: an integer, or a string with a unit, all of them powers of 1024."""

    FORM: ClassVar = 'a size such as "512MiB"'

    def __new__(cls, value: object) -> Self:
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 64:
            return super().__new__(cls, value)
        if not isinstance(value, str):
            raise ValueError(f"expected {cls.FORM}, got {got(value)}")
        match = re.fullmatch(r"([0-9]{1,20})(?:\.([0-9]{1,20}))? ?([A-Za-z]*)", value)
        if not match:
            raise ValueError(f"expected {cls.FORM}, got {shown(value)}")
        whole, fraction, unit = match[1], match[2] or "", match[3]
        if unit not in UNITS:
            other_case = next((f" (did you mean '{name}'?)" for name in UNITS if name.lower() == unit.lower()), "")
            hint = other_case or did_you_mean(unit, UNITS) or "; units are KiB, MiB, GiB and TiB"
            raise ValueError(f"unknown unit '{plain(unit)}' in {shown(value)}{hint}")
        size, rest = divmod(int(whole + fraction) * UNITS[unit], 10 ** len(fraction))
        if rest:
            raise ValueError(f"{shown(value)} is not a whole number of bytes")
        return super().__new__(cls, size)


class Text(str):
    """A string of one form, said as a PATTERN and in words."""

    PATTERN: ClassVar[str]
    FORM: ClassVar[str]

    def __new__(cls, value: object) -> Self:
        if not isinstance(value, str):
            raise ValueError(f"expected {cls.FORM}, got {got(value)}")
        if not re.fullmatch(cls.PATTERN, value):
            raise ValueError(f"expected {cls.FORM}, got {shown(value)}")
        return super().__new__(cls, cls.normal(value))

    @classmethod
    def normal(cls, text: str) -> str:
        """The one spelling of those that mean the same."""
        return text


class Name(Text):
    """A machine's name, which is also a directory's."""

    PATTERN = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}"
    FORM = "a name (up to 64 letters, digits, '.', '_', '-'; not '.' or '-' first)"


class Id(Text):
    """What others call a table by."""

    PATTERN = r"[A-Za-z][A-Za-z0-9._-]{0,63}"
    FORM = "an id (a letter, then up to 63 letters, digits, '.', '_', '-')"


class Interface(Text):
    """The name of a network interface: what the kernel takes, without its %d patterns."""

    PATTERN = r"(?!\.\.?$)[!-$&-.0-9;-~]{1,15}"
    FORM = "an interface name (up to 15 bytes; no '/', ':', '%' or white space)"


class NetworkNamespace(Text):
    """A network namespace: a name that `ip netns` knows, or the absolute path of one such as /proc/1/ns/net."""

    PATTERN = rf"/(?:(?!\n){IN_PATHS})+|(?!\.\.?$)[A-Za-z0-9._-]{{1,255}}"
    FORM = "a network namespace's name, or an absolute path"

    @property
    def path(self) -> str:
        """The file that stands for it."""
        return self if self.startswith("/") else f"/run/netns/{self}"


class Mac(Text):
    """A MAC address of one station, in lower case."""

    PATTERN = r"(?!00(:00){5}$)[0-9A-Fa-f][02468ACEace](:[0-9A-Fa-f]{2}){5}"
    FORM = 'a unicast MAC address such as "52:54:00:12:34:56"'

    @classmethod
    def normal(cls, text: str) -> str:
        return text.lower()


class Serial(Text):
    """A disk's serial number: what fits into the 20 bytes of VIRTIO_BLK_T_GET_ID."""

    PATTERN = r"[!-~]{1,20}"
    FORM = "a serial number (up to 20 printing characters, no white space)"


class PciAddress(Text):
    """Where a PCI function of the host is, as sysfs spells it: with its domain, in lower case."""

    PATTERN = r"([0-9A-Fa-f]{4,8}:)?[0-9A-Fa-f]{2}:[01][0-9A-Fa-f]\.[0-7]"
    FORM = 'a PCI address such as "0000:5e:00.2"'

    @classmethod
    def normal(cls, text: str) -> str:
        return (text if text.count(":") == 2 else f"0000:{text}").lower()


class HostPath(Text):
    """A path on the host. In a file, it is relative to that file's directory."""

    PATTERN = rf"(?s){IN_PATHS}+"
    FORM = "a path"

    def within(self, directory: str) -> Self:
        """The same place, said absolutely."""
        return type(self)(join(directory, self))


class Cpu(HostPath):
    """The guest's processor: the host's own, or a baseline in a file."""

    FORM = '"host", or the path of a CPU baseline'

    @property
    def is_host(self) -> bool:
        return self == "host"

    def within(self, directory: str) -> Self:
        return self if self.is_host else super().within(directory)


class Backend(Text):
    """Where a character device ends on the host. ``kind`` is the word before the path, ``path`` empty without one."""

    PATTERN = rf"(?s)stdio|pty|null|(file|unix):{IN_PATHS}+"
    FORM = "stdio, pty, null, file:PATH or unix:PATH"

    @property
    def kind(self) -> str:
        return self.partition(":")[0]

    @property
    def path(self) -> str:
        return self.partition(":")[2]

    def within(self, directory: str) -> Self:
        """The same backend with an absolute path; raises ValueError where that is too long for a socket."""
        if not self.path:
            return self
        path = join(directory, self.path)
        if self.kind == "unix" and len(os.fsencode(path)) > SOCKET_PATH_MAX:
            raise ValueError(f"the socket's path is longer than {SOCKET_PATH_MAX} bytes: {shown(path)}")
        return type(self)(f"{self.kind}:{path}")


class CharacterDevice(Backend):
    """A Backend that is not the terminal: that one is the serial line's."""

    PATTERN = rf"(?s)pty|null|(file|unix):{IN_PATHS}+"
    FORM = "pty, null, file:PATH or unix:PATH"


class UnixSocket(Backend):
    """A Backend that is a unix socket."""

    PATTERN = rf"(?s)unix:{IN_PATHS}+"
    FORM = "unix:PATH"


def size_text(size: int) -> str:
    """A size in the largest unit that says it exactly: "512 MiB"."""
    unit = next((unit for unit in ("TiB", "GiB", "MiB", "KiB") if size and size % UNITS[unit] == 0), "bytes")
    return f"{size // UNITS.get(unit, 1)} {unit}"


def got(value: object) -> str:
    """A value of a wrong type, as a message says it: 'a string ("two")'."""
    match value:
        case list():
            return "an array"
        case dict():
            return "a table"
        case bool() | int() | float() | str():
            return f"{_KINDS[type(value)]} ({shown(value)})"
        case _:
            return f"a date or time ({shown(value)})"


def shown(value: object) -> str:
    """A value as it was written, or nearly, on one line and not long."""
    match value:
        case bool():
            return str(value).lower()
        case str():
            return f'"{plain(value)}"'
        case int() if value.bit_length() > 64:  # the decimal form of a large integer costs quadratic time
            return plain(hex(value))
        case _:
            return plain(str(value))


_KINDS: Final = {bool: "a boolean", int: "an integer", float: "a float", str: "a string"}
