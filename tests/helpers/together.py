"""Several processes on this machine, as torchrun would start them: forked, which is quick."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PATIENCE = 120  # seconds


def together(size: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call a function in each of `size` processes; what it returned, plain data, by rank.

    Args:
        folder: where the results are put down.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=work, args=(rank, size, port, folder, function, arguments))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
    results = [torch.load(folder / f"{rank}.pt") for rank in range(size)]
    for error, _ in results:
        assert error is None, error
    return [result for _, result in results]


def work(rank: int, size: int, port: int, folder: Path, function, arguments) -> None:
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    place |= {"GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"TORCHELASTIC_RUN_ID": "test"}
    error, result = "killed, since it did not end", None
    torch.save((error, result), folder / f"{rank}.pt")
    try:
        error, result = None, function(*arguments)
    except BaseException:
        error = traceback.format_exc()
    torch.save((error, result), folder / f"{rank}.pt")
    os._exit(0)  # without what the parent has to do at its end
