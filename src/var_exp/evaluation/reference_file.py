"""A reference as a file: one that we wrote, or anyone's statistics or images.

An .npz gives `mu` and `sigma`, or images `arr_0`, or all three as the reference batches of ADM do
(Dhariwal & Nichol, arXiv 2105.05233), whose other arrays are not used. Nothing in a file is
believed before its checksums, shapes and numbers are looked at.

    B batch, N images, (C, H, W) an image, F features
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from var_exp.evaluation.extraction import draw, features_of, seen_by, statistics_of
from var_exp.evaluation.networks.base import FeatureNetwork
from var_exp.io import npz
from var_exp.io.files import atomic_write
from var_exp.io.npz import NpzError

EXPECTED = "expected an .npz with mu and sigma, or with images arr_0, or none for the data set's"


class Reference(NamedTuple):
    """mu (F,), sigma (F, F) float64, and what they are of.

    num_images: of mu and sigma; None where nobody knows
    features:   (N, F) float32 on the CPU, for KID, precision, recall and neighbours; None where
        only mu and sigma are known
    indices:    which image of the data set each row of features is; None for a file's
    about:      plain data for the protocol: what, num_images, hash, network, network_weights,
        num_features, image_size, crop
    """

    mu: np.ndarray
    sigma: np.ndarray
    num_images: int | None
    features: Tensor | None
    indices: list[int] | None
    about: dict[str, Any]


def save_reference(reference: Reference, path: str | Path) -> None:
    """Write a reference as an .npz, all at once; `reference_from_file` reads it."""
    arrays = {
        "mu": reference.mu,
        "sigma": reference.sigma,
        "num_images": reference.num_images,
        "features": reference.features,
        "indices": reference.indices,
        "about": json.dumps(reference.about),
    }
    with atomic_write(path) as unfinished, unfinished.open("wb") as file:
        npz.write(file, {name: x for name, x in arrays.items() if x is not None})


@torch.inference_mode(False)
def load_reference(path: Path) -> Reference:
    """What `save_reference` wrote.

    Raises:
        NpzError: it is missing or damaged, or something else.
    """
    names = npz.names(path)
    if missing := {"mu", "sigma", "about"} - names:
        raise NpzError(f"lacks {', '.join(sorted(missing))}")
    arrays = {name: npz.read(path, name) for name in {*Reference._fields} & names}
    try:
        reference = Reference(
            arrays["mu"].astype(np.float64),
            arrays["sigma"].astype(np.float64),
            int(arrays["num_images"]) if "num_images" in arrays else None,
            torch.tensor(arrays["features"]).float() if "features" in arrays else None,
            arrays["indices"].tolist() if "indices" in arrays else None,
            dict(json.loads(str(arrays["about"]))),
        )
    except (TypeError, ValueError):
        raise NpzError("holds something else under our names") from None
    mu, sigma, _, features, indices, _ = reference
    rows = (0, *mu.shape) if features is None else features.shape
    fit = sigma.shape == 2 * mu.shape and rows[1:] == mu.shape
    if not fit or (indices is not None and len(indices) != rows[0]):
        raise NpzError("holds arrays that do not fit together")
    numbers = [arrays[name] for name in {"mu", "sigma", "features"} & names]
    if not all(np.issubdtype(array.dtype, np.number) for array in numbers):
        raise NpzError("holds something else under our names")
    if not all(np.isfinite(array).all() for array in numbers):
        raise NpzError("holds numbers that are not finite")
    return reference


@torch.inference_mode(False)
def reference_from_file(
    path: str | Path,
    network: FeatureNetwork,
    image_size: tuple[int, int],
    crop: str | None = None,
    batch_size: int = 100,
    device: torch.device | None = None,
    limit: int | None = 10_000,
) -> Reference:
    """The reference in an .npz: mu and sigma, images arr_0, all three, or one that we wrote.

    Images are uint8 (N, H, W, C), and read one at a time. Where a file has mu and sigma too, they
    are believed, and images give only the features. All processes must call; they share the work.

    Args:
        image_size: (H, W) of what will be compared with it.
        crop: how the images that will be compared are cut; a file of ours must say the same.
        batch_size: images that the network sees at once.
        device: where the network computes, and stays; None for where it is.
        limit: from how many images, drawn evenly, features are computed beside a file's own mu
            and sigma; None for all.

    Raises:
        ValueError: the file is missing, damaged, holds pickles, has other arrays or images of
            another size, was made with another network, or its numbers are not finite.
    """
    path = Path(path).expanduser()
    device = network.device if device is None else torch.device(device)
    try:
        names = npz.names(path)
        if "about" in names:
            return _ours(path, seen_by(network, image_size, crop))
        given = _given(path, network.num_features) if {"mu", "sigma"} <= names else None
        features, statistics = None, given
        if "arr_0" in names:
            chosen = _choose(path, image_size, limit if given else None)
            features = _features_in(path, network, chosen, batch_size, device)
            statistics = given or statistics_of(features)
        if statistics is None:
            raise NpzError(f"holds {', '.join(sorted(names)[:6]) or 'nothing'}")
    except NpzError as error:
        raise _refusal(path, str(error), EXPECTED) from None
    num_images = None if given or features is None else len(features)
    about = {
        "what": path.name,
        "num_images": num_images,
        "hash": _hash(path),
        **seen_by(network, image_size, None),
        "statistics": "the file's" if given else "of the file's images",
        "num_images_of_features": None if features is None else len(features),
    }
    return Reference(*statistics, num_images, features, None, about)


def _refusal(path: Path, given: str, advice: str) -> ValueError:
    return ValueError(f"evaluation.reference: {path} {given}; {advice}")


def _hash(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:16]


def _ours(path: Path, expected: dict[str, Any]) -> Reference:
    reference = load_reference(path)
    for key, value in expected.items():
        if (given := reference.about.get(key)) != value:
            advice = "make it again, or give none for images of the data set"
            raise _refusal(path, f"was made with {key} = {given}, expected {value}", advice)
    _check_shapes(path, reference.mu, reference.sigma, expected["num_features"])
    return reference._replace(indices=None)  # they may be of another data set


def _given(path: Path, num_features: int) -> tuple[np.ndarray, np.ndarray]:
    """A file's mu and sigma, whoever made them."""
    mu, sigma = npz.read(path, "mu"), npz.read(path, "sigma")
    _check_shapes(path, mu, sigma, num_features)
    if not all(x.dtype.kind == "f" and np.isfinite(x).all() for x in (mu, sigma)):
        given = f"has mu and sigma of {mu.dtype} and {sigma.dtype} that are not all finite numbers"
        raise _refusal(path, given, "make it again")
    off = np.abs(sigma - sigma.T).max(initial=0.0) > 1e-3 * np.abs(sigma).max(initial=0.0)
    if off or (np.diagonal(sigma) < 0).any():
        given = "has a sigma that is no covariance: not symmetric, or with a variance below 0"
        raise _refusal(path, given, "make it again")
    return mu.astype(np.float64), sigma.astype(np.float64)


def _check_shapes(path: Path, mu: np.ndarray, sigma: np.ndarray, num_features: int) -> None:
    if mu.shape != (num_features,) or sigma.shape != (num_features, num_features):
        given = f"has mu {mu.shape} and sigma {sigma.shape}, expected {num_features} features"
        raise _refusal(path, given, "it was made with another network (evaluation)")


def _choose(path: Path, image_size: tuple[int, int], limit: int | None) -> list[int]:
    """Which of a file's images are looked at."""
    shape, _, dtype = npz.header(path, "arr_0")
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or shape[0] == 0:
        advice = "expected images, uint8 (N, H, W, C), C = 1 or 3"
        raise _refusal(path, f"has arr_0 of {dtype} {shape}", advice)
    if shape[1:3] != tuple(image_size):
        given = f"has images of (H, W) = {shape[1:3]}, expected {tuple(image_size)}"
        raise _refusal(path, given, "take a file of images of that size (data.image_size)")
    return draw(shape[0], limit)


def _features_in(
    path: Path, network: FeatureNetwork, chosen: list[int], batch_size: int, device: torch.device
) -> Tensor:
    """Features (N, F) of the chosen ones of a file's images."""
    images = enumerate(npz.rows(path, "arr_0"))  # of which each process takes its batches

    def load(numbers: list[int]) -> Tensor:
        wanted = {chosen[i] for i in numbers}
        found: list[np.ndarray] = []
        while len(found) < len(wanted):
            row, image = next(images)
            if row in wanted:
                found.append(image)
        return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)  # (B, C, H, W)

    features = features_of(network, load, len(chosen), batch_size, device)
    for _ in images:  # the checksum is compared at the end
        pass
    return features
