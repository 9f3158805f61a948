"""AML, the bytecode of ACPI's definition blocks: each function returns the bytes of one term.

ACPI 6.5, chapter 20, is the grammar; section numbers below are its. Only what kvmpy's tables say is here. A term is
bytes; where a term is expected, an int stands for its own constant. Names are paths such as "_STA", "^PCI0" or
"\\_SB.COM1", padded and checked here.
"""

from __future__ import annotations

import re
from typing import Final

Term = bytes | int

ROOT: Final = "\\"
NAME_SEGMENT: Final = re.compile(r"[A-Z_][A-Z0-9_]{0,3}")
EISA_ID: Final = re.compile(r"([A-Z]{3})([0-9A-F]{4})")
UUID: Final = re.compile(r"([0-9a-fA-F]{8})-([0-9a-fA-F]{4})-([0-9a-fA-F]{4})-([0-9a-fA-F]{4})-([0-9a-fA-F]{12})")
MAX_ARGUMENTS: Final = 7


# Names and data objects: 20.2.2 and 20.2.3


def path(name: str) -> bytes:
    """A name, as a declaration takes it and as a reference to an object."""
    body = name.lstrip("\\^")
    prefix = name[: len(name) - len(body)]
    if prefix != ROOT and prefix.strip("^"):
        raise ValueError(f"{name!r}: a name starts with one backslash or with carets")
    segments = body.split(".") if body else []
    for segment in segments:
        if not NAME_SEGMENT.fullmatch(segment):
            raise ValueError(f"{name!r}: {segment!r} is no name segment")
    joined = b"".join(segment.ljust(4, "_").encode() for segment in segments)
    match len(segments):
        case 0:
            if not prefix:
                raise ValueError("an empty name")
            joined = b"\x00"
        case 1:
            pass
        case 2:
            joined = b"\x2e" + joined
        case count:
            joined = b"\x2f" + bytes([count]) + joined
    return prefix.encode() + joined


def integer(value: int) -> bytes:
    """The shortest constant for ``value``, in a block of 64-bit integers (revision 2)."""
    if value in (0, 1):
        return bytes([value])
    for prefix, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if 0 <= value < 1 << 8 * size:
            return b"\xff" if value == (1 << 64) - 1 else bytes([prefix]) + value.to_bytes(size, "little")
    raise ValueError(f"{value:#x} is not an unsigned 64-bit integer")


def string(text: str) -> bytes:
    """A string of ASCII characters without NUL."""
    if "\0" in text:
        raise ValueError(f"{text!r}: NUL ends a string")
    return b"\x0d" + text.encode("ascii") + b"\0"


def buffer(data: bytes) -> bytes:
    """A buffer that holds ``data``."""
    return b"\x11" + _package_length(integer(len(data)) + data)


def package(*elements: Term) -> bytes:
    """A package of up to 255 elements."""
    return b"\x12" + _package_length(bytes([len(elements)]) + _terms(elements))


def eisa_id(text: str) -> bytes:
    """A compressed EISA id such as "PNP0501": 19.3.4, EISAID."""
    if not (match := EISA_ID.fullmatch(text)):
        raise ValueError(f"{text!r} is not an EISA id: three capitals and four hex digits")
    first, second, third = (ord(letter) - 0x40 for letter in match[1])
    value = first << 26 | second << 21 | third << 16 | int(match[2], 16)
    return integer(int.from_bytes(value.to_bytes(4, "big"), "little"))


def to_uuid(text: str) -> bytes:
    """A UUID as the buffer that ASL's ToUUID makes: 19.6; its first three groups are little-endian."""
    if not (match := UUID.fullmatch(text)):
        raise ValueError(f"{text!r} is not a UUID")
    groups = [bytes.fromhex(group) for group in match.groups()]
    return buffer(b"".join(group[::-1] for group in groups[:3]) + b"".join(groups[3:]))


# Named objects and scopes: 20.2.5


def name(where: str, value: Term) -> bytes:
    """Name: an object with a value."""
    return b"\x08" + path(where) + _term(value)


def scope(where: str, *terms: bytes) -> bytes:
    """Scope: declare ``terms`` in a place that exists."""
    return b"\x10" + _package_length(path(where) + b"".join(terms))


def device(where: str, *terms: bytes) -> bytes:
    """Device: a new scope that is a device."""
    return b"\x5b\x82" + _package_length(path(where) + b"".join(terms))


def method(where: str, arguments: int, *terms: bytes, serialized: bool = False) -> bytes:
    """Method: control flow with up to seven arguments."""
    if not 0 <= arguments <= MAX_ARGUMENTS:
        raise ValueError(f"{where}: {arguments} arguments")
    flags = arguments | serialized << 3
    return b"\x14" + _package_length(path(where) + bytes([flags]) + b"".join(terms))


def create_dword_field(source: bytes, index: Term, where: str) -> bytes:
    """CreateDWordField: the 32 bits at byte ``index`` of the buffer ``source``, by name."""
    return b"\x8a" + source + _term(index) + path(where)


# Statements and operators: 20.2.5.3 and 20.2.5.4; locals and arguments: 20.2.6


def local(number: int) -> bytes:
    """Local0 to Local7."""
    return _numbered(0x60, number, 8)


def arg(number: int) -> bytes:
    """Arg0 to Arg6."""
    return _numbered(0x68, number, MAX_ARGUMENTS)


def return_(value: Term) -> bytes:
    """Return ``value`` from the method."""
    return b"\xa4" + _term(value)


def if_(condition: Term, *terms: bytes) -> bytes:
    """If; an `else_` may follow."""
    return b"\xa0" + _package_length(_term(condition) + b"".join(terms))


def else_(*terms: bytes) -> bytes:
    """Else, directly behind an `if_`."""
    return b"\xa1" + _package_length(b"".join(terms))


def store(value: Term, target: bytes) -> bytes:
    """``target`` = ``value``."""
    return b"\x70" + _term(value) + target


def and_(left: Term, right: Term, target: bytes) -> bytes:
    """``target`` = ``left`` & ``right``."""
    return b"\x7b" + _term(left) + _term(right) + target


def or_(left: Term, right: Term, target: bytes) -> bytes:
    """``target`` = ``left`` | ``right``."""
    return b"\x7d" + _term(left) + _term(right) + target


def lequal(left: Term, right: Term) -> bytes:
    """``left`` == ``right``: integers, strings or buffers."""
    return b"\x93" + _term(left) + _term(right)


def lnot(value: Term) -> bytes:
    """Whether ``value`` is zero."""
    return b"\x92" + _term(value)


def _numbered(first: int, number: int, count: int) -> bytes:
    if not 0 <= number < count:
        raise ValueError(f"number {number} of {count}")
    return bytes([first + number])


def _term(value: Term) -> bytes:
    return integer(value) if isinstance(value, int) else value


def _terms(values: tuple[Term, ...]) -> bytes:
    return b"".join(_term(value) for value in values)


def _package_length(body: bytes) -> bytes:
    """``body`` behind its PkgLength, which counts itself: 20.2.4."""
    if len(body) + 1 < 1 << 6:
        return bytes([len(body) + 1]) + body
    for more in (1, 2, 3):
        length = len(body) + 1 + more
        if length < 1 << 4 + 8 * more:
            return bytes([more << 6 | length & 0xF]) + (length >> 4).to_bytes(more, "little") + body
    raise ValueError(f"{len(body)} bytes are too many for one term")
