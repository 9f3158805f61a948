"""What can go wrong in the lab.

LabError
├── LabTimeout    a wait ended: says what came so far and what the host's console said last
└── HostGone      the emulated host ended while something was still expected of it
"""


class LabError(Exception):
    """The lab cannot do what was asked; the text says what is missing or what happened."""


class LabTimeout(LabError):
    """Something did not happen in its time."""


class HostGone(LabError):
    """The emulated host is not there any more."""
