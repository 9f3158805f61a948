"""Move a running Linux guest into a second machine of the same process, by State alone, and look whether it goes on.

    python -m tests.lab.programs.relocate CONFIG SECONDS KEY=VALUE...

The guest prints its time of day and uptime again and again; prints, as JSON, what it said before and after, with the
host's time at which each line came. All but RAM goes through `save`, JSON and `load`, as in a migration's stream.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

from kvmpy import Machine, load
from kvmpy.boot.plan import BootPlan
from kvmpy.kvm import vcpu_state
from kvmpy.kvm.cpu_model import describe_guest, describe_host, differences
from kvmpy.kvm.tsc import load_tsc
from kvmpy.kvm.vcpu_registers import VcpuRegisters
from kvmpy.kvm.vm_state import VmState, load_clock, load_interrupts, save_vm
from kvmpy.machine import registers
from kvmpy.state import load as decode
from kvmpy.state import save as encode

PATIENCE = 300
TICKS = 30  # a line is late by what the host does meanwhile: the earliest of many tells the time
LOOP = b"while :; do echo tick $(date +%s) $(cat /proc/uptime) end; sleep 0.2; done\n"


def main(config: str, seconds: str, *overrides: str) -> None:
    source, destination = (
        Machine(load(config, [*overrides, f"console.serial=unix:/run/{name}.sock"], name=name)) for name in ("a", "b")
    )
    with source, destination:
        source.start()
        with terminal("a") as console:
            lines = said(console)
            up = until(lines, b"KVMPY-GUEST UP").decode().strip()
            console.sendall(LOOP)
            before = [tick(lines) for _ in range(TICKS)]
        source.pause()
        state = saved(source)
        time.sleep(float(seconds))
        problems = differences(describe_guest(source.board.vcpus[0]), describe_host(destination.board.vcpus[0]))
        moved(source, destination, json.loads(json.dumps(state)))
        with terminal("b") as console:
            with instead_of_booting(destination):
                destination.start()
            lines = said(console)
            after = [tick(lines) for _ in range(TICKS)]
        destination.reset()  # and it can still be reset
        answer = {"up": up, "before": before, "after": after, "problems": problems, "state": destination.state.value}
        print(json.dumps(answer))


def saved(machine: Machine) -> dict[str, Any]:
    board = machine.board
    return {
        "vcpus": [encode(vcpu_state.save(vcpu)) for vcpu in board.vcpus],
        "vm": encode(save_vm(board.vm)),
        "devices": [encode(device.state) for device in board.devices],
    }


def moved(source: Machine, destination: Machine, state: dict[str, Any]) -> None:
    """All of the source into the destination, which has not run; the order is that of a migration."""
    board = destination.board
    for ours, theirs in zip(board.memory.blocks, source.board.memory.blocks, strict=True):
        ours.view[:] = theirs.view
    destination.handoff.adopt_cpu(describe_guest(source.board.vcpus[0]))
    states = [decode(VcpuRegisters, section) for section in state["vcpus"]]
    for vcpu, registers_ in zip(board.vcpus, states, strict=True):
        vcpu_state.load(vcpu, registers_)
    vm = decode(VmState, state["vm"])
    load_interrupts(board.vm, vm.interrupts)
    for device, section in zip(board.devices, state["devices"], strict=True):
        device.state = decode(type(device.state), section)
        device.post_load()
    load_tsc(board.vcpus, states)
    load_clock(board.vm, vm.clock)
    for vcpu in board.vcpus:
        vcpu.tell_paused()


@contextmanager
def instead_of_booting(machine: Machine) -> Iterator[None]:
    """Within, `start` runs on from what was loaded."""
    boot, enter = machine.boot, registers.enter
    machine.boot = cast(BootPlan, SimpleNamespace(load=lambda memory: None))
    setattr(registers, "enter", lambda vcpu, entry: None)  # noqa: B010  mypy knows that it is a function
    try:
        yield
    finally:
        machine.boot = boot
        setattr(registers, "enter", enter)  # noqa: B010


def terminal(name: str) -> socket.socket:
    console = socket.socket(socket.AF_UNIX)
    console.settimeout(PATIENCE)
    console.connect(f"/run/{name}.sock")
    return console


def said(console: socket.socket) -> Iterator[bytes]:
    text = b""
    while data := console.recv(4096):
        *whole, text = (text + data).split(b"\n")
        yield from whole


def until(lines: Iterator[bytes], word: bytes) -> bytes:
    return next(line for line in lines if word in line)


def tick(lines: Iterator[bytes]) -> dict[str, float]:
    """The guest's time and uptime, and the host's time now."""
    while True:
        words = until(lines, b"tick").split()
        if words[0] == b"tick" and words[-1].strip() == b"end" and len(words) == 5:
            return {"date": float(words[1]), "uptime": float(words[2]), "host": time.time()}


if __name__ == "__main__":
    main(*sys.argv[1:])
