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
from var_exp.distributed.launch import joined
from var_exp.distributed.signals import stop_if_traced
from var_exp.evaluation.samples.draw import SETTINGS, Drawer, fill, make_plan
from var_exp.experiment.entry import launch, program
from var_exp.experiment.resume import write_record
from var_exp.experiment.run import Run
from var_exp.experiment.sample import (
    EXPORTS,
    GRAPHS,
    check_place,
    check_sampling,
    choose_networks,
    choose_number,
    describe,
    export,
    is_scored,
    make_eyes,
    make_scorer,
    make_set,
    score,
)
from var_exp.io.run_folder import remove_if_empty
from var_exp.io.text import table


def sample(cfg: DictConfig, run: Run) -> None:
    """Export the networks where that is asked for; draw into `out`, and score."""
    device, out = check_sampling(cfg), run.path
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
    plan = make_plan(*pair, cfg.classes, cfg.precision, settings, bool(cfg.compile))
    eyes = make_eyes(cfg, found.path) if cfg.evaluate else None
    with joined(device, cfg.devices, cfg.num_nodes) as processes:
        networks.to(processes.device)
        if cfg.compile:
            networks.compile(graphs=cfg.compile == GRAPHS)
        drawer = Drawer(*pair, plan, eyes and make_scorer(cfg, eyes, found.tokenizer))
        samples = make_set(cfg, out, num_samples, drawer)
        about = eyes and describe(cfg, samples, drawer, found.weights)
        if processes.is_first:  # up to here nothing was written
            samples.check()
            export(networks, asked)
            write_record(cfg, out)
            if replaced := samples.begin():
                print(replaced)
        left = processes.tell(lambda: samples.jobs(cfg.batch_size, is_scored(samples, about)))
        stop = functools.partial(stop_if_traced, out)
        fill(samples, left, drawer, processes.rank, processes.size, stop)
        processes.part()
        if not processes.is_first:
            return
        with drawer.computing():
            samples.finish(found.tokenizer, found.class_names, cfg.batch_size)
        if eyes:
            done |= score(cfg, samples, drawer, about)
        samples.clear()
    print(table(f"{num_samples} samples", done | {"folder": out}))


@hydra.main(version_base=None, config_path="conf", config_name="sample")
@program
def main(cfg: DictConfig, run: Run) -> None:
    sample(cfg, run)


if __name__ == "__main__":
    launch(main, "sample")
