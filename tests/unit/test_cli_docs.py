"""docs/exit-codes.md says what kvmpy says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

from kvmpy.cli.main import CONFIG_ERROR, HOST_ERROR
from kvmpy.cli.move import BLOCKED, CANCELLED, UNKNOWN
from kvmpy.machine.runstate import Outcome

HERE: Final = Path(__file__).parents[2]
PAGE: Final = (HERE / "docs/exit-codes.md").read_text()
CODES, ERRORS = PAGE.split("## Common errors")
SOURCE: Final = "".join(path.read_text() for path in sorted((HERE / "kvmpy").rglob("*.py")))
# A message may be written over two lines of source.
TEXT: Final = re.sub(r'"\s*f?"', "", SOURCE)


def test_every_exit_code_is_on_the_page() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", CODES, re.MULTILINE)}
    assert listed == {outcome.value for outcome in Outcome} | {HOST_ERROR, CONFIG_ERROR, BLOCKED, CANCELLED, UNKNOWN}


@pytest.mark.parametrize("words", re.findall(r"^\| `([^`]+)` \|", ERRORS, re.MULTILINE))
def test_each_error_on_the_page_is_one_that_kvmpy_says(words: str) -> None:
    assert words in TEXT


MIGRATION: Final = (
    (HERE / "docs/migration.md").read_text().partition("## What stands in the way")[2].partition("\n## ")[0]
)
FIRST_COLUMN: Final = "".join(re.findall(r"^\| (.*?) \|", MIGRATION, re.MULTILINE))


@pytest.mark.parametrize("words", re.findall(r"`([^`]+?)(?: \.\.\.[^`]*)?`", FIRST_COLUMN))
def test_each_obstacle_on_the_page_about_migration_is_one_that_kvmpy_names(words: str) -> None:
    assert words in TEXT
