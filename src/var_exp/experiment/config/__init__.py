"""The configuration: its schema, its checks, and overrides of the command line."""
