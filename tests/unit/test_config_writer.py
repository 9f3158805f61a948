"""A configuration that is written and read again is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import msgspec
import pytest

from kvmpy.config.schema import Config, load
from kvmpy.config.toml_lines import Document
from kvmpy.config.writer import tables, toml

NOWHERE: Final = Document("", "")
EXAMPLES: Final = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))
EVERYTHING: Final = r"""
name = "web1"
[machine]
memory = "1GiB"
cpus = 3
hugepages = "2MiB"
reserve = true
[boot]
kernel = "odd \"name\"\twith \u007f and ü"
cmdline = "console=ttyS0 a=\"b c\" \\"
[console]
serial = "file:log"
[monitor]
qmp = "unix:qmp.sock"
[[root_port]]
id = "rp1"
slot = 4
power_controller = false
[[netdev]]
id = "tap0"
type = "tap"
ifname = "tap0"
bridge = "br0"
vhost = false
queues = 2
netns = "blue"
[[drive]]
id = "d0"
path = "disk.raw"
format = "raw"
cache = "writeback"
readonly = true
[[device]]
driver = "virtio-net-pci"
id = "net0"
netdev = "tap0"
mac = "52:54:00:6F:55:CC"
host_mtu = 1400
[[device]]
driver = "virtio-blk-pci"
id = "vd0"
drive = "d0"
num-queues = 2
serial = "S1"
[[device]]
driver = "vfio-pci"
id = "hostdev0"
host = "5e:00.2"
bus = "rp1"
vlan = 0
[[device]]
driver = "virtio-serial-pci"
id = "console0"
chardev = "unix:console.sock"
"""


def content(config: Config) -> Config:
    """Without where it was written."""
    return msgspec.structs.replace(config, _origin=NOWHERE)


def again(config: Config, path: Path) -> Config:
    """Through JSON, as the monitor tells it, and through a file in another directory."""
    path.write_text(toml(json.loads(json.dumps(tables(config)))))
    return load(path)


def test_one_with_every_kind_of_table_and_value(tmp_path: Path) -> None:
    path = tmp_path / "here" / "any.toml"
    path.parent.mkdir()
    path.write_text(EVERYTHING)
    config = load(path)
    assert content(again(config, tmp_path / "there.toml")) == content(config)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_each_example(example: Path, tmp_path: Path) -> None:
    config = load(example)
    assert content(again(config, tmp_path / "there.toml")) == content(config)
