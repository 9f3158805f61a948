"""What driver and device agree on: the numbers and layouts of Virtio 1.2 that every device shares.

Section numbers are those of the Virtio 1.2 specification. What belongs to one kind of device stands beside it.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final


class DeviceId(IntEnum):
    """What kind of device it is (section 5)."""

    NET = 1
    BLOCK = 2
    CONSOLE = 3
    ENTROPY = 4


class Status(IntEnum):
    """Bits of the device status field (section 2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


class Feature(IntEnum):
    """Numbers of the feature bits that mean the same for every device (section 6)."""

    INDIRECT_DESC = 28
    EVENT_IDX = 29
    VERSION_1 = 32
    ACCESS_PLATFORM = 33
    RING_PACKED = 34
    IN_ORDER = 35
    ORDER_PLATFORM = 36
    SR_IOV = 37
    NOTIFICATION_DATA = 38
    NOTIF_CONFIG_DATA = 39
    RING_RESET = 40


def feature_mask(*numbers: int) -> int:
    """The feature bits of these numbers."""
    return sum(1 << number for number in set(numbers))


# Split virtqueues (section 2.7): struct virtq_desc (addr, len, flags, next) and struct virtq_used_elem (id, len).
VIRTQ_DESC: Final = struct.Struct("<QIHH")
VIRTQ_USED_ELEM: Final = struct.Struct("<II")
VIRTQ_DESC_F_NEXT: Final = 1
VIRTQ_DESC_F_WRITE: Final = 2
VIRTQ_DESC_F_INDIRECT: Final = 4
VIRTQ_AVAIL_F_NO_INTERRUPT: Final = 1
VIRTQ_USED_F_NO_NOTIFY: Final = 1
# Both rings begin with le16 flags and le16 idx and end with a le16 that event index uses.
VIRTQ_IDX: Final = 2
VIRTQ_RING: Final = 4
LARGEST_QUEUE: Final = 32768

NO_VECTOR: Final = 0xFFFF  # VIRTIO_MSI_NO_VECTOR (section 4.1.4.3)

# virtio-pci (section 4.1).
PCI_VENDOR: Final = 0x1AF4
PCI_DEVICE: Final = 0x1040  # plus the DeviceId


class PciCap(IntEnum):
    """cfg_type of a struct virtio_pci_cap (section 4.1.4)."""

    COMMON = 1
    NOTIFY = 2
    ISR = 3
    DEVICE = 4
    PCI = 5


class Isr(IntEnum):
    """Bits of the ISR status byte (section 4.1.4.5)."""

    QUEUE = 1
    CONFIG = 2
