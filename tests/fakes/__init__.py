"""Small real objects that stand where a device meets the host."""
