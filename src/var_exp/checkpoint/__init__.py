"""Checkpoints of networks: what they hold, how they are read, and where they come from."""
