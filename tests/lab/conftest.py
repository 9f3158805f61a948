"""What tests on emulated hosts share: one host for all of them, its console in every failure, and time enough."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Final

import pytest

from scripts.lab import images
from scripts.lab.host import EmulatedHost
from scripts.lab.pair import HostPair
from tests.conftest import skip_or_fail
from tests.lab.nics import NicHost

TIMEOUT_SECONDS = 1500  # a guest on an emulated host boots in tens of seconds, on a busy machine in minutes


NIC_HOSTS: Final = {"igb_host", "e1000e_host"}
LONGEST_FIRST: Final = (
    *("lab-nics", "lab-nic-pairs", "lab-pairs", "lab-test_demo"),
    *("lab-test_migration", "lab-test_network", "lab-test_guest", "lab-test_hotplug", "lab-test_disk"),
)
"""Groups of tests. All others are short: so the workers end together."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    places = {}
    for item in items:
        if here not in item.path.parents:
            places[item] = -1
            continue
        group = _group(item)
        item.add_marker(pytest.mark.xdist_group(group))
        places[item] = LONGEST_FIRST.index(group) if group in LONGEST_FIRST else len(LONGEST_FIRST)
        if config.getoption("timeout") is None and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIMEOUT_SECONDS))
    items.sort(key=places.__getitem__)


def _group(item: pytest.Item) -> str:
    """For `pytest -n`: hosts with NICs, and pairs, are started by one worker; the plain one, being quick, by both."""
    fixtures = set(getattr(item, "fixturenames", ()))
    fixtures |= {f"{value}_host" for value in getattr(getattr(item, "callspec", None), "params", {}).values()}
    if "two_igb_hosts" in fixtures:
        return "lab-nic-pairs"
    if "two_hosts" in fixtures:
        return "lab-pairs"
    return "lab-nics" if fixtures & NIC_HOSTS else f"lab-{item.path.stem}"


@pytest.fixture(scope="session")
def lab_images() -> images.Images:
    """The kernels and initramfs images, made on demand."""
    if missing := images.missing_packages():
        skip_or_fail("lab", f"the lab's programs are not here: apt-get install {' '.join(missing)}")
    return images.make()


@pytest.fixture(scope="session")
def host(lab_images: images.Images) -> Iterator[EmulatedHost]:
    """The emulated host that all tests share. A test ends what it starts there."""
    with EmulatedHost(memory="4G") as emulated:
        yield emulated


@pytest.fixture(scope="session")
def igb_host(lab_images: images.Images) -> Iterator[NicHost]:
    """A host with an IOMMU and two virtual functions of a NIC, for all tests that need them."""
    with NicHost("igb") as emulated:
        yield emulated


@pytest.fixture(scope="session")
def e1000e_host(lab_images: images.Images) -> Iterator[NicHost]:
    """A host with an IOMMU and whole NICs."""
    with NicHost("e1000e") as emulated:
        yield emulated


@pytest.fixture(scope="session")
def two_hosts(lab_images: images.Images) -> Iterator[HostPair]:
    """Two hosts on one network, with one disk that both have and ssh between them, for all tests that need them."""
    with HostPair() as pair:
        yield pair


@pytest.fixture(scope="session")
def two_igb_hosts(lab_images: images.Images) -> Iterator[HostPair]:
    """The same, each with an IOMMU and two virtual functions of a NIC."""
    with HostPair("igb") as pair:
        yield pair


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the console of each host that a failed test ran on."""
    report = yield
    if report.failed:
        used = getattr(item, "funcargs", {}).values()
        hosts = [host for value in used for host in (value.hosts if isinstance(value, HostPair) else (value,))]
        consoles = [host.console_tail() for host in hosts if isinstance(host, EmulatedHost)]
        report.sections.extend(("console of the emulated host", text) for text in consoles)
    return report
