"""Whole migration streams, one pair for each version: what a source sent, and what its destination answered."""
