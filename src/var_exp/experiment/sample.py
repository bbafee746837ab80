"""From the configuration of sample.py to its objects: networks, sampler, scorer, set of samples."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from var_exp.checkpoint.load import Found, read_networks, read_published
from var_exp.checkpoint.official import MODELS, save_official
from var_exp.checkpoint.pipeline import VARPipeline
from var_exp.data import ImageSource
from var_exp.distributed.launch import (
    check_meeting_point,
    check_processes,
    check_tasks,
    resolve_device,
)
from var_exp.evaluation import FeatureNetwork, ScoreSettings, protocol
from var_exp.evaluation.sampler import Sampler
from var_exp.evaluation.samples.sample_set import SampleSet
from var_exp.evaluation.scorer import RealImages, SampleScorer
from var_exp.experiment.build import feature_network
from var_exp.experiment.config.checks import check_sweep
from var_exp.experiment.config.plain import plain
from var_exp.experiment.resume import CONFIG
from var_exp.experiment.run import METRICS, Run
from var_exp.io.run_folder import Metrics, read_metrics, write_metrics
from var_exp.sampling.compile import check_compiler
from var_exp.tokenizer import VQVAE
from var_exp.transformer import VAR

EXPORTS = {"export": "portable folder", "export_official": "published files"}
WholeFound = Found[VQVAE, VAR]
SETTINGS = ("cfg_scale", "top_k", "top_p", "temperature", "seed")
NUM_SAMPLES = 16  # of a set that is not scored, where num_samples is null
GRAPHS = "graphs"  # what `compile` may be besides true and false
STAGE = "sample"  # under which the metrics of samples are filed


def check_sampling(cfg: DictConfig, run: Run) -> torch.device:
    """Return the device; find what can be found wrong before networks are read.

    Raises:
        ValueError: processes that this machine cannot have, a compiler that is missing, or a
            folder in which train.py ran, whose record would be replaced.
    """
    device = resolve_device(cfg.device)
    check_processes(device, cfg.devices, cfg.num_nodes)
    check_tasks(cfg.devices, cfg.num_nodes)
    check_sweep(cfg.devices * cfg.num_nodes)
    check_meeting_point(cfg.devices * cfg.num_nodes, cfg.num_nodes)
    if cfg.compile == GRAPHS and device.type != "cuda":
        raise ValueError(f"compile={GRAPHS}: CUDA graphs need a CUDA device, got {device} (device)")
    if cfg.compile:
        check_compiler(device)
    if cfg.num_samples != 0 and is_trained_in(run.path):
        raise ValueError(
            f"out_dir: {str(run.path)!r} is the run folder of a training, whose record would be "
            f"replaced; choose another folder (out_dir=...), such as one within it"
        )
    return device


def is_trained_in(folder: Path) -> bool:
    """Whether train.py ran in a folder; sample.py leaves its configuration in a folder too."""
    path = folder / CONFIG
    return path.is_file() and bool(OmegaConf.select(OmegaConf.load(path), "data._target_"))


# -- networks -----------------------------------------------------------------------------


def networks(cfg: DictConfig) -> WholeFound:
    """The networks of `ckpt`, or the published ones that `official` names."""
    if (cfg.ckpt is None) == (cfg.official is None):
        raise ValueError(
            f"sample: expected either ckpt=PATH, such as runs/latest, or official=NAME, one of "
            f"{', '.join(MODELS)}; got ckpt={cfg.ckpt} and official={cfg.official}"
        )
    if cfg.official is not None:
        found = read_published(cfg.official, cfg.official_dir)
    else:
        found = read_networks(cfg.ckpt, cfg.weights)
    if found.transformer is None:
        raise ValueError(
            f"ckpt: {str(found.path)!r} holds a tokenizer only; expected a checkpoint of the var "
            f"stage"
        )
    if found.tokenizer is None:
        raise ValueError(
            f"ckpt: {str(found.path)!r} holds a transformer only; to draw with published files "
            f"use official=NAME, and official_dir=DIR for where they are"
        )
    return Found(found.tokenizer, found.transformer, *found[2:])


def origin(found: WholeFound) -> dict[str, str]:
    """The row of a table that names the checkpoint."""
    early = ", of a stage that was not validated yet" if found.path.name == "last.ckpt" else ""
    return {"checkpoint": f"{found.path}{early}"}


def exports(cfg: DictConfig) -> dict[str, str]:
    """The folders that the networks are written to, by key.

    Raises:
        ValueError: there is a file in the place of a folder.
    """
    folders = {key: cfg[key] for key in EXPORTS if cfg[key] is not None}
    for key, folder in folders.items():
        if Path(folder).exists() and not Path(folder).is_dir():
            raise ValueError(f"{key}: expected a folder, {str(folder)!r} is a file")
    return folders


def export(pipeline: VARPipeline, folders: Mapping[str, str]) -> None:
    """Write the networks into the folders of `export` and `export_official`."""
    if "export_official" in folders:  # first: it may refuse
        try:
            save_official(folders["export_official"], pipeline.transformer, pipeline.tokenizer)
        except ValueError as error:
            raise ValueError(f"export_official: {error}; export= writes any networks") from None
    if "export" in folders:
        pipeline.save_pretrained(folders["export"])


# -- samples and their scores -------------------------------------------------------------


def sampler(cfg: DictConfig, found: WholeFound) -> Sampler:
    """What draws the samples."""
    settings = {name: cfg[name] for name in SETTINGS}
    pair = found.transformer, found.tokenizer
    return Sampler(*pair, cfg.classes, settings, cfg.precision, bool(cfg.compile))


class RealSource(NamedTuple):
    """What samples are compared with: features, and images where the run is known."""

    network: FeatureNetwork
    images: ImageSource | None


def real_source(cfg: DictConfig, found: WholeFound) -> RealSource:
    """The feature network, and the images of the run that the networks are from."""
    parents = found.path.absolute().parents[:2] if cfg.official is None else ()
    folder = next((parent for parent in parents if is_trained_in(parent)), None)
    images = None
    if folder is not None:
        run = OmegaConf.load(folder / CONFIG)
        changes = {key: value for key, value in cfg.data.items() if value is not None}
        run.data = OmegaConf.merge(run.data, changes)
        images = instantiate(run.data, _convert_="all")
        images.prepare()
        images.setup()
    if images is None and cfg.evaluation.reference is None:
        raise ValueError(
            f"evaluation.reference: {str(found.path)!r} is in no run folder, whose images samples "
            f"would be compared with; expected evaluation.reference=FILE.npz, which evaluation="
            f"adm_imagenet256 has"
        )
    return RealSource(feature_network(cfg, folder, images), images)


def scorer(cfg: DictConfig, real: RealSource, found: WholeFound) -> SampleScorer:
    """What scores the samples, on the device of the networks; all processes must call."""
    chosen, tokenizer = cfg.evaluation, found.tokenizer
    images = RealImages(
        real.network.to(next(tokenizer.parameters()).device),
        real.images,
        tokenizer.image_size,
        file=chosen.reference,
        num_reference=chosen.num_reference,
        batch_size=chosen.batch_size,
        cache=chosen.cache,
    )
    settings = ScoreSettings(**chosen.scores)
    return images.scorer(tokenizer, settings, held_out=chosen.reference is None)


def num_samples(cfg: DictConfig) -> int:
    """How many samples.

    Raises:
        ValueError: too few, to score or at all.
    """
    usual = cfg.evaluation.num_samples if cfg.evaluate else NUM_SAMPLES
    smallest = max(2, cfg.evaluation.scores.num_neighbours + 1) if cfg.evaluate else 1
    number = usual if cfg.num_samples is None else cfg.num_samples
    if number < smallest:
        why = " to score (more than evaluation.scores.num_neighbours)" if cfg.evaluate else ""
        raise ValueError(f"num_samples: expected a whole number >= {smallest}{why}, got {number}")
    return number


class ScoredSet:
    """A set of samples in a folder, with its scorer and metrics, where they are scored.

    Args:
        cfg: the configuration of sample.py.
        run: in its folder.
        found: the networks.
        plan: see `Sampler.plan`.
        scorer: None where nothing is scored.
    """

    def __init__(
        self,
        cfg: DictConfig,
        run: Run,
        found: WholeFound,
        plan: dict[str, Any],
        scorer: SampleScorer | None,
    ):
        self.cfg, self.found, self.scorer = cfg, found, scorer
        self.samples = SampleSet(
            run.path,
            plan,
            num_samples(cfg),
            batch_size=cfg.batch_size,
            png=cfg.png,
            npz=cfg.npz,
            scores=None if scorer is None else scorer.identity,
            num_per_scale=cfg.evaluation.num_samples_per_scale,
        )
        self.protocol = None if scorer is None else self._protocol(scorer)
        self.path = run.path / METRICS

    def _protocol(self, scorer: SampleScorer) -> dict[str, Any]:
        """How the scores are obtained, as plain data."""
        cfg, samples = self.cfg, self.samples
        about = protocol.of_samples(
            samples.labels,
            scorer.schedule,
            {name: cfg[name] for name in SETTINGS if name != "seed"},
            seed=cfg.seed,
            precision=cfg.precision,
            weights=self.found.weights,
            image_size=samples.plan["image_size"],
        ) | protocol.of_scores(scorer.network, scorer.reference, scorer.settings)
        about |= {"model": samples.plan["networks"], "num_per_scale": samples.num_per_scale}
        return json.loads(json.dumps(about))  # as it will be read

    @property
    def is_scored(self) -> bool:
        """Whether metrics.json holds the scores that are obtained so."""
        if self.protocol is None:
            return False
        return read_metrics(self.path).protocols.get(STAGE) == self.protocol

    def score(self) -> dict[str, str]:
        """Measure, unless it was measured so before; write metrics.json; return rows of a table."""
        if self.scorer is None or self.protocol is None:
            return {}
        metrics = read_metrics(self.path)
        if not self.is_scored:
            for ids, features in self.samples.features():
                self.scorer.update(ids, features)
            others = {k: v for k, v in metrics.figures.items() if not k.startswith(f"{STAGE}/")}
            metrics = Metrics(others, metrics.protocols)
            metrics = metrics.with_stage(STAGE, self.scorer.compute(), self.protocol)
            write_metrics(metrics, self.path)
        scores = {
            key.removeprefix(f"{STAGE}/"): value
            for key, value in metrics.figures.items()
            if key.startswith(f"{STAGE}/") and "_scale_" not in key
        }
        cfg = self.cfg
        given = {name: cfg[name] for name in (*cfg.evaluation.sampling, "classes")}
        required = plain(cfg.evaluation.sampling) | {"classes": "all"}
        given |= {"num_samples": self.samples.num_samples}
        required |= {"num_samples": cfg.evaluation.num_samples}
        expected = plain(cfg.evaluation.expected)
        model = f"d{len(self.found.transformer.blocks)}"
        return beside_expected(scores, expected, model, given, required)


def beside_expected(
    scores: Mapping[str, float],
    expected: Mapping[str, Mapping[str, list[float]] | None],
    model: str,
    given: Mapping[str, Any],
    required: Mapping[str, Any],
) -> dict[str, str]:
    """Format scores, each with the band in which it is expected, where there is one.

    Args:
        scores: by key.
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
    words = {key: f"{value:.4g}" for key, value in scores.items()}
    for key, (low, high) in bands.items():
        if key in words:
            words[key] += f"  (expected {low:g} to {high:g})"
    return words | rows
