"""The published files by the name of their model: found in a folder, or fetched into it.

The authors of VAR (arXiv 2404.02905) publish a transformer of each size and one tokenizer for
all of them, in a repository of Hugging Face. Only what is missing is fetched, by the optional
package `huggingface_hub`.
"""

import os
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path

from var_exp.checkpoint.official.save import OfficialFiles

REPOSITORY = "FoundationVision/var"
MODELS = ("var_d16", "var_d20", "var_d24", "var_d30", "var_d36")
TOKENIZER = "vae_ch160v4096z32.pth"
PATIENCE = 10  # seconds until the repository must have answered


def find_official(name: str, folder: str | os.PathLike) -> OfficialFiles[Path]:
    """The files of a published model in a folder; those that are missing are fetched into it.

    Args:
        name: one of `MODELS`; var_d36 is for 512 pixels, the others for 256.

    Raises:
        ValueError: an unknown name; or a file is missing and cannot be fetched.
    """
    if name not in MODELS:
        raise ValueError(f"official: expected one of {', '.join(MODELS)}, got {name!r}")
    files = OfficialFiles(Path(folder) / f"{name}.pth", Path(folder) / TOKENIZER)
    missing = [path for path in files if not path.is_file()]
    if missing:
        _fetch(missing)
    return files


def _fetch(paths: Sequence[Path]) -> None:
    try:
        import huggingface_hub as hub  # optional, and needed here alone
    except ImportError:
        raise _missing(
            paths, "not installed", "have them fetched: pip install 'var-exp[hub]'"
        ) from None
    for path in paths:
        try:
            _download(hub, path)
        except Exception as error:  # of the network, the disk or the library, which may raise any
            reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
            left = [path for path in paths if not path.is_file()]
            raise _missing(left, reason, "try again") from None


def _download(hub, path: Path) -> None:
    """Fetch one file beside its final place, where a download that broke off may go on."""
    # One question first: without a network the download itself would ask for half a minute.
    hub.get_hf_file_metadata(hub.hf_hub_url(REPOSITORY, path.name), timeout=PATIENCE)
    beside = path.with_name(f".{path.name}.unfinished")
    try:
        fetched = hub.hf_hub_download(
            REPOSITORY, path.name, local_dir=beside, etag_timeout=PATIENCE
        )
        os.replace(fetched, path)
    finally:
        if not any(beside.rglob("*.incomplete")):
            shutil.rmtree(beside, ignore_errors=True)


def _missing(paths: Sequence[Path], reason: str, otherwise: str) -> ValueError:
    names = " and ".join(repr(str(path)) for path in paths)
    return ValueError(
        f"official: no file at {names}, and huggingface_hub cannot fetch it ({reason}); put the "
        f"files of that name in {REPOSITORY} on Hugging Face there yourself, or {otherwise}"
    )
