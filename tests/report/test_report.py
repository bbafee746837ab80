"""The report of a run, and of runs side by side: what stands there, and what never may."""

import html
import io
import json
import os
import re
import runpy
import shutil
import sys
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.run_folders import CONFIG, FIGURES, make_run, protocol, save, write
from var_exp.report import write_comparison, write_report
from var_exp.report.__main__ import main
from var_exp.report.charts import Chart, Line, draw, short, thin
from var_exp.report.run import curves, read_run
from var_exp.report.verdict import few_images, verdict_of
from var_exp.visualization.metrics import describe, duration, show


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "digits" / "first")


def words(page: Path) -> str:
    """What a reader sees of a page: its text, without tags and in single spaces."""
    text = re.sub(r"<style>.*?</style>|<[^>]+>", " ", page.read_text(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(text))


# -- one run ------------------------------------------------------------------------------


def test_the_page_says_what_was_run_what_came_out_and_how_it_was_measured(run):
    path = write_report(run)
    text = words(path)
    assert path == run / "report.html"
    for part in ("digits/first", "train.py data=digits", "2026-11-24 19:30", "abc123def456"):
        assert part in text
    for part in ("AMD EPYC, 2 cores", "Python 3.11.9, torch 2.14.1", "seed=7"):
        assert part in text
    assert (
        "Finished: 500 samples, FID 1.25 in classifier features, classifier accuracy 100 %; "
        "validation loss 3.946 nats, inside the expected 3.9 to 4." in text
    )
    assert "FID, classifier features" in text and "PSNR" in text and "29.75 dB" in text
    assert "51ab34ff" in text and "cfg scale 1.5" in text  # the protocol
    assert "cfg_scale: 1.5" in text  # the configuration


def test_a_figure_outside_its_band_makes_the_verdict_a_miss(tmp_path):
    missed = verdict_of(read_run(make_run(tmp_path, {"var/loss": 4.2})))
    assert missed.state == "missed"
    assert "4.200\u202fnats, above the expected 3.9 to 4." in missed.line
    assert verdict_of(read_run(make_run(tmp_path))).state == "reached"


def test_the_table_of_scales_has_a_row_for_each_with_its_tokens_and_figures(run):
    text = words(write_report(run))
    assert "Scale Tokens Cross-entropy, nats FID after it, classifier features" in text
    assert "4×4 16 4.100 1.88 94" in text


def test_a_run_in_training_says_how_far_it_is_and_shows_its_newest_pictures(run):
    (run / "metrics.json").write_text(json.dumps({"tokenizer/psnr": 29.75}))
    shutil.rmtree(run / "samples")
    for batch in (20, 40):
        save(run / "var" / "pictures" / f"samples_{batch:06d}.png", np.zeros((9, 9, 3), np.uint8))
    text = words(write_report(run))
    assert "Running: transformer, all 60 batches trained, not yet measured." in text
    assert "a row for each class; after batch 40" in text
    lines = (run / "csv" / "var" / "metrics.csv").read_text().splitlines(keepends=True)
    (run / "csv" / "var" / "metrics.csv").write_text("".join(lines[:5]))
    assert "Running: transformer, batch 20 of 60 (logged" in words(write_report(run))


def test_whatever_is_missing_is_left_out(run):
    files = [path for path in sorted(run.rglob("*")) if path.is_file()]
    assert len(files) > 9
    for path in files:
        kept = path.read_bytes()
        path.unlink()
        assert "</html>" in write_report(run).read_text(), path
        path.write_bytes(kept)


def test_an_empty_folder_gets_a_page_that_says_so(tmp_path):
    text = words(write_report(tmp_path))
    assert "Nothing was recorded here yet." in text
    assert "No samples yet." in text and "No scores yet." in text


def test_whatever_is_cut_short_or_overwritten_is_left_out(run):
    whole = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for path, kept in whole.items():
        path.write_bytes(kept[: len(kept) // 2])
        assert "</html>" in write_report(run).read_text(), path
        path.write_bytes(kept)
    for rubbish in (b"", b"\x00\xff not what it was\n", b"[1, 2]\n"):
        for path in whole:
            path.write_bytes(rubbish)
        assert "No samples yet." in words(write_report(run))


def test_values_of_an_unexpected_form_are_left_out(run):
    odd = {"var/loss": float("nan"), "var/fid_classifier_scale_4": float("inf"), "loose": 1.0}
    odd |= {"var/text": "no number", "protocol": {"var": [1, {"a": None}], "tokenizer": "text"}}
    (run / "metrics.json").write_text(json.dumps(odd))
    (run / "environment.json").write_text('{"versions": [1], "date": {"a": 1}}')
    for line in ("scales: 3", "scales: {patch_nums: [[1, 2, 3], x]}", "expected: [1]", "model: 1"):
        (run / ".hydra" / "config.yaml").write_text(f"stages: var\n{line}\n")
        assert "not a number" in words(write_report(run))


def test_names_that_look_like_markup_are_shown_as_they_are(run):
    hostile = '<script>alert("1")</script>'
    write(run / ".hydra" / "overrides.yaml", json.dumps([f"data.root={hostile}"]))
    figures = FIGURES | {f"var/{hostile}": 1.0, "protocol": {"var": {hostile: {hostile: hostile}}}}
    write(run / "metrics.json", json.dumps(figures))
    write(run / "environment.json", json.dumps({"command": hostile}))
    write(run / "csv" / "var" / "metrics.csv", "step,val/<script>\n0,1\n1,2\n")
    np.savez(
        run / "samples" / "steps.npz",
        arr_0=np.zeros((3, 1, 8, 8, 1), np.uint8),
        names=['"><script>'],
    )
    for page in (write_report(run), write_comparison([run, make_run(run / "b")], run / "c.html")):
        source = page.read_text()
        assert "<script" not in source.lower()
        assert "&lt;script&gt;" in source


def test_names_that_are_not_utf8_are_written_with_a_question_mark(tmp_path):
    """Python keeps a byte of another encoding, as in a folder `caf\\xe9`, as half a character."""
    name = os.fsdecode(b"caf\xe9")
    run = make_run(tmp_path / name, {f"var/{name}": 1.0})
    write(run / "environment.json", json.dumps({"command": f"train.py data.root={name}"}))
    write(run / ".hydra" / "overrides.yaml", json.dumps([f"data.root=/{name}"]))
    write(run / ".hydra" / "config.yaml", CONFIG + f"comment: {json.dumps(name)}\n")
    steps = np.zeros((3, 2, 8, 8, 1), np.uint8)
    np.savez(run / "samples" / "steps.npz", arr_0=steps, names=[name, "\ud800"])
    for page in (write_report(run), write_comparison([run, make_run(run / "b")], run / "c.html")):
        text = words(page)
        assert text.count(f"{tmp_path.name}/caf?") >= 1 and "var/caf?" in text
        assert "caf?, ?: the image after each of 3 scales" in page.read_text()
    assert "train.py data.root=caf?" in words(run / "report.html")


def test_the_page_is_one_file_that_asks_for_nothing(run):
    page = write_report(run).read_text()
    assert not re.search(r"https?://(?!www\.w3\.org/)", page)
    assert not re.search(r'(?:src|srcset|href)="(?!data:|#)', page)
    assert "default-src 'none'" in page
    assert len(page) < 3e6


def test_ids_are_unique_over_all_charts_and_every_reference_has_its_target(run):
    page = write_report(run).read_text()
    ids = re.findall(r' id="([^"]+)"', page)
    assert page.count("<svg") >= 5 and len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#|labelledby=")([\w-]+)', page)) <= set(ids)


def test_a_report_that_cannot_be_finished_leaves_the_one_before(run, monkeypatch):
    before = write_report(run).read_text()

    def write_half(path, text, **_):
        path.write_bytes(text.encode()[: len(text) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="No space left"):
        write_report(run)
    assert (run / "report.html").read_text() == before
    assert [path.name for path in run.glob(".report*")] == []


def test_the_animation_shows_each_scale_in_turn_and_stands_still_for_who_wants_that(run):
    page = write_report(run).read_text()
    still, moving = re.search(
        r'srcset="data:image/webp;base64,([^"]+)">\s*<img src="data:image/webp;base64,([^"]+)"',
        page,
    ).groups()
    frames = Image.open(io.BytesIO(b64decode(moving)))
    assert frames.n_frames == 3
    frames.seek(2)
    last = Image.open(io.BytesIO(b64decode(still)))
    assert getattr(last, "n_frames", 1) == 1
    assert np.array_equal(np.asarray(last.convert("RGBA")), np.asarray(frames.convert("RGBA")))


def test_large_pictures_are_shrunk(run):
    noise = np.random.default_rng(0).integers(0, 256, (700, 2000, 3), np.uint8)
    save(run / "samples" / "grid.png", noise)
    assert (run / "samples" / "grid.png").stat().st_size > 4e6
    assert write_report(run).stat().st_size < 3e6


# -- parts --------------------------------------------------------------------------------


def test_curves_count_batches_from_one_and_the_later_row_of_a_step_wins():
    found = curves("step,val/loss,train/lr\n9,,0.1\n9,5.0,\n19,4.0,0.2\n19,3.0,\n9,4.5,\n")
    assert found == {"val/loss": [(10, 4.5), (20, 3.0)], "train/lr": [(10, 0.1), (20, 0.2)]}


def test_a_last_line_that_is_being_written_is_not_read():
    assert curves("step,val/loss\n9,3.9\n19,3.8946")["val/loss"] == [(10, 3.9)]
    assert curves("step,val/loss\n9,nan\n19,oops\nx,1\n1,2,3\n29,2\n") == {"val/loss": [(30, 2.0)]}
    assert curves("") == curves("step") == {}


def test_a_long_curve_is_thinned_to_means_that_keep_its_end():
    curve = [(i, float(i % 2)) for i in range(1, 1001)]
    short_one = thin(curve, 100)
    assert len(short_one) == 100 and short_one[-1] == (1000, 0.5)
    assert thin(curve[:100], 100) == curve[:100]


def test_a_chart_takes_its_colours_from_the_page_and_says_what_it_shows():
    svg = draw(Chart('A "chart"', [Line("x<y", [(1, 2.0), (9, 3.0)])], bands=[(1, 2)]), "c").svg
    assert "var(--accent)" in svg and "var(--band)" in svg and "var(--muted)" in svg
    assert 'aria-label="A &#34;chart&#34; over the batch: x&lt;y from 2 to 3"' in svg
    assert not re.search(r"(?:fill|stroke): #", svg)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234.5, "1234"),
        (15000, "15k"),
        (2e6, "2M"),
        (-0.5, "\u22120.5"),
        (6e-5, "6e\u22125"),
    ],
)
def test_axes_carry_short_numbers(value, text):
    assert short(value) == text


@pytest.mark.parametrize(
    ("key", "value", "label", "text"),
    [
        ("fid_inception", 3.3, "FID, Inception", "3.30"),
        ("rfid_inception_adm", 0.9, "rFID, Inception, crop adm", "0.900"),
        ("fid_classifier_scale_4", 120.0, "FID, classifier features, after 4×4", "120.0"),
        ("fid_dinov2_raw", 12.345, "FID, DINOv2 features, raw weights", "12.35"),
        ("class_accuracy_pixels", 0.996, "Classifier accuracy, pixels", "99.6\u202f%"),
        ("loss_scale_4x2", 3.8, "Cross-entropy, at 4×2", "3.800\u202fnats"),
        ("rkid_clip", 0.001, "KID of reconstructions, CLIP features", "0.00100"),
        ("recall_classifier", 0.5, "Recall, classifier features", "0.500"),
        ("psnr", 29.754, "PSNR", "29.75\u202fdB"),
        ("unheard_of", 1.5, "unheard of", "1.5"),
    ],
)
def test_metrics_are_named_in_words_with_network_and_unit(key, value, label, text):
    meaning = describe(key)
    assert (meaning.label, show(value, meaning)) == (label, text)


def test_durations_have_their_two_largest_units():
    spoken = [duration(s).replace("\u202f", " ") for s in (42, 95, 7260, 180_000)]
    assert spoken == ["42 s", "1 min 35 s", "2 h 1 min", "2 d 2 h"]


def test_a_score_of_fewer_images_than_features_is_labelled(run):
    metrics = FIGURES | {"protocol": {"var": protocol() | {"network": {"num_features": 2048}}}}
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert "500 for 2048 features" in few_images(read_run(run), "var", "fid_classifier")
    assert few_images(read_run(run), "var", "class_accuracy_classifier") == ""
    text = words(write_report(run))
    assert "few images: 500 for 2048 features" in text
    assert "FID 1.25 in classifier features (few images)" in text
    assert "few images" not in words(write_report(make_run(run)))


# -- runs side by side --------------------------------------------------------------------


def compared(tmp_path: Path, **second) -> str:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", **second)]
    return words(write_comparison(runs, tmp_path / "compare.html"))


def test_runs_that_were_measured_alike_are_compared_and_the_best_is_marked(tmp_path):
    figures = {"var/fid_classifier": 0.98, "tokenizer/psnr": 28.0, "var/loss": 3.9461}
    text = compared(tmp_path, figures=figures, seed=8)
    assert "do not compare" not in text and "does not compare" not in text
    assert "var/fid_classifier 1.25 0.980 best" in text
    assert "tokenizer/psnr 29.75 dB best 28.00 dB" in text
    assert "var/loss 3.946 nats 3.946 nats" in text  # alike as far as they are shown
    assert "The configurations agree." in text


def test_scores_with_different_protocols_carry_a_warning_and_no_best(tmp_path):
    text = compared(tmp_path, figures={"var/fid_classifier": 0.98, "var/loss": 3.9}, cfg_scale=3.0)
    assert (
        "Transformer: scores of images do not compare, their protocols differ (sampling.cfg_scale)."
        in text
    )
    assert "does not compare var/fid_classifier 1.25 0.980 Inception" in text
    assert "var/loss 3.946 nats 3.900 nats best" in text
    assert "Tokenizer: scores" not in text


def test_scores_without_a_protocol_carry_a_warning(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b")]
    (runs[1] / "metrics.json").write_text(json.dumps(FIGURES))
    text = words(write_comparison(runs, tmp_path / "compare.html"))
    assert "scores of images do not compare, their protocols differ (protocol)" in text
    assert "protocol recorded not recorded" in text


def test_losses_on_codes_of_different_tokenizers_carry_a_warning(tmp_path):
    config = CONFIG.replace("width: 32", "width: 64").replace("lr: 0.003", "lr: 0.001")
    text = compared(tmp_path, config=config, figures={"var/loss": 3.5})
    assert "metrics of tokens do not compare, the tokenizers differ (tokenizer.width)" in text
    assert "model.var.lr 0.003 0.001 tokenizer.width 32 64" in text
    assert "does not compare var/loss 3.946 nats 3.500 nats Token accuracy" in text


def test_metrics_of_different_images_do_not_compare(tmp_path):
    text = compared(tmp_path, config=CONFIG.replace("name: digits", "name: shapes"))
    assert "no metrics compare, the images differ (data.name)" in text


def test_a_young_run_stands_beside_a_finished_one(tmp_path, run):
    write(tmp_path / "young" / ".hydra" / "config.yaml", CONFIG)
    page = write_comparison([run, tmp_path / "young"], tmp_path / "compare.html")
    assert "Running: tokenizer, no batch logged yet." in words(page)


# -- the command --------------------------------------------------------------------------


def test_one_run_is_written_in_its_folder_and_several_where_out_says(run, tmp_path):
    assert main([str(run)]) == run / "report.html"
    other = make_run(tmp_path / "other")
    out = tmp_path / "pages" / "two.html"
    assert main([str(run), str(other), "--out", str(out)]) == out
    assert "2 runs side by side" in words(out)


def test_the_same_run_twice_is_refused(run):
    with pytest.raises(ValueError, match="different run folders"):
        main([str(run), f"{run}/"])


def test_a_path_that_is_no_run_folder_ends_in_one_line_and_exit_code_1(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["report", str(run), "no_such_run"])
    monkeypatch.delitem(sys.modules, "var_exp.report")
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("var_exp.report", run_name="__main__")
    assert stop.value.code == (  # a text goes to standard error, and the exit code is 1
        "error: report: expected run folders, with .hydra, metrics.json or csv in them, got "
        "'no_such_run'"
    )
    assert not Path("compare.html").exists()
