"""What the README and the pages of documentation show: code blocks, commands, files, links."""

import re
import shlex
from pathlib import Path

from helpers.command import ROOT, TINY, Finished, run

README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [README, CONTRIBUTING, ROOT / "CHANGELOG.md", *PAGES]

# A single batch of each stage; no command that is shown may fail however small it is.
SMALL = [*TINY, *(f"model.{stage}.num_batches=1" for stage in ("tokenizer", "var"))]
SMALL_OF = {
    "data=shapes": ["data.num_train=96", "data.num_val=24"],
    "data=gratings": ["data.num_train=96", "data.num_val=24"],
    "-m": ["stages=[tokenizer]"],
}
# What is not here: a network, a GPU, files of others, a finished run of that name.
ABSENT = ("mnist", "cifar10", "imagenet", "gpu", "ddp", "fsdp", "slurm", "inception", "official")
ABSENT += ("DIR", "PATH", "NAME", "RUN", "<", "tokens.dir", "bf16", "hydra.", "deterministic")


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of a language; those without one have the language ''."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)
    return [text for found, text in fenced if found == language]


def named_files(path: Path) -> dict[str, str]:
    """The files that a page shows: a block after the last `path` in backticks before it."""
    shown = re.findall(
        r"`((?:src|conf)/[\w/.]+)`[^`]*\n\n```\w+\n(.*?)^```$", path.read_text(), re.M | re.S
    )
    return dict(shown)


def words(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def commands(path: Path) -> list[str]:
    """Every command of the bash blocks, without comments."""
    lines = "\n".join(blocks(path, "bash")).replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in shlex.join(words(line)).split(" '&&' ")]
    return [part for part in parts if part]


def arguments_of(command: str) -> tuple[str, list[str]] | None:
    """The program that a command starts, whatever launches it, and its arguments."""
    parts = words(command)
    if parts[0] == "sbatch":
        place = next(i for i, word in enumerate(parts) if word.endswith(".sbatch"))
        return "train", parts[place + 1 :]
    for program in ("train", "sample"):
        if f"{program}.py" in parts and parts[0] in ("python", "srun", "torchrun"):
            return program, parts[parts.index(f"{program}.py") + 1 :]
    return None


def runs_of(path: Path, program: str) -> list[str]:
    """The arguments of every `python {program}.py`, as they would be typed."""
    found = [arguments_of(command) for command in commands(path) if command.startswith("python ")]
    return [shlex.join(each[1]) for each in found if each and each[0] == program]


def lacks_something(arguments: list[str]) -> bool:
    return any(absent in argument for argument in arguments for absent in ABSENT)


def run_small(arguments: list[str], *before: str) -> Finished:
    chosen = [option for name in arguments for option in SMALL_OF.get(name, [])]
    if any("progressive" in argument for argument in arguments):
        chosen.append("model.var.num_batches=4")  # a batch for each number of scales
    if any("epochs=" in argument for argument in arguments):
        chosen += ["model.var.num_batches=null", "model.var.epochs=1", "model.var.batch_size=500"]
    if not any(argument.startswith("logger=") for argument in arguments):
        chosen.append("logger=csv")
    return run("train", *before, *arguments, *SMALL, *chosen)
