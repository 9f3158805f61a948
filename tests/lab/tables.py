"""Tables of a configuration's devices, as TOML."""

from __future__ import annotations

import json


def table(kind: str, **keys: object) -> str:
    """One entry of an array of tables, without the keys that are None. JSON's values are TOML's."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items() if value is not None]
    return "\n".join([f"[[{kind}]]", *lines, ""])


def root_ports(*names: str) -> str:
    return "".join(table("root_port", id=name) for name in names)


def disk(name: str, path: str, *, bus: str | None = None, queues: int = 1, readonly: bool = False) -> str:
    """A disk and its drive, which has the same name."""
    drive = table("drive", id=name, path=path, format="raw", readonly=readonly)
    queue_key = {"num-queues": queues}
    return drive + table("device", driver="virtio-blk-pci", id=name, drive=name, bus=bus, **queue_key)


def nic(
    name: str,
    ifname: str,
    bridge: str,
    *,
    vhost: bool | None = None,
    queues: int = 1,
    bus: str | None = None,
    mtu: int | None = None,
    mac: str | None = None,
) -> str:
    """A network device on a tap in a bridge; its netdev is called "tap-" and its name."""
    netdev = f"tap-{name}"
    tap = table("netdev", type="tap", id=netdev, ifname=ifname, bridge=bridge, vhost=vhost, queues=queues)
    return tap + table("device", driver="virtio-net-pci", id=name, netdev=netdev, bus=bus, host_mtu=mtu, mac=mac)


def rng(name: str, *, bus: str | None = None) -> str:
    return table("device", driver="virtio-rng-pci", id=name, bus=bus)


def console(name: str, chardev: str) -> str:
    return table("device", driver="virtio-serial-pci", id=name, chardev=chardev)
