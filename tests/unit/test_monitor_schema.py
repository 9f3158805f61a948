"""What the monitor says of itself: query-qmp-schema, docs/qmp.md, and the events that the code really sends."""

from __future__ import annotations

import ast
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from kvmpy.monitor import schema
from kvmpy.monitor.commands import COMMANDS
from kvmpy.monitor.events import EVENTS, Event, ShutdownCause
from kvmpy.monitor.table import struct_fields
from scripts import qmp_reference
from tests.fakes.loop import BOUND

SOURCE: Final = Path(schema.__file__).parents[1]
ENTRIES: Final = schema.entries(COMMANDS.values())
BY_NAME: Final = {entry["name"]: entry for entry in ENTRIES}
DECLARED: Final = {event.NAME: event for event in EVENTS}


def references(entry: dict[str, Any]) -> list[str]:
    """The types that an entry names."""
    members = [*entry.get("members", []), *entry.get("variants", [])]
    named = [entry[key] for key in ("arg-type", "ret-type", "element-type") if key in entry]
    return named + [member["type"] for member in members if "type" in member]


def test_every_name_is_described_once_and_every_command_and_event_is_there() -> None:
    assert len(BY_NAME) == len(ENTRIES)
    assert {e["name"] for e in ENTRIES if e["meta-type"] == "command"} == set(COMMANDS)
    assert {e["name"] for e in ENTRIES if e["meta-type"] == "event"} == set(DECLARED)


def test_what_an_entry_refers_to_is_a_type_that_is_described() -> None:
    missing = [name for entry in ENTRIES for name in references(entry) if name not in BY_NAME]
    assert missing == []
    named = {name for entry in ENTRIES for name in references(entry)}
    assert {e["name"] for e in ENTRIES if e["meta-type"] not in ("command", "event")} == named


def test_an_entry_has_the_members_of_its_kind_in_qemus_format() -> None:
    members_of = {
        "command": {"arg-type", "ret-type"},
        "event": {"arg-type"},
        "builtin": {"json-type"},
        "array": {"element-type"},
        "enum": {"members", "values"},
        "object": {"members"},
    }
    for entry in ENTRIES:
        variants = {"tag", "variants"} if "tag" in entry and entry["meta-type"] == "object" else set()
        assert entry.keys() == {"name", "meta-type"} | members_of[entry["meta-type"]] | variants, entry["name"]


def test_optional_members_have_a_default_and_others_none() -> None:
    up, name = ({m["name"]: m for m in BY_NAME["SetLink"]["members"]}[key] for key in ("up", "name"))
    assert (up, name) == ({"name": "up", "type": "bool"}, {"name": "name", "type": "str"})
    force = {m["name"]: m for m in BY_NAME["DeviceDel"]["members"]}["force"]
    assert force == {"name": "force", "type": "bool", "default": None}


def test_a_devices_arguments_follow_from_its_driver() -> None:
    device = BY_NAME[BY_NAME["device_add"]["arg-type"]]
    assert device["tag"] == "driver"
    variants = {variant["case"]: variant["type"] for variant in device["variants"]}
    assert variants.keys() == set(BY_NAME["DeviceBaseKind"]["values"])
    keys = {member["name"] for member in BY_NAME[variants["virtio-blk-pci"]]["members"]}
    assert keys == {"drive", "num-queues", "serial"}
    assert BY_NAME[variants["virtio-rng-pci"]]["members"] == []


def test_two_types_of_one_name_are_a_mistake() -> None:
    collected = schema.Schema()
    for defaults in ([("a", int)], [("a", str)]):
        kind = msgspec.defstruct("Same", defaults)
        if defaults[0][1] is int:
            collected.object_name((kind,))
        else:
            with pytest.raises(ValueError, match="two types are called Same"):
                collected.object_name((kind,))


# Beside QEMU's own

# What ours have beyond QEMU's, on purpose
SETTING: Final = "migrate-set-parameters"
OURS: Final = {
    *(("system_powerdown", "limit"), ("device_del", "force"), ("cont", "force")),
    ("DEVICE_UNPLUG_GUEST_ERROR", "reason"),
    *((SETTING, key) for key in ("x-on-no-convergence", "x-checksum", "x-timeout", "x-insecure")),
    *((SETTING, f"x-{key}") for key in ("unplug-timeout", "on-unplug-timeout", "primaries", "prepare-timeout")),
    (SETTING, "x-release-primaries"),
}
# What QEMU has of arguments that can be left out, and we have nothing for: storage migration, compression of our
# grandparents, postcopy, block devices. QEMU has dropped some of it since.
LEFT_OUT: Final = {
    *(("migrate", key) for key in ("blk", "inc", "channels")),
    *((SETTING, key) for key in ("compress-level", "compress-threads", "compress-wait-thread", "decompress-threads")),
    *((SETTING, key) for key in ("throttle-trigger-threshold", "cpu-throttle-tailslow", "tls-authz")),
    *((SETTING, key) for key in ("x-checkpoint-delay", "block-incremental", "xbzrle-cache-size")),
    *((SETTING, key) for key in ("max-postcopy-bandwidth", "multifd-zlib-level", "multifd-zstd-level")),
    (SETTING, "block-bitmap-mapping"),
}


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """QEMU's schema, from a QEMU without a machine."""
    path = str(tmp_path_factory.mktemp("qemu") / "qmp.sock")
    command = ["qemu-system-x86_64", "-M", "none", "-nodefaults", "-display", "none", "-qmp", f"unix:{path},server=on"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as qemu:
        try:
            client = connect(path)
            with client, client.makefile("rb") as lines:
                client.sendall(b'{"execute": "qmp_capabilities"}{"execute": "query-qmp-schema"}')
                *_, answer = (json.loads(lines.readline()) for _ in range(3))
        finally:
            qemu.kill()
    return {entry["name"]: entry for entry in answer["return"]}


def connect(path: str) -> socket.socket:
    end = time.monotonic() + BOUND
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(BOUND)
    while True:
        try:
            client.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            assert time.monotonic() < end, "QEMU does not listen"
            os.sched_yield()
        else:
            return client


def members(entries: dict[str, dict[str, Any]], name: str) -> dict[str, tuple[bool, str]]:
    """An object's members: whether each can be left out, and its type as far as two schemas can agree on that."""
    found = {}
    for member in entries[name]["members"]:
        kind = entries[member["type"]]
        json_type = kind.get("json-type", kind["meta-type"])
        # QEMU takes null, too, where it has an alternate of it and a string: we have "" for that, as it has.
        found[member["name"]] = ("default" in member, "string" if json_type == "alternate" else json_type)
    return found


@pytest.mark.parametrize("name", [c.name for c in COMMANDS.values() if not c.ours and "_add" not in c.name])
def test_a_command_of_qemus_takes_qemus_arguments(peer: dict[str, dict[str, Any]], name: str) -> None:
    ours, theirs = (members(entries, entries[name]["arg-type"]) for entries in (BY_NAME, peer))
    common = {key: kind for key, kind in ours.items() if (name, key) not in OURS}
    missing = {key: kind for key, kind in theirs.items() if (name, key) in LEFT_OUT}
    assert common | missing == theirs
    assert all(can_be_left_out for can_be_left_out, _ in missing.values())


@pytest.mark.parametrize("event", [e for e in EVENTS if not e.OURS], ids=lambda event: str(event.NAME))
def test_an_event_of_qemus_has_qemus_fields(peer: dict[str, dict[str, Any]], event: type[Event]) -> None:
    ours, theirs = (members(entries, entries[event.NAME]["arg-type"]) for entries in (BY_NAME, peer))
    optional = {key for key, (can_be_left_out, _) in theirs.items() if can_be_left_out}
    added = {key for key in ours if (event.NAME, key) in OURS}
    assert {key: kind for key, kind in ours.items() if key not in added}.items() <= theirs.items()
    assert all(ours[key][0] for key in added)
    assert theirs.keys() - ours.keys() <= optional


REPLIES: Final = ("query-pci", "query-cpus-fast", "query-kvm", "query-fdsets", "add-fd", "query-version")


@pytest.mark.parametrize("name", REPLIES)
def test_a_reply_of_qemus_has_qemus_fields(peer: dict[str, dict[str, Any]], name: str) -> None:
    assert list(different(peer, BY_NAME[name]["ret-type"], peer[name]["ret-type"], set())) == []


def different(
    peer: dict[str, dict[str, Any]], ours: str, theirs: str, seen: set[str], path: str = ""
) -> Iterator[tuple[str, object, object]]:
    """Where a type of ours is not QEMU's: has members that QEMU's has not, or lacks one that it always has."""
    mine, other = BY_NAME[ours], peer[theirs]
    if mine["meta-type"] == other["meta-type"] == "array":
        yield from different(peer, mine["element-type"], other["element-type"], seen, path)
    elif mine["meta-type"] == other["meta-type"] == "object" and ours not in seen:
        seen.add(ours)
        have, want = ({member["name"]: member for member in entry["members"]} for entry in (mine, other))
        always, promised = ({key for key, m in named.items() if "default" not in m} for named in (have, want))
        if have.keys() - want.keys() or promised - always:
            yield path, have.keys() - want.keys(), promised - always
        for key in have.keys() & want.keys():
            yield from different(peer, have[key]["type"], want[key]["type"], seen, f"{path}.{key}")
    elif mine["meta-type"] == other["meta-type"] == "builtin" and mine["json-type"] != other["json-type"]:
        yield path, mine["json-type"], other["json-type"]


# Events that are sent


SENDERS: Final = ("emit", "report")


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Every call in our source that sends an event of a device or of the machine."""
    for path in sorted([*SOURCE.glob("machine/*.py"), *SOURCE.glob("devices/**/*.py")]):
        text = path.read_text()
        if not any(f"{name}(" in text for name in SENDERS):  # most have none, and each worker of `pytest -n` asks
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and name_of(node.func) in SENDERS and node.args:
                yield f"{path.relative_to(SOURCE)}:{node.lineno}", node


def name_of(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def given_by(keyword: ast.keyword) -> list[str]:
    """The names of a keyword argument, or of a dictionary of them."""
    if keyword.arg is not None:
        return [keyword.arg]
    assert isinstance(keyword.value, ast.Dict)
    return [key.value for key in keyword.value.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]


CALLS: Final = list(calls())
SENT: Final = [(place, call) for place, call in CALLS if isinstance(call.args[0], ast.Constant)]


def test_only_the_forwarder_sends_an_event_whose_name_is_not_written_there() -> None:
    assert [place.partition(":")[0] for place, call in CALLS if not isinstance(call.args[0], ast.Constant)] == [
        "machine/machine.py"  # Machine.report
    ]
    assert len(SENT) >= 7


@pytest.mark.parametrize(("place", "call"), SENT, ids=[place for place, _ in SENT])
def test_an_event_is_sent_with_the_fields_it_is_declared_with(place: str, call: ast.Call) -> None:
    assert isinstance(call.args[0], ast.Constant)
    event = DECLARED[str(call.args[0].value)]
    fields = struct_fields(event)
    given = {name for keyword in call.keywords for name in given_by(keyword)}
    assert given <= {field.encode_name for field in fields}
    assert {field.encode_name for field in fields if field.required} <= given


def test_every_reason_the_machine_gives_is_a_declared_one() -> None:
    tree = ast.parse((SOURCE / "machine" / "machine.py").read_text())
    given = {
        constant.value
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "reason"
        for constant in ast.walk(node.value)
        if isinstance(constant, ast.Constant)
    }
    assert given <= {cause.value for cause in ShutdownCause}
    assert {"host-qmp-quit", "guest-reset"} <= given


def test_the_page_is_up_to_date() -> None:
    assert qmp_reference.PAGE.read_text() == qmp_reference.page()
