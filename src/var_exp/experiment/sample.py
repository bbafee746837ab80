"""What samples of a finished model are compared with, and what is expected of it.

Without the training around it: the images of the model's run, where there are some, or a file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from var_exp.evaluation.metrics import ScoreSettings
from var_exp.evaluation.networks.base import FeatureNetwork
from var_exp.evaluation.scorer import RealImages, SampleScorer
from var_exp.tokenizer import VQVAE


def scorer_of(
    network: FeatureNetwork,
    source: Any | None,
    tokenizer: VQVAE,
    settings: ScoreSettings,
    *,
    reference: str | Path | None,
    num_reference: int,
    batch_size: int,
    cache: str | Path | None,
) -> SampleScorer:
    """What scores samples of a model, on its device; all processes must call.

    Args:
        network: what samples are compared in.
        source: the images that the model was trained on, set up; None where they are not known.
        tokenizer: the model's.
        reference: an .npz that samples are compared with; None: training images of the source.
        num_reference, batch_size, cache: as in `RealImages`.

    Raises:
        ValueError: as `RealImages` and `reference_of`.
    """
    real = RealImages(
        network.to(next(tokenizer.parameters()).device),
        source,
        tokenizer.image_size,
        file=reference,
        num_reference=num_reference,
        batch_size=batch_size,
        cache=cache,
    )
    return real.scorer(tokenizer, settings, held_out=reference is None)


def beside_expected(
    figures: Mapping[str, float],
    expected: Mapping[str, Mapping[str, list[float]] | None],
    model: str,
    given: Mapping[str, Any],
    required: Mapping[str, Any],
) -> dict[str, str]:
    """Figures in words, each with the band in which it is expected, where there is one.

    Args:
        figures: by key.
        expected: bands (low, high) by model and key.
        model: which one was scored, such as "d16".
        given, required: settings, and those under which the bands hold. Where they differ no
            band is shown, and a row says why.
    """
    others = [f"{k}={given[k]} in place of {v}" for k, v in required.items() if given[k] != v]
    bands, rows = expected.get(model) or {}, {}
    if any(expected.values()) and not bands:
        rows["expected"] = f"no figures are known of {model}"
    elif bands and others:
        bands, rows["expected"] = {}, f"not shown, since it holds for others: {', '.join(others)}"
    words = {key: f"{value:.4g}" for key, value in figures.items()}
    for key, (low, high) in bands.items():
        if key in words:
            words[key] += f"  (expected {low:g} to {high:g})"
    return words | rows
