"""The pages for operators: each of their commands works, in its order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts.lab.host import EmulatedHost
from scripts.lab.pair import HostPair
from tests.lab.nics import NicHost

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("operating", ['"status": "running"', "demo: paused"]),
        ("networking", ["alias kvmpy:web1:", "192.0.2.1/24"]),
        ("hotplug", ["vd1", "net1"]),
        ("devices", ["vd0: virtio-blk-pci at 01:00.0, in use", "queues: requests0 256, requests1 256"]),
    ],
)
def test_a_pages_commands_work_in_their_order(host: EmulatedHost, page: str, said: list[str]) -> None:
    assert_commands_work(host, page, said)


def test_the_commands_for_passthrough_work_in_their_order(igb_host: NicHost) -> None:
    said = ["0000:01:10.0: can be passed through; IOMMU group", "virtual function 0 of 0000:01:00.0", "ok    IOMMU: "]
    assert_commands_work(igb_host, "passthrough", said)
    assert [igb_host.driver(function) for function in igb_host.functions] == ["igbvf", "igbvf"]


@pytest.mark.timeout(2000)
def test_the_commands_for_migration_work_in_their_order_on_two_hosts(two_hosts: HostPair) -> None:
    said = ["3 packets received", "web1 ", "completed "]
    assert_commands_work(two_hosts.first, "migration", said, timeout=1900)
    assert two_hosts.second.run(["ls", "-A", "/run/kvmpy"]).stdout == ""


@pytest.mark.timeout(2000)
def test_the_commands_for_failover_work_in_their_order_on_two_hosts_with_nics(two_igb_hosts: HostPair) -> None:
    said = ["virtual function 0 of 0000:01:00.0", "hostdev0", "'outcome': 'in use'", "3 packets received"]
    assert_commands_work(two_igb_hosts.first, "failover", said, timeout=1900)
    assert two_igb_hosts.second.run(["ls", "-A", "/run/kvmpy"]).stdout == ""


def assert_commands_work(host: EmulatedHost, page: str, said: list[str], timeout: float = 500) -> None:
    commands = re.findall(r"^\$ (.*)$", (DOCS / f"{page}.md").read_text(), re.MULTILINE)
    script = "\n".join(["set -ex", *commands])
    done = host.run(["bash", "-c", script], timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [text for text in said if text not in done.stdout] == []
    assert "has not powered off in time" not in done.stderr
    assert host.run(["ls", "-A", "/run/kvmpy"]).stdout == ""


def test_the_readmes_first_configuration_runs_in_the_checkout(host: EmulatedHost) -> None:
    text = (DOCS.parent / "README.md").read_text()
    [config] = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    [copy] = re.findall(r"# (cp \S+ \S+)$", config, re.MULTILINE)
    script = f"""set -e
        {copy}
        cat >web1.toml
        kvmpy check web1.toml
        kvmpy run web1.toml --set console.serial=file:/run/web1.log &
        until grep 'KVMPY-GUEST UP .*root=/dev/vda' /run/web1.log; do kill -0 $!; sleep 1; done
        kvmpy status web1
        kvmpy powerdown web1 --limit 300
        wait $!
    """
    done = host.run(["bash", "-c", script], input=config, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "vd0: virtio-blk-pci at" in done.stdout
    assert "net1: virtio-net-pci at" in done.stdout
    assert "has not powered off in time" not in done.stderr
