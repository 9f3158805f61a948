"""Direct boot: kernel images, the command line and the ACPI tables that kvmpy, being the firmware, provides."""
