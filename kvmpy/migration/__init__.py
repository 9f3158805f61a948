"""Moving a running machine to another kvmpy, and taking one in."""
