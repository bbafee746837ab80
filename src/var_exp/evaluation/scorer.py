"""Scores of generated samples: after the last scale, and after each.

`see` takes from a batch of samples all that scores need of them, as plain tensors: so the images
can be forgotten, and what was seen can be kept in a file and added later, by another process.

    B batch, K scales, F features
"""

from typing import Any

import torch
from torch import Tensor, nn

from var_exp.evaluation.metrics import ALL, Judge, ScoreSettings, scores
from var_exp.evaluation.neighbours import neighbour_ratio
from var_exp.evaluation.networks.base import FeatureBank, FeatureNetwork, Features
from var_exp.evaluation.reference import Reference
from var_exp.sampling.generate import Samples, decode_by_rows
from var_exp.scales import ScaleSchedule
from var_exp.tokenizer import VQVAE

NUM_HELD_OUT = 1000  # validation images that say how far real images are from each other

Seen = dict[str, Tensor]
"""features (B, F); logits (B, num_classes), where the network has some; right (B,) uint8, where
there is a judge; scale_features (B, K, F), where samples are scored after each scale."""


class SampleScorer(nn.Module):
    """Counts samples, a batch at a time; scores all that were counted, over all processes.

    Args:
        network: what samples are compared in.
        reference: what they are compared with.
        schedule: the scales; their names go into the keys of scores after each scale.
        judge: says which class an image shows, with its name for the key; None counts no hits.
        settings: of the scores.
        held_out: real images outside the reference: samples should be as far from the reference
            as these are, not nearer.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        reference: Reference,
        schedule: ScaleSchedule,
        judge: tuple[str, Judge] | None = None,
        settings: ScoreSettings | None = None,
        held_out: Reference | None = None,
    ):
        super().__init__()
        self.network, self.reference, self.held_out = network, reference, held_out
        self.schedule, self.judge = schedule, judge
        self.settings = settings or ScoreSettings()
        self.final = FeatureBank()
        self.after_scale = nn.ModuleList(FeatureBank() for _ in range(schedule.num_scales))
        self.hits = FeatureBank()  # right (B, 1): kept like features, since a sum over processes

    @torch.no_grad()
    def see(
        self, tokenizer: VQVAE, samples: Samples, labels: Tensor, per_scale: bool = False
    ) -> Seen:
        """What scores need of samples with labels (B,), on the CPU.

        Args:
            per_scale: also what the image is after each scale.
        """
        found = self.network(samples.images)
        seen = {"features": found.features.cpu()}
        if found.logits is not None:
            seen["logits"] = found.logits.cpu()
        if self.judge is not None:
            shown = self.judge[1](samples.images.mul(2).sub(1).cpu())
            seen["right"] = (shown == labels.cpu()).to(torch.uint8)
        if per_scale:
            steps = decode_by_rows(tokenizer, samples.indices, per_scale=True)
            after = [self.network(images.add(1).div(2)).features.cpu() for images in steps]
            seen["scale_features"] = torch.stack(after, dim=1)  # (B, K, F)
        return seen

    def add(self, ids: Tensor, seen: Seen) -> None:
        """Count what was seen of the samples numbered (B,)."""
        self.final.update(Features(seen["features"], seen.get("logits")), ids)
        if "right" in seen:
            self.hits.update(Features(seen["right"].float().unsqueeze(1), None), ids)
        for k, bank in enumerate(self.after_scale if "scale_features" in seen else ()):
            bank.update(Features(seen["scale_features"][:, k], None), ids)

    def reset(self) -> None:
        for bank in (self.final, self.hits, *self.after_scale):
            bank.reset()

    def compute(self) -> dict[str, float]:
        """All scores; those after each scale are of the samples that were seen after each."""
        name = self.network.name
        samples = self.final.compute()
        only = scores_against(self.reference, self.settings)
        found = scores(samples, self.reference, name, self.settings, only)
        if self.judge is not None:
            found[f"class_accuracy_{self.judge[0]}"] = self.hits.compute().features.mean().item()
        for scale, bank in zip(self.schedule.names, self.after_scale, strict=True):
            after = bank.compute().features
            if len(after):
                only = scores(Features(after, None), self.reference, name, self.settings, ("fid",))
                found[f"fid_{name}_scale_{scale}"] = only[f"fid_{name}"]
        if self.held_out is not None and self.reference.features is not None:
            found[f"neighbour_ratio_{name}"] = neighbour_ratio(
                samples.features, self.reference.features, self.held_out.features
            )
        return found


def judge_of(network: FeatureNetwork, source: Any | None) -> tuple[str, Judge] | None:
    """What says which class an image shows, and its name; None where nothing can.

    The source's own where it has one, which reads pixels, else that of the feature network.
    """
    if source is None or source.num_classes == 0:
        return None
    if source.judge is not None:
        return "pixels", source.judge
    return None if network.judge is None else (network.name, network.judge)


def scores_against(reference: Reference, settings: ScoreSettings) -> tuple[str, ...]:
    """The scores that so many real images allow: precision and recall need neighbours."""
    num_images = 0 if reference.features is None else len(reference.features)
    return ALL if num_images > settings.num_neighbours else ALL[:3]
