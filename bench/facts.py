"""What the figures were taken on: the machine, its kernel and KVM, and the versions of what is compared."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import kvmpy
from bench.installed import interpreter
from kvmpy.errors import HostError
from kvmpy.host.memory import MIB, available_memory
from kvmpy.kvm.system import WELCOME, System, virtualization
from scripts.lab.kernels import LAB


def facts() -> dict[str, str]:
    """By name, as they are printed."""
    return {
        "kernel": f"{platform.system()} {platform.release()}",
        "processor": f"{_processor()}, {os.cpu_count()} of them",
        "memory": f"{available_memory() // MIB} MiB available",
        "KVM": _kvm(),
        "lab": f"emulated hosts and their guests: Linux {_lab_kernels()}",
        "QEMU": _first_line("qemu-system-x86_64", "--version"),
        "Python": f"{_first_line(interpreter(), '--version')} ({interpreter()})",
        "kvmpy": f"{kvmpy.__version__} ({_revision()})",
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _kvm() -> str:
    """What runs a guest, and what of it kvmpy would use and does not find."""
    try:
        with System() as system:
            absent = [each.name for each in WELCOME if not system.check(each.name)]
    except HostError as e:
        return str(e)
    kind = virtualization() or "no vmx or svm: guests' kernels are interpreted"
    return f"{kind}; without {', '.join(absent)}" if absent else kind


def _lab_kernels() -> str:
    found = (LAB / "kernel").glob("*/boot/vmlinuz-*")
    return ", ".join(sorted(path.name.partition("-")[2] for path in found)) or "unknown"


def _revision() -> str:
    checkout = str(Path(kvmpy.__file__).parents[1])
    return _first_line("git", "-C", checkout, "describe", "--always", "--dirty")


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.partition("\n")[0]
