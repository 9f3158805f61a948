"""The machine: where everything is, how it is put together, and how it runs."""
