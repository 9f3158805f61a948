"""Saved sections of every State and version: what was once written must load for ever.

One file for each NAME and VERSION, with the sections of a device at power-on and of a busy one. `python -m
tests.golden.make` writes the files that are missing and never touches one that exists: after bumping a VERSION run it
once and commit the new file.
"""
