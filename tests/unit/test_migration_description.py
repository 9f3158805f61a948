"""Two machines compared before anything moves: every difference that matters is named, and nothing else is one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvmpy.errors import IncompatibleError
from kvmpy.kvm.cpu_model import CpuDescription
from kvmpy.migration.description import (
    PIECE,
    PIECES,
    Description,
    Findings,
    Host,
    Part,
    compare,
    parse,
    sum_of,
    to_json,
)
from kvmpy.state import save

NET = Part(
    driver="virtio-net-pci",
    place="root1",
    facts={"kind": "net", "queues": [256, 256, 64], "mac": "52:54:00:00:00:01", "mtu": None},
    offered=["MAC", "MQ", "VERSION_1"],
    accepted=["MAC", "VERSION_1"],
)
HERE = Description(
    name="web1",
    host=Host(name="a", boot="1", kvmpy="1"),
    cpus=2,
    cpu=save(CpuDescription()),
    memory={"RAM 0": [0, 1 << 30]},
    root_bus={"00.0": "host-bridge", "01.0": "root1"},
    ports={"root1": {"slot": 1}},
    devices={"net1": NET},
    buffered=[],
    boot={"kernel": "1, 2 bytes", "cmdline": "3"},
)


def other(**changes: Any) -> Description:
    return msgspec.structs.replace(HERE, **changes)


def found(destination: Description, source: Description = HERE) -> Findings:
    return compare(source, destination)


def test_two_alike_have_no_difference() -> None:
    assert found(HERE) == ([], [])


def test_what_need_not_be_alike_is_none() -> None:
    elsewhere = Host(name="b", boot="2", kvmpy="2")
    more = msgspec.structs.replace(NET, offered=[*NET.offered, "GUEST_ANNOUNCE"], accepted=[])
    assert found(other(name="web2", host=elsewhere, devices={"net1": more})) == ([], [])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"cpus": 4}, "machine.cpus: the source has 2, the destination 4"),
        ({"memory": {"RAM 0": [0, 1 << 29]}}, "memory map: RAM 0: the source has 0x0+0x40000000, the destination "),
        ({"memory": {}}, "memory map: RAM 0: the source has 0x0+0x40000000, the destination nothing"),
        ({"ports": {"root1": {"slot": 2}}}, "root_port root1: the source has {'slot': 1}, the destination {'slot': 2}"),
        ({"root_bus": {"00.0": "host-bridge"}}, "root bus: device 01.0: the source has root1, the destination nothing"),
        ({"devices": {}}, "device net1: the source has it, the destination does not; give both the same [[device]]"),
        ({"devices": {"net1": NET, "x": NET}}, "device x: the destination has it, the source does not"),
    ],
)
def test_a_difference_is_named(changes: dict[str, Any], problem: str) -> None:
    problems = found(other(**changes)).problems
    assert len(problems) == 1
    assert problems[0].startswith(problem)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"driver": "virtio-rng-pci"}, "driver: the source has virtio-net-pci, the destination virtio-rng-pci"),
        ({"place": "root2"}, "bus: the source has root1, the destination root2"),
        (
            {"facts": NET.facts | {"mac": "52:54:00:00:00:02"}},
            "mac: the source has 52:54:00:00:00:01, the destination ",
        ),
        ({"facts": NET.facts | {"queues": [256]}}, "queues: the source has [256, 256, 64], the destination [256]"),
        ({"offered": ["MAC"]}, "the guest uses its feature VERSION_1, which the destination cannot give it"),
    ],
)
def test_a_difference_of_a_device_is_named(changes: dict[str, Any], problem: str) -> None:
    problems = found(other(devices={"net1": msgspec.structs.replace(NET, **changes)})).problems
    assert len(problems) == 1
    assert problems[0].startswith(f"device net1: {problem}")


def test_all_differences_are_named_at_once() -> None:
    problems = found(other(cpus=1, memory={}, devices={}, ports={})).problems
    assert [problem.partition(":")[0] for problem in problems] == [
        *("machine.cpus", "memory map", "root_port root1", "device net1")
    ]


@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_buffered_drive_cannot_go_to_another_host_but_to_another_process(side: str) -> None:
    elsewhere = Host(name="b", boot="2", kvmpy="1")
    buffered = {"buffered": ["disk0"]}
    source = other(**(buffered if side == "source" else {}))
    destination = other(host=elsewhere, **(buffered if side == "destination" else {}))
    problems = found(destination, source).problems
    assert len(problems) == 1
    assert problems[0].startswith(f'drive disk0: the {side} has cache = "writeback"')
    assert found(msgspec.structs.replace(destination, host=HERE.host), source) == ([], [])


def test_another_kernel_is_a_warning() -> None:
    problems, warnings = found(other(boot={"kernel": "9, 2 bytes", "cmdline": "3", "initrd": "4, 5 bytes"}))
    assert problems == []
    assert [warning.partition(":")[0] for warning in warnings] == ["boot.initrd", "boot.kernel"]


FLIPPED = bytes(byte ^ 1 for byte in range(256))


@pytest.mark.parametrize("size", [3, 4096, PIECE * PIECES // 2, PIECE * PIECES, 16 << 20])
def test_a_sum_is_another_for_another_file(tmp_path: Path, size: int) -> None:
    data = bytearray(random.Random(size).randbytes(size))
    file = tmp_path / "kernel"
    file.write_bytes(data)
    said = [sum_of(file)]
    length = 1 if size <= PIECE * PIECES else size // PIECES  # of large files only some is read
    for at in (0, size // 2, size - length):
        data[at : at + length] = data[at : at + length].translate(FLIPPED)
        file.write_bytes(data)
        said.append(sum_of(file))
    file.write_bytes(data + b"x")
    said.append(sum_of(file))
    assert len(set(said)) == len(said), said
    assert all(each.endswith(f", {size} bytes") for each in said[:-1])


def test_a_file_that_is_not_there_has_no_sum(tmp_path: Path) -> None:
    assert sum_of(tmp_path / "kernel") == "cannot be read"


def test_a_description_arrives_as_it_was_sent() -> None:
    arrived = parse(msgspec.json.decode(msgspec.json.encode(to_json(HERE))))
    assert arrived.devices == HERE.devices
    assert compare(arrived, HERE) == compare(HERE, arrived) == ([], [])


@pytest.mark.parametrize(
    "change",
    [
        {"cpus": "2"},
        {"surplus": 1},
        {"memory": {"RAM 0": "all of it"}},
        {"name": "x" * 5000},
        {"devices": {"net1": {"driver": "x"}}},
        {"root_bus": {str(n): "x" for n in range(1000)}},
    ],
)
def test_what_is_no_description_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(IncompatibleError, match="description cannot be read"):
        parse(to_json(HERE) | change)


def test_what_is_no_processor_is_refused() -> None:
    with pytest.raises(IncompatibleError, match="processor's description cannot be read"):
        compare(other(cpu={"name": "cpu"}), HERE)
