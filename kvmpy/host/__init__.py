"""Resources of the host, each owned and closed by one object.

Memory, eventfds, the reactor, terminals, the runtime directory.
"""
