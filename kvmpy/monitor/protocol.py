"""QMP on the wire: a stream of JSON objects in, CRLF-ended objects out.

Clients send no newline, and an object may come in pieces or several at once, so the stream is cut at the brackets that
balance, not at lines. What is found never depends on how the bytes came in pieces. Input is bounded in length and in
depth. Specified in QEMU's docs/interop/qmp-spec.rst.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, Final, NoReturn

import msgspec

from kvmpy.errors import CommandError, KvmpyError

# No command of ours comes near either. The depth stays far from Python's own limit, which echoing an id would meet.
LONGEST_REQUEST: Final = 64 << 10
DEEPEST_REQUEST: Final = 64
EOL: Final = b"\r\n"
# What means something between requests, in what is none, inside one, and inside a string of one.
BETWEEN: Final = re.compile(rb"[^ \t\r\n\xff]")
GARBAGE_END: Final = re.compile(rb"[ \t\r\n{\xff]")
STRUCTURE: Final = re.compile(rb'["{}\[\]\xff]')
STRING: Final = re.compile(rb'["\\\x00-\x1f\xff]')
# No UTF-8 has this byte. A client sends it to be rid of what it may have left unfinished.
RESYNC: Final = 0xFF


class Parser:
    """Cuts a byte stream into JSON objects. What is wrong is found in its place, as the CommandError to answer with."""

    def __init__(self) -> None:
        self._pending = bytearray()  # from where the unfinished object begins
        self._at = 0  # this much of it has been looked at
        self._depth = 0
        self._in_string = False
        self._in_garbage = False
        self.broken = False
        """A request was beyond all limits. Where the next begins nobody can tell: nothing more is found."""

    def feed(self, data: bytes) -> list[Any]:
        """The objects that ``data`` completes, and a CommandError for each thing in between that is none."""
        found: list[Any] = []
        if not self.broken:
            self._pending += data
        while not self.broken and self._scan(found):
            pass
        return found

    def _scan(self, found: list[Any]) -> bool:
        """Look at what comes next; False where more has to come first."""
        if self._in_garbage:
            return self._skip_garbage()
        if not self._depth:
            return self._begin(found)
        mark = (STRING if self._in_string else STRUCTURE).search(self._pending, self._at)
        self._at = mark.end() if mark else len(self._pending)
        if self._at > LONGEST_REQUEST:
            self._break(found, f"longer than {LONGEST_REQUEST} bytes")
        elif mark is None:
            return False
        elif mark[0][0] == RESYNC:
            self._drop(self._at)
        elif self._in_string:
            return self._string_mark(mark[0], found)
        else:
            self._structure_mark(mark[0], found)
        return True

    def _string_mark(self, mark: bytes, found: list[Any]) -> bool:
        if mark == b'"':
            self._in_string = False
        elif mark != b"\\":  # a control character: most likely the end of a line that somebody typed
            self._drop(self._at)
            found.append(CommandError("JSON parse error: a control character in a string"))
        elif self._at == len(self._pending):
            self._at -= 1  # what it escapes is still to come
            return False
        elif self._pending[self._at] in b'"\\':
            self._at += 1
        return True

    def _structure_mark(self, mark: bytes, found: list[Any]) -> None:
        if mark == b'"':
            self._in_string = True
        elif mark in b"{[":
            self._depth += 1
            if self._depth > DEEPEST_REQUEST:
                self._break(found, f"nested more than {DEEPEST_REQUEST} deep")
        else:
            self._depth -= 1
            if not self._depth:
                self._complete(found)

    def _begin(self, found: list[Any]) -> bool:
        start = BETWEEN.search(self._pending)
        self._drop(start.start() if start else len(self._pending))
        if start is None:
            return False
        if self._pending[0] == ord("{"):
            self._at, self._depth = 1, 1
        else:
            self._in_garbage = True
            found.append(CommandError("JSON parse error: expected an object"))
        return True

    def _skip_garbage(self) -> bool:
        end = GARBAGE_END.search(self._pending)
        self._drop(end.start() if end else len(self._pending))
        self._in_garbage = end is None
        return end is not None

    def _complete(self, found: list[Any]) -> None:
        text = bytes(self._pending[: self._at])
        self._drop(self._at)
        try:
            found.append(json.loads(text, parse_constant=_refuse, parse_float=_finite))
        except ValueError:  # not JSON, not UTF-8, or a number of thousands of digits
            found.append(CommandError("JSON parse error"))

    def _break(self, found: list[Any], why: str) -> None:
        self.broken = True
        self._pending.clear()
        found.append(CommandError(f"JSON parse error: {why}"))

    def _drop(self, end: int) -> None:
        del self._pending[:end]
        self._at, self._depth, self._in_string = 0, 0, False


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")  # Python's decoder takes NaN and Infinity


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError("a number without bounds could not be echoed")
    return number


def reply(result: object, request: object) -> bytes:
    """The answer to ``request``, which may be no object at all: a client's id comes back whatever it is."""
    return _message("return", result, request)


def error(e: KvmpyError, request: object) -> bytes:
    """The answer that says why not."""
    kind = e.kind if isinstance(e, CommandError) else "GenericError"
    return _message("error", {"class": kind, "desc": str(e)}, request)


def greeting(version: object) -> bytes:
    """What the server says first. Out-of-band execution is not offered, nor anything else."""
    return encode({"QMP": {"version": version, "capabilities": []}}) + EOL


def event(name: str, data: dict[str, Any], at_ns: int) -> bytes:
    """An event, stamped with when it happened, by the wall clock in ns."""
    stamp = {"seconds": at_ns // 10**9, "microseconds": at_ns % 10**9 // 1000}
    return encode({"event": name, **({"data": data} if data else {}), "timestamp": stamp}) + EOL


def encode(value: object) -> bytes:
    """As JSON in ASCII, as QEMU's is."""
    if isinstance(value, msgspec.Raw):  # it is so already
        return bytes(value)
    return json.dumps(msgspec.to_builtins(value, enc_hook=_plain), separators=(",", ":")).encode()


def _plain(value: object) -> object:
    """The configuration's values are strings and numbers with a check."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    raise TypeError(f"{type(value).__name__} has no place in a message")


def _message(what: str, content: object, request: object) -> bytes:
    message = b'{"%s":%s' % (what.encode(), encode(content))
    if isinstance(request, dict) and "id" in request:
        message += b',"id":' + json.dumps(request["id"], separators=(",", ":")).encode()
    return message + b"}" + EOL
