"""What sample.py does: read networks, draw a set of samples, export, and score."""

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
from var_exp.distributed.launch import (
    check_meeting_point,
    check_processes,
    check_tasks,
    choose_device,
)
from var_exp.evaluation import FeatureNetwork, ScoreSettings, protocol
from var_exp.evaluation.reference import reference_from_file, reference_of
from var_exp.evaluation.samples.draw import SETTINGS, Drawer
from var_exp.evaluation.samples.sample_set import SampleSet
from var_exp.evaluation.scorer import NUM_HELD_OUT, SampleScorer, judge_of
from var_exp.experiment.build import feature_network
from var_exp.experiment.config.checks import check_sweep
from var_exp.io.run_folder import Metrics, read_metrics, write_metrics
from var_exp.sampling.compile import check_compiler
from var_exp.tokenizer import VQVAE

EXPORTS = {"export": "portable folder", "export_official": "published files"}
NUM_SAMPLES = 16  # unless asked otherwise
CONFIG = ".hydra/config.yaml"  # of the run that networks are from
GRAPHS = "graphs"  # what `compile` may be besides true and false
METRICS, STAGE = "metrics.json", "sample"  # where figures of samples are filed, and under what


# -- what is drawn ------------------------------------------------------------------------


def check_sampling(cfg: DictConfig) -> torch.device:
    """The device; raises ValueError for what can be found wrong before networks are read."""
    device = choose_device(cfg.device)
    check_processes(device, cfg.devices, cfg.num_nodes)
    check_tasks(cfg.devices, cfg.num_nodes)
    check_sweep(cfg.devices * cfg.num_nodes)
    check_meeting_point(cfg.devices * cfg.num_nodes, cfg.num_nodes)
    if cfg.compile == GRAPHS and device.type != "cuda":
        raise ValueError(f"compile={GRAPHS}: CUDA graphs need a CUDA device, got {device} (device)")
    if cfg.compile:
        check_compiler(device)
    return device


def check_place(out: Path) -> None:
    """Raise ValueError for a folder in which train.py was run, whose record would be replaced."""
    if is_run(out):
        raise ValueError(
            f"out_dir: {str(out)!r} is the run folder of a training, whose record would be "
            f"replaced; choose another folder (out_dir=...), such as one within it"
        )


def choose_networks(cfg: DictConfig) -> Found:
    """The networks of `ckpt`, or the published ones that `official` names."""
    if (cfg.ckpt is None) == (cfg.official is None):
        raise ValueError(
            f"sample: expected either ckpt=PATH, such as runs/latest, or official=NAME, one of "
            f"{', '.join(MODELS)}; got ckpt={cfg.ckpt} and official={cfg.official}"
        )
    if cfg.official is not None:
        return read_published(cfg.official, cfg.official_dir)
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
    return found


def choose_number(cfg: DictConfig) -> int:
    """How many samples."""
    usual = cfg.evaluation.num_samples if cfg.evaluate else NUM_SAMPLES
    smallest = max(2, cfg.evaluation.scores.num_neighbours + 1) if cfg.evaluate else 1
    number = usual if cfg.num_samples is None else cfg.num_samples
    if type(number) is not int or number < smallest:
        why = " to score (more than evaluation.scores.num_neighbours)" if cfg.evaluate else ""
        raise ValueError(f"num_samples: expected a whole number >= {smallest}{why}, got {number}")
    return number


def export(networks: VARPipeline, folders: dict[str, str]) -> None:
    """Write the networks into the folders of `export` and `export_official`, where given."""
    for key, folder in folders.items():
        if Path(folder).exists() and not Path(folder).is_dir():
            raise ValueError(f"{key}: expected a folder, {str(folder)!r} is a file")
    if "export_official" in folders:  # first: it may refuse
        try:
            save_official(folders["export_official"], networks.transformer, networks.tokenizer)
        except ValueError as error:
            raise ValueError(f"export_official: {error}; export= writes any networks") from None
    if "export" in folders:
        networks.save_pretrained(folders["export"])


def make_set(cfg: DictConfig, out: Path, num_samples: int, drawer: Drawer) -> SampleSet:
    scorer = drawer.scorer
    seen = scorer and {"network": scorer.network.fingerprint, "judge": bool(scorer.judge)}
    num_per_scale = cfg.evaluation.num_samples_per_scale
    return SampleSet(
        out,
        drawer.plan,
        num_samples,
        png=cfg.png,
        npz=cfg.npz,
        scores=seen,
        num_per_scale=num_per_scale,
    )


# -- scores -------------------------------------------------------------------------------


class Eyes(NamedTuple):
    """What samples are seen with, and the images of the run they come from, where it is known."""

    network: FeatureNetwork
    source: Any | None


def make_eyes(cfg: DictConfig, path: Path) -> Eyes:
    """The feature network, and the images of the run that the networks at this path are from."""
    parents = path.absolute().parents[:2] if cfg.official is None else ()
    runs = [folder for folder in parents if is_run(folder)]
    folder, source = runs[0] if runs else None, None
    if folder is not None:
        run = OmegaConf.load(folder / CONFIG)
        changes = {key: value for key, value in cfg.data.items() if value is not None}
        run.data = OmegaConf.merge(run.data, changes)
        source = instantiate(run.data, _convert_="all")
        source.prepare()
        source.setup()
    if source is None and cfg.evaluation.reference is None:
        raise ValueError(
            f"evaluation.reference: {str(path)!r} is in no run folder, whose images samples would "
            f"be compared with; expected evaluation.reference=FILE.npz, which evaluation="
            f"adm_imagenet256 has"
        )
    return Eyes(feature_network(cfg, folder, source), source)


def is_run(folder: Path) -> bool:
    """Whether train.py was run there; this program leaves its composition in a folder too."""
    path = folder / CONFIG
    return path.is_file() and bool(OmegaConf.select(OmegaConf.load(path), "data._target_"))


def make_scorer(cfg: DictConfig, eyes: Eyes, tokenizer):
    chosen = cfg.evaluation
    return scorer_of(
        *eyes,
        tokenizer,
        ScoreSettings(**chosen.scores),
        reference=chosen.reference,
        num_reference=chosen.num_reference,
        batch_size=chosen.batch_size,
        cache=chosen.cache,
    )


def describe(cfg: DictConfig, samples: SampleSet, drawer: Drawer, weights: str) -> dict[str, Any]:
    """How the scores are obtained, as plain data."""
    scorer, schedule = drawer.scorer, drawer.tokenizer.schedule
    settings = {name: cfg[name] for name in SETTINGS if name != "seed"}
    about = protocol.of_samples(
        samples.labels,
        schedule,
        settings,
        seed=cfg.seed,
        precision=cfg.precision,
        weights=weights,
        image_size=drawer.tokenizer.image_size,
    ) | protocol.of_scores(scorer.network, scorer.reference, scorer.settings)
    about |= {"model": drawer.plan["networks"], "num_per_scale": samples.num_per_scale}
    return json.loads(json.dumps(about))  # as it will be read


def is_scored(samples: SampleSet, about: dict[str, Any] | None) -> bool:
    """Whether metrics.json holds the scores that are obtained so."""
    return bool(about) and read_metrics(samples.folder / METRICS).protocols.get(STAGE) == about


def score(
    cfg: DictConfig, samples: SampleSet, drawer: Drawer, about: dict[str, Any]
) -> dict[str, str]:
    """Measure, unless it was measured so before, and write metrics.json; figures in words."""
    path = samples.folder / METRICS
    metrics = read_metrics(path)
    if not is_scored(samples, about):
        for ids, seen in samples.seen():
            drawer.scorer.add(ids, seen)
        others = {k: v for k, v in metrics.figures.items() if not k.startswith(f"{STAGE}/")}
        metrics = Metrics(others, metrics.protocols)
        metrics = metrics.with_stage(STAGE, drawer.scorer.compute(), about)
        write_metrics(metrics, path)
    figures = {
        key.removeprefix(f"{STAGE}/"): value
        for key, value in metrics.figures.items()
        if key.startswith(f"{STAGE}/") and "_scale_" not in key
    }
    given = {name: cfg[name] for name in (*cfg.evaluation.sampling, "classes")}
    required = OmegaConf.to_container(cfg.evaluation.sampling) | {"classes": "all"}
    given, required = (
        given | {"num_samples": samples.num_samples},
        required | {"num_samples": cfg.evaluation.num_samples},
    )
    expected = OmegaConf.to_container(cfg.evaluation.expected)
    model = f"d{len(drawer.transformer.blocks)}"
    return beside_expected(figures, expected, model, given, required)


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
        num_reference, batch_size, cache: as in `reference_of`.

    Raises:
        ValueError: the images have another size than the model's, or are a single one; as
            `reference_of` and `reference_from_file`.
    """
    device = next(tokenizer.parameters()).device
    if source is not None and tuple(source.image_size) != tuple(tokenizer.image_size):
        raise ValueError(
            f"evaluation: the images of {source.name} are of {tuple(source.image_size)} pixels, "
            f"those of the model of {tuple(tokenizer.image_size)} (data.image_size)"
        )
    network, held_out = network.to(device), None
    if reference is not None:
        size = tokenizer.image_size
        real = reference_from_file(Path(reference), network, size, batch_size=batch_size)
    else:
        how = batch_size, cache, device
        real = reference_of(network, source, "train", num_reference, *how)
        held_out = reference_of(network, source, "val", NUM_HELD_OUT, *how)
    if real.num_images == 1:  # which shows here, not once all samples are drawn
        raise ValueError(
            f"evaluation: scores need at least 2 reference images, got 1 of {real.about['what']} "
            f"(evaluation.num_reference, evaluation.reference)"
        )
    judge = judge_of(network, source)
    return SampleScorer(network, real, tokenizer.schedule, judge, settings, held_out).to(device)


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
