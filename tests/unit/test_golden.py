"""What was once saved loads for ever (tests/golden says how the files are made)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvmpy.state import State, load, save
from tests.golden.make import NAMES, kind_of, path, sections

KINDS: dict[str, type[State]] = {name: kind_of(name) for name in NAMES}
VERSIONS = [(kind, version) for kind in KINDS.values() for version in range(1, kind.VERSION + 1)]


def golden(kind: type[State], version: int) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path(kind, version).read_text())
    return content


def as_json(value: Any) -> Any:
    """As it comes out of a stream: a tuple as a list."""
    return json.loads(json.dumps(value))


@pytest.mark.parametrize(("kind", "version"), VERSIONS)
@pytest.mark.parametrize("moment", ["power_on", "busy"])
def test_every_version_loads(kind: type[State], version: int, moment: str) -> None:
    assert isinstance(load(kind, golden(kind, version)[moment]), kind)


@pytest.mark.parametrize("kind", KINDS.values())
@pytest.mark.parametrize("moment", ["power_on", "busy"])
def test_current_version_saves_as_it_was_loaded(kind: type[State], moment: str) -> None:
    section = golden(kind, kind.VERSION)[moment]
    assert as_json(save(load(kind, section))) == section


@pytest.mark.parametrize("name", KINDS)
def test_layout_has_not_changed_without_a_new_version(name: str) -> None:
    kind = KINDS[name]
    assert as_json(sections(name)) == golden(kind, kind.VERSION)
