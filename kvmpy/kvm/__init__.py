"""KVM as typed Python: the system, the VM, its vCPUs and their exits."""
