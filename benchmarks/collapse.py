"""What each switch against codebook collapse mends: the table of docs/collapse.md.

    python -m benchmarks.collapse

Trains the tokenizer on shapes at 64 px from scratch, once for each switch and seed, everything else
equal: a codebook of 256 codes that all scales share and that learns by gradient, as the published
one, with one switch turned on at a time. Two runs at a time, one thread each. Writes
`benchmarks/results/collapse.json` and the picture of it, and prints the table.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.harness import markdown, save
from var_exp.experiment import build
from var_exp.experiment.config.overrides import CONF
from var_exp.experiment.run import Run
from var_exp.io.environment import machine
from var_exp.training.fit import StageSchedule, fit_stage

ROOT = Path(__file__).resolve().parents[1]
BASE = [
    "data=shapes",
    "data.image_size=64",
    "data.num_val=256",
    "stages=[tokenizer]",
    # One resolution of 8x8: small enough for 24 trainings in a quarter of an hour.
    "tokenizer=tiny",
    "tokenizer.encoder.patch_size=8",
    "tokenizer.encoder.width=32",
    "tokenizer.encoder.code_dim=8",
    "tokenizer.quantizer.codebook.vocab_size=256",
    "model.tokenizer.batch_size=16",
    # The published kind of codebook, with nothing against collapse.
    "tokenizer.quantizer.per_scale=false",
    "tokenizer.quantizer.codebook._target_=var_exp.tokenizer.Codebook",
    "tokenizer.quantizer.codebook.start_from=none",
    "tokenizer.quantizer.codebook.restart_below=0.0",
]
SWITCHES = {
    "none": [],
    "k-means start": ["tokenizer.quantizer.codebook.start_from=kmeans"],
    "EMA codebook": ["tokenizer.quantizer.codebook._target_=var_exp.tokenizer.EMACodebook"],
    "restart of dead codes": ["tokenizer.quantizer.codebook.restart_below=0.03"],
    "cosine codes": ["tokenizer.quantizer.codebook.cosine=true"],
    "quantizer dropout": ["tokenizer.quantizer.quantizer_dropout=0.3"],
    "entropy": ["tokenizer.quantizer.entropy=0.01", "tokenizer.quantizer.entropy_temperature=0.1"],
}
SWITCHES["k-means, EMA, restart"] = [
    override
    for name in ("k-means start", "EMA codebook", "restart of dead codes")
    for override in SWITCHES[name]
]


def measure(job: tuple[str, int, int]) -> dict:
    """Train one tokenizer: (switch, seed, batches) -> its final figures."""
    switch, seed, num_batches = job
    torch.set_num_threads(1)
    overrides = [*BASE, *SWITCHES[switch], f"seed={seed}"]
    with initialize_config_dir(str(CONF), version_base=None):
        cfg = compose("train", overrides=overrides)
    data = build.datamodule(cfg)
    quiet = contextlib.redirect_stderr(io.StringIO())  # two runs' progress lines, mixed
    with tempfile.TemporaryDirectory() as folder, quiet:
        tokenizer = build.tokenizer(cfg, data.source, Run(Path(folder), cfg))
        (module,) = build.modules(cfg, data.source, tokenizer).values()
        fitted = fit_stage(
            module,
            data,
            instantiate(cfg.trainer, _partial_=True),
            StageSchedule(cfg.model.tokenizer.batch_size, num_batches, num_batches, seed),
            run_dir=Path(folder),
        )
    return {"switch": switch, "seed": seed, "seconds": fitted.seconds, **fitted.metrics}


def table(results: list[dict]) -> str:
    """Means over the seeds, in brackets the lowest and highest PSNR."""
    scales = [key.removeprefix("usage_scale_") for key in results[0] if "usage_scale" in key]
    head = ["switch", "PSNR (dB)"]
    head += [f"{what} {s}x{s}" for what in ("usage", "perplexity") for s in scales]
    rows = [head]
    for switch in SWITCHES:
        runs = [run for run in results if run["switch"] == switch]
        psnr = [run["psnr"] for run in runs]
        row = [switch, f"{mean(psnr):.2f} ({min(psnr):.2f} to {max(psnr):.2f})"]
        row += [f"{100 * mean(run[f'usage_scale_{s}'] for run in runs):.0f} %" for s in scales]
        row += [f"{mean(run[f'perplexity_scale_{s}'] for run in runs):.0f}" for s in scales]
        rows.append(row)
    return markdown(rows)


def picture(results: list[dict], path: Path) -> None:
    """Usage of each scale by switch as a heat map, and PSNR of every seed beside it."""
    scales = [key.removeprefix("usage_scale_") for key in results[0] if "usage_scale" in key]
    runs = {switch: [r for r in results if r["switch"] == switch] for switch in SWITCHES}
    used = np.array(
        [[mean(r[f"usage_scale_{s}"] for r in runs[switch]) for s in scales] for switch in SWITCHES]
    )
    figure = Figure(figsize=(9, 4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    left.imshow(used, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    left.set_xticks(range(len(scales)), [f"{s}x{s}" for s in scales])
    left.set_yticks(range(len(SWITCHES)), list(SWITCHES))
    left.set_title("share of codes in use, scale by scale")
    for (i, j), value in np.ndenumerate(used):
        colour = "black" if value > 0.6 else "white"
        left.text(j, i, f"{100 * value:.0f} %", ha="center", va="center", color=colour)
    for i, switch in enumerate(SWITCHES):
        values = [run["psnr"] for run in runs[switch]]
        right.plot(values, [i] * len(values), "o", color="#1f3b63", alpha=0.7)
    right.set_title("PSNR of each seed (dB)")
    right.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    jobs = [(switch, seed, args.batches) for seed in range(args.seeds) for switch in SWITCHES]
    os.environ["OMP_NUM_THREADS"] = "1"
    started = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        results = list(tqdm(pool.imap_unordered(measure, jobs), "tokenizers", len(jobs)))
    results.sort(key=lambda run: (list(SWITCHES).index(run["switch"]), run["seed"]))
    about = {**machine(), "date": date.today().isoformat(), "batches": args.batches}
    about["overrides"] = BASE
    about |= {"switches": SWITCHES, "wall_seconds": round(time.monotonic() - started)}
    save("collapse", about | {"results": results})
    picture(results, ROOT / "docs" / "images" / "collapse.png")
    print(table(results))


if __name__ == "__main__":
    main()
