"""The main job, on whatever this machine offers: Debian's kernel under kvmpy, to a shell you can type into.

With hardware KVM the guest runs right here. Without, an emulated host is started first: a whole machine in software,
with KVM that works, where everything takes some ten times longer.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

from kvmpy.kvm.system import virtualization

RUN: Final = ("kvmpy", "run", "examples/demo.toml", "--timings")
LAB: Final = ("-m", "scripts.lab", "run", "--seconds", "28800")


def main() -> None:
    """Become the command that runs the guest."""
    sys.stdout.flush()
    if has_hardware_kvm():
        kvmpy = Path(sys.executable).with_name("kvmpy")
        print("This machine has hardware KVM: the guest runs on it.", file=sys.stderr)
        os.execv(kvmpy, RUN)
    print(
        "This machine has no hardware KVM for us: starting an emulated host, and the guest in it.",
        file=sys.stderr,
    )
    tty = ["--tty"] if os.isatty(0) else []
    os.execv(sys.executable, [sys.executable, *LAB, *tty, "--", *RUN])


def has_hardware_kvm() -> bool:
    """/dev/kvm can be opened, and the processor virtualizes: KVM without that cannot run a stock kernel."""
    return virtualization() is not None and os.access("/dev/kvm", os.R_OK | os.W_OK)


if __name__ == "__main__":
    main()
