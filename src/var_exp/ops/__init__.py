"""Operators with torch's names and shapes, and faster kernels for CPUs beside the plain way.

Networks import them in place of torch's; which kernel runs is decided here alone. docs/speed.md has
what each of them gains.
"""
