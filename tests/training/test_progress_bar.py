"""Progress off a terminal is plain lines, on it a bar; both tell the loss of the batch."""

import gc
import re
import sys

import pytest

from helpers.stages import NUM_BATCHES, Interrupt, run

STAGES = pytest.mark.parametrize("stage", ["tokenizer", "var"])


@STAGES
def test_off_a_terminal_a_line_tells_batch_and_loss(stage, digits, tmp_path, capsys):
    _, losses = run(stage, digits, tmp_path)
    told = capsys.readouterr().err.splitlines()
    expected = [f"{stage}: batch {b}/{NUM_BATCHES}, loss {x:.4g}" for b, x in losses.items()]
    assert [", ".join(line.split(", ")[:2]) for line in told] == expected
    assert told[-1].endswith("0 s left")


@STAGES
def test_on_a_terminal_the_bar_tells_the_loss_and_goes_on_where_the_run_does(
    stage, digits, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run(stage, digits, tmp_path, Interrupt(5))
    capsys.readouterr()
    _, losses = run(stage, digits, tmp_path)
    gc.collect()  # the bars of the interrupted run, which must say nothing more
    # Where a validation's bar stands below, the cursor is moved before the line.
    shown = re.split(r"[\r\n]+", re.sub(r"\x1b\[\w", "", capsys.readouterr().out))
    (*_, last) = [line for line in shown if line.startswith(f"{stage}:")]
    assert f" {NUM_BATCHES}/{NUM_BATCHES} " in last
    (loss,) = re.findall(r"loss=([\d.]+)", last)
    assert float(loss) == pytest.approx(losses[NUM_BATCHES], rel=5e-3)
