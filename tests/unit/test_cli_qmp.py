"""`kvmpy qmp`: what its arguments mean, and the list of commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvmpy.cli.main import main
from kvmpy.cli.qmp import parse_arguments, usages
from kvmpy.errors import ConfigError
from kvmpy.monitor import schema
from kvmpy.monitor.commands import COMMANDS
from tests.fakes.qmp import FakeMonitor, Handler, Refusal


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ([], {}),
        (["id=net1", "up=false", "n=5", "f=1.5", "x=null"], {"id": "net1", "up": False, "n": 5, "f": 1.5, "x": None}),
        (['name="5"', "mac=52:54:00:6f:55:cc"], {"name": "5", "mac": "52:54:00:6f:55:cc"}),
        (['l=["a",1]', 'o={"a":{"b":1}}'], {"l": ["a", 1], "o": {"a": {"b": 1}}}),
        (["a.b=1", "a.c.d=x", "e=2"], {"a": {"b": 1, "c": {"d": "x"}}, "e": 2}),
        (['a={"b":1}', "a.c=2"], {"a": {"b": 1, "c": 2}}),
        (["path=/a=b", "empty=", "nan=NaN", "half={"], {"path": "/a=b", "empty": "", "nan": "NaN", "half": "{"}),
    ],
)
def test_values_are_json_where_they_are_and_dots_make_objects(typed: list[str], meant: dict[str, Any]) -> None:
    assert parse_arguments(typed) == meant


@pytest.mark.parametrize(
    ("typed", "error"),
    [
        (["up"], "up: expected KEY=VALUE, where VALUE is JSON or else a string"),
        (["=1"], "=1: expected KEY=VALUE, where VALUE is JSON or else a string"),
        (["a.=1"], "a.=1: expected KEY=VALUE, where VALUE is JSON or else a string"),
        ([".a=1"], ".a=1: expected KEY=VALUE, where VALUE is JSON or else a string"),
        (["a=1", "a=2"], "a=2: a has been given a value before"),
        (["a.b=1", "a=2"], "a=2: a has been given a value before"),
        (["a=1", "a.b=2"], "a.b=2: a has been given a value that is no object"),
        (["a.b=1", "a.b.c=2"], "a.b.c=2: b has been given a value that is no object"),
    ],
)
def test_what_contradicts_itself_is_refused(typed: list[str], error: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_arguments(typed)
    assert str(refused.value) == error


def test_every_command_is_listed_with_its_arguments() -> None:
    lines = list(usages(schema.entries(COMMANDS.values())))
    assert [line.split()[0] for line in lines] == sorted(COMMANDS)
    assert "query-status" in lines
    assert "set_link name=STRING up=BOOLEAN" in lines
    assert "device_del id=STRING [force=BOOLEAN]" in lines
    assert "netdev_add type=tap id=STRING ..." in lines


def test_arguments_may_have_any_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVMPY_RUNTIME_DIR", str(tmp_path / "run"))
    with FakeMonitor("web1", {"x": lambda arguments: arguments}):
        assert main(["qmp", "web1", "x", "command=1", "self=2"]) == 0
    assert json.loads(capsys.readouterr().out) == {"command": 1, "self": 2}


def test_a_command_with_a_slip_in_its_name_is_answered_with_the_right_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: object) -> None:
        raise Refusal("The command migrate-cancel has not been found")

    monkeypatch.setenv("KVMPY_RUNTIME_DIR", str(tmp_path / "run"))
    handlers: dict[str, Handler] = {
        "query-qmp-schema": lambda _: schema.entries(COMMANDS.values()),
        "migrate-cancel": refuse,
    }
    with FakeMonitor("web1", handlers):
        assert main(["qmp", "web1", "migrate-cancel"]) == 1
    assert "migrate-cancel has not been found (did you mean 'migrate_cancel'?)" in capsys.readouterr().err


def test_events_are_printed_one_a_line_until_the_machine_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVMPY_RUNTIME_DIR", str(tmp_path / "run"))
    with FakeMonitor("web1", {}) as machine:

        def device_del(_: object) -> dict[str, Any]:
            machine.emit("UNPLUG_PRIMARY", device_id="hostdev0")
            machine.quit.set()  # it hangs up after its answer
            return {}

        machine.handlers["device_del"] = device_del
        assert main(["qmp", "web1", "device_del", "id=hostdev0", "--events"]) == 0
    reply, event = capsys.readouterr().out.splitlines()
    assert json.loads(reply) == {}
    told = json.loads(event)
    assert (told["event"], told["data"]) == ("UNPLUG_PRIMARY", {"device-id": "hostdev0"})
