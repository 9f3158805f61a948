"""What a configuration may say, and that every mistake in one is found, located and explained."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import fields

from kvmpy.config.schema import (
    Boot,
    Cache,
    Config,
    Console,
    Drive,
    Format,
    HugePages,
    Machine,
    Migration,
    Monitor,
    RootPort,
    Tap,
    VfioPci,
    VirtioBlkPci,
    VirtioNetPci,
    VirtioRngPci,
    VirtioSerialPci,
    load,
    standby_of,
    validate,
    warnings,
)
from kvmpy.config.values import (
    Backend,
    Cpu,
    HostPath,
    Id,
    Interface,
    Mac,
    Name,
    PciAddress,
    Size,
    UnixSocket,
    size_text,
)
from kvmpy.errors import ConfigError
from scripts import config_reference

BOOT = '[boot]\nkernel = "vmlinuz"\n'  # what must be there: lines 1 and 2

PAIR = """\
root_port = [{ id = "root1" }, { id = "root2" }]
netdev = [{ id = "hostnet1", type = "tap", ifname = "tap0" }]

[boot]
kernel = "vmlinuz"

[[device]]
driver = "virtio-net-pci"
id = "net1"
netdev = "hostnet1"
bus = "root2"
mac = "52:54:00:6f:55:cc"
failover = true

[[device]]
driver = "vfio-pci"
id = "hostdev0"
host = "5e:00.2"
bus = "root1"
failover_pair_id = "net1"
"""

Read = Callable[..., Config]
Problems = Callable[..., tuple[str, ...]]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """Loads a text as config.toml."""
    monkeypatch.chdir(tmp_path)

    def read(text: str, *overrides: str, name: str | None = None) -> Config:
        Path("config.toml").write_text(text)
        return load("config.toml", overrides, name=name)

    return read


@pytest.fixture
def problems(read: Read) -> Problems:
    """What is wrong with a text."""

    def problems(text: str, *overrides: str, name: str | None = None) -> tuple[str, ...]:
        with pytest.raises(ConfigError) as refused:
            read(text, *overrides, name=name)
        return refused.value.problems

    return problems


# What is accepted


def test_a_full_configuration_becomes_typed_values(read: Read, tmp_path: Path) -> None:
    config = read("""
        name = "web1"
        [machine]
        memory = "2GiB"
        cpus = 2
        hugepages = "2MiB"
        reserve = true
        shared = true
        dirty_ring = true
        [boot]
        kernel = "vmlinuz"
        initrd = "/boot/initrd.img"
        cmdline = "quiet"
        [console]
        serial = "file:serial.log"
        [monitor]
        qmp = "unix:qmp.sock"
        [migration]
        tls-creds = "pki"
        [[root_port]]
        id = "root1"
        chassis = 3
        slot = 4
        [[netdev]]
        id = "hostnet1"
        type = "tap"
        ifname = "tap-web1"
        bridge = "br0"
        vhost = false
        queues = 4
        [[drive]]
        id = "disk0"
        path = "../disk.raw"
        format = "raw"
        cache = "writeback"
        readonly = true
        [[device]]
        driver = "virtio-net-pci"
        id = "net1"
        netdev = "hostnet1"
        mac = "52:54:00:6F:55:CC"
        failover = true
        [[device]]
        driver = "vfio-pci"
        id = "hostdev0"
        host = "5E:00.2"
        bus = "root1"
        failover_pair_id = "net1"
        [[device]]
        driver = "virtio-blk-pci"
        id = "vd0"
        drive = "disk0"
        [[device]]
        driver = "virtio-rng-pci"
        id = "rng0"
        [[device]]
        driver = "virtio-serial-pci"
        id = "serial0"
    """)
    assert config == Config(
        name=Name("web1"),
        machine=Machine(
            memory=Size(2 << 30), cpus=2, hugepages=HugePages.MIB2, reserve=True, shared=True, dirty_ring=True
        ),
        boot=Boot(kernel=HostPath(f"{tmp_path}/vmlinuz"), initrd=HostPath("/boot/initrd.img"), cmdline="quiet"),
        console=Console(serial=Backend(f"file:{tmp_path}/serial.log")),
        monitor=Monitor(qmp=UnixSocket(f"unix:{tmp_path}/qmp.sock")),
        migration=Migration(tls_creds=HostPath(f"{tmp_path}/pki")),
        root_port=(RootPort(id=Id("root1"), chassis=3, slot=4),),
        netdev=(Tap(id=Id("hostnet1"), ifname=Interface("tap-web1"), bridge=Interface("br0"), vhost=False, queues=4),),
        drive=(
            Drive(
                id=Id("disk0"),
                path=HostPath(f"{tmp_path}/../disk.raw"),
                format=Format.RAW,
                cache=Cache.WRITEBACK,
                readonly=True,
            ),
        ),
        device=(
            VirtioNetPci(id=Id("net1"), netdev=Id("hostnet1"), mac=Mac("52:54:00:6f:55:cc"), failover=True),
            VfioPci(id=Id("hostdev0"), host=PciAddress("0000:5e:00.2"), bus=Id("root1"), failover_pair_id=Id("net1")),
            VirtioBlkPci(id=Id("vd0"), drive=Id("disk0")),
            VirtioRngPci(id=Id("rng0")),
            VirtioSerialPci(id=Id("serial0")),
        ),
        _origin=config._origin,
    )


def test_only_the_kernel_must_be_said(read: Read, tmp_path: Path) -> None:
    config = read(BOOT)
    kernel = HostPath(f"{tmp_path}/vmlinuz")
    assert config == Config(name=Name("config"), boot=Boot(kernel=kernel), _origin=config._origin)
    assert config.machine == Machine(memory=Size(512 << 20), cpus=1, hugepages=HugePages.OFF)
    assert config.boot == Boot(kernel=kernel, initrd=None, cmdline="console=ttyS0")
    assert (config.console.serial, config.monitor.qmp) == ("stdio", None)


def test_a_processor_is_the_hosts_or_a_file_beside_the_configuration(read: Read, tmp_path: Path) -> None:
    assert read(BOOT).machine.cpu.is_host
    assert read(BOOT + '[machine]\ncpu = "host"').machine.cpu.is_host
    found = read(BOOT + '[machine]\ncpu = "fleet.json"').machine.cpu
    assert (found, found.is_host) == (f"{tmp_path}/fleet.json", False)


def test_a_name_that_is_given_wins(read: Read) -> None:
    assert read(f'name = "a"\n{BOOT}', name="b").name == "b"


def test_the_example_in_the_reference_is_right(read: Read) -> None:
    examples = re.findall(r"```toml\n(.*?)```", config_reference.page(), re.DOTALL)
    assert [warnings(read(example)) for example in examples] == [[]]


def test_the_reference_is_up_to_date() -> None:
    assert config_reference.PAGE.read_text() == config_reference.page()


@pytest.mark.parametrize(
    ("said", "size"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("4KiB", 4 << 10),
        ("4 MiB", 4 << 20),
        ("4GiB", 4 << 30),
        ("4TiB", 4 << 40),
        ("4K", 4 << 10),
        ("4M", 4 << 20),
        ("4G", 4 << 30),
        ("4T", 4 << 40),
        ("1.5GiB", 3 << 29),
        ("0.0625KiB", 64),
    ],
)
def test_a_size_is_bytes_or_has_a_unit(said: int | str, size: int) -> None:
    assert Size(said) == size


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1000, "1000 bytes"), (1536, "1536 bytes"), (3 << 29, "1536 MiB"), (1 << 50, "1024 TiB")],
)
def test_a_size_is_said_exactly(size: int, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("said", "kind", "path"),
    [("stdio", "stdio", ""), ("null", "null", ""), ("file:/a:b", "file", "/a:b"), ("unix:/x", "unix", "/x")],
)
def test_a_backend_has_a_kind_and_a_path(said: str, kind: str, path: str) -> None:
    backend = Backend(said)
    assert (backend.kind, backend.path) == (kind, path)


# Overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("machine.cpus=4", lambda config: config.machine.cpus == 4),
        ("machine.memory=1GiB", lambda config: config.machine.memory == 1 << 30),
        ("machine.reserve = true", lambda config: config.machine.reserve),
        ("boot.cmdline=console=ttyS0 quiet", lambda config: config.boot.cmdline == "console=ttyS0 quiet"),
        ("boot.cmdline=", lambda config: config.boot.cmdline == ""),
        ("netdev.0.ifname=tap7", lambda config: config.netdev[0].ifname == "tap7"),
        ("netdev[0].ifname=tap7", lambda config: config.netdev[0].ifname == "tap7"),
        ("netdev.hostnet1.ifname=tap7", lambda config: config.netdev[0].ifname == "tap7"),
        ("drive=[{id = 'd', path = '/x', format = 'raw'}]", lambda config: config.drive[0].path == "/x"),
    ],
)
def test_an_override_changes_a_key(read: Read, override: str, value: Callable[[Config], bool]) -> None:
    assert value(read(PAIR, override))


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("machine.cpus=0", "--set machine.cpus: expected an integer >= 1, got 0"),
        ("machine.memoryy=1", "--set machine.memoryy: unknown key 'memoryy' (did you mean 'memory'?)"),
        ("netdev.hostnet1.ifname=a/b", f'--set netdev.hostnet1.ifname: expected {Interface.FORM}, got "a/b"'),
        ("machine={cpus = 0}", "--set machine: machine.cpus: expected an integer >= 1, got 0"),
        ("machine=1", "--set machine: expected a table, got an integer (1)"),
        ("machine.cpus", "--set machine.cpus: expected KEY=VALUE"),
        ("=1", "--set : '' is not a key"),
        (
            "netdev.hostnet2.ifname=x",
            "--set netdev.hostnet2.ifname: no netdev has the id 'hostnet2' (did you mean 'hostnet1'?)",
        ),
        ("nope.x=3", "--set nope.x: unknown key 'nope'"),
        ("hostnet1.ifname=x", "--set hostnet1.ifname: unknown key 'hostnet1' (did you mean netdev.hostnet1.ifname?)"),
        ("machin.cpus=3", "--set machin.cpus: unknown key 'machin' (did you mean 'machine'?)"),
        ("drive.0.path=r", "--set drive.0.path: there is no drive[0]"),
        ("drive.d.path=r", "--set drive.d.path: no drive has the id 'd'"),
        ("monitor.0.qmp=r", "--set monitor.0.qmp: unknown key '0'"),
        ("device.7.id=x", "--set device.7.id: there is no device[7], only 2 of them"),
        ("boot.kernel.x=1", "--set boot.kernel.x: boot.kernel is neither a table nor an array"),
    ],
)
def test_a_mistake_in_an_override_is_located_there(problems: Problems, override: str, problem: str) -> None:
    assert problems(PAIR, override) == (problem,)


def test_a_name_that_is_no_name_is_refused_where_it_was_given(problems: Problems) -> None:
    assert problems(BOOT, name="../x") == (f'--name: expected {Name.FORM}, got "../x"',)


# One mistake, one line

DEVICE = "expected virtio-net-pci, vfio-pci, virtio-blk-pci, virtio-rng-pci or virtio-serial-pci"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("nme = 1", ":3: boot.nme: unknown key 'nme'"),
        ("kernl = 1", ":3: boot.kernl: unknown key 'kernl' (did you mean 'kernel'?)"),
        ("[machin]\ncpus = 1", ":3: machin: unknown key 'machin' (did you mean 'machine'?)"),
        ("[machine]\nmemoryy = 1", ":4: machine.memoryy: unknown key 'memoryy' (did you mean 'memory'?)"),
        ("[machine]\n_origin = 1", ":4: machine._origin: unknown key '_origin'"),
        ('[machine]\ncpus = "two"', ':4: machine.cpus: expected an integer, got a string ("two")'),
        ("[machine]\ncpus = true", ":4: machine.cpus: expected an integer, got a boolean (true)"),
        ("[machine]\ncpus = 1.0", ":4: machine.cpus: expected an integer, got a float (1.0)"),
        ("[machine]\ncpus = 1979-05-27", ":4: machine.cpus: expected an integer, got a date or time (1979-05-27)"),
        ("[machine]\ncpus = []", ":4: machine.cpus: expected an integer, got an array"),
        ("[machine]\ncpus = {}", ":4: machine.cpus: expected an integer, got a table"),
        ("[machine]\ncpus = 0", ":4: machine.cpus: expected an integer >= 1, got 0"),
        ("[machine]\ncpus = 255", ":4: machine.cpus: expected an integer <= 254, got 255"),
        (f"[machine]\ncpus = 0x{'f' * 99}", f":4: machine.cpus: expected an integer <= 254, got 0x{'f' * 57}…"),
        ("[machine]\nreserve = 1", ":4: machine.reserve: expected true or false, got an integer (1)"),
        ("[machine]\nhugepages = 1", ":4: machine.hugepages: expected off, 2MiB or 1GiB, got an integer (1)"),
        (
            '[machine]\nhugepages = "2Mib"',
            ":4: machine.hugepages: expected off, 2MiB or 1GiB, got \"2Mib\" (did you mean '2MiB'?)",
        ),
        ('[machine]\nmemory = "1MB"', ":4: machine.memory: unknown unit 'MB' in \"1MB\" (did you mean 'MiB'?)"),
        ('[machine]\nmemory = "1x"', ":4: machine.memory: unknown unit 'x' in \"1x\"; units are KiB, MiB, GiB and TiB"),
        ('[machine]\nmemory = "0.1GiB"', ':4: machine.memory: "0.1GiB" is not a whole number of bytes'),
        ('[machine]\nmemory = "much"', f':4: machine.memory: expected {Size.FORM}, got "much"'),
        ('[machine]\nmemory = "-1GiB"', f':4: machine.memory: expected {Size.FORM}, got "-1GiB"'),
        ("[machine]\nmemory = 1.5", f":4: machine.memory: expected {Size.FORM}, got a float (1.5)"),
        ("[machine]\nmemory = true", f":4: machine.memory: expected {Size.FORM}, got a boolean (true)"),
        ("[machine]\nmemory = -4096", f":4: machine.memory: expected {Size.FORM}, got an integer (-4096)"),
        ("[machine]\nmemory = 0", ":4: machine.memory: expected 16 MiB to 4096 TiB, got 0 bytes"),
        ('[machine]\nmemory = "8MiB"', ":4: machine.memory: expected 16 MiB to 4096 TiB, got 8 MiB"),
        ('[machine]\nmemory = "5000TiB"', ":4: machine.memory: expected 16 MiB to 4096 TiB, got 5000 TiB"),
        (
            "[machine]\nmemory = 99999999",
            ":4: machine.memory: 99999999 bytes is not a multiple of the page size, 4 KiB",
        ),
        ('[machine]\nhugepages = "1GiB"', ":3: machine.memory: 512 MiB is not a multiple of the page size, 1 GiB"),
        ("[[machine]]", ":3: machine: expected a table, got an array"),
        ("[machine]\ncpu = 4", f":4: machine.cpu: expected {Cpu.FORM}, got an integer (4)"),
        ('initrd = ""', ':3: boot.initrd: expected a path, got ""'),
        ("cmdline = 1", ":3: boot.cmdline: expected a string, got an integer (1)"),
        ('[console]\nserial = "tty"', f':4: console.serial: expected {Backend.FORM}, got "tty"'),
        ('[console]\nserial = "file:"', f':4: console.serial: expected {Backend.FORM}, got "file:"'),
        ("[migration]\ntls-cred = 1", ":4: migration.tls-cred: unknown key 'tls-cred' (did you mean 'tls-creds'?)"),
        ('[monitor]\nqmp = "stdio"', ':4: monitor.qmp: expected unix:PATH, got "stdio"'),
        (
            f'[monitor]\nqmp = "unix:/{"x" * 107}"',
            f':4: monitor.qmp: the socket\'s path is longer than 107 bytes: "/{"x" * 58}…"',
        ),
        ("[root_port]", ":3: root_port: expected an array of tables, [[root_port]], got a table"),
        ("[[root_port]]", ":3: root_port[0].id: missing"),
        ('[[root_port]]\nid = ""', f':4: root_port[0].id: expected {Id.FORM}, got ""'),
        (
            '[[root_port]]\nid = "a"\n[[root_port]]\nid = "a"',
            ":6: root_port[1].id: duplicate id 'a': root_port[0].id has it",
        ),
        (
            '[[root_port]]\nid = "a"\n[[device]]\nid = "a"\ndriver = "virtio-rng-pci"',
            ":6: device[0].id: duplicate id 'a': root_port[0].id has it",
        ),
        (
            '[[root_port]]\nid = "a"\nslot = 1\n[[root_port]]\nid = "b"\nslot = 1',
            ":8: root_port[1].slot: 1 is taken by 'a', 'b' needs another",
        ),
        ('[[netdev]]\nid = "n"\nifname = "t"', ":3: netdev[0].type: missing, expected tap"),
        (
            '[[netdev]]\nid = "n"\ntype = "tpa"\nifname = "t"',
            ":5: netdev[0].type: expected tap, got \"tpa\" (did you mean 'tap'?)",
        ),
        ('[[netdev]]\nid = "n"\ntype = 1\nifname = "t"', ":5: netdev[0].type: expected tap, got an integer (1)"),
        ('[[netdev]]\nid = "n"\ntype = "tap"', ":3: netdev[0].ifname: missing"),
        ('[[device]]\nid = "d"', f":3: device[0].driver: missing, {DEVICE}"),
        (
            '[[device]]\nid = "d"\ndriver = "virtio-net"\nmac = 1',
            f":5: device[0].driver: {DEVICE}, got \"virtio-net\" (did you mean 'virtio-net-pci'?)",
        ),
        (
            '[[device]]\nid = "d"\ndriver = "virtio-rng-pci"\nbus = "r"',
            ':6: device[0].bus: no root_port has the id "r"',
        ),
        (
            '[[device]]\nid = "d"\ndriver = "virtio-blk-pci"\ndrive = "x"',
            ':6: device[0].drive: no drive has the id "x"',
        ),
        ('[[device]]\nid = "d"\ndriver = "virtio-blk-pci"', ":3: device[0].drive: missing"),
        (
            '[[device]]\nid = "d"\ndriver = "vfio-pci"\nhost = "5e:20.0"',
            f':6: device[0].host: expected {PciAddress.FORM}, got "5e:20.0"',
        ),
        (
            '[[device]]\nid = "d"\ndriver = "vfio-pci"\nhost = 1',
            f":6: device[0].host: expected {PciAddress.FORM}, got an integer (1)",
        ),
        (
            '[[device]]\nid = "d"\ndriver = "vfio-pci"\nhost = "0:0.0"',
            f':6: device[0].host: expected {PciAddress.FORM}, got "0:0.0"',
        ),
    ],
)
def test_a_mistake_is_located_and_explained(problems: Problems, text: str, problem: str) -> None:
    assert problems(BOOT + text) == (f"config.toml{problem}",)


@pytest.mark.parametrize("name", ["", ".x", "-x", "a/b", "a b", "x" * 65, "é"])
def test_a_name_is_one_plain_directory(problems: Problems, name: str) -> None:
    [problem] = problems(f'name = "{name}"\n{BOOT}')
    assert problem.startswith(f"config.toml:1: name: expected {Name.FORM}, got ")


@pytest.mark.parametrize("ifname", ["", "x" * 16, "a/b", "a b", "a:b", "tap%d", ".", "..", "é"])
def test_an_interface_name_is_one_the_kernel_takes(ifname: str) -> None:
    with pytest.raises(ValueError, match="expected an interface name"):
        Interface(ifname)


@pytest.mark.parametrize("mac", ["", "52:54:00:6f:55", "52-54-00-6f-55-cc", "53:54:00:6f:55:cc", "00:00:00:00:00:00"])
def test_a_mac_address_is_that_of_one_station(mac: str) -> None:
    with pytest.raises(ValueError, match="expected a unicast MAC address"):
        Mac(mac)


def test_a_missing_kernel_is_located_at_its_table(problems: Problems) -> None:
    assert problems('name = "a"\n[boot]\n') == ("config.toml:2: boot.kernel: missing",)


def test_a_missing_table_is_located_at_the_file(problems: Problems) -> None:
    assert problems("") == ("config.toml: boot.kernel: missing",)


def test_a_long_value_is_shortened_and_kept_on_one_line(problems: Problems) -> None:
    [problem] = problems(BOOT + '[machine]\ncpus = "\\n\\u001b[31m' + "x" * 500 + '"\n')
    assert problem == f'config.toml:4: machine.cpus: expected an integer, got a string ("\\n\\x1b[31m{"x" * 49}…")'


# Mistakes between tables


ANOTHER = '[[device]]\nid = "b"\ndriver = '  # its driver is on line 23


def swap(old: str, new: str) -> Callable[[str], str]:
    return lambda text: text.replace(old, new)


def add(more: str) -> Callable[[str], str]:
    return lambda text: text + more


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (
            swap('bus = "root1"\n', ""),
            ":15: device[1].bus: missing: a failover primary is hot-plugged, so it needs a root port",
        ),
        (
            swap('bus = "root1"', 'bus = "root2"'),
            ":19: device[1].bus: a primary and its standby need two root ports: 'hostdev0', 'net1'",
        ),
        (
            swap('bus = "root2"', 'bus = "root1"'),
            ":19: device[1].bus: a primary and its standby need two root ports: 'hostdev0', 'net1'",
        ),
        (
            add('mac = "52:54:00:00:00:01"\n'),
            ":21: device[1].mac: 52:54:00:00:00:01 is not that of the standby 'net1', 52:54:00:6f:55:cc",
        ),
        (swap('id = "hostdev0"\n', ""), ":15: device[1].id: missing"),
    ],
)
def test_r2_r3_r6_a_pair_that_cannot_work_is_refused_where_it_is_written(
    problems: Problems, edit: Callable[[str], str], problem: str
) -> None:
    assert problems(edit(PAIR)) == (f"config.toml{problem}",)


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (
            swap('netdev = "hostnet1"', 'netdev = "hostnet2"'),
            ":10: device[0].netdev: no netdev has the id \"hostnet2\" (did you mean 'hostnet1'?)",
        ),
        (
            swap('bus = "root1"', 'bus = "root3"'),
            ":19: device[1].bus: no root_port has the id \"root3\" (did you mean 'root2'?)",
        ),
        (
            swap('failover_pair_id = "net1"', 'failover_pair_id = ""'),
            f':20: device[1].failover_pair_id: expected {Id.FORM}, got ""',
        ),
        (
            swap('failover_pair_id = "net1"', 'failover_pair_id = "hostdev0"'),
            ":20: device[1].failover_pair_id: 'hostdev0' is not a virtio-net-pci device",
        ),
        (
            add(ANOTHER + '"virtio-rng-pci"\nbus = "root1"'),
            ":24: device[2].bus: \"root1\" is taken by 'hostdev0', 'b' needs another",
        ),
        (
            add(ANOTHER + '"virtio-net-pci"\nnetdev = "hostnet1"'),
            ":24: device[2].netdev: \"hostnet1\" is taken by 'net1', 'b' needs another",
        ),
        (
            add(ANOTHER + '"vfio-pci"\nhost = "0000:5E:00.2"'),
            ":24: device[2].host: \"0000:5e:00.2\" is taken by 'hostdev0', 'b' needs another",
        ),
        (
            add('[[drive]]\nid="a"\npath="x"\nformat="raw"\n[[drive]]\nid="a"\npath="y"\nformat="raw"'),
            ":26: drive[1].id: duplicate id 'a': drive[0].id has it",
        ),
    ],
)
def test_tables_that_do_not_fit_together_are_refused(
    problems: Problems, edit: Callable[[str], str], problem: str
) -> None:
    assert problems(edit(PAIR)) == (f"config.toml{problem}",)


def test_r5_two_primaries_of_one_standby_are_refused_naming_both(problems: Problems) -> None:
    text = PAIR.replace("root_port = [", 'root_port = [{ id = "root3" }, ') + (
        '[[device]]\ndriver = "vfio-pci"\nid = "hostdev1"\nhost = "5e:00.3"\nbus = "root3"\nfailover_pair_id = "net1"\n'
    )
    assert problems(text) == (
        "config.toml:26: device[2].failover_pair_id: \"net1\" is taken by 'hostdev0', 'hostdev1' needs another",
    )


def test_one_interface_cannot_serve_two_netdevs(problems: Problems) -> None:
    tap = '[[netdev]]\ntype = "tap"\nifname = "tap0"\nid = '
    assert problems(f'{BOOT}{tap}"a"\n{tap}"b"') == (
        "config.toml:9: netdev[1].ifname: \"tap0\" is taken by 'a', 'b' needs another",
    )


def test_interfaces_of_different_namespaces_may_have_the_same_name(read: Read) -> None:
    tap = '[[netdev]]\ntype = "tap"\nifname = "tap0"\nid = '
    config = read(f'{BOOT}{tap}"a"\n{tap}"b"\nnetns = "blue"\n{tap}"c"\nnetns = "/proc/1/ns/net"')
    spaces = [netdev.netns and netdev.netns.path for netdev in config.netdev]
    assert spaces == [None, "/run/netns/blue", "/proc/1/ns/net"]


@pytest.mark.parametrize("netns", ["", "..", "a/b", "a b", "a\nb"])
def test_a_namespace_is_a_name_or_an_absolute_path(problems: Problems, netns: str) -> None:
    text = f'[[netdev]]\ntype = "tap"\nifname = "tap0"\nid = "a"\nnetns = {json.dumps(netns)}'
    (problem,) = problems(BOOT + text)
    assert "netdev[0].netns: expected a network namespace's name" in problem


def test_a_virtio_console_is_not_the_terminal(problems: Problems) -> None:
    port = '[[device]]\ndriver = "virtio-serial-pci"\nid = "a"\nchardev = "stdio"'
    assert problems(f"{BOOT}{port}") == (
        'config.toml:6: device[0].chardev: expected pty, null, file:PATH or unix:PATH, got "stdio"',
    )


def test_a_key_with_a_dash_is_read_and_located(read: Read, problems: Problems) -> None:
    drive = '[[drive]]\nid = "d"\npath = "x"\nformat = "raw"\n'
    disk = f'{drive}[[device]]\nid = "v"\ndriver = "virtio-blk-pci"\ndrive = "d"\n'
    (device,) = read(f"{BOOT}{disk}num-queues = 4").device
    assert isinstance(device, VirtioBlkPci)
    assert device.num_queues == 4
    assert problems(f"{BOOT}{disk}num-queues = 0") == (
        "config.toml:11: device[0].num-queues: expected an integer >= 1, got 0",
    )
    (problem,) = problems(f"{BOOT}{disk}num_queues = 4")
    assert problem == "config.toml:11: device[0].num_queues: unknown key 'num_queues' (did you mean 'num-queues'?)"


def test_a_drives_format_is_never_guessed(problems: Problems) -> None:
    assert problems(f'{BOOT}[[drive]]\nid = "d"\npath = "x"') == ("config.toml:3: drive[0].format: missing",)


def test_a_drive_serves_one_device(problems: Problems) -> None:
    text = (
        BOOT
        + '[[drive]]\nid = "d"\npath = "x"\nformat = "raw"\n'
        + "".join(f'[[device]]\nid = "{id}"\ndriver = "virtio-blk-pci"\ndrive = "d"\n' for id in "ab")  # noqa: A001
    )
    assert problems(text) == ("config.toml:14: device[1].drive: \"d\" is taken by 'a', 'b' needs another",)


def test_r8_the_pair_may_be_written_in_either_order(read: Read) -> None:
    head, standby, primary = PAIR.split("[[device]]")
    assert warnings(read("[[device]]".join([head, primary, standby]))) == []


def test_a_netdev_and_a_device_may_have_the_same_id(read: Read) -> None:
    assert read(PAIR.replace("hostnet1", "net1")).netdev[0].id == "net1"


def test_r7_a_missing_standby_is_a_warning(read: Read) -> None:
    assert warnings(read(PAIR.replace('failover_pair_id = "net1"', 'failover_pair_id = "net2"'))) == [
        "config.toml:20: device[1].failover_pair_id: no device has the id \"net2\" (did you mean 'net1'?), "
        "'hostdev0' stays hidden until one is added"
    ]


def test_a_standby_that_does_not_offer_failover_is_a_warning(read: Read) -> None:
    assert warnings(read(PAIR.replace("failover = true", "failover = false"))) == [
        "config.toml:20: device[1].failover_pair_id: 'net1' does not have failover = true, "
        "so the guest sees both devices"
    ]


def test_r6_a_primary_with_an_address_needs_a_standby_with_the_same(problems: Problems) -> None:
    head, standby, primary = PAIR.split("[[device]]")
    own = primary + 'mac = "52:54:00:00:00:01"\n'
    assert problems("[[device]]".join([head, standby, own])) == (
        "config.toml:21: device[1].mac: 52:54:00:00:00:01 is not that of the standby 'net1', 52:54:00:6f:55:cc",
    )
    (later,) = problems("[[device]]".join([head, own + "\n", standby]))
    assert later.endswith("device[1].mac: 52:54:00:6f:55:cc is not that of the primary 'hostdev0', 52:54:00:00:00:01")
    (none,) = problems("[[device]]".join([head, standby.replace('mac = "52:54:00:6f:55:cc"\n', ""), own]))
    assert none.endswith(
        "device[1].mac: the standby 'net1' has no mac: give it 52:54:00:00:00:01, or leave this one out"
    )


def test_r6_addresses_are_not_compared_where_pairs_are_as_qemus(read: Read) -> None:
    read(PAIR + 'mac = "52:54:00:00:00:01"\n', "machine.failover_compat=true")


def test_r7_a_missing_standby_leaves_the_primary_visible_where_pairs_are_as_qemus(read: Read) -> None:
    alone = PAIR.replace('failover_pair_id = "net1"', 'failover_pair_id = "other"')
    (warning,) = warnings(read(alone, "machine.failover_compat=true"))
    assert warning.endswith("no device has the id \"other\", so the guest sees 'hostdev0'")


@pytest.mark.parametrize(
    ("text", "override", "standby"),
    [
        (PAIR, "name=m", "net1"),
        (PAIR.replace("failover = true", "failover = false"), "name=m", None),
        (PAIR.replace('pair_id = "net1"', 'pair_id = "net2"'), "name=m", "net2"),
        (PAIR.replace('pair_id = "net1"', 'pair_id = "net2"'), "machine.failover_compat=true", None),
    ],
    ids=["a pair", "no failover", "no standby", "no standby, as QEMU"],
)
def test_r7_whose_primary_a_device_is(read: Read, text: str, override: str, standby: str | None) -> None:
    config = read(text, override)
    assert [standby_of(config, device) for device in config.device] == [None, standby]


@pytest.mark.parametrize("table", ["device", "root_port"])
@pytest.mark.parametrize("name", ["vm", "machine", "vcpu0", "vcpu253", "com1", "reset"])
def test_a_name_of_a_part_of_every_machine_is_no_id(problems: Problems, table: str, name: str) -> None:
    driver = 'driver = "virtio-rng-pci"\n' if table == "device" else ""
    assert problems(f'{BOOT}[[{table}]]\nid = "{name}"\n{driver}') == (
        f"config.toml:4: {table}[0].id: '{name}' is what a part of every machine is called; choose another",
    )


def test_r8_a_standby_is_no_root_port(problems: Problems) -> None:
    assert problems(PAIR.replace('failover_pair_id = "net1"', 'failover_pair_id = "root1"')) == (
        "config.toml:20: device[1].failover_pair_id: 'root1' is a root port, no virtio-net-pci device",
    )


def test_a_configuration_made_by_hand_is_validated_alike() -> None:
    config = Config(name=Name("x"), machine=Machine(memory=Size(4096)), boot=Boot(kernel=HostPath("/k")))
    assert [path for path, _ in validate(config)] == [("machine", "memory")]
    assert config.locate("machine.memory") == "(no file)"


# All at once


def test_all_mistakes_are_reported_at_once_in_the_order_of_the_file(problems: Problems) -> None:
    text = """\
name = "web 1"
[machine]
memory = "512MB"
cpus = "two"
reservee = true
[boot]
initrd = 3
[console]
serial = "tty"
[[root_port]]
id = "root1"
[[root_port]]
id = "root1"
[[netdev]]
id = "hostnet1"
type = "tpa"
ifname = "a-very-long-interface-name"
queues = 0
[[device]]
driver = "virtio-net"
id = "net1"
bus = "root1"
[[device]]
driver = "vfio-pci"
id = ""
host = "5e:00"
bus = "rot1"
failover_pair_id = "net1"
[[device]]
driver = "virtio-net-pci"
id = "net2"
netdev = "hostnet2"
"""
    found = problems(text, "machine.dirty_ring=1")
    assert [problem.split(": ")[:2] for problem in found] == [
        ["config.toml:1", "name"],
        ["config.toml:3", "machine.memory"],
        ["config.toml:4", "machine.cpus"],
        ["config.toml:5", "machine.reservee"],
        ["config.toml:6", "boot.kernel"],
        ["config.toml:7", "boot.initrd"],
        ["config.toml:9", "console.serial"],
        ["config.toml:13", "root_port[1].id"],
        ["config.toml:16", "netdev[0].type"],
        ["config.toml:17", "netdev[0].ifname"],
        ["config.toml:18", "netdev[0].queues"],
        ["config.toml:20", "device[0].driver"],
        ["config.toml:25", "device[1].id"],
        ["config.toml:26", "device[1].host"],
        ["config.toml:27", "device[1].bus"],
        ["config.toml:32", "device[2].netdev"],
        ["--set machine.dirty_ring", "expected true or false, got an integer (1)"],
    ]


# Places


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("boot.kernel", "config.toml:5"),
        ("boot.initrd", "config.toml:4"),
        ("device[1].host", "config.toml:18"),
        ("device.hostdev0.host", "config.toml:18"),
        ("device.net1.bus", "config.toml:11"),
        ("netdev.hostnet1", "config.toml:2"),
        ("device.absent.host", "config.toml"),
        ("monitor.qmp", "config.toml"),
        ("machine.cpus", "--set machine.cpus"),
    ],
)
def test_a_configuration_knows_where_its_keys_were_written(read: Read, key: str, place: str) -> None:
    assert read(PAIR, "machine.cpus=2").locate(key) == place


# Files


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a = 1\nb = \n", "c.toml:2: not TOML: invalid value"),
        (b"a = 1\nb = '\xff'\n", "c.toml:2: not UTF-8 (byte 0xff)"),
        (b"#" * ((1 << 20) + 1), "c.toml: cannot be read: EFBIG (it has more than 1 MiB)"),
    ],
)
def test_a_file_that_is_no_toml_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.toml").write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        load("c.toml")
    assert refused.value.problems == (problem,)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    with pytest.raises(ConfigError, match=re.escape(f"{path}: cannot be read: ENOENT (No such file or directory)")):
        load(path)


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}: cannot be read: EISDIR (Is a directory)")):
        load(tmp_path)


# Whatever comes

KEYS = st.sampled_from(
    ["type", "driver", *(field.name for _, kind in config_reference.sections(Config, "") for field in fields(kind))]
)
WORDS = st.sampled_from(
    ["tap", "virtio-net-pci", "vfio-pci", "virtio-blk-pci", "raw", "root1", "net1", "unix:x", "1GiB", "0.5K", "5e:00.2"]
)
SCALARS = st.one_of(
    WORDS.map(lambda word: f'"{word}"'),
    st.text(max_size=9).map(lambda text: '"' + "".join(f"\\U{ord(letter):08x}" for letter in text) + '"'),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(lambda number: str(number)),
    st.sampled_from(["true", "false", "1979-05-27", "07:32:00", "1979-05-27T07:32:00Z", "0x" + "f" * 9000]),
)


def inline(data: dict[str, str]) -> str:
    return "{" + ", ".join(f"{key} = {value}" for key, value in data.items()) + "}"


VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
        st.dictionaries(KEYS, inner, max_size=6).map(inline),
    ),
    max_leaves=20,
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "config.toml"


def problems_of(file: Path, content: bytes, *overrides: str) -> tuple[str, ...]:
    file.write_bytes(content)
    try:
        config = load(file, overrides)
    except ConfigError as e:
        return e.problems
    return tuple(warnings(config))


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(data=st.dictionaries(KEYS, VALUES, max_size=9))
def test_no_data_raises_anything_but_located_problems(file: Path, data: dict[str, str]) -> None:
    text = "\n".join(f"{key} = {value}" for key, value in data.items())
    assert [p for p in problems_of(file, text.encode()) if not (p.isprintable() and p.startswith(str(file)))] == []


@given(content=st.binary(max_size=60))
def test_no_file_raises_anything_but_located_problems(file: Path, content: bytes) -> None:
    assert [p for p in problems_of(file, content) if not (p.isprintable() and p.startswith(str(file)))] == []


@given(override=st.one_of(st.text(max_size=30), st.tuples(KEYS, KEYS, VALUES).map(lambda o: f"{o[0]}.{o[1]}={o[2]}")))
def test_no_override_raises_anything_but_problems(file: Path, override: str) -> None:
    assert [problem for problem in problems_of(file, PAIR.encode(), override) if not problem.isprintable()] == []


def test_of_very_many_mistakes_the_first_50_are_reported_and_the_others_counted(problems: Problems) -> None:
    drives = "".join(f'[[drive]]\nid = "disk{number}"\npath = "x"\nformat = "raw"\n' for number in range(200))
    devices = "".join(
        f'[[device]]\ndriver = "virtio-blk-pci"\nid = "blk{number}"\ndrive = "disq{number}"\n' for number in range(200)
    )
    found = problems(BOOT + drives + devices)
    assert len(found) == 51
    assert found[0].endswith("device[0].drive: no drive has the id \"disq0\" (did you mean 'disk0'?)")
    assert found[-1] == "config.toml: and 150 more, not shown"


def test_very_many_warnings_are_counted_too(read: Read) -> None:
    devices = "".join(
        f'[[root_port]]\nid = "root{number}"\n[[device]]\ndriver = "vfio-pci"\nid = "vf{number}"\n'
        f'host = "00:{number // 8:02x}.{number % 8}"\nbus = "root{number}"\nfailover_pair_id = "net{number}"\n'
        for number in range(60)
    )
    found = warnings(read(BOOT + devices))
    assert (len(found), found[-1]) == (51, "config.toml: and 10 more, not shown")


def test_an_array_of_more_tables_than_any_machine_has_is_not_read_to_its_end(problems: Problems) -> None:
    drives = "drive = [" + '{ id = "disk", path = "x" },' * 4096 + "{ id = 1 }, 1]\n"
    assert problems(drives + BOOT) == ("config.toml:1: drive: expected 4096 tables at most, got 4098",)
