"""Figures of docs/reliability.md: what kills, damage and time do to a run. Run by hand.

    python tests/reliability.py kills --count 50      the digits job, killed at random moments
    python tests/reliability.py damage --count 200    checkpoints damaged at random places
    python tests/reliability.py memory                resident size over 5,000 steps

Each writes its result to benchmarks/results/reliability_<name>.json, and ends with code 1 where
something was not as promised. Everything random comes from --seed, but for the moment that a
kill hits a program whose speed depends on the machine.
"""

import argparse
import contextlib
import io
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from helpers.damage import spoil
from helpers.programs import Program, csv_rows
from helpers.stages import Interrupt, run, weights
from var_exp.data.digits import Digits
from var_exp.io.environment import machine
from var_exp.training.resume import LAST, PREVIOUS

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("tokenizer", "var")
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


# -- kills ------------------------------------------------------------------------------------


def kills(count: int, seed: int, arguments: list[str]) -> dict:
    """Kill whole jobs at random moments until `count` kills are reached; compare what they leave.

    A job that ends before is compared, and another one begins.
    """
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        options = ["model.tokenizer.save_every=50", "model.var.save_every=50", *arguments]
        started = time.monotonic()
        code, said = Program(Path(folder, "whole"), *options).end(timeout=3600)
        assert code == 0, said
        seconds = time.monotonic() - started
        expected = left_by(Path(folder, "whole", "run"))
        done, places, codes, runs, differing = 0, Counter(), Counter(), 0, []
        while done < count:
            place = Path(folder, f"run_{runs}")
            code = None
            while code != 0:
                program = Program(place, *options)
                if done == count:
                    code, said = program.end(timeout=3600)
                else:
                    number = draw.choice(SIGNALS)
                    where, code, said = program.strike(number, draw.uniform(1, seconds / 5))
                    if code != 0:
                        done += 1
                        places[where] += 1
                        codes[f"{number.name}: {code}"] += 1
                        print(f"{done}/{count}: {number.name} in {where}, exit {code}", flush=True)
                if code not in (0, 85, -9):
                    differing.append(f"kill {done}: exit {code}: {said[-500:]}")
                    break
            if code == 0:
                found = left_by(place / "run")
                differing += [key for key in expected if found.get(key) != expected[key]]
            runs += 1
    return {
        "kills": done,
        "jobs": runs,
        "seconds_of_a_whole_job": round(seconds),
        "where": dict(places.most_common()),
        "exit_codes": dict(codes.most_common()),
        "different": differing,
    }


def left_by(run_dir: Path) -> dict[str, object]:
    """What a job leaves that must not depend on how often it was stopped."""
    left = {}
    for stage in STAGES:
        for name, tensor in weights(run_dir, stage).items():
            left[f"{stage} {name}"] = tensor.numpy().tobytes()
        left[f"{stage} log"] = csv_rows(run_dir, stage)
    figures = json.loads((run_dir / "metrics.json").read_text())
    left |= {k: v for k, v in figures.items() if not k.endswith("/seconds")}
    left |= {path.name: path.read_bytes() for path in (run_dir / "samples").glob("*.png")}
    return left


# -- damage -----------------------------------------------------------------------------------


def damage(count: int, seed: int) -> dict:
    """Damage the newest checkpoint of small stages, and go on."""
    draw, kinds, undetected, differing = random.Random(seed), Counter(), [], []
    source = Digits()
    source.prepare()
    source.setup()
    with tempfile.TemporaryDirectory() as folder:
        whole, stopped = Path(folder, "whole"), Path(folder, "stopped")
        for stage in STAGES:
            quietly(stage, source, whole)
            quietly(stage, source, stopped, Interrupt(7), save_every=1)
        for trial in range(count):
            stage, place = STAGES[trial % 2], Path(folder, "trial")
            shutil.copytree(stopped / stage, place / stage)
            kind = spoil(place / stage / LAST, draw)
            kinds[kind] += 1
            said = quietly(stage, source, place)
            if not re.search(rf"damaged.*going on from .*{PREVIOUS}", said):
                undetected.append(f"{trial}: {kind}")
            ours, theirs = weights(place, stage), weights(whole, stage)
            if any(not ours[name].equal(theirs[name]) for name in theirs):
                differing.append(f"{trial}: {kind}")
            shutil.rmtree(place)
            print(f"{trial + 1}/{count}: {kind}", flush=True)
    return {
        "damaged": count,
        "kinds": dict(kinds),
        "undetected": undetected,
        "different": differing,
    }


def quietly(*arguments, **options) -> str:
    """Run a stage; what it said of checkpoints."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        run(*arguments, **options)
    return said.getvalue()


# -- memory -----------------------------------------------------------------------------------


def memory(steps: int, arguments: list[str]) -> dict:
    """Resident size of both stages, a tenth of the way and at the end."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        lengths = [f"model.{stage}.num_batches={steps}" for stage in STAGES]
        program = Program(Path(folder), *lengths, *arguments)
        for stage in STAGES:
            for batch in (steps // 10, steps):
                program.wait_for(f"^{stage}: batch {batch}/{steps},")
                found[f"{stage}_mb_at_{batch}"] = round(program.resident_bytes() / 1e6, 1)
            found[f"{stage}_ratio"] = round(
                found[f"{stage}_mb_at_{steps}"] / found[f"{stage}_mb_at_{steps // 10}"], 3
            )
        program.process.kill()
        program.end()
    different = [k for k, v in found.items() if k.endswith("ratio") and v > 1.05]
    return {"steps": steps, **found, "different": different}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["kills", "damage", "memory"])
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("arguments", nargs="*", help="of train.py")
    chosen = parser.parse_args()
    measured = {
        "kills": lambda: kills(chosen.count or 50, chosen.seed, chosen.arguments),
        "damage": lambda: damage(chosen.count or 200, chosen.seed),
        "memory": lambda: memory(chosen.count or 5000, chosen.arguments),
    }[chosen.what]()
    result = machine() | {"date": time.strftime("%F"), "seed": chosen.seed} | measured
    path = ROOT / "benchmarks" / "results" / f"reliability_{chosen.what}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(measured, indent=2))
    sys.exit(bool(measured["different"] or measured.get("undetected")))


if __name__ == "__main__":
    main()
