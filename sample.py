"""Draw images: numbered PNG files, pictures of the whole, one npz, and scores by choice.

python sample.py ckpt=runs/latest 'classes=[3,7]' num_samples=16 seed=0
python sample.py official=var_d16 'classes=[207]'         the published networks
python sample.py ckpt=runs/latest evaluate=true           FID and others, into metrics.json
python sample.py ckpt=runs/latest num_samples=0 export=DIR   the networks in one portable folder
"""

from var_exp.distributed.signals import (
    Interrupted,
    Interruption,
    forget_trace,
    leave,
    stop_if_traced,
)

interruption = Interruption()
if __name__ == "__main__":
    interruption.install()  # before the slow imports: a signal may come while they last

import functools
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
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
    joined,
)
from var_exp.distributed.slurm import requeue
from var_exp.evaluation import FeatureNetwork, ScoreSettings, protocol
from var_exp.evaluation.sampler import Sampler
from var_exp.evaluation.samples.sample_set import SampleSet, draw_missing
from var_exp.evaluation.scorer import SampleScorer
from var_exp.experiment.build import make_network
from var_exp.experiment.entry import check_sweep, launch, record_composition, report_errors
from var_exp.experiment.sample import beside_expected, scorer_of
from var_exp.io.lock import locked
from var_exp.io.run_folder import Metrics, read_metrics, remove_if_empty, write_metrics
from var_exp.io.text import table
from var_exp.ops.memory import keep_memory
from var_exp.sampling.compile import check_compiler

EXPORTS = {"export": "portable folder", "export_official": "published files"}
SETTINGS = ("cfg_scale", "top_k", "top_p", "temperature", "seed")
NUM_SAMPLES = 16  # unless asked otherwise
CONFIG = ".hydra/config.yaml"  # of the run that networks are from
GRAPHS = "graphs"  # what `compile` may be besides true and false
METRICS, STAGE = "metrics.json", "sample"  # where figures of samples are filed, and under what


def sample(cfg: DictConfig, out: Path) -> None:
    """Export the networks where that is asked for; draw into `out`, and score."""
    device = check_choices(cfg)
    keep_memory()
    found = choose_networks(cfg)
    networks = VARPipeline(found.transformer, found.tokenizer, found.class_names)
    asked = {key: cfg[key] for key in EXPORTS if cfg[key] is not None}
    early = ", of a stage that was not validated yet" if found.path.name == "last.ckpt" else ""
    done = {"checkpoint": f"{found.path}{early}"}
    done |= {EXPORTS[key]: folder for key, folder in asked.items()}
    if asked and cfg.num_samples == 0:
        export(networks, asked)
        remove_if_empty(out)
        print(table("exported", done))
        return
    check_place(out)
    num_samples = choose_number(cfg)
    pair, settings = (found.transformer, found.tokenizer), {name: cfg[name] for name in SETTINGS}
    sampler = Sampler(*pair, cfg.classes, settings, cfg.precision, bool(cfg.compile))
    plan = sampler.plan()
    eyes = make_eyes(cfg, found.path) if cfg.evaluate else None
    with joined(device, cfg.devices, cfg.num_nodes) as processes, ExitStack() as held:
        networks.to(processes.device)
        if cfg.compile:
            networks.compile(graphs=cfg.compile == GRAPHS)
        scorer = eyes and make_scorer(cfg, eyes, found.tokenizer)
        samples = make_set(cfg, out, num_samples, plan, scorer)
        about = eyes and describe(cfg, samples, scorer, found.weights)
        if processes.is_first:  # up to here nothing was written
            held.enter_context(locked(out, "out_dir=..."))
            samples.check()
            export(networks, asked)
            record_composition(cfg, out)
            if replaced := samples.begin():
                print(replaced)
        left = processes.tell(lambda: samples.missing(is_scored(samples, about)))
        stop = functools.partial(stop_if_traced, out)
        draw_missing(samples, left, sampler, scorer, processes.rank, processes.size, stop)
        processes.part()
        if not processes.is_first:
            return
        samples.finish(sampler, found.class_names)
        if eyes:
            done |= score(cfg, samples, scorer, about, f"d{len(found.transformer.blocks)}")
        samples.clear()
    print(table(f"{num_samples} samples", done | {"folder": out}))


# -- what is drawn ------------------------------------------------------------------------


def check_choices(cfg: DictConfig) -> torch.device:
    """The device; raises ValueError for what can be found wrong before networks are read."""
    device = choose_device(cfg.device)
    check_processes(device, cfg.devices, cfg.num_nodes)
    check_tasks(cfg.devices, cfg.num_nodes)
    check_sweep(cfg.devices * cfg.num_nodes)
    check_meeting_point(cfg.devices * cfg.num_nodes, cfg.num_nodes)
    if cfg.compile not in (True, False, GRAPHS):
        raise ValueError(f"compile: expected true, false or {GRAPHS}, got {cfg.compile}")
    if cfg.compile == GRAPHS and device.type != "cuda":
        raise ValueError(f"compile={GRAPHS}: CUDA graphs need a CUDA device, got {device} (device)")
    if cfg.compile:
        check_compiler(device)
    if cfg.batch_size < 1:
        raise ValueError(f"batch_size: expected a whole number >= 1, got {cfg.batch_size}")
    number = cfg.evaluation.num_samples_per_scale
    ScoreSettings(**cfg.evaluation.scores).check()
    if number < 0 or number == 1:  # of one there is no distance
        key = "evaluation.num_samples_per_scale"
        raise ValueError(f"{key}: expected 0, or a whole number >= 2, got {number!r}")
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


def make_set(
    cfg: DictConfig, out: Path, num_samples: int, plan: dict[str, Any], scorer: SampleScorer | None
) -> SampleSet:
    features = scorer and {
        "network": scorer.network.fingerprint,
        "classifier": bool(scorer.classifier),
    }
    num_per_scale = cfg.evaluation.num_samples_per_scale
    return SampleSet(
        out,
        plan,
        num_samples,
        batch_size=cfg.batch_size,
        png=cfg.png,
        npz=cfg.npz,
        scores=features,
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
    return Eyes(make_network(cfg, folder, source), source)


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


def describe(
    cfg: DictConfig, samples: SampleSet, scorer: SampleScorer, weights: str
) -> dict[str, Any]:
    """How the scores are obtained, as plain data."""
    settings = {name: cfg[name] for name in SETTINGS if name != "seed"}
    about = protocol.of_samples(
        samples.labels,
        scorer.schedule,
        settings,
        seed=cfg.seed,
        precision=cfg.precision,
        weights=weights,
        image_size=samples.plan["image_size"],
    ) | protocol.of_scores(scorer.network, scorer.reference, scorer.settings)
    about |= {"model": samples.plan["networks"], "num_per_scale": samples.num_per_scale}
    return json.loads(json.dumps(about))  # as it will be read


def is_scored(samples: SampleSet, about: dict[str, Any] | None) -> bool:
    """Whether metrics.json holds the scores that are obtained so."""
    return bool(about) and read_metrics(samples.folder / METRICS).protocols.get(STAGE) == about


def score(
    cfg: DictConfig, samples: SampleSet, scorer: SampleScorer, about: dict[str, Any], model: str
) -> dict[str, str]:
    """Measure, unless it was measured so before, and write metrics.json; figures in words."""
    path = samples.folder / METRICS
    metrics = read_metrics(path)
    if not is_scored(samples, about):
        for ids, features in samples.features():
            scorer.update(ids, features)
        others = {k: v for k, v in metrics.figures.items() if not k.startswith(f"{STAGE}/")}
        metrics = Metrics(others, metrics.protocols)
        metrics = metrics.with_stage(STAGE, scorer.compute(), about)
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
    return beside_expected(figures, expected, model, given, required)


@hydra.main(version_base=None, config_path="conf", config_name="sample")
@report_errors
def main(cfg: DictConfig) -> None:
    out = Path(HydraConfig.get().runtime.output_dir)
    try:
        with interruption.heeded():
            forget_trace(out)
            sample(cfg, out)
    except Interrupted as stop:  # every file is whole or not there
        requeue(stop)
        leave(stop, out)


if __name__ == "__main__":
    try:
        launch(main, "sample")
    finally:
        interruption.finish()
