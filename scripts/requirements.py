"""Writes docs/requirements.md from the names of tests; with --check, only says whether it is up to date.

requirements.toml has the texts. A test says by its name which of them it proves: `test_r9_r10_a_primary_is_hidden` is
a proof of R9 and R10, and the rest is what the page says of it. Tests are read, not imported.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).parent.parent
PAGE: Final = ROOT / "docs" / "requirements.md"
TEXTS: Final = Path(__file__).with_suffix(".toml")
TESTS: Final = ROOT / "tests"
NAME: Final = re.compile(r"test_((?:r\d+_)+)(\w+)")
LINUX: Final = "lab"
"""The directory of the tests that have a Linux guest."""

HEAD: Final = """\
# What a failover pair is held to, and what proves it

[Failover pairs](failover.md) are built to the numbered requirements below. A test that proves one has its number in its
name (`test_r9_r10_...`); this page is made of these names by `scripts/requirements.py`, so it says what is tested, not
what is intended. `tests/unit` needs nothing, `tests/kvm` runs small programs on a real kernel, `tests/lab` Linux guests
with real drivers on [emulated hosts](lab.md), with NICs to pass through.
"""


class Requirement(NamedTuple):
    """One of them; ``needs`` is what it takes to prove it: "unit", "guest" or "function"."""

    part: str
    needs: str
    text: str
    remark: str = ""


class Proof(NamedTuple):
    """One that proves something: its file below `tests`, and what it says."""

    file: str
    says: str


def requirements() -> dict[int, Requirement]:
    """All, by their numbers, in their order."""
    parts = tomllib.loads(TEXTS.read_text())
    return {
        int(name[1:]): Requirement(part, *entry) for part, entries in parts.items() for name, entry in entries.items()
    }


def proofs(directory: Path = TESTS) -> dict[int, list[Proof]]:
    """The tests of each number that has any."""
    found: defaultdict[int, list[Proof]] = defaultdict(list)
    for path in sorted(directory.rglob("test_*.py")):
        source = path.read_text()
        if not re.search(r"def test_r\d", source):  # most have none, and reading one takes long
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and (name := NAME.fullmatch(node.name)):
                for number in re.findall(r"\d+", name[1]):
                    found[int(number)].append(Proof(str(path.relative_to(directory)), name[2].replace("_", " ")))
    return dict(found)


def page() -> str:
    """The whole page."""
    known, proven = requirements(), proofs()
    lines = [HEAD, *summary(known, proven)]
    for part in dict.fromkeys(each.part for each in known.values()):
        lines += ["", f"## {part}"]
        for number, each in known.items():
            if each.part == part:
                lines += ["", *section(number, each, proven.get(number, []))]
    return "\n".join([*lines, ""])


def summary(known: Mapping[int, Requirement], proven: Mapping[int, Sequence[Proof]]) -> Iterator[str]:
    """How many are proven, and which are not."""
    nothing = [number for number in known if not proven.get(number)]
    without = [number for number, each in known.items() if number not in nothing and lacks_guest(each, proven[number])]
    tests = {test for found in proven.values() for test in found}
    yield f"**{len(known) - len(nothing)} of {len(known)}** are proven, by {len(tests)} tests."
    yield ""
    yield f"Nothing proves yet: {named(nothing)}."
    yield ""
    yield f"About Linux guests, and proven without one so far: {named(without)}."


def named(numbers: Sequence[int]) -> str:
    return ", ".join(f"[R{number}](#r{number})" for number in numbers) or "none"


def lacks_guest(each: Requirement, tests: Sequence[Proof]) -> bool:
    """It is about what Linux makes of it, and no test has a Linux guest."""
    return each.needs != "unit" and not any(test.file.startswith(f"{LINUX}/") for test in tests)


def section(number: int, each: Requirement, tests: Sequence[Proof]) -> Iterator[str]:
    """A requirement and its tests."""
    yield f"### R{number}"
    yield ""
    yield f"{each.text} {each.remark}".strip()
    yield ""
    yield from (f"- {test.says}: [{test.file}](../tests/{test.file})" for test in tests)
    if not tests:
        yield "- *nothing proves it yet*"


def main() -> int:
    """0 where the page is as the tests say, or was made so; 1 where --check finds a difference."""
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page())
    elif not PAGE.exists() or PAGE.read_text() != page():
        print(f"{PAGE.name} is not what the tests' names say: run scripts/requirements.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
