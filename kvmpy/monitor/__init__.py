"""The control socket: what operators and scripts say to a running machine."""
