"""The commands that talk to a running machine over its monitor socket."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any, Final

from kvmpy.cli.client import Client, find
from kvmpy.config.values import size_text
from kvmpy.errors import HostError
from kvmpy.host import rundir

# ps is for when things are wrong: it does not wait long for a machine that hangs.
PS_PATIENCE: Final = 2.0
# How long `status` counts exits for
RATE_SECONDS: Final = 0.5
# What goes on at a root port, in words
STATES: Final = {
    "hidden": "hidden from the guest, see its failover pair",
    "waiting": "shown to the guest when that is done with the one before",
    "off": "the guest does not use it",
    "working": "the guest is at work on it",
    "on": "in use",
    "asked": "the guest has been asked to let it go",
    "leaving": "out of the slot, the host is not done with it",
}
# What becomes of a failover primary, in words
PRIMARIES: Final = {
    "waiting-for-standby": "hidden: there is no such standby",
    "hidden": "hidden: no driver has asked for it",
    "plugging": "in its slot, not in use yet",
    "plugged": "in use",
    "unplug-requested": "the guest has been asked to let it go",
    "released": "out of its slot",
    "failed": "failed",
}
# Of a device, what has a place of its own in `status` or is for --json
SAID_APART: Final = ("host", "id", "driver", "address", "kind", "status", "features", "queues", "broken")


def ps(args: argparse.Namespace) -> int:
    """List the machines that run."""
    rows = [_row(machine) for machine in rundir.running()]
    if args.json:
        print(json.dumps(rows))
        return 0
    print(f"{'NAME':<24} {'PID':>8}  {'STATUS':<16} {'CPUS':>4} {'MEMORY':>10}  DEVICES")
    for row in rows:
        devices = ", ".join(_brief(device) for device in row["devices"]) or "-"
        memory = size_text(row["memory"]) if row["memory"] else "-"
        print(f"{row['name']:<24} {row['pid']:>8}  {row['status']:<16} {row['cpus'] or '-':>4} {memory:>10}  {devices}")
    return 0


def status(args: argparse.Namespace) -> int:
    """Say what one machine is doing."""
    with Client(find(args.name)) as client:
        earlier, begun = client("query-machine")["exits"], time.monotonic()
        time.sleep(RATE_SECONDS)
        info, seconds = client("query-machine"), time.monotonic() - begun
    info["exits-per-second"] = {
        kind: round((count - earlier[kind]) / seconds, 1) for kind, count in info["exits"].items()
    }
    if args.json:
        print(json.dumps(info))
        return 0
    exits = ", ".join(f"{count} {kind} ({info['exits-per-second'][kind]:g}/s)" for kind, count in info["exits"].items())
    print(f"{info['name']}: {info['status']}, process {info['pid']}")
    print(f"  {info['cpus']} vCPUs, {size_text(info['memory'])} of memory")
    print(f"  kernel: {info['kernel']}")
    print(f"  serial line: {info['serial']}")
    print(f"  exits: {exits}")
    for device in info["devices"]:
        _show(device)
    _show_ports(info["root-ports"], info["spare"])
    for pair in info["failover"]:
        _show_pair(pair)
    if info["device-faults"]:
        print(f"  device faults: {info['device-faults']} (see the machine's standard error)")
    return 0


def pause(args: argparse.Namespace) -> int:
    """Stop a machine's vCPUs."""
    return _ask(args.name, "stop")


def resume(args: argparse.Namespace) -> int:
    """Let them run on."""
    return _ask(args.name, "cont", **({"force": True} if args.force else {}))


def reset(args: argparse.Namespace) -> int:
    """Press the reset button."""
    return _ask(args.name, "system_reset")


def powerdown(args: argparse.Namespace) -> int:
    """Press the power button."""
    arguments = {} if args.limit is None else {"limit": args.limit}
    with Client(find(args.name)) as client:
        listens = client("query-machine")["power-button-enabled"]
        client("system_powerdown", **arguments)
    if not listens:
        print(
            f"kvmpy: {args.name}: the guest has not enabled its power button, and may not notice; "
            f"press again when it has booted, or: kvmpy stop {args.name}",
            file=sys.stderr,
        )
    return 0


def stop(args: argparse.Namespace) -> int:
    """Pull the plug, and wait until the machine is gone."""
    with Client(find(args.name)) as client:
        client.quit()
    return 0


def _brief(device: dict[str, Any]) -> str:
    """A device in a word: its id, and of a network device its link and data path."""
    facts = [device[key] for key in ("link", "path") if key in device] + ["broken"] * bool(device["broken"])
    return f"{device['id']} ({' '.join(facts)})" if facts else str(device["id"])


def _show(device: dict[str, Any]) -> None:
    """A device: what and where it is, what it is doing, its queues, and why it is broken if it is."""
    facts = {key: value for key, value in device.items() if key not in SAID_APART and value not in ("", None, {})}
    if "bars" in facts:
        facts["bars"] = {index: "not placed" if at is None else f"at {at:#x}" for index, at in facts["bars"].items()}
    if facts.get("path") == "vhost" and not any(facts.get("userspace", {}).values()):
        facts.pop("userspace", None)  # its frames pass by us, uncounted: zeros would say that there are none
    place = f"at {device['address']}" if device["address"] else "at no address yet"
    print(f"  {device['id']}: {device['driver']} {place}, {_driver_status(device)}")
    print("    " + ", ".join(f"{key} {_shown(value)}" for key, value in facts.items())) if facts else None
    if queues := [
        f"{queue['name']} {queue['size']}" for queue in device.get("queues", ()) if queue.get("enabled", True)
    ]:
        print(f"    queues: {', '.join(queues)}")
    if device["broken"]:
        print(f"    broken until the guest resets it: {device['broken']}")


def _show_ports(ports: list[dict[str, Any]], spare: dict[str, list[str]]) -> None:
    """Where devices can be plugged in, and what there is for them to use."""
    if not ports:
        return
    width = max(len(port["id"]) for port in ports)
    print("  root ports:")
    for port in ports:
        taken = "free" if port["state"] == "free" else f"{port['device']}: {STATES[port['state']]}"
        print(f"    {port['id']:<{width}}  slot {port['slot']:>2}  {taken}")
    for kind, names in spare.items():
        if names:
            print(f"  {kind} that no device uses: {', '.join(names)}")


def _show_pair(pair: dict[str, Any]) -> None:
    """A failover pair: its devices, their addresses, and what is wrong."""
    standby, address = pair["standby-id"], pair.get("standby-mac", "no such device")
    if (primary := pair.get("primary-id")) is None:
        print(f"  failover pair {standby} ({address}): no primary")
    else:
        own = pair.get("primary-mac", "no MAC now")
        print(f"  failover pair {standby} ({address}), {primary} ({own}): {PRIMARIES[pair['state']]}")
        gap = f"; at its last change frames went nowhere for {pair['rx-gap-ms']:g} ms" if "rx-gap-ms" in pair else ""
        print(f"    frames take the {pair['path']}{gap}")
    if "standby-rx-frames" in pair:
        print(f"    over the standby: {pair['standby-rx-frames']} frames in, {pair['standby-tx-frames']} out")
    for key, what in (("error", "last error"), ("network-error", "the network around it")):
        if pair.get(key):
            print(f"    {what}: {pair[key]}")


def _driver_status(device: dict[str, Any]) -> str:
    if "status" not in device:  # no virtio device
        return f"the host's {device['host']}"
    return "in use" if "driver_ok" in device["status"] else "the guest has no driver for it yet"


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {count}" for key, count in value.items()) + ")"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _ask(name: str, command: str, **arguments: Any) -> int:
    with Client(find(name)) as client:
        client(command, **arguments)
    return 0


def _row(machine: rundir.Running) -> dict[str, Any]:
    """One line of ps; a machine that does not answer is listed as such."""
    try:
        with Client(machine, PS_PATIENCE) as client:
            info: dict[str, Any] = client("query-machine")
    except HostError:
        return {"name": machine.name, "pid": machine.pid, "status": "no answer", "cpus": 0, "memory": 0, "devices": []}
    return {key: info[key] for key in ("name", "pid", "status", "cpus", "memory", "devices")}
