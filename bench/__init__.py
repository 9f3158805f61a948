"""Measurements of kvmpy beside QEMU, in one run: ratios, because absolute times on shared machines mean little."""
