"""Devices that come at any moment of a guest's boot."""

from __future__ import annotations

import os
import random
from typing import Final

import pytest

from scripts.lab.host import EmulatedHost
from scripts.lab.images import Images
from tests.counts import count
from tests.lab.guest import Guest
from tests.lab.test_hotplug import SLOW, ports

SEED: Final = int(os.environ.get("KVMPY_SEED", "20260101"))

MOMENTS: Final = count(8, 24)
AT_A_TIME: Final = 8
BOOT: Final = 12.0  # seconds over which the moments are spread; where the boot is shorter, the last come after it


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("turn", range(MOMENTS // AT_A_TIME))
def test_r24_what_is_plugged_while_the_guest_boots_ends_present(
    host: EmulatedHost, lab_images: Images, turn: int
) -> None:
    dice = random.Random(SEED + turn)
    names = [f"rp{number}" for number in range(1, AT_A_TIME + 1)]
    plan = [
        f"{moment:.2f}:{name}" for moment, name in zip(sorted(dice.uniform(0, BOOT) for _ in names), names, strict=True)
    ]
    kernel = ("generic", "cloud")[turn % 2]
    words = "modules=virtio_pci,virtio-rng"
    with Guest(host, "boot", kernel=kernel, tables=ports(*names), words=words) as guest:
        program = ["python", "-m", "tests.lab.programs.plug_at_boot", "/run/kvmpy/boot/qmp.sock", *plan]
        plugging = host.spawn(program)
        guest.wait_shell()
        plugging.expect("all plugged", SLOW)
        slots = f"/sys/bus/pci/slots/[1-{AT_A_TIME}]"
        guest.type(f"until [ $(cat {slots}/power | grep -c 1) = {AT_A_TIME} ]; do sleep 0.2; done", SLOW)
        guest.type("sleep 8")  # no press of a button is behind it
        assert guest.type(f"cat {slots}/power {slots}/adapter | grep -c 1") == str(2 * AT_A_TIME)
        bound = "ls -d /sys/bus/virtio/drivers/virtio_rng/virtio* | wc -l"
        assert guest.type(bound) == str(AT_A_TIME), f"seed {SEED + turn}: {plan}: {plugging.output}"
        guest.process.send("poweroff\n")
        assert guest.wait_end() == 0
