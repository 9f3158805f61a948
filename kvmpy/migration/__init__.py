"""Moving a running machine to another host: its pages, its state, and the hand-over."""
