"""The lab: Linux hosts with real KVM, emulated in software on a machine that needs none of its own (docs/lab.md)."""
