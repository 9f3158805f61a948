"""PCI Express: configuration space, BARs, message-signalled interrupts, the host bridge and root ports.

Models PCI Express Base 5.0 (with PCI Local Bus 3.0 for INTx and the header, PCI-to-PCI Bridge 1.2 for windows).

Locks, always taken in this order and never across anything that waits, but for a disk's requests (docs/adr/0007):

    PciRoot.lock        which function has which number; held during a configuration access
    PciFunction.lock    the function's registers; the bus holds it during a BAR access (a port's, then that behind it)
    PciRoot's decoding  where BARs are mapped now
    Bar's own           its doorbells

A BAR access takes the function's alone, so the host side (an io thread) and other vCPUs are never kept waiting by one
that reads configuration space.
"""
