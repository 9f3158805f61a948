"""Where the keys of a TOML document are, against what tomllib finds in it."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from functools import partial
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.config.toml_lines import Document, Path, did_you_mean, key_lines, key_text, parse_value, plain
from kvmpy.errors import ConfigError

DOCUMENT = '''\
# a comment with a key = 1
name = "web1"
text = """
[not.a.table]
no_key = 1
"""
"quoted \\u00e9".'literal' = 'it # is'

[machine]  # [nor.this]
sizes = [
  1,  # [x]
  [2, 3],
]
inline = { a = 1, b = { c = [{ d = 1 }, { d = 2 }] } }

[[device]]
id = "net1"

  [device.options]
  x.y = 1

[[device]]
id = "net2"
[[device.port]]
number = 1
[[device.port]]
number = 2
'''


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("name",), 2),
        (("text",), 3),
        (("quoted é",), 7),
        (("quoted é", "literal"), 7),
        (("machine",), 9),
        (("machine", "sizes"), 10),
        (("machine", "sizes", 0), 11),
        (("machine", "sizes", 1), 12),
        (("machine", "sizes", 1, 1), 12),
        (("machine", "inline", "b", "c", 1, "d"), 14),
        (("device",), 16),
        (("device", 0), 16),
        (("device", 0, "options"), 19),
        (("device", 0, "options", "x", "y"), 20),
        (("device", 1), 22),
        (("device", 1, "id"), 23),
        (("device", 1, "port"), 24),
        (("device", 1, "port", 1), 26),
        (("device", 1, "port", 1, "number"), 27),
    ],
)
def test_a_key_has_the_line_it_was_written_on(path: Path, line: int) -> None:
    assert key_lines(DOCUMENT)[path] == line


def test_what_is_no_key_has_no_line() -> None:
    assert set(key_lines(DOCUMENT)) == set(paths(tomllib.loads(DOCUMENT)))


def test_an_explicit_table_has_the_line_of_its_own_header() -> None:
    assert key_lines("[a.b]\n[a]\n")[("a",)] == 2


def test_carriage_returns_do_not_count_as_lines() -> None:
    assert key_lines('a = """\r\n"""\r\nb = 1\r\n') == {("a",): 1, ("b",): 3}


def paths(value: object, path: Path = ()) -> Iterator[Path]:
    """Every key and item in what tomllib gave."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    for part, item in inner:
        yield (*path, part)
        yield from paths(item, (*path, part))


SCALARS = st.sampled_from(
    [
        "1",
        "true",
        "+1.5e3",
        "0x1F",
        "inf",
        "1979-05-27T07:32:00Z",
        "1979-05-27 07:32:00",
        "[]",
        "{}",
        '""',
        '"a#b"',
        r'"\\\"["',
        '"] } , = # "',
        "''",
        r"'\'",
        "'\"'",
        '""""""',
        '""""q"""""',
        r'"""a\"""b\\"""',
        '"""\n[a]\nb = 1\n"""',
        "''''''",
        "'''x\n'''''",
        r"'''\'''",
    ]
)
FLAGS = st.booleans()
BLANKS = st.sampled_from(["", " ", "\t", "\n", " # a ] } = , comment\n", "\r\n\n"])
TAILS = st.text(st.sampled_from("a-_ .#[]{}=\"'\\é\n\t,"), max_size=3)


class Writer:
    """Draws a TOML document. Every key begins with a word of its own, so that the line it is on proves itself."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.numbers = count()

    def key(self) -> str:
        text = f"k{next(self.numbers):04}" + self.draw(TAILS)
        forms = [json.dumps(text), json.dumps(text, ensure_ascii=False)]
        if not set(text) & set("'\n"):
            forms.append(f"'{text}'")
        if not set(text) - set("k0123456789a-_"):
            forms.append(text)
        return self.draw(st.sampled_from(forms))

    def keys(self, most: int) -> str:
        dot = self.draw(st.sampled_from([".", " . "]))
        return dot.join(self.key() for _ in range(self.draw(st.integers(1, most))))

    def value(self, depth: int) -> str:
        kind = self.draw(st.sampled_from(["scalar", "array", "table"])) if depth else "scalar"
        number = range(self.draw(st.integers(0, 3)))
        if kind == "array":
            items = [self.draw(BLANKS) + self.value(depth - 1) + self.draw(BLANKS) for _ in number]
            return f"[{','.join(items)}{',' if self.draw(FLAGS) and items else ''}]"
        if kind == "table":
            return "{" + ", ".join(f"{self.keys(2)} = {self.value(depth - 1)}" for _ in number) + "}"
        return self.draw(SCALARS)

    def statements(self) -> str:
        number = range(self.draw(st.integers(0, 3)))
        return "".join(f"{self.keys(3)} = {self.value(3)} # k = 1\n{self.draw(BLANKS).strip(' ')}\n" for _ in number)

    def document(self) -> str:
        parts = [self.statements()]
        headers: list[str] = []
        for _ in range(self.draw(st.integers(0, 4))):
            again = self.draw(st.sampled_from(["", *headers]))
            deeper = self.draw(FLAGS)
            if again and not deeper:
                header = again
            else:
                header = f"{again}.{self.keys(2)}".removeprefix(".")
                if self.draw(FLAGS):
                    parts.append(f"[{header}]\n{self.statements()}")
                    continue
                headers.append(header)
            parts.append(f"[[ {header} ]]\n{self.statements()}")
        return "".join(parts)


@st.composite
def documents(draw: st.DrawFn) -> str:
    return Writer(draw).document()


@given(documents())
def test_every_key_that_tomllib_finds_is_on_its_line(text: str) -> None:
    lines = key_lines(text)
    found = set(paths(tomllib.loads(text)))
    written = text.split("\n")
    assert set(lines) == found
    assert [path for path in found if isinstance(path[-1], str) and path[-1][:5] not in written[lines[path] - 1]] == []


@given(st.text(st.sampled_from("ab=[]{}.,'\"\\# \n1"), max_size=40))
def test_no_valid_document_is_too_odd_to_scan(text: str) -> None:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    assert set(key_lines(text)) == set(paths(data))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a = 1\nb = \n", "f.toml:2: not TOML: invalid value"),
        ("a = 1\na = 2\n", "f.toml:2: not TOML: cannot overwrite a value"),
        ('a = 1\n\nb = "x', "f.toml:3: not TOML: unterminated string"),
        ("[a\n", "f.toml:1: not TOML: expected ']' at the end of a table declaration"),
    ],
)
def test_what_is_not_toml_is_refused_with_its_line(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Document(text, "f.toml")
    assert refused.value.problems == (problem,)


DEEP = "more than 16 keys, arrays and inline tables in one another"


@pytest.mark.parametrize(
    "text",
    [
        ".".join(["a"] * 17) + " = 1",
        " . ".join(["'a.b'", '"c.d"', "e"] * 6) + " = 1",
        ".".join(["a"] * (1 << 19)) + "=1",
        f"[{'.'.join(['a'] * 17)}]",
        f"[[ {'.'.join(['a'] * 17)} ]]",
        "a = " + "[" * 16 + "]" * 16,
        "a = " + "[" * 5000,
        "a = " + "{a=" * 5000,
        "a = [" + "[" * 15 + "]" * 15 + ", [1.5], " + "[" * 15,
        "a.a.a.a.a.a.a.a = [1.5, {a.a.a.a = [], b.b.b = 1, a.a.a.a.a.a.a.a = 1}]",
        "a = { b.b.b.b.b.b.b.b = [ { c.c.c.c.c.c.c = 1 } ] }",
    ],
)
def test_what_goes_too_deep_is_refused_with_its_line_before_tomllib_sees_it(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tomllib, "loads", None)
    with pytest.raises(ConfigError) as refused:
        Document(f'''# ]]\n"#" = """\n"\\""""" # [\n{text}\n''', "f.toml")
    assert refused.value.problems == (f"f.toml:4: {DEEP}",)


@pytest.mark.parametrize(
    "text",
    [
        ".".join(["a"] * 16) + " = 1.5\n" + ".".join(["b"] * 16) + " = 1979-05-27T07:32:00.5Z",
        f"[{'.'.join(['a'] * 16)}]\n" + ".".join(["b"] * 16) + " = 1",
        f"[[{'.'.join(['a'] * 16)}]]\r\n" + ".".join(["b"] * 16) + " = 1",
        "a = " + "[" * 15 + "]" * 15,
        "a.b = " + "{c.d=" * 7 + "1.5" + "}" * 7,
        "a = [" + "1.5, " * 99 + "]",
        "a = [\n" + "{b.c = 1.5, d = [1.5]}, # .[{\n" * 99 + "]",
        "# " + ".[{" * 99 + "\na = 1",
        "'" + ".[{" * 99 + "' = 1",
        'a = "' + r"\".[{" * 99 + '"',
        "a = '" + ".[{" * 99 + "'",
        'a = """' + '""\n.[{\\"' * 99 + '"""""',
        "a = '''" + "''\n.[{" * 99 + "'''''",
    ],
)
def test_what_is_as_deep_as_may_be_is_read_and_what_only_looks_deep_too(text: str) -> None:
    assert Document(text, "f.toml").data == tomllib.loads(text)


def depth(value: object) -> int:
    """How deep tomllib's data is. An empty array or table counts what could be in it."""
    if not isinstance(value, dict | list):
        return 0
    return 1 + max((depth(item) for item in (value.values() if isinstance(value, dict) else value)), default=0)


@given(st.text(st.sampled_from("ab=[]{}.,'\"\\# \n1"), max_size=60) | documents())
def test_a_valid_document_is_refused_only_if_it_is_too_deep(text: str) -> None:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    try:
        read = Document(text, "f.toml").data
    except ConfigError as e:
        refused = e.problems[0]
    else:
        assert read == data
        return
    assert refused.endswith(DEEP)
    assert depth(data) >= 16


@given(documents())
def test_no_document_of_few_levels_is_refused(text: str) -> None:
    assert Document(text, "f.toml").data == tomllib.loads(text)


@given(documents(), st.integers(17, 40), st.sampled_from(["{} = 1", "[{}]", "[[{}]]", "a = {{ {} = 1 }}"]))
def test_a_key_that_is_too_deep_is_found_after_any_document(text: str, parts: int, form: str) -> None:
    line = text.count("\n") + 2
    with pytest.raises(ConfigError) as refused:
        Document(f"{text}\n{form.format('.'.join(['a'] * parts))}\n{text}", "f.toml")
    assert refused.value.problems == (f"f.toml:{line}: {DEEP}",)


def test_an_integer_without_end_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^f\.toml: not TOML: Exceeds the limit"):
        Document("a = " + "9" * 5000, "f.toml")


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("name", ("name",)),
        ("device[1].id", ("device", 1, "id")),
        ("device.1.id", ("device", 1, "id")),
        ("device.net2.id", ("device", 1, "id")),
        ('"quoted é".literal', ("quoted é", "literal")),
        ("not.there.yet", ("not", "there", "yet")),
    ],
)
def test_an_item_is_found_by_number_and_by_id(key: str, path: Path) -> None:
    assert Document(DOCUMENT, "f.toml").path(key) == path


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("", "'' is not a key"),
        ("a b", "'a b' is not a key"),
        ("a\nb", r"'a\\nb' is not a key"),
        (".".join(["a"] * 17), "'a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a' is not a key"),
        ("name.x", "name is neither a table nor an array"),
        ("device.2.id", r"there is no device\[2\], only 2 of them"),
        ("device.net3.id", r"no device has the id 'net3' \(did you mean 'net2'\?\)"),
        ("machine.sizes.x", "no machine.sizes has the id 'x'"),
    ],
)
def test_a_key_that_leads_nowhere_is_refused(key: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Document(DOCUMENT, "f.toml").path(key)


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("device.net.1.mac", ("device", 0, "mac")),
        ("device.slot.3", ("device", 3)),
        ('device."net.1".mac', ("device", 0, "mac")),
        ("device.net.mac", ("device", 1, "mac")),
        ("device.net.mac.mac", ("device", 2, "mac")),
    ],
)
def test_an_id_may_have_dots(key: str, path: Path) -> None:
    text = "".join(f'[[device]]\nid = "{name}"\n' for name in ("net.1", "net", "net.mac", "slot.3"))
    assert Document(text, "f.toml").path(key) == path


def test_a_key_set_from_outside_is_located_there_with_all_below_it() -> None:
    document = Document(DOCUMENT, "f.toml")
    document.set("device[1].port[0].number", 3, "--set number")
    document.set("device.1", {"id": "x"}, "--set device.1")
    assert document.data["device"][1] == {"id": "x"}
    assert document.locate(("device", 1, "port", 0, "number")) == "--set device.1"
    assert document.locate(("device", 0, "id")) == "f.toml:17"


def test_setting_a_key_makes_the_tables_on_its_way() -> None:
    document = Document("", "f.toml")
    document.set("boot.extra.kernel", "x", "--set")
    assert document.data == {"boot": {"extra": {"kernel": "x"}}}


@pytest.mark.parametrize(
    ("path", "place"),
    [
        (("machine", "inline"), "f.toml:14"),
        (("machine", "absent"), "f.toml:9"),
        (("device", 1, "absent", "deeper"), "f.toml:22"),
        (("absent",), "f.toml"),
        ((), "f.toml"),
    ],
)
def test_an_absent_key_is_located_at_the_table_around_it(path: Path, place: str) -> None:
    assert Document(DOCUMENT, "f.toml").locate(path) == place


def test_mistakes_are_reported_in_the_order_of_the_file() -> None:
    mistakes: dict[Path, str] = {("absent",): "c", ("device", 1, "id"): "b", ("name",): "a"}
    assert list(Document(DOCUMENT, "f.toml").report(mistakes)) == [
        "f.toml:2: name: a",
        "f.toml:23: device[1].id: b",
        "f.toml: absent: c",
    ]


def test_of_very_many_mistakes_the_first_are_reported_and_no_time_is_spent_on_the_others() -> None:
    document = Document("".join(f"k{number} = 1\n" for number in range(60)), "f.toml")
    said: list[int] = []

    def message(number: int) -> str:
        said.append(number)
        return "x"

    report = list(document.report({(f"k{number}",): partial(message, number) for number in reversed(range(53))}))
    assert report[:2] == ["f.toml:1: k0: x", "f.toml:2: k1: x"]
    assert report[49:] == ["f.toml:50: k49: x", "f.toml: and 3 more, not shown"]
    assert said == list(range(50))


def test_as_many_mistakes_as_are_shown_are_all_of_them() -> None:
    document = Document("", "f.toml")
    assert len(list(document.report({(f"k{number}",): "x" for number in range(50)}))) == 50


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("true", True),
        ('"1"', "1"),
        ("[1, 2]", [1, 2]),
        ("{a = 1}", {"a": 1}),
        ("", ""),
        ("tap-web1", "tap-web1"),
        ("console=ttyS0 quiet", "console=ttyS0 quiet"),
        ("1\nother = 2", "1\nother = 2"),
        ("9" * 5000, "9" * 5000),
        ("[" * 5000, "[" * 5000),
        ("{" + ".".join(["a"] * 5000) + " = 1}", "{" + ".".join(["a"] * 5000) + " = 1}"),
    ],
)
def test_a_value_that_is_not_toml_is_the_string_itself(text: str, value: object) -> None:
    assert parse_value(text) == value


@pytest.mark.parametrize(
    ("path", "text"),
    [((), ""), (("a",), "a"), (("a", 0, "b", 1), "a[0].b[1]"), (("a\nb",), r"a\nb"), (("x" * 99,), "x" * 59 + "…")],
)
def test_a_path_is_shown_on_one_line(path: Path, text: str) -> None:
    assert key_text(path) == text


@given(st.text())
def test_plain_text_is_printable_and_short(text: str) -> None:
    shown = plain(text)
    assert shown.isprintable()
    assert len(shown) <= 60


def test_only_a_near_name_is_suggested() -> None:
    assert did_you_mean("memoryy", ["memory", "cpus"]) == " (did you mean 'memory'?)"
    assert did_you_mean("zzz", ["memory", "cpus"]) == ""


def test_a_near_name_is_looked_for_among_a_bounded_number_of_names_and_not_for_a_long_word() -> None:
    names = [f"{number:08}" for number in range(99)]
    assert did_you_mean("memoryy", [*names, "memory"]) == " (did you mean 'memory'?)"
    assert did_you_mean("memoryy", [*names, "x", "memory"]) == ""
    assert did_you_mean("m" * 60, ["m" * 61]) == f" (did you mean '{'m' * 61}'?)"
    assert did_you_mean("m" * 61, ["m" * 61]) == ""
