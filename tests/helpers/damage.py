"""Damage to files, as a disk or a cut connection does it."""

import random
from pathlib import Path

DAMAGES = ("cut short", "one bit", "several bits", "a block of zeros")


def spoil(path: Path, draw: random.Random, kinds: tuple[str, ...] = DAMAGES) -> str:
    """Damage a file in one of these ways; in which."""
    content = bytearray(path.read_bytes())
    kind = draw.choice(kinds)
    place = draw.randrange(len(content))
    if kind == "cut short":
        del content[place:]
    elif kind == "a block of zeros":
        while not any(content[place : place + 512]):
            place = draw.randrange(len(content))
        content[place : place + 512] = bytes(len(content[place : place + 512]))
    elif kind == "noise":
        content[place:] = draw.randbytes(len(content) - place)
    elif kind == "doubled":
        content *= 2
    elif kind == "empty":
        content.clear()
    elif kind == "another answer":
        content = b"<html>404: not found</html>\n"
    else:
        for _ in range({"one bit": 1, "several bits": 8}[kind]):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return kind
