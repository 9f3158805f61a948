"""Functions of the host's PCI bus given to the guest, by the kernel's VFIO.

container   who may do DMA where: groups of devices, and the one place where the guest's RAM is mapped for them
type1       those maps
device      one open function: its regions, interrupts and reset
config      what its configuration space says
reset       which reset it has, and resetter does it on a thread
interrupts  its interrupts tied to the guest's, with nobody of ours between them
pci         the function as the guest sees it
"""
