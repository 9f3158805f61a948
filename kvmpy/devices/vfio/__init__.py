"""Functions of the host's PCI bus given to the guest, by the kernel's VFIO.

container   who may do DMA where: groups, and the guest's RAM mapped for them
device      one open function: its regions, interrupts and reset
config      what its configuration space says
interrupts  its interrupts tied to the guest's, with nobody of ours between them
pci         the function as the guest sees it
"""
