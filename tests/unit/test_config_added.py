"""Tables that a client adds: the schema of the file, QEMU's words, and nothing but CommandError for any input."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.config.added import read_device, read_netdev
from kvmpy.config.schema import Config, VirtioBlkPci, VirtioNetPci, VirtioSerialPci, load
from kvmpy.config.values import HostPath
from kvmpy.errors import CommandError
from tests.counts import count

EXAMPLES = settings(max_examples=count(40, 10_000), deadline=None)
TEXT: Final = """
name = "m"
[boot]
kernel = "kernel"
[[root_port]]
id = "root1"
[[root_port]]
id = "root2"
[[netdev]]
id = "hostnet1"
type = "tap"
ifname = "tap1"
[[drive]]
id = "disk0"
path = "disk.raw"
format = "raw"
[[device]]
driver = "virtio-rng-pci"
id = "rng1"
bus = "root1"
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    path = tmp_path_factory.mktemp("config") / "m.toml"
    path.write_text(TEXT)
    return load(path)


def test_a_device_has_the_types_and_defaults_of_the_file(config: Config) -> None:
    table = {"driver": "virtio-net-pci", "id": "net1", "netdev": "hostnet1", "bus": "root2", "mac": "52:54:00:6F:55:CC"}
    device = read_device(config, table)
    assert isinstance(device, VirtioNetPci)
    assert (device.mac, device.host_mtu, device.failover) == ("52:54:00:6f:55:cc", None, False)


@pytest.mark.parametrize(
    ("said", "meant"), [("on", True), ("off", False), ("yes", True), ("false", False), (True, True)]
)
def test_flags_may_be_words(config: Config, said: object, meant: bool) -> None:
    table = {"driver": "virtio-net-pci", "id": "net1", "netdev": "hostnet1", "bus": "root2", "failover": said}
    device = read_device(config, table)
    assert isinstance(device, VirtioNetPci)
    assert device.failover is meant


@pytest.mark.parametrize("said", [2, "2"])
def test_numbers_may_be_text(config: Config, said: object) -> None:
    table = {"driver": "virtio-blk-pci", "id": "vd1", "drive": "disk0", "bus": "root2", "num-queues": said}
    device = read_device(config, table)
    assert isinstance(device, VirtioBlkPci)
    assert device.num_queues == 2


def test_text_that_looks_like_a_flag_stays_text(config: Config) -> None:
    with pytest.raises(CommandError, match="can't find value 'on'"):
        read_device(config, {"driver": "virtio-blk-pci", "id": "vd1", "drive": "on", "bus": "root2"})


def test_a_relative_path_is_that_of_the_file(config: Config) -> None:
    table = {"driver": "virtio-serial-pci", "id": "con1", "bus": "root2", "chardev": "file:out.log"}
    device = read_device(config, table)
    assert isinstance(device, VirtioSerialPci)
    assert device.chardev.path == str(Path(config.locate("name").rpartition(":")[0]).parent / "out.log")


def test_a_netdev_is_one_more(config: Config) -> None:
    netdev = read_netdev(config, {"type": "tap", "id": "hostnet2", "ifname": "tap2", "queues": "2", "vhost": "off"})
    assert (netdev.id, netdev.queues, netdev.vhost) == ("hostnet2", 2, False)


@pytest.mark.parametrize("code", [0, 0xD800, 0xDC7F, 0xDD00, 0xDFFF])
def test_a_path_that_no_file_can_have_is_refused(config: Config, code: int) -> None:
    path = f"/a{chr(code)}b"
    for chardev in (f"file:{path}", f"unix:{path}"):
        with pytest.raises(CommandError, match="chardev': expected"):
            read_device(config, {"driver": "virtio-serial-pci", "id": "con1", "bus": "root2", "chardev": chardev})
    with pytest.raises(CommandError, match="netns': expected"):
        read_netdev(config, {"type": "tap", "id": "hostnet2", "ifname": "tap2", "netns": path})
    with pytest.raises(ValueError, match="expected a path"):
        HostPath(path)


def test_half_a_surrogate_pair_is_neither_a_flag_nor_a_number(config: Config) -> None:
    with pytest.raises(CommandError, match=r"'virtio-blk-pci.num-queues': half a surrogate pair is no text"):
        read_device(config, {"driver": "virtio-blk-pci", "id": "vd1", "drive": "disk0", "num-queues": "\udc80"})
    with pytest.raises(CommandError, match=r"Parameter 'vhost': half a surrogate pair is no text"):
        read_netdev(config, {"type": "tap", "id": "hostnet2", "ifname": "tap2", "vhost": "\udc80"})


def test_a_path_of_bytes_that_are_no_utf_8_is_one(config: Config) -> None:
    chardev = f"file:/{os.fsdecode(bytes(range(0x80, 0x100)))}"
    device = read_device(config, {"driver": "virtio-serial-pci", "id": "con1", "bus": "root2", "chardev": chardev})
    assert isinstance(device, VirtioSerialPci)
    assert os.fsencode(device.chardev.path) == b"/" + bytes(range(0x80, 0x100))


WORDS: Final = st.sampled_from(
    [
        *("driver", "id", "bus", "netdev", "drive", "num-queues", "mac", "chardev", "host_mtu", "type", "ifname"),
        *("virtio-net-pci", "virtio-blk-pci", "virtio-rng-pci", "virtio-serial-pci", "vfio-pci", "tap", "root1"),
        *("root2", "hostnet1", "disk0", "on", "file:x", "\x00", "\ud800", "é", "", "9" * 5000, "_origin"),
    ]
)
VALUES: Final = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), WORDS, st.text(max_size=10)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)
TABLES: Final = st.dictionaries(st.one_of(WORDS, st.text(max_size=8)), VALUES, max_size=8)


@given(TABLES, st.sampled_from(["virtio-net-pci", "virtio-blk-pci", "virtio-serial-pci", "vfio-pci", None]))
@EXAMPLES
def test_any_table_is_read_or_refused_in_a_short_line(
    config: Config, table: dict[str, Any], driver: str | None
) -> None:
    full: Mapping[str, Any] = {"id": "x", "bus": "root2", "type": "tap", **table}
    if driver is not None:
        full = {**full, "driver": driver}
    for read in (read_device, read_netdev):
        said = ""
        try:
            read(config, full)
        except CommandError as e:
            said = str(e)
        assert len(said) < 1000
        assert said.isprintable()
