"""docs/a-guest-write.md tells the truth: its quotes are the code, and there are three hops."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, cast

import pytest

from kvmpy.bus import Bus
from kvmpy.devices.serial import Serial16550
from kvmpy.kvm.exits import PioWrite
from kvmpy.kvm.vcpu import Vcpu
from kvmpy.machine.vcpu import Gate, VcpuThread
from tests.fakes.host import Line
from tests.fakes.vcpu import FakeVcpu

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "a-guest-write.md").read_text()
SOURCES = "\n".join(path.read_text() for path in (ROOT / "kvmpy").rglob("*.py"))


@pytest.mark.parametrize("quote", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
def test_each_quote_is_in_the_code(quote: str) -> None:
    assert quote.rstrip("\n") in SOURCES


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:kvmpy|tests)/[\w/-]+\.py)`", PAGE))))
def test_each_file_it_names_exists(path: str) -> None:
    assert (ROOT / path).is_file()


def test_from_the_exit_to_the_device_there_are_three_hops() -> None:
    hops: list[str] = []
    said = bytearray()
    pio = Bus("pio")
    pio.map(0x3F8, 8, Serial16550("com1", Line(), said.extend), widest=1)
    vcpu = cast("Vcpu", FakeVcpu(PioWrite(0x3F8, 1, (ord("K"),))))
    thread = VcpuThread(vcpu, Gate(), pio, Bus("mmio"), on_fatal=lambda *_: None)

    def note(frame: Any, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and frame.f_code.co_name in ("step", "write") and "kvmpy" in path.parts:
            hops.append(f"{path.relative_to(ROOT)} {frame.f_code.co_name}")

    sys.setprofile(note)
    thread.step()
    sys.setprofile(None)
    assert said == b"K"
    assert hops == ["kvmpy/machine/vcpu.py step", "kvmpy/bus.py write", "kvmpy/devices/serial.py write"]
