"""Tracepoints: off costs a truth test, on is one line for each listener."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator

import pytest

from kvmpy import trace
from kvmpy.trace import Tracepoint


class Listener:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def hear(self, line: str) -> None:
        self.lines.append(line)

    @property
    def said(self) -> list[str]:
        """The lines without time and thread."""
        return [line.split(" ", 2)[2] for line in self.lines]


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    trace.disable(listener.hear)


def test_tracepoint_is_false_until_somebody_listens(listener: Listener) -> None:
    point = Tracepoint("test.truth", "value")
    assert not point
    trace.enable("test.truth", listener.hear)
    assert point


def test_line_has_name_and_fields_with_numbers_in_hex(listener: Listener) -> None:
    point = Tracepoint("test.line", "device size level")
    trace.enable("test.line", listener.hear)
    point("com1", 16, True)
    assert listener.said == ["test.line device=com1 size=0x10 level=True"]


def test_line_begins_with_time_and_thread(listener: Listener) -> None:
    point = Tracepoint("test.prefix", "")
    trace.enable("test.prefix", listener.hear)
    point()
    assert listener.lines[0].split(" ")[1] == "MainThread"


def test_enable_takes_a_glob_and_says_what_it_matched(listener: Listener) -> None:
    Tracepoint("test.glob.b", "")
    Tracepoint("test.glob.a", "")
    Tracepoint("test.other", "")
    assert trace.enable("test.glob.*", listener.hear) == ["test.glob.a", "test.glob.b"]


def test_tracepoint_declared_later_obeys(listener: Listener) -> None:
    Tracepoint("test.later.early", "value")
    trace.enable("test.later*", listener.hear)
    point = Tracepoint("test.later", "value")
    point(1)
    assert listener.said == ["test.later value=0x1"]


def test_glob_that_matches_nothing_is_not_kept(listener: Listener) -> None:
    assert trace.enable("test.nothing", listener.hear) == []
    assert not Tracepoint("test.nothing", "")


def test_two_globs_that_match_give_one_line(listener: Listener) -> None:
    early = Tracepoint("test.twice.early", "")
    trace.enable("test.twice.*", listener.hear)
    trace.enable("test.*", listener.hear)
    late = Tracepoint("test.twice.late", "")
    early()
    late()
    assert [line.rstrip() for line in listener.said] == ["test.twice.early", "test.twice.late"]


def test_disabled_listener_hears_nothing_more_not_even_of_later_tracepoints(listener: Listener) -> None:
    early = Tracepoint("test.off.early", "")
    trace.enable("test.off.*", listener.hear)
    trace.disable(listener.hear)
    late = Tracepoint("test.off.late", "")
    assert not early
    assert not late


def test_disabling_one_listener_leaves_the_other(listener: Listener) -> None:
    point, other = Tracepoint("test.both", ""), Listener()
    trace.enable("test.both", listener.hear)
    trace.enable("test.both", other.hear)
    trace.disable(other.hear)
    point()
    assert (len(listener.lines), other.lines) == (1, [])


def test_tracepoint_declared_meanwhile_by_another_thread_disturbs_nobody(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = Tracepoint("test.disturbed", "")
    declared = dict(trace._all)
    monkeypatch.setattr(trace, "_all", declared)

    def match(name: str, glob: str) -> bool:
        declared[f"test.meanwhile.{len(declared)}"] = point
        return name == glob

    class Sink:
        def __call__(self, line: str) -> None:
            raise AssertionError("it hears nothing")

        def __eq__(self, other: object) -> bool:
            return match("", "other")

        __hash__ = None  # type: ignore[assignment]

    with monkeypatch.context() as patch:
        patch.setattr(fnmatch, "fnmatchcase", match)
        assert trace.enable("test.disturbed", listener.hear) == ["test.disturbed"]
    trace.disable(Sink())
    assert point


def test_wrong_number_of_values_is_a_programming_error(listener: Listener) -> None:
    point = Tracepoint("test.wrong", "one two")
    trace.enable("test.wrong", listener.hear)
    with pytest.raises(ValueError, match="zip"):
        point(1)


def test_names_lists_what_is_declared() -> None:
    Tracepoint("test.named", "")
    assert "test.named" in trace.names()
