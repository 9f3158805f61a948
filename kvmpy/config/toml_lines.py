"""A TOML document that knows where each key was written, so that a mistake found in it can be located.

tomllib gives the values and proves that the text is TOML, but keeps no positions. `key_lines` therefore goes through
the same text once more, for the keys alone; it believes that the text is valid. It runs when a place is first asked
for: a document without mistakes is not scanned. Keys set from outside, on a command line, are located there.

The text is untrusted. What a hostile one costs is bounded by SIZE_LIMIT, LEVELS_MAX and MISTAKES_SHOWN.
"""

from __future__ import annotations

import codecs
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from itertools import islice
from typing import Any, Final, Self

from kvmpy.errors import ConfigError, errno_name

Path = tuple[str | int, ...]
"""Keys and indices from the top of a document: ("device", 0, "bus")."""

Message = str | Callable[[], str]
"""What is wrong at a path. It is a function where it takes time to say: of very many mistakes, few are shown."""

SIZE_LIMIT: Final = 1 << 20  # bytes; a thousand devices need a tenth of it
LEVELS_MAX: Final = 16  # of keys, arrays and inline tables in one another; no configuration needs more than 4
MISTAKES_SHOWN: Final = 50
NAMES_COMPARED: Final = 100  # for "did you mean"
TEXT_SHOWN: Final = 60  # characters


class Document:
    """The ``data`` of a TOML text; ``file`` is what messages call it."""

    def __init__(self, text: str, file: str) -> None:
        """Raises ConfigError, with the line, where ``text`` is not TOML."""
        try:
            self.data: dict[str, Any] = _loads(text)
        except ValueError as e:  # a plain ValueError is an integer of more than 4300 digits
            raise ConfigError(_syntax_error(e, text, file)) from e
        self.file = file
        self._text = text
        self._outside: dict[Path, str] = {}  # what `set` put, and from where
        self._made: dict[Path, str] = {}  # the tables it made on the way; what else is missing in them is the file's

    @classmethod
    def read(cls, file: str) -> Self:
        """The document in a file; raises ConfigError where it cannot be read or is not TOML."""
        try:
            with open(file, "rb") as stream:
                raw = stream.read(SIZE_LIMIT + 1)
        except OSError as e:
            raise ConfigError(f"{file}: cannot be read: {errno_name(e.errno or 0)} ({e.strerror})") from e
        if len(raw) > SIZE_LIMIT:
            raise ConfigError(f"{file}: cannot be read: EFBIG (it has more than {SIZE_LIMIT >> 20} MiB)")
        if raw.startswith(codecs.BOM_UTF8):
            raise ConfigError(f"{file}:1: starts with a byte order mark (BOM); save it without one")
        try:
            return cls(raw.decode(), file)
        except UnicodeDecodeError as e:
            line = raw.count(b"\n", 0, e.start) + 1
            raise ConfigError(f"{file}:{line}: not UTF-8 (byte {raw[e.start]:#04x})") from e

    def path(self, key: str) -> Path:
        """What a key such as device[0].bus, device.0.bus or device.net1.bus (by id) stands for.

        Raises ValueError where it is not a key, or goes through what is neither a table nor an item of an array.
        """
        path: Path = ()
        value: Any = self.data
        rest = _key_parts(key)
        while rest:
            if isinstance(value, list):
                index, rest = _item(path, rest, value)
                path = (*path, index)
                value = value[index]
            elif isinstance(value, dict):
                part, *rest = rest
                path = (*path, part)
                value = value.get(part, {})  # a table that `set` would make
            else:
                raise ValueError(f"{key_text(path)} is neither a table nor an array")
        return path

    def set(self, key: str, value: object, place: str) -> None:
        """Put ``value`` at ``key``; mistakes in it are located at ``place``. Raises ValueError like `path`."""
        path = self.path(key)
        into: Any = self.data
        for depth, part in enumerate(path[:-1], 1):
            if isinstance(into, dict) and part not in into:
                into[part] = {}
                self._made[path[:depth]] = place
            into = into[part]
        into[path[-1]] = value
        self._outside = {old: said for old, said in self._outside.items() if old[: len(path)] != path}
        self._outside[path] = place

    def locate(self, path: Path) -> str:
        """Where ``path``, or else the nearest table around it, was written: "config.toml:12"."""
        place = self._place(path)
        return f"{self.file}:{place}" if isinstance(place, int) else place

    def names(self, path: Path) -> bool:
        """Whether `locate` names ``path`` already, as "--set machine.cpus" does."""
        return path in self._outside or path in self._made

    def report(self, mistakes: Mapping[Path, Message]) -> Iterable[str]:
        """Each mistake on a line, "config.toml:12: machine.cpus: what is wrong", as they come in the file.

        After the first MISTAKES_SHOWN, a last line says how many more there are.
        """

        def line(path: Path) -> int:
            place = self._place(path)
            return place if isinstance(place, int) else SIZE_LIMIT  # what is not in the file comes after it

        for path in sorted(mistakes, key=line)[:MISTAKES_SHOWN]:
            said = () if self.names(path) else (key_text(path),)
            message = mistakes[path]
            yield ": ".join((self.locate(path), *said, message if isinstance(message, str) else message()))
        if len(mistakes) > MISTAKES_SHOWN:
            yield f"{self.file}: and {len(mistakes) - MISTAKES_SHOWN} more, not shown"

    @cached_property
    def _lines(self) -> dict[Path, int]:
        return key_lines(self._text)

    def _place(self, path: Path) -> int | str:
        """What `set` was told about ``path`` or what holds it, else the line of the nearest of these, else the file."""
        holders = [path[:end] for end in range(len(path), 0, -1)]
        outside = (self._outside[holder] for holder in holders if holder in self._outside)
        lines = (self._lines[holder] for holder in holders if holder in self._lines)
        return next(outside, None) or self._made.get(path) or next(lines, None) or self.file


def key_lines(text: str) -> dict[Path, int]:
    """The line of every key, table and array item of ``text``, which is valid TOML. Lines count from 1."""
    scanner = _Scanner()
    scanner.scan(text)
    return scanner.lines


class _Scanner:
    """Goes through valid TOML and notes the line of each key. What it does not note, it has only to step over."""

    TOKEN = r"""
        (?P<blank> [ \t\r]+ | \#[^\n]* )
      | (?P<word>  \"{3} (?: [^\\] | \\. )*? \"{3,5} | '{3} .*? '{3,5} | " (?: [^"\\] | \\. )* " | '[^']*' | [\w-]+ )
      | (?P<mark>  . )
    """

    def __init__(self) -> None:
        self.lines: dict[Path, int] = {}
        self.sizes: dict[Path, int] = {}  # how many [[headers]] each array of tables has had
        self.table: Path = ()  # what the last header named
        self.header = 0  # the brackets open: 1 in [this], 2 in [[this]]
        self.key: list[str] = []  # the parts read so far
        self.value: Path | None = None  # whose value comes next; None where a key does
        self.inside: list[tuple[Path, int | None]] = []  # open arrays, with the item's index, and inline tables

    def scan(self, text: str) -> None:
        line = 1
        for match in re.finditer(self.TOKEN, text, re.VERBOSE | re.DOTALL):
            token = match[0]
            if match.lastgroup == "blank":
                continue
            if self.value is None:
                self.in_key(token, line)
            else:
                self.in_value(self.value, token, line)
            line += token.count("\n")

    def in_key(self, token: str, line: int) -> None:
        match token:
            case "[":
                self.header += 1
            case "]" if self.header:  # of two, the first counts
                self.table = self.header_path()
                if self.header == 2:
                    self.sizes[self.table] = self.sizes.get(self.table, 0) + 1
                    self.table = (*self.table, self.sizes[self.table] - 1)
                self.lines[self.table] = line
                self.header, self.key = 0, []
            case "=":
                self.value = self.key_path()
            case "}":  # of an empty inline table
                self.value, _ = self.inside.pop()
            case "." | "," | "]" | "\n":
                pass
            case _:
                self.key.append(_unquoted(token))
                self.lines.setdefault(self.header_path() if self.header else self.key_path(), line)

    def in_value(self, value: Path, token: str, line: int) -> None:
        if token not in ("]", "}", ",", "\n"):
            self.lines.setdefault(value, line)
        match token:
            case "[":
                self.inside.append((value, 0))
                self.value = (*value, 0)
            case "{":
                self.inside.append((value, None))
                self.value, self.key = None, []
            case "]" | "}":
                self.value, _ = self.inside.pop()
            case ",":
                array, index = self.inside.pop()
                self.inside.append((array, index if index is None else index + 1))
                self.value, self.key = (None if index is None else (*array, index + 1)), []
            case "\n" if not self.inside:
                self.value, self.key = None, []

    def key_path(self) -> Path:
        return (*(self.inside[-1][0] if self.inside else self.table), *self.key)

    def header_path(self) -> Path:
        """A header goes through the last item of each array of tables on its way."""
        path: Path = ()
        for part in self.key:
            path = (*path, self.sizes[path] - 1, part) if path in self.sizes else (*path, part)
        return path


def key_text(path: Path) -> str:
    """A path as people write it: "device[0].bus"."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{plain(part)}" for part in path).removeprefix(".")


def plain(text: str) -> str:
    """``text``, whatever it may hold, as a message can show it: printable, on one line, and not long."""
    shown = text if text.isprintable() else ascii(text)[1:-1]
    return shown if len(shown) <= TEXT_SHOWN else f"{shown[: TEXT_SHOWN - 1]}…"


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """ " (did you mean 'memory'?)" for the name nearest to ``word``; empty where none is near.

    Comparing takes long: nothing is near to a long word, and of very many names only the first are looked at.
    """
    import difflib  # costs 2 ms, and most documents have no mistake

    if len(word) > TEXT_SHOWN:
        return ""
    near = difflib.get_close_matches(word, list(islice(names, NAMES_COMPARED)), 1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def parse_value(text: str) -> object:
    """What ``text`` is as a TOML value, or the text itself where it is none: so --set needs few quotes."""
    try:
        data = _loads(f"value = {text}")
    except ValueError:
        return text
    return data["value"] if data.keys() == {"value"} else text


def _key_parts(key: str) -> list[str]:
    try:
        value: Any = _loads(re.sub(r"\[(\d+)]", r".\1", key) + " = 0")
    except ValueError as e:
        raise ValueError(f"'{plain(key)}' is not a key") from e
    parts = []
    while isinstance(value, dict):
        [(part, value)] = value.items()
        parts.append(part)
    return parts


def _item(path: Path, parts: list[str], items: list[Any]) -> tuple[int, list[str]]:
    """The index that ``parts`` begin with, as a number or the id of an item, and the parts after it.

    An id may have dots. Of several the longest is meant, but one before a key rather than one that is all there is.
    """
    part = parts[0]
    if re.fullmatch(r"[0-9]{1,9}", part):
        if int(part) < len(items):
            return int(part), parts[1:]
        others = f", only {len(items)} of them" if items else ""
        raise ValueError(f"there is no {key_text((*path, int(part)))}{others}")
    ids = [str(item.get("id")) if isinstance(item, dict) else "" for item in items]
    for end in (*range(len(parts) - 1, 0, -1), len(parts)):
        if (name := ".".join(parts[:end])) in ids:
            return ids.index(name), parts[end:]
    raise ValueError(f"no {key_text(path)} has the id '{plain(part)}'{did_you_mean(part, ids)}")


def _unquoted(token: str) -> str:
    if "\\" in token:
        return str(tomllib.loads(f"key = {token}")["key"])
    return token[1:-1] if token[0] in "\"'" else token


class _TooDeepError(ValueError):
    """Perhaps TOML, but it goes more than LEVELS_MAX deep on this line, so it is not read."""

    def __init__(self, line: int) -> None:
        super().__init__(line)
        self.line = line


def _loads(text: str) -> dict[str, Any]:
    """The data of a TOML text. Raises ValueError where it is none, or goes too deep."""
    _check_levels(text)  # first, as the time and memory that tomllib needs grow with the square of a key's parts
    return tomllib.loads(text)


def _check_levels(text: str) -> None:
    """Raise _TooDeepError where ``text`` goes more than LEVELS_MAX deep, in a time that grows with its length.

    Up to its first error, if it has one, the text is understood as tomllib does; there tomllib stops.
    """
    around: list[tuple[int, str]] = []  # the open arrays and inline tables: the level each is at, and its bracket
    level = 1  # of the part of a key, or the value, that is being read
    in_value = False
    for mark, position in _marks(text):
        if mark == ".":
            level += not in_value  # in a value it is a number's
        elif mark == "=":
            in_value = True
        elif mark in "[{":
            if in_value:  # a header's do not count
                around.append((level, mark))
                level += 1
                in_value = mark == "["
        elif mark in "]}":
            if around:
                level, _ = around.pop()
                in_value = True
        elif around:  # a comma, or the end of a line in an array
            outer, bracket = around[-1]
            level, in_value = outer + 1, bracket == "["
        else:
            level, in_value = 1, False
        if level > LEVELS_MAX:
            raise _TooDeepError(text.count("\n", 0, position) + 1)


# Strings and comments are stepped over. A string without an end is not TOML; it lasts to the end of what it may hold.
_MARKS: Final = r"""
    " (?: "" (?: [^"\\]++ | \\. | "(?!"") )*+ (?: "{3,5} | \Z ) | (?: [^"\\\n]++ | \\. )*+ "? )
  | ' (?: '' (?: [^']++ | '(?!'') )*+ (?: '{3,5} | \Z ) | [^'\n]*+ '? )
  | \#[^\n]*+
  | (?P<mark> [.,=\[\]{}] | \n++ )
"""


def _marks(text: str) -> Iterator[tuple[str, int]]:
    for match in re.finditer(_MARKS, text, re.VERBOSE | re.DOTALL):
        if mark := match["mark"]:
            yield mark, match.start()


def _syntax_error(error: Exception, text: str, file: str) -> str:
    """tomllib says the line within its text, or that it met the end."""
    if isinstance(error, _TooDeepError):
        return f"{file}:{error.line}: more than {LEVELS_MAX} keys, arrays and inline tables in one another"
    said = str(error)
    found = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", said, re.DOTALL)
    if not found:
        return f"{file}: not TOML: {said}"
    line = found[2] or text.rstrip("\n").count("\n") + 1
    return f"{file}:{line}: not TOML: {found[1][0].lower()}{found[1][1:]}"
