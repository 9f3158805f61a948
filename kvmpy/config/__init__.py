"""The operator's configuration: what it may say (`schema`), and the strict loader of the file that says it."""
