"""Streams that somebody could send to break a reader, each with what it says of it."""
