"""Device models: what the guest sees. None of them knows KVM, its own address, or the configuration."""
