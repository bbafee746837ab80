"""Fidelity: how close generated images are to real ones, seen through a feature network.

- FID, the Fréchet distance of two Gaussians fitted to features (Heusel et al., arXiv
  1706.08500): low when samples are as good and as varied as the real images.
- Inception Score, exp E KL(p(y|x) || p(y)) (Salimans et al., arXiv 1606.03498): high when every
  sample is surely of one class and the samples cover all classes.
- KID, the squared maximum mean discrepancy with a cubic kernel (Binkowski et al., arXiv
  1801.01401): like FID, but without bias, so it tells of few images too. Slightly below 0 where
  there is no difference.
- Precision and recall (Kynkäänniemi et al., arXiv 1904.06991): the share of samples that lie
  within the k-nearest-neighbour balls of real images, and of real images within those of samples.
- Class accuracy: the share of samples that show the class they were asked for. Guidance raises
  it and worsens the FID, so they are read together.

The formulas are torch-fidelity's, which published figures use; states and their exchange between
processes are torchmetrics'. Images are in the order of their numbers before anything is summed,
so that one process and many agree to the last bit.

    B batch, N images, (C, H, W) an image, F features
"""

from collections.abc import Callable, Collection
from typing import NamedTuple

from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from var_exp.evaluation.networks.base import Features
from var_exp.evaluation.reference_file import Reference

Classifier = Callable[[Tensor], Tensor]
"""Images (B, C, H, W) in [-1, 1] -> the class that each shows, (B,)."""

ALL = ("fid", "inception_score", "kid", "precision", "recall")
ROWS_AT_ONCE = 1000  #   of the distances between all images, to bound their memory
SMALLEST_LOGIT = -600.0  # below the largest: its probability, 1e-261, is not 0 in float64


class ScoreSettings(NamedTuple):
    """Plain values that scores depend on; the defaults are torch-fidelity's.

    num_splits:      parts of a random split that the Inception Score is averaged over
    kid_subsets:     random subsets that KID is averaged over
    kid_subset_size: images in each, or as many as there are
    num_neighbours:  k of precision and recall
    seed:            of splits and subsets
    """

    num_splits: int = 10
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    num_neighbours: int = 3
    seed: int = 2020


def scores(
    fake: Features,
    reference: Reference,
    name: str,
    settings: ScoreSettings | None = None,
    only: Collection[str] = ALL,
) -> dict[str, float]:
    """Scores of generated images against real ones.

    They are a pure function of features, order and settings. Where there are fewer images than
    features, the FID is exact for these images and a number, but far above that of many: see
    `too_few`.

    Args:
        fake: (N, F) features, and logits for the Inception Score, on the CPU.
        reference: statistics of real images; its features, where it has some, for KID, precision
            and recall.
        name: of the feature network.
        settings: `ScoreSettings()` for None.
        only: which scores, of `ALL`.

    Returns:
        fid_<name>, and where they can be had inception_score_<name>, kid_<name>,
        precision_<name> and recall_<name>.

    Raises:
        ValueError: fewer than two images, no more than num_neighbours for precision or recall,
            features of another length, or such that are no numbers.
    """
    settings = settings or ScoreSettings()
    _check(fake.features, reference, only)
    found = {}
    if "fid" in only:
        found["fid"] = _fid(fake.features, reference)
    if "inception_score" in only and fake.logits is not None:
        found["inception_score"] = _inception_score(fake.logits, settings)
    if reference.features is not None:
        if "kid" in only:
            found["kid"] = _kid(fake.features, reference.features, settings)
        if {"precision", "recall"} & set(only):
            found |= _precision_and_recall(fake.features, reference.features, settings)
    return {f"{key}_{name}": value for key, value in found.items() if key in only}


def too_few(num_fake: int, num_reference: int | None, num_features: int) -> bool:
    """Whether there are fewer images than features: the FID is then far above that of many.

    Covariances are singular, and figures compare only at equal numbers of images.

    Args:
        num_reference: None where nobody knows.
    """
    return min(num_fake, num_fake if num_reference is None else num_reference) <= num_features


def class_accuracy(images: Tensor, labels: Tensor, classify: Classifier) -> float:
    """Share of images (B, C, H, W) in [0, 1] whose class is their label (B,).

    The classifier reads [-1, 1]: a source's own `classify`, or a feature network's.
    """
    return (classify(2 * images - 1) == labels).double().mean().item()


def _check(fake: Tensor, reference: Reference, only: Collection[str]) -> None:
    if unknown := set(only) - set(ALL):
        raise ValueError(f"evaluation: expected scores of {ALL}, got {sorted(unknown)}")
    num_real = reference.num_images
    if len(fake) < 2 or (num_real is not None and num_real < 2):
        raise ValueError(
            f"evaluation: scores need at least 2 generated and 2 reference images, got "
            f"{len(fake)} and {num_real} (evaluation.num_samples, evaluation.num_reference)"
        )
    if fake.shape[1] != len(reference.mu):
        raise ValueError(
            f"evaluation: samples have {fake.shape[1]} features, the reference has "
            f"{len(reference.mu)}: it was made with another network (evaluation.reference)"
        )
    if not fake.isfinite().all():
        raise ValueError("evaluation: features of samples hold nan or infinity")


def _fid(fake: Tensor, reference: Reference) -> float:
    ours = fid_features_to_statistics(fake.double())
    theirs = {"mu": reference.mu, "sigma": reference.sigma}
    return fid_statistics_to_metric(ours, theirs, verbose=False)["frechet_inception_distance"]


def _inception_score(logits: Tensor, settings: ScoreSettings) -> float:
    # A probability of 0 would give 0 times infinity.
    logits = logits.double() - logits.double().amax(dim=1, keepdim=True)
    return isc_features_to_metric(
        logits.clamp_min(SMALLEST_LOGIT),  # (N, num_classes)
        splits=min(settings.num_splits, len(logits)),
        shuffle=True,
        rng_seed=settings.seed,
    )["inception_score_mean"]


def _kid(fake: Tensor, real: Tensor, settings: ScoreSettings) -> float:
    return kid_features_to_metric(
        fake,
        real,
        kid_subsets=settings.kid_subsets,
        kid_subset_size=min(settings.kid_subset_size, len(fake), len(real)),
        kid_kernel="poly",
        kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None,  # one over the number of features
        kid_kernel_poly_coef0=1,
        rng_seed=settings.seed,
        verbose=False,
    )["kernel_inception_distance_mean"]


def _precision_and_recall(fake: Tensor, real: Tensor, settings: ScoreSettings) -> dict[str, float]:
    k = settings.num_neighbours
    if min(len(fake), len(real)) <= k:
        raise ValueError(
            f"evaluation: precision and recall with {k} neighbours need more than {k} generated "
            f"and reference images, got {len(fake)} and {len(real)}; take more, or fewer "
            f"neighbours (evaluation.num_samples, evaluation.scores.num_neighbours)"
        )
    return prc_features_to_metric(
        fake,
        real,
        prc_neighborhood=k,
        prc_batch_size=ROWS_AT_ONCE,
        save_cpu_ram=True,
        verbose=False,
    )
