"""Draw images: numbered PNG files, pictures of the whole, one npz, and scores by choice.

python sample.py ckpt=runs/latest 'classes=[3,7]' num_samples=16 seed=0
python sample.py official=var_d16 'classes=[207]'         the published networks
python sample.py ckpt=runs/latest evaluate=true           FID and others, into metrics.json
python sample.py ckpt=runs/latest num_samples=0 export=DIR   the networks in one portable folder
"""

from var_exp.distributed import signals

if __name__ == "__main__":
    signals.start()  # before the slow imports: a signal may come while they last

import functools

import hydra
from omegaconf import DictConfig

from var_exp.checkpoint.pipeline import VARPipeline
from var_exp.distributed.launch import process_group
from var_exp.evaluation.samples.sample_set import draw_missing
from var_exp.experiment import sample as build
from var_exp.experiment.entry import launch, program
from var_exp.experiment.resume import write_record
from var_exp.experiment.run import Run
from var_exp.io.text import table


def sample(cfg: DictConfig, run: Run) -> None:
    """Export the networks where that is asked for; draw samples into the folder, and score them."""
    device = build.check_sampling(cfg, run)
    found = build.networks(cfg)
    pipeline = VARPipeline(found.transformer, found.tokenizer, found.class_names)
    exports = build.exports(cfg)
    rows = build.origin(found) | {build.EXPORTS[key]: folder for key, folder in exports.items()}
    if exports and cfg.num_samples == 0:
        build.export(pipeline, exports)
        print(table("exported", rows))
        return
    sampler = build.sampler(cfg, found)
    plan = sampler.plan()
    real = build.real_source(cfg, found) if cfg.evaluate else None
    with process_group(device, cfg.devices, cfg.num_nodes) as processes:
        pipeline.to(processes.device)
        if cfg.compile:
            pipeline.compile(graphs=cfg.compile == build.GRAPHS)
        scorer = real and build.scorer(cfg, real, found)
        scored = build.ScoredSet(cfg, run, found, plan, scorer)
        samples = scored.samples
        if processes.is_main_process:  # up to here nothing was written
            samples.check()
            build.export(pipeline, exports)
            write_record(cfg, run.path)
            if replaced := samples.begin():
                print(replaced)
        missing = processes.tell(lambda: samples.missing(scored.is_scored))
        stop = functools.partial(signals.raise_if_stopped_elsewhere, run.path)
        draw_missing(samples, missing, sampler, scorer, processes.rank, processes.size, stop)
        processes.part()
        if not processes.is_main_process:
            return
        samples.finish(sampler, found.class_names)
        rows |= scored.score()
        samples.clear()
    print(table(f"{samples.num_samples} samples", rows | {"folder": run.path}))


@hydra.main(version_base=None, config_path="conf", config_name="sample")
@program
def main(cfg: DictConfig, run: Run) -> None:
    sample(cfg, run)


if __name__ == "__main__":
    launch(main, "sample")
