"""The tiers: a test's directory is its marker, and a missing resource skips with its reason or, where KVMPY_REQUIRE
names the tier, fails."""

from __future__ import annotations

import gc
import os
import re
from functools import cache
from itertools import count as counted
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import HealthCheck, settings

from tests.counts import count

# No time limit is a test of speed here, and a busy machine is no failure.
settings.register_profile(
    "kvmpy", max_examples=count(15, 500), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("kvmpy")

TIERS = ("host", "kvm", "lab")
# These modules last longest, and go first: the workers of `pytest -n` come to their ends together.
LONGEST = (
    *("test_migration_faults", "test_failover_departure", "test_cli", "test_migration", "test_failover_migration"),
    *("test_migration_processes", "test_failover_preparation", "test_hotplug", "test_config", "test_cli_bad_input"),
    *("test_pages", "test_devices_fuzz", "test_config_added", "test_migration_transport", "test_migration_channel"),
)
ID_LENGTH = 100
NUMBERS = counted()


def required(resource: str) -> bool:
    """KVMPY_REQUIRE=kvm,lab turns a skip for want of that resource into a failure."""
    return resource in os.environ.get("KVMPY_REQUIRE", "").split(",")


def skip_or_fail(resource: str, reason: str) -> NoReturn:
    """For a fixture whose ``resource`` is not there."""
    if required(resource):
        pytest.fail(f"KVMPY_REQUIRE names {resource}: {reason}", pytrace=False)
    pytest.skip(reason)


def pytest_make_parametrize_id(val: object) -> str | None:
    """What is long is named by how it begins: a name goes with every report, and is in the environment of a test."""
    return f"{val[:ID_LENGTH]!r}..." if isinstance(val, str | bytes) and len(val) > ID_LENGTH else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        tier = _tier(item.path)
        if tier in TIERS:
            item.add_marker(tier)
        if tier != "lab":  # which has its own
            item.add_marker(pytest.mark.xdist_group(item.path.stem))  # for `pytest -n`: a module's tests stay together
    items.sort(key=_place)


@cache
def _tier(path: Path) -> str:
    return path.relative_to(Path(__file__).parent).parts[0]


def _place(item: pytest.Item) -> int:
    """Those of the lab, which have an order of their own, come last."""
    stem, is_lab = item.path.stem, item.get_closest_marker("lab") is not None
    return LONGEST.index(stem) if stem in LONGEST and not is_lab else len(LONGEST) + is_lab


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As pytest's own, which looks at all those of other tests before it makes one: that is a tenth of a short test.

    Its name is short, for sockets are in it.
    """
    path = tmp_path_factory.getbasetemp() / f"{re.sub(r'[^a-zA-Z0-9_]', '_', request.node.name)[:20]}{next(NUMBERS)}"
    path.mkdir(mode=0o700)
    return path


def pytest_collection_finish() -> None:
    _keep()


@pytest.fixture(scope="module", autouse=True)
def _between_modules() -> None:
    """Nothing of the last module's own is left."""
    _keep()


def _keep() -> None:
    """What is there now stays: tests that have Python look for circles need not have it look there, too."""
    gc.collect()
    gc.freeze()
