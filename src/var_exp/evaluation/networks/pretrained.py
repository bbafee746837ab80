"""Published feature networks, as torch-fidelity runs them: figures that others' compare with.

- `inception`: Inception v3 with the weights of the authors of FID (Heusel et al., arXiv
  1706.08500). Plain "FID", "Inception Score" and "KID" of papers are in its features.
- `dinov2`: vision transformers trained without labels (Oquab et al., arXiv 2304.07193), whose
  distances agree best with people's judgement (Stein et al., arXiv 2306.04675).
- `clip`: image encoders trained on captions (Radford et al., arXiv 2103.00020), which do not
  look for the classes of ImageNet (Kynkäänniemi et al., arXiv 2203.06026).

All are made by calls with the same arguments as `train_or_load`, so that a configuration can
name any of them. Files that are not there are fetched to torch.hub's cache, once.

    B batch, (C, H, W) an image, F features
"""

import hashlib
import io
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_clip import MODEL_METADATA as CLIP_FILES
from torch_fidelity.feature_extractor_clip import MODEL_URLS as CLIP_URLS
from torch_fidelity.feature_extractor_clip import FeatureExtractorCLIP
from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)

from var_exp.evaluation.networks.base import FeatureNetwork, Features
from var_exp.io.pretrained import Published, State, fill, find, load

KEY = "evaluation.weights"
WITHOUT = "measure in features that need no file (evaluation=classifier)"
PATIENCE = 30.0  # seconds; a network that drops packets would keep a run waiting for minutes

INCEPTION = Published("evaluation", "torch-fidelity's Inception v3", URL_INCEPTION_V3, KEY, WITHOUT)

DINOV2_SIZES = ("vit-s-14", "vit-b-14", "vit-l-14", "vit-g-14")
DINOV2_CODE = "facebookresearch/dinov2"
CLIP_SIZES = tuple(name.removeprefix("clip-") for name in CLIP_URLS)


@contextmanager
def _politely() -> Iterator[None]:
    """Leave the caller's random numbers alone, and give up a connection that says nothing."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        with torch.random.fork_rng(devices=[]):  # networks start random, before they are filled
            yield
    finally:
        socket.setdefaulttimeout(before)


class Pretrained(FeatureNetwork):
    """A network of torch-fidelity; grey images are repeated to three channels.

    Args:
        extractor: uint8 (B, 3, H, W) -> features (B, F), and logits where it has some.
        file: of its weights.
    """

    def __init__(
        self, name: str, num_features: int, extractor: nn.Module, file: Path, about: dict[str, Any]
    ):
        weights = {"weights_file": file.name, "weights_sha256": _sha256(file)[:16]}
        super().__init__(name, num_features, about | weights)
        self.extractor = extractor
        self.eval().requires_grad_(False)

    def extract(self, pixels: Tensor) -> Features:
        features, *logits = self.extractor(pixels.expand(-1, 3, -1, -1))
        return Features(features, logits[0] if logits else None)  # (B, F), (B, num_classes)


@_politely()
def inception(
    path: str | Path | None = None, source: Any = None, *, weights: str | Path | None = None
) -> Pretrained:
    """Inception v3 of 2015: F = 2048 and 1008 logits.

    Args:
        path, source: of the features that are learned; not used here.
        weights: torch-fidelity's file. None looks in torch.hub's cache, and tries to fetch the
            file there if it is missing.

    Raises:
        ValueError: the file is missing and cannot be fetched, is damaged, holds code, or another
            network.
    """
    file = find(INCEPTION, weights)
    extractor = load(INCEPTION, file, _assemble_inception)
    about = {
        "layer": "2048, the pooled features",
        "logits": "without the bias, of 1008 classes",
        "resize": "299 x 299, bilinear as in TensorFlow 1, without antialiasing",
    }
    return Pretrained("inception", 2048, extractor, file, about)


def _assemble_inception(state: State) -> FeatureExtractorInceptionV3:
    # torch-fidelity would run code in a file; what it gets here are the tensors that were in it.
    tensors = io.BytesIO()
    torch.save(dict(state), tensors)
    tensors.seek(0)
    layers = ["2048", "logits_unbiased"]
    try:
        return FeatureExtractorInceptionV3(
            "inception-v3-compat", layers, feature_extractor_weights_path=tensors
        )
    except RuntimeError as error:  # names or shapes differ; the message lists all of them
        raise ValueError(shorten(str(error).partition("\n")[2], 120, placeholder=" ...")) from None


@_politely()
def dinov2(
    path: str | Path | None = None,
    source: Any = None,
    *,
    weights: str | Path | None = None,
    size: str = "vit-b-14",
) -> Pretrained:
    """DINOv2: the class token, F = 384 to 1536; no logits.

    Its code is not part of torch-fidelity: it is the authors', which torch.hub fetches and runs.

    Args:
        path, source: of the features that are learned; not used here.
        weights: a folder like torch.hub's, with the code in `facebookresearch_dinov2_main` and
            the weights in `checkpoints/`, such as `checkpoints/dinov2_vitb14_pretrain.pth`. None
            takes torch.hub's own, and tries to fetch what is missing there.
        size: of the transformer, one of `DINOV2_SIZES`.

    Raises:
        ValueError: an unknown size; code or weights are missing and cannot be fetched, or the
            weights are damaged, hold code, or another network.
    """
    _check_size(size, DINOV2_SIZES)
    entry = f"dinov2_{size.replace('-', '')}"
    published = Published(
        part="evaluation",
        what=f"DINOv2's {size}",
        url=f"https://dl.fbaipublicfiles.com/dinov2/{entry}/{entry}_pretrain.pth",
        key=KEY,
        without=WITHOUT,
    )
    folder = None if weights is None else Path(weights).expanduser()
    model = _dinov2_without_weights(published, folder, entry)
    file = find(published, folder and folder / "checkpoints" / f"{entry}_pretrain.pth")
    extractor = _DinoV2(f"dinov2-{size}", load(published, file, lambda state: fill(model, state)))
    about = {
        "layer": "the class token after the last norm",
        "resize": "224 x 224, bilinear as in TensorFlow 1, without antialiasing",
        "size": size,
    }
    return Pretrained("dinov2", model.embed_dim, extractor, file, about)


class _DinoV2(FeatureExtractorDinoV2):
    """torch-fidelity's, around a network that is there already, where it would ask GitHub."""

    def __init__(self, name: str, model: nn.Module):
        FeatureExtractorBase.__init__(self, name, ["dinov2"])
        self.feature_extractor_internal_dtype = torch.float32
        self.model = model


def _dinov2_without_weights(published: Published, folder: Path | None, entry: str) -> Any:
    code = (folder or Path(torch.hub.get_dir())) / "facebookresearch_dinov2_main"
    if folder is not None and not code.is_dir():
        raise _lacks_code(published, code, "is missing")
    # As torch-fidelity has it: attention in plain torch gives the same figures everywhere.
    os.environ["XFORMERS_DISABLED"] = "1"
    known = {"repo_or_dir": str(code), "source": "local"}
    fetched = {"repo_or_dir": DINOV2_CODE, "trust_repo": True, "verbose": False}
    try:
        with redirect_stdout(sys.stderr), warnings.catch_warnings(action="ignore"):
            return torch.hub.load(
                model=entry, pretrained=False, **(known if code.is_dir() else fetched)
            )
    except Exception as error:  # others' code, fetched or found, may fail in any way
        problem = f"is missing or could not be run ({type(error).__name__})"
        raise _lacks_code(published, code, problem) from None


def _lacks_code(published: Published, code: Path, problem: str) -> ValueError:
    what = f"a copy of github.com/{DINOV2_CODE}"
    return ValueError(
        f"{published.part}: {code} {problem}; put {what} there, or name the folder that has it "
        f"({published.key}=FOLDER), or {published.without}"
    )


@_politely()
def clip(
    path: str | Path | None = None,
    source: Any = None,
    *,
    weights: str | Path | None = None,
    size: str = "vit-b-32",
) -> Pretrained:
    """The image encoder of CLIP: its embedding, F = 512 to 1024; no logits.

    Args:
        path, source: of the features that are learned; not used here.
        weights: OpenAI's file. None looks in torch.hub's cache, and tries to fetch the file there
            if it is missing.
        size: of the encoder, one of `CLIP_SIZES`.

    Raises:
        ValueError: an unknown size; the file is missing and cannot be fetched, or is not the
            published one.
    """
    _check_size(size, CLIP_SIZES)
    name = f"clip-{size}"
    published = Published("evaluation", f"OpenAI's CLIP {size}", CLIP_URLS[name], KEY, WITHOUT)
    file = find(published, weights)
    # The file is a TorchScript archive, which holds code: only the published one is opened.
    expected, given = CLIP_FILES[name]["hash"], _sha256(file)
    if given != expected:
        problem = (
            f"is damaged or another file: its SHA-256 is {given[:8]}..., not {expected[:8]}..."
        )
        raise published.refusal(file, problem)
    extractor = FeatureExtractorCLIP(
        name, ["clip"], feature_extractor_weights_path=str(file), verbose=False
    )
    side = extractor.resolution
    about = {
        "layer": "the embedding that is compared with captions",
        "resize": f"{side} x {side}, bilinear as in TensorFlow 1, without antialiasing",
        "size": size,
    }
    return Pretrained("clip", extractor.model.visual.output_dim, extractor, file, about)


def _check_size(size: str, sizes: tuple[str, ...]) -> None:
    if size not in sizes:
        raise ValueError(
            f"evaluation: expected a size of {', '.join(sizes)}, got {size!r} "
            f"(evaluation.network.size)"
        )


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
