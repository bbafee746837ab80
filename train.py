"""Train the tokenizer, encode the images, train the next-scale transformer, and evaluate both.

python train.py                          both stages on the embedded digits
python train.py data=shapes              other images
python train.py 'stages=[tokenizer]'     one stage alone
python train.py --cfg job                what would run
python train.py check=true ...           what is wrong, and what it would take: docs/preflight.md
"""

from var_exp.distributed import signals

if __name__ == "__main__":
    signals.start()  # before the slow imports: a signal may come while they last

import sys

import hydra
from omegaconf import DictConfig

from var_exp.experiment import build
from var_exp.experiment.config.checks import check_choices
from var_exp.experiment.entry import launch, program
from var_exp.experiment.preflight import preflight
from var_exp.experiment.run import Run


def train(cfg: DictConfig, run: Run) -> dict[str, float]:
    """Run the configured stages; return all final metrics, keyed `stage/metric`."""
    check_choices(cfg)
    data = build.datamodule(cfg)
    tokenizer = build.tokenizer(cfg, data.source, run)
    stages = build.stages(cfg, data, tokenizer, run)  # all of them: a mistake shows now
    run.check(stages, *build.num_devices(cfg))
    evaluator = build.evaluator(cfg, data.source, run)
    run.start(stages)
    for stage in stages:
        run.record(stage, stage.run(evaluator))
    return run.finish(data.source)


@hydra.main(version_base=None, config_path="conf", config_name="train")
@program
def main(cfg: DictConfig, run: Run) -> float | None:
    if cfg.check:
        sys.exit(preflight(cfg, run))
    return run.objective(train(cfg, run))


if __name__ == "__main__":
    launch(main, "train")
