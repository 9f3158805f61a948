"""`kvmpy doctor`: what this host can do, each precondition with a verdict and how to mend it."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from kvmpy.cli.doctor_pci import examine_device, node, passthrough
from kvmpy.cli.finding import FAIL, OK, WARN, Finding
from kvmpy.errors import ConfigError, HostError
from kvmpy.host import rundir
from kvmpy.host.memory import MIB, available_memory
from kvmpy.host.pci_function import parse_address
from kvmpy.host.tree import Host
from kvmpy.kvm.system import WELCOME, System, virtualization

CAP_NET_ADMIN: Final = 1 << 12  # linux/capability.h


def doctor(args: argparse.Namespace) -> int:
    """Print every finding; the exit code is 1 where one is a failure."""
    host = Host()
    findings = examine(host) if args.device is None else examine_device(_address(args.device), host)
    return report(list(findings), as_json=args.json)


def _address(text: str) -> str:
    try:
        return parse_address(text)
    except HostError as e:
        raise ConfigError(f"--device: {e}") from e


def report(findings: Sequence[Finding], *, as_json: bool) -> int:
    """Print ``findings``; returns the exit code."""
    if as_json:
        print(json.dumps([finding._asdict() for finding in findings]))
    else:
        for finding in findings:
            print(f"{finding.verdict:<5} {finding.what}: {finding.found}")
            if finding.remedy:
                print(f"      {finding.remedy}")
    return int(any(finding.verdict == FAIL for finding in findings))


def examine(host: Host) -> Iterator[Finding]:
    """Every precondition, the most important first."""
    yield from _kvm(f"{host.dev}/kvm")
    yield _nested(virtualization(host.proc))
    yield Finding("kernel", OK, _read(f"{host.proc}/sys/kernel/osrelease").strip() or "unknown")
    yield Finding("memory", OK, f"{available_memory() // MIB} MiB available for a guest")
    yield _huge_pages(Path(host.sys))
    yield _runtime_directory(rundir.base())
    yield node(f"{host.dev}/net/tun", "taps, that is for any netdev", "modprobe tun")
    yield node(f"{host.dev}/vhost-net", "packets that stay in the kernel", "modprobe vhost_net")
    yield _net_admin(_read(f"{host.proc}/self/status"))
    yield from passthrough(host)


def _kvm(path: str) -> Iterator[Finding]:
    try:
        system = System(path)
    except HostError as e:
        found, _, remedy = str(e).removeprefix(f"{path}: ").partition(": ")
        yield Finding(path, FAIL, found, remedy)
        return
    with system:
        missing = system.missing()
        for capability in missing:
            yield Finding(capability.name, FAIL, "missing", f"Linux {capability.since} and later have it")
        if not missing:
            yield Finding(path, OK, f"opened; up to {system.max_vcpus} vCPUs in a machine")
        for capability in WELCOME:
            if not system.check(capability.name):
                remedy = f"kvmpy does without; Linux {capability.since} and later have it where the processor does"
                yield Finding(capability.name, WARN, "missing", remedy)


def _nested(extension: str | None) -> Finding:
    if extension is None:
        return Finding(
            "hardware virtualization",
            WARN,
            "neither vmx nor svm in /proc/cpuinfo",
            "switch it on in the firmware, or for the virtual machine that this is; on a KVM without it a Linux guest "
            "most likely hangs without a word, whatever else is ok here; make demo-boot uses an emulated host",
        )
    return Finding("hardware virtualization", OK, extension)


def _huge_pages(sys: Path) -> Finding:
    pools = {
        path.name.removeprefix("hugepages-"): int(_read(path / "free_hugepages") or 0)
        for path in sorted((sys / "kernel/mm/hugepages").glob("hugepages-*"))
    }
    found = ", ".join(f"{count} free of {size}" for size, count in pools.items()) or "none"
    return Finding("huge pages", OK, found + " (for machine.hugepages)")


def _runtime_directory(base: str) -> Finding:
    path = Path(base).absolute()
    # Not Path.exists, which raises where we may not look: what can be seen then is the directory that is closed to us.
    nearest = next(place for place in (path, *path.parents) if os.path.exists(place))
    remedy = f"run as root, or set {rundir.OVERRIDE} to a directory of yours"
    if not nearest.is_dir():
        return Finding("runtime directory", FAIL, f"{nearest} is not a directory", remedy)
    if not os.access(nearest, os.W_OK | os.X_OK):
        return Finding("runtime directory", FAIL, f"{nearest} is not writable", remedy)
    return Finding("runtime directory", OK, base)


def _net_admin(status: str) -> Finding:
    """``status`` is /proc/PID/status, with the effective capabilities as a hexadecimal mask (man 5 proc)."""
    masks = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:")]
    if any(mask & CAP_NET_ADMIN for mask in masks):
        return Finding("CAP_NET_ADMIN", OK, "held")
    remedy = (
        "run as root, give a service AmbientCapabilities=CAP_NET_ADMIN, "
        "or make bridge and tap for the user beforehand (docs/networking.md)"
    )
    return Finding("CAP_NET_ADMIN", WARN, "not held; needed to make taps and bridges", remedy)


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
