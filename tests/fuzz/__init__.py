"""The whole machine under random guests: everything but KVM is real, threads included."""
