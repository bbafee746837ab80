"""Operators with fast kernels: the names and shapes of torch, each with a plain fallback."""
