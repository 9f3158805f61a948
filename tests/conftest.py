"""The tiers: a test's directory is its marker, and a missing resource skips with its reason or, where KVMPY_REQUIRE
names the tier, fails."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import HealthCheck, settings

from tests.counts import count

# No time limit is a test of speed here, and a busy machine is no failure.
settings.register_profile(
    "kvmpy", max_examples=count(25, 500), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("kvmpy")

TIERS = ("host", "kvm", "lab")


def required(resource: str) -> bool:
    """KVMPY_REQUIRE=kvm,lab turns a skip for want of that resource into a failure."""
    return resource in os.environ.get("KVMPY_REQUIRE", "").split(",")


def skip_or_fail(resource: str, reason: str) -> NoReturn:
    """For a fixture whose ``resource`` is not there."""
    if required(resource):
        pytest.fail(f"KVMPY_REQUIRE names {resource}: {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        tier = item.path.relative_to(here).parts[0]
        if tier in TIERS:
            item.add_marker(tier)
        if tier != "lab":  # which has its own
            item.add_marker(pytest.mark.xdist_group(item.path.stem))  # for `pytest -n`: a module's tests stay together
