"""What is measured and drawn of a model in training and at its end.

Scores are shared work: each process draws and sees every n-th image, and all of them must call.
What was seen is brought into the order of the images before anything is summed, so that the
figures do not depend on the number of processes. Pictures are drawn by whoever asks.

    B batch, N samples, K scales
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from var_exp.distributed.collectives import common_batches, is_first, share
from var_exp.evaluation import protocol
from var_exp.evaluation.metrics import ScoreSettings, scores
from var_exp.evaluation.neighbours import nearest, neighbours_picture
from var_exp.evaluation.networks.base import FeatureBank, FeatureNetwork, Features
from var_exp.evaluation.reference import Reference, reference_from_file, reference_of
from var_exp.evaluation.samples.draw import MAX_ROWS, Drawing, device_of, load, rebuild
from var_exp.evaluation.scorer import NUM_HELD_OUT, SampleScorer, judge_of, scores_against
from var_exp.io.files import replacing
from var_exp.sampling.generate import round_up
from var_exp.tokenizer import VQVAE
from var_exp.transformer import VAR
from var_exp.visualization.images import save_png

NUM_NEIGHBOURS = 5  # training images beside each sample
PRECISION = "32-true"  # of all networks while they are measured here


class Evaluator(Drawing):
    """Scores and pictures of models of one source of images.

    `on_batch` is called after each batch of what is scored, or read as a reference, by all
    processes equally often: who waits for the end of a long evaluation may end it there.

    Args:
        source: a `var_exp.data.ImageSource` that has been set up.
        network: the features in which samples are compared with real images.
        settings: how samples are drawn; arguments of `var_exp.sampling.generate.generate`.
        num_samples: how many the final scores are measured on.
        num_samples_per_scale: how many of them are scored after each scale too.
        batch_size: samples at once.
        seed: of the samples.
        reference: an .npz that samples are compared with; None: training images of the source.
        num_reference: how many training images at most.
        cache: a folder where statistics of real images are kept for other runs.
        score_settings: of the scores.

    Raises:
        ValueError: a reference that is missing or does not fit.
    """

    def __init__(
        self,
        source: Any,
        network: FeatureNetwork,
        settings: dict[str, Any],
        *,
        num_samples: int = 500,
        num_samples_per_scale: int = 0,
        batch_size: int = 100,
        seed: int = 0,
        reference: str | Path | None = None,
        num_reference: int = 10_000,
        cache: str | Path | None = None,
        score_settings: ScoreSettings | None = None,
    ):
        super().__init__(source, settings, batch_size, seed)
        self.network, self.judge = network, judge_of(network, source)
        self.num_samples, self.num_samples_per_scale = num_samples, num_samples_per_scale
        self.num_reference = num_reference
        self.on_batch: Callable[[], None] = lambda: None
        self.cache = cache and Path(cache)
        self.score_settings = score_settings or ScoreSettings()
        self._references: dict[tuple[str, int | None], Reference] = {}
        self._given = reference and reference_from_file(
            Path(reference), network, source.image_size, batch_size=batch_size
        )

    # -- scores ---------------------------------------------------------------------------

    def score_samples(
        self, transformer: VAR, tokenizer: VQVAE, num_samples: int, num_per_scale: int = 0
    ) -> dict[str, float]:
        """All scores of fresh samples; of the first `num_per_scale` also the FID by scale."""
        scorer, num_per_scale = self._scorer(tokenizer), min(num_per_scale, num_samples)
        parts = ((range(num_per_scale), True), (range(num_per_scale, num_samples), False))
        # None: hidden off a terminal.
        hidden = None if is_first() else True
        total = len(share(num_samples))
        with tqdm(total=total, desc="scoring samples", leave=False, disable=hidden) as bar:
            for numbers, per_scale in parts:
                ids = [i for i in share(num_samples) if i in numbers]
                for batch, (chosen, samples) in enumerate(self.draw(transformer, tokenizer, ids)):
                    labels = torch.tensor([self.label(i) for i in chosen])
                    seen = scorer.see(tokenizer, samples, labels, per_scale)
                    scorer.add(torch.tensor(chosen), seen)
                    bar.update(len(chosen))
                    if batch < common_batches(len(numbers), round_up(self.batch_size)):
                        self.on_batch()
        return scorer.compute()

    def score_reconstructions(
        self, tokenizer: VQVAE, num_images: int | None = None
    ) -> dict[str, float]:
        """How close reconstructions of validation images come to them.

        All scores against the very images they are made of, `rfid_<network>[_<crop>]` and so on;
        and what the judge finds right of both.

        Args:
            num_images: how many validation images, drawn evenly; all of them for None.
        """
        device = device_of(tokenizer)
        reference = self.held_out(num_images, device)
        bank, hits = FeatureBank().to(device), FeatureBank().to(device)
        judge, rows = self.judge, share(len(reference.indices))
        for batch, start in enumerate(range(0, len(rows), self.batch_size)):
            ids = torch.tensor(rows[start : start + self.batch_size])
            chosen = [reference.indices[i] for i in ids]
            images, labels = load(self.source, self.source.val, chosen)
            rebuilt = rebuild(tokenizer, images)
            bank.update(self.network(rebuilt), ids)
            if judge:
                shown = [judge[1](x) for x in (images, rebuilt.mul(2).sub(1))]
                right = torch.stack([(x == labels).float() for x in shown], dim=1)  # (B, 2)
                hits.update(Features(right, None), ids)
            if batch < common_batches(len(reference.indices), self.batch_size):
                self.on_batch()
        found = {}
        if len(reference.indices) > 1:  # of one image there is no distance
            name = "_".join(filter(None, (self.network.name, self.source.crop)))
            only = scores_against(reference, self.score_settings)
            found = scores(bank.compute(), reference, name, self.score_settings, only)
            found = {f"r{key}": value for key, value in found.items()}
        if judge:
            real, rebuilt = hits.compute().features.mean(dim=0).tolist()
            found[f"class_accuracy_real_{judge[0]}"] = real
            found[f"class_accuracy_{judge[0]}"] = rebuilt
        return found

    # -- at the end of a stage ------------------------------------------------------------

    def conclude_tokenizer(self, tokenizer: VQVAE, folder: Path) -> dict[str, float]:
        """Write `reconstructions.png` and return the scores of reconstructions."""
        if is_first():
            picture = self.reconstruction_picture(tokenizer, num_images=12)
            save_png(picture, folder / "reconstructions.png")
        return self.score_reconstructions(tokenizer)

    def conclude_var(self, transformer: VAR, tokenizer: VQVAE, folder: Path) -> dict[str, float]:
        """Write pictures of samples and return their scores.

        `grid.png`, `coarse_to_fine.png` and the same as arrays in `steps.npz`, and
        `neighbours.png`: the nearest training images beside each sample.
        """
        found = self.score_samples(
            transformer, tokenizer, self.num_samples, self.num_samples_per_scale
        )
        if is_first():
            drawn = self.draw_per_class(transformer, tokenizer, num_per_class=10)
            save_png(drawn.grid, folder / "grid.png")
            save_png(drawn.strip, folder / "coarse_to_fine.png")
            with replacing(folder / "steps.npz") as unfinished:
                names = np.array(self.source.class_names[:MAX_ROWS], dtype=str)
                np.savez_compressed(unfinished, arr_0=drawn.steps, names=names)
            picture = self.neighbour_picture(transformer, tokenizer)
            if picture is not None:
                save_png(picture, folder / "neighbours.png")
        return found

    def protocol_of_samples(self, tokenizer: VQVAE, weights: str) -> dict[str, Any]:
        """How the final scores of samples are obtained; `weights`: "averaged" or "raw"."""
        return protocol.of_samples(
            [self.label(i) for i in range(self.num_samples)],
            tokenizer.schedule,
            self.settings,
            seed=self.seed,
            precision=PRECISION,
            weights=weights,
            image_size=self.source.image_size,
        ) | self._protocol_of_scores(self.reference(device_of(tokenizer)))

    def protocol_of_reconstructions(self, tokenizer: VQVAE, weights: str) -> dict[str, Any]:
        """How the final scores of reconstructions are obtained."""
        return protocol.of_reconstructions(
            len(self.source.val),
            precision=PRECISION,
            weights=weights,
            image_size=self.source.image_size,
            crop=self.source.crop,
        ) | self._protocol_of_scores(self.held_out(None, device_of(tokenizer)))

    def _protocol_of_scores(self, reference: Reference) -> dict[str, Any]:
        return protocol.of_scores(self.network, reference, self.score_settings)

    # -- pictures -------------------------------------------------------------------------

    def neighbour_picture(self, transformer: VAR, tokenizer: VQVAE) -> np.ndarray | None:
        """The nearest training images beside one sample of each class: uint8 (H, W, 3).

        None where the reference is no part of the training images.
        """
        reference = self.reference(device_of(tokenizer))
        if reference.indices is None:
            return None
        ids = list(range(min(max(1, self.source.num_classes), NUM_HELD_OUT, 10)))
        samples = torch.cat([s.images for _, s in self.draw(transformer, tokenizer, ids)]).cpu()
        k = min(NUM_NEIGHBOURS, len(reference.indices))
        features = self.network(samples).features.cpu()
        distances, rows = nearest(features, reference.features, k)
        chosen = [reference.indices[i] for i in rows.flatten().tolist()]
        images, _ = load(self.source, self.source.train, chosen)
        images = images.add(1).div(2).unflatten(0, (len(ids), k))  # (n, k, C, H, W)
        return neighbours_picture(samples, images, distances)

    # -- parts ----------------------------------------------------------------------------

    def reference(self, device: torch.device) -> Reference:
        """What samples are compared with; all processes must ask for it."""
        return self._given or self._read("train", self.num_reference, device)

    def held_out(self, num_images: int | None, device: torch.device) -> Reference:
        """Validation images; all processes must ask for them."""
        return self._read("val", num_images, device)

    def _read(self, part: str, limit: int | None, device: torch.device) -> Reference:
        self.network.to(device)
        if (part, limit) not in self._references:
            how = self.batch_size, self.cache, device, self.on_batch
            self._references[part, limit] = reference_of(
                self.network, self.source, part, limit, *how
            )
        return self._references[part, limit]

    def _scorer(self, tokenizer: VQVAE) -> SampleScorer:
        device = device_of(tokenizer)
        scorer = SampleScorer(
            self.network,
            self.reference(device),
            tokenizer.schedule,
            self.judge,
            self.score_settings,
            self.held_out(NUM_HELD_OUT, device),
        )
        return scorer.to(device)
