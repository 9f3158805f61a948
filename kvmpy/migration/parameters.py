"""What an operator can choose about migrations. Names and defaults are QEMU's where QEMU has the parameter."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Final

from msgspec import Meta, Struct

from kvmpy.machine.announce import Rounds

Natural = Annotated[int, Meta(ge=0, le=2**62)]
Percentage = Annotated[int, Meta(ge=1, le=99)]
Milliseconds = Annotated[int, Meta(ge=0, le=100_000)]
UnplugMilliseconds = Annotated[int, Meta(ge=1, le=3_600_000)]
PrepareMilliseconds = Annotated[int, Meta(ge=1, le=86_400_000)]
Directory = Annotated[str, Meta(max_length=4096)]


class OnNoConvergence(Enum):
    """What to do about a guest that writes faster than its pages can be sent."""

    THROTTLE = "throttle"
    CANCEL = "cancel"
    CONTINUE = "continue"


class OnUnplugTimeout(Enum):
    """What to do about a guest that does not let its failover primary go."""

    FAIL = "fail"
    SURPRISE = "surprise"


class Primaries(Enum):
    """What to do where the destination has no failover primary for the guest."""

    REQUIRE = "require"
    BEST_EFFORT = "best-effort"


class Compression(Enum):
    """How pages are sent."""

    NONE = "none"
    ZSTD = "zstd"


class Parameters(Struct, frozen=True, kw_only=True, rename="kebab"):
    """The comment behind a field is its entry in docs/qmp.md."""

    max_bandwidth: Natural = 0  # bytes a second for all pages together; 0: no limit
    downtime_limit: Annotated[int, Meta(ge=0, le=2_000_000)] = 300  # milliseconds that the guest may stand still
    multifd_channels: Annotated[int, Meta(ge=1, le=64)] = 2  # connections for pages
    multifd_compression: Compression = Compression.NONE  # how pages are sent
    cpu_throttle_initial: Percentage = 20  # how much vCPUs sleep at first, where the guest writes too fast
    cpu_throttle_increment: Percentage = 10  # how much more each time that is not enough
    max_cpu_throttle: Percentage = 99  # and how much at most
    tls_creds: Directory = ""  # the directory with certificates and keys for tcp; "": none
    tls_hostname: Directory = ""  # what the destination's certificate must name; "": the host of the URI
    announce_initial: Milliseconds = 50  # milliseconds between the first announcement of the guest and the second
    announce_max: Milliseconds = 550  # the longest wait between two
    announce_rounds: Annotated[int, Meta(ge=0, le=1000)] = 5  # how many
    announce_step: Milliseconds = 100  # how much longer each wait is than the one before
    x_on_no_convergence: OnNoConvergence = (
        OnNoConvergence.THROTTLE
    )  # what is done where the guest writes too fast (ours)
    x_checksum: bool = False  # compare all RAM at the switchover, which takes its time (ours)
    x_timeout: Annotated[float, Meta(gt=0, le=3600)] = 10.0  # seconds that the other side may take for anything (ours)
    x_insecure: bool = False  # let tcp be used without TLS (ours)
    x_unplug_timeout: UnplugMilliseconds = 30_000  # milliseconds in which the guest is to let its primaries go (ours)
    x_on_unplug_timeout: OnUnplugTimeout = OnUnplugTimeout.FAIL  # what is done where it does not (ours)
    x_primaries: Primaries = Primaries.REQUIRE  # whether the destination must have a primary for it (ours)
    x_prepare_timeout: PrepareMilliseconds = (
        60_000  # milliseconds that the stop waits for the destination to prepare its primaries (ours)
    )
    x_release_primaries: bool = False  # free the primaries here once the guest runs there (ours)

    @property
    def announcement(self) -> Rounds:
        """When the guest is announced once it has arrived."""
        return Rounds(self.announce_initial, self.announce_max, self.announce_rounds, self.announce_step)


class Capability(Enum):
    """What QEMU calls capabilities, of those that concern us."""

    EVENTS = "events"
    MULTIFD = "multifd"
    AUTO_CONVERGE = "auto-converge"
    RETURN_PATH = "return-path"


CAPABILITIES: Final = {
    Capability.EVENTS: True,
    Capability.MULTIFD: True,
    Capability.AUTO_CONVERGE: True,
    Capability.RETURN_PATH: True,
}
"""What they are at first. The last cannot be changed: without a way back nobody knows who has the guest."""
