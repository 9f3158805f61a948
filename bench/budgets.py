"""What each ratio may be: the budgets of the design, in one table.

A budget bounds kvmpy's figure divided by its peer's, from above unless it says `AT_LEAST`. The peer is QEMU in the same
run, or what the name of the row says: kvmpy itself without what is measured, or an allowance in the unit of the row.
"""

from __future__ import annotations

from typing import Final, NamedTuple

AT_MOST: Final = "<="
AT_LEAST: Final = ">="


class Budget(NamedTuple):
    """What a ratio may be."""

    limit: float
    bound: str = AT_MOST

    def allows(self, ratio: float) -> bool:
        """A ratio that is no number, for nothing was measured, is not allowed."""
        return ratio >= self.limit if self.bound == AT_LEAST else ratio <= self.limit


BUDGETS: Final = {
    "exit": Budget(1.25),
    "exit while migrating": Budget(3.0),  # p99.9, of the same with nothing else going on
    "start": Budget(1.0),
    "boot": Budget(0.8),
    "memory": Budget(1.0),
    "memory allowance": Budget(1.0),  # of `MEMORY_MIB`
    "network rate": Budget(0.95, AT_LEAST),
    "network exits": Budget(1.0),  # of `NETWORK_EXITS`
    "migration rate": Budget(1.0, AT_LEAST),
    "migration time": Budget(1.0),
    "migration blackout": Budget(1.0),
    "failover igb": Budget(0.25),
    "failover e1000e": Budget(0.1),
    "failover alone": Budget(1.1),  # of kvmpy's own with no primary
    "failover back": Budget(1.0),
    "hotplug": Budget(1.1),
}
MEMORY_MIB: Final = 48.0
"""What a VMM may take beside guest RAM."""
NETWORK_EXITS: Final = 100.0
"""In a second, to userspace, while a guest sends as much as it can through vhost-net."""
