"""What a user reads of an exception: one line, and where the value was given."""

import os

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from var_exp.distributed.collectives import is_distributed

WRONG_ARGUMENTS = ("unexpected keyword argument", "required positional argument")
FULL_MEMORY = ("can't allocate memory", "out of memory", "Storage size calculation overflowed")
OUT_OF_MEMORY = (
    "memory is full; take a smaller data.image_size, batch_size, "
    "model.<stage>.micro_batch_size or network: check=true says what a run takes"
)


def mistake(error: Exception) -> str | None:
    """What a user reads of an exception, in one line; None for one that is no user's mistake."""
    told = first_cause(error)
    if isinstance(error, MemoryError) or any(words in told for words in FULL_MEMORY):
        return f"{OUT_OF_MEMORY} ({told})"
    if isinstance(error, ValueError | HydraException | OmegaConfBaseException):
        return told
    if isinstance(error, TypeError) and any(words in told for words in WRONG_ARGUMENTS):
        return told
    # Lightning's, for arguments of its Trainer; only training may import it.
    return f"trainer: {told}" if type(error).__name__ == "MisconfigurationException" else None


def is_of_another_process(error: RuntimeError) -> bool:
    """Whether this is how the end of another process of the run looks from here."""
    told = str(error)
    return any(name in told for name in ("gloo", "NCCL", "Connection closed by peer"))


def first_cause(error: BaseException) -> str:
    """The message that the wrapping of Hydra or of a data worker hides, in one line.

    With Hydra's note of the key where it happened.
    """
    where = [line for line in str(error).splitlines() if line.startswith("full_key:")]
    while isinstance(error, HydraException) and error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).splitlines()
    if any(line.startswith("Original Traceback") for line in lines):
        lines = [lines[-1].partition(": ")[2]]
    return " ".join([*lines, *(f"({line})" for line in where)])


def should_report() -> bool:
    """Whether this process says what went wrong.

    Before processes have met, all of a machine make the same mistake, and its first one says so.
    """
    names = ("LOCAL_RANK", "SLURM_LOCALID")
    local_rank = int(next((os.environ[name] for name in names if name in os.environ), 0))
    return local_rank == 0 or is_distributed()
