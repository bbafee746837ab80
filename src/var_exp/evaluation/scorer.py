"""Scores of generated samples: after the last scale, and after each.

`extract_features` takes from a batch of samples all that scores need of them, as plain tensors: so
the images can be forgotten, and features kept in a file and counted later, by another process.

    B batch, K scales, F features
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from var_exp.evaluation.metrics import ALL, Classifier, ScoreSettings, scores
from var_exp.evaluation.neighbours import neighbour_ratio
from var_exp.evaluation.networks.base import FeatureBank, FeatureNetwork, Features
from var_exp.evaluation.reference import Reference, reference_from_file, reference_of
from var_exp.sampling.generate import Samples, decode_by_rows
from var_exp.scales import ScaleSchedule
from var_exp.tokenizer import VQVAE

NUM_HELD_OUT = 1000  # validation images that say how far real images are from each other

SampleFeatures = dict[str, Tensor]
"""features (B, F); logits (B, num_classes), where the network has some; right (B,) uint8, where
there is a classifier; scale_features (B, K, F), where samples are scored after each scale."""


class SampleScorer(nn.Module):
    """Counts samples, a batch at a time; scores all that were counted, over all processes.

    Args:
        network: what samples are compared in.
        reference: what they are compared with.
        schedule: the scales; their names go into the keys of scores after each scale.
        classifier: says which class an image shows, with its name for the key; None counts no hits.
        settings: of the scores.
        held_out: real images outside the reference: samples should be as far from the reference
            as these are, not nearer.
    """

    after_scale: Sequence[FeatureBank]  # a ModuleList, whose type cannot say of what it is

    def __init__(
        self,
        network: FeatureNetwork,
        reference: Reference,
        schedule: ScaleSchedule,
        classifier: tuple[str, Classifier] | None = None,
        settings: ScoreSettings | None = None,
        held_out: Reference | None = None,
    ):
        super().__init__()
        self.network, self.reference, self.held_out = network, reference, held_out
        self.schedule, self.classifier = schedule, classifier
        self.settings = settings or ScoreSettings()
        self.final = FeatureBank()
        banks = [FeatureBank() for _ in range(schedule.num_scales)]
        self.after_scale = nn.ModuleList(banks)  # type: ignore[assignment]
        self.hits = FeatureBank()  # right (B, 1): kept like features, since a sum over processes

    @torch.no_grad()
    def extract_features(
        self, tokenizer: VQVAE, samples: Samples, labels: Tensor, per_scale: bool = False
    ) -> SampleFeatures:
        """What scores need of samples with labels (B,), on the CPU.

        Args:
            per_scale: also what the image is after each scale.
        """
        found = self.network(samples.images)
        features = {"features": found.features.cpu()}
        if found.logits is not None:
            features["logits"] = found.logits.cpu()
        if self.classifier is not None:
            classes = self.classifier[1](samples.images.mul(2).sub(1).cpu())
            features["right"] = (classes == labels.cpu()).to(torch.uint8)
        if per_scale:
            steps = decode_by_rows(tokenizer, samples.indices)
            after = [self.network(images.add(1).div(2)).features.cpu() for images in steps]
            features["scale_features"] = torch.stack(after, dim=1)  # (B, K, F)
        return features

    def update(self, ids: Tensor, features: SampleFeatures) -> None:
        """Count the features of the samples numbered (B,)."""
        self.final.update(Features(features["features"], features.get("logits")), ids)
        if "right" in features:
            self.hits.update(Features(features["right"].float().unsqueeze(1), None), ids)
        for k, bank in enumerate(self.after_scale if "scale_features" in features else ()):
            bank.update(Features(features["scale_features"][:, k], None), ids)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the features, as plain data."""
        return {"network": self.network.fingerprint, "classifier": bool(self.classifier)}

    def reset(self) -> None:
        for bank in (self.final, self.hits, *self.after_scale):
            bank.reset()

    def compute(self) -> dict[str, float]:
        """All scores; those after each scale are of the samples that have features after each."""
        name = self.network.name
        samples = self.final.compute()
        only = scores_against(self.reference, self.settings)
        found = scores(samples, self.reference, name, self.settings, only)
        if self.classifier is not None:
            key = f"class_accuracy_{self.classifier[0]}"
            found[key] = self.hits.compute().features.mean().item()
        for scale, bank in zip(self.schedule.names, self.after_scale, strict=True):
            after = bank.compute().features
            if len(after):
                fid = scores(Features(after, None), self.reference, name, self.settings, ("fid",))
                found[f"fid_{name}_scale_{scale}"] = fid[f"fid_{name}"]
        known = self.reference.features
        unseen = None if self.held_out is None else self.held_out.features
        if known is not None and unseen is not None:
            ratio = neighbour_ratio(samples.features, known, unseen)
            found[f"neighbour_ratio_{name}"] = ratio
        return found


class RealImages:
    """What samples are compared with: the images of a source, or a file; read once, and kept.

    `on_batch` is called after each batch that is read, by all processes equally often.

    Args:
        network: the features in which samples are compared with real images.
        source: a `var_exp.data.ImageSource` that has been set up; None where it is not known.
        image_size: (H, W) in pixels, of the samples.
        file: an .npz that samples are compared with; None: training images of the source.
        num_reference: how many training images at most.
        batch_size: images that the network sees at once.
        cache: a folder where statistics of real images are kept for other runs.

    Raises:
        ValueError: the file is missing or does not fit, or the source has images of another size.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        source: Any | None,
        image_size: tuple[int, int],
        *,
        file: str | Path | None = None,
        num_reference: int = 10_000,
        batch_size: int = 100,
        cache: str | Path | None = None,
    ):
        if source is not None and tuple(source.image_size) != tuple(image_size):
            raise ValueError(
                f"evaluation: the images of {source.name} are of {tuple(source.image_size)} "
                f"pixels, those of the model of {tuple(image_size)} (data.image_size)"
            )
        self.network, self.source, self.num_reference = network, source, num_reference
        self.batch_size, self.cache = batch_size, cache and Path(cache)
        self.on_batch: Callable[[], None] = lambda: None
        self.classifier = classifier_for(network, source)
        self._references: dict[tuple[str, int | None], Reference] = {}
        self._file = file and reference_from_file(
            Path(file), network, image_size, batch_size=batch_size
        )

    def reference(self, device: torch.device) -> Reference:
        """What samples are compared with; all processes must ask for it."""
        return self._file or self._read("train", self.num_reference, device)

    def held_out(self, num_images: int | None, device: torch.device) -> Reference:
        """Validation images; all processes must ask for them."""
        return self._read("val", num_images, device)

    def _read(self, part: str, limit: int | None, device: torch.device) -> Reference:
        self.network.to(device)
        if (part, limit) not in self._references:
            options = self.batch_size, self.cache, device, self.on_batch
            found = reference_of(self.network, self.source, part, limit, *options)
            self._references[part, limit] = found
        return self._references[part, limit]

    def scorer(
        self, tokenizer: VQVAE, settings: ScoreSettings, held_out: bool = True
    ) -> SampleScorer:
        """What scores samples of a tokenizer, on its device; all processes must call.

        Args:
            held_out: compare distances with those of validation images, too.

        Raises:
            ValueError: a single reference image, of which there is no distance.
        """
        device = next(tokenizer.parameters()).device
        reference = self.reference(device)
        if reference.num_images == 1:  # which shows here, not once all samples are drawn
            raise ValueError(
                f"evaluation: scores need at least 2 reference images, got 1 of "
                f"{reference.about['what']} (evaluation.num_reference, evaluation.reference)"
            )
        unseen = self.held_out(NUM_HELD_OUT, device) if held_out else None
        schedule = tokenizer.schedule
        scorer = SampleScorer(self.network, reference, schedule, self.classifier, settings, unseen)
        return scorer.to(device)


def classifier_for(network: FeatureNetwork, source: Any | None) -> tuple[str, Classifier] | None:
    """What says which class an image shows, and its name; None where nothing can.

    The source's own where it has one, which reads pixels, else that of the feature network.
    """
    if source is None or source.num_classes == 0:
        return None
    if source.classify is not None:
        return "pixels", source.classify
    return None if network.classify is None else (network.name, network.classify)


def scores_against(reference: Reference, settings: ScoreSettings) -> tuple[str, ...]:
    """The scores that so many real images allow: precision and recall need neighbours."""
    num_images = 0 if reference.features is None else len(reference.features)
    return ALL if num_images > settings.num_neighbours else ALL[:3]
