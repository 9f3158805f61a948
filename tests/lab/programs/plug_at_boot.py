"""Run on an emulated host: plugs devices into a machine of kvmpy's at moments of its guest's boot. Standard library.

python plug_at_boot.py QMP-SOCKET MOMENT:PORT ...          moments in seconds from the socket's appearance
"""

from __future__ import annotations

import os
import sys
import time

from bench.plug_times import Qmp

POLL = 0.01
PATIENCE = 600.0


def main(path: str, *plan: str) -> None:
    end = time.monotonic() + PATIENCE
    while not os.path.exists(path):
        if time.monotonic() > end:
            raise SystemExit(f"{path}: never there")
        time.sleep(POLL)
    begin = time.monotonic()
    qmp: Qmp | None = None
    for moment, port in (item.split(":") for item in plan):
        time.sleep(max(0.0, begin + float(moment) - time.monotonic()))
        try:
            qmp = qmp or Qmp(path)
        except (TimeoutError, ConnectionError) as e:
            raise SystemExit(f"{path}: {e}") from e
        qmp("device_add", driver="virtio-rng-pci", id=f"rng-{port}", bus=port)
        print(f"{port} at {time.monotonic() - begin:.2f}", flush=True)
    print("all plugged", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
