"""Figures of a set: those of its images, each looked at once, against a reference that fits."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.command import run
from helpers.feature_networks import JudgingProjection
from helpers.sample_sets import SCORED, Killed, count_calls, draw, left_in, make_set, tiny_sampler
from var_exp.evaluation import Features, extraction, scores
from var_exp.evaluation import sampler as sampling
from var_exp.evaluation.networks.classifier import train_or_load
from var_exp.evaluation.reference import reference_of, save_reference
from var_exp.evaluation.reference_file import Reference
from var_exp.evaluation.samples.sample_set import draw_missing
from var_exp.evaluation.scorer import RealImages, SampleScorer
from var_exp.experiment.sample import beside_expected
from var_exp.io.parts import Parts
from var_exp.sampling.generate import Samples
from var_exp.visualization.images import to_uint8

FINAL = [*SCORED[:-1], "evaluation.num_samples_per_scale=0"]


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    """The folder of a scored set; to be read, not written."""
    folder = tmp_path_factory.mktemp("whole")
    draw(trained, folder, *SCORED)
    return folder


def figures(folder):
    content = json.loads((folder / "metrics.json").read_text())
    return {k.removeprefix("sample/"): v for k, v in content.items() if k != "protocol"}


# -- the figures -----------------------------------------------------------------------------


def tiny_scorer(tokenizer):
    network = JudgingProjection((10, 10))
    real = network(torch.rand(40, 3, 10, 10)).features
    mu, sigma = extraction.statistics_of(real)
    reference = Reference(mu, sigma, len(real), real, None, {})
    classifier = ("bright", lambda images: (images.mean(dim=(1, 2, 3)) > 0).long())
    return SampleScorer(network, reference, tokenizer.schedule, classifier)


@pytest.mark.parametrize("kind", [{}, {"png": False, "npz": False}], ids=str)
def test_figures_through_a_set_are_those_of_the_scorer_fed_directly(kind, tmp_path):
    sampler = tiny_sampler()
    scorer = tiny_scorer(sampler.tokenizer)
    samples = make_set(tmp_path, sampler, 30, **kind, scores={"a": 1}, num_per_scale=12)
    samples.begin()
    draw_missing(samples, samples.missing(), sampler, scorer, 0, 1)
    for ids, features in samples.features():
        scorer.update(ids, features)
    found = scorer.compute()

    scorer.reset()
    drawn, labels = sampler.sample_batch(range(30)), torch.tensor(samples.labels)
    rounded = to_uint8(drawn.images) / 255
    for part, per_scale in ((slice(12), True), (slice(12, 30), False)):
        some = Samples(rounded[part], [codes[part] for codes in drawn.indices])
        features = scorer.extract_features(sampler.tokenizer, some, labels[part], per_scale)
        scorer.update(torch.arange(30)[part], features)
    assert found == pytest.approx(scorer.compute(), rel=1e-6)
    assert {"fid_projection_scale_1", "recall_projection", "class_accuracy_bright"} < set(found)


def test_figures_of_the_program_are_those_of_its_png_files(whole, trained, digits):
    network = train_or_load(trained / "evaluation" / "classifier.pt", digits)
    paths = sorted(whole.glob("0*.png"))
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths]))
    found = network(pixels.unsqueeze(1))
    reference = reference_of(network, digits, "train")
    expected = scores(Features(found.features, found.logits), reference, "classifier")
    labels = torch.arange(40) % 10
    expected["class_accuracy_classifier"] = (found.logits.argmax(1) == labels).float().mean().item()
    ours = {key: value for key, value in figures(whole).items() if key in expected}
    assert ours == pytest.approx(expected, rel=1e-5)
    assert {"neighbour_ratio_classifier", "fid_classifier_scale_1"} < set(figures(whole))


# -- looked at once --------------------------------------------------------------------------


def numbers_drawn(calls):
    """Of samples for the set, without the eight of the strip."""
    return sum(len(labels) for _, _, labels in calls) - 8


@pytest.mark.parametrize(("options", "drawn"), [(SCORED, 24), (FINAL, 8)])
def test_an_evaluation_broken_off_half_way_draws_and_sees_only_the_rest(
    options, drawn, trained, tmp_path, monkeypatch
):
    """What is scored after each scale needs its token maps, of which files hold none."""
    real = Parts.write

    def write(parts, name, save):
        if name == "000016-000032.npz":
            raise Killed
        real(parts, name, save)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Parts, "write", write)
        draw(trained, tmp_path, *options)
    calls = count_calls(monkeypatch, sampling, "iterate_samples")
    seen = count_calls(monkeypatch, SampleScorer, "extract_features")
    draw(trained, tmp_path, *options)
    assert numbers_drawn(calls) == drawn
    assert [len(labels) for *_, labels, _ in seen] == [16, 8]


def test_a_second_evaluation_neither_draws_nor_sees_nor_reads_the_reference(
    whole, trained, tmp_path, monkeypatch
):
    before = left_in(whole)
    drawn = count_calls(monkeypatch, sampling, "iterate_samples")
    seen = count_calls(monkeypatch, SampleScorer, "extract_features")
    read = count_calls(monkeypatch, torch.nn.Module, "__call__")
    assert draw(trained, whole, *SCORED) == before
    assert drawn == seen == read == []


def test_scores_of_a_finished_set_see_its_files_and_draw_only_what_scales_need(
    whole, trained, tmp_path, monkeypatch
):
    draw(trained, tmp_path, *[option for option in SCORED if "evalua" not in option])
    drawn = count_calls(monkeypatch, sampling, "iterate_samples")
    assert draw(trained, tmp_path, *SCORED) == left_in(whole)
    assert numbers_drawn(drawn) + 8 == 32  # the first 20, in batches of 16; the strip is there


def test_other_settings_of_the_scores_measure_anew_and_draw_nothing(trained, tmp_path, monkeypatch):
    draw(trained, tmp_path, *FINAL)
    first, drawn = figures(tmp_path), count_calls(monkeypatch, sampling, "iterate_samples")
    draw(trained, tmp_path, *FINAL, "evaluation.scores.num_neighbours=20")
    second = figures(tmp_path)
    assert drawn == [] and first.keys() == second.keys()
    assert first["precision_classifier"] < second["precision_classifier"]
    assert first["fid_classifier"] == second["fid_classifier"]


def test_figures_of_other_stages_stay(trained, tmp_path):
    others = {"var/loss": 3.9, "protocol": {"var": {"seed": 7}}}
    (tmp_path / "metrics.json").write_text(json.dumps(others))
    draw(trained, tmp_path, *FINAL)
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert content["var/loss"] == 3.9 and content["protocol"]["var"] == {"seed": 7}
    assert content["protocol"]["sample"]["images"]["number"] == 40
    assert content["sample/fid_classifier"] > 0


# -- beside what is expected -----------------------------------------------------------------

BANDS = {"d16": {"fid": [3.3, 3.55], "recall": [0.5, 0.52]}, "d20": None}
REQUIRED = {"cfg_scale": 1.5, "num_samples": 50_000}


@pytest.mark.parametrize(
    ("model", "given", "words"),
    [
        ("d16", {}, {"fid": "3.412  (expected 3.3 to 3.55)", "kid": "0.001"}),
        ("d20", {}, {"fid": "3.412", "kid": "0.001", "expected": "no figures are known of d20"}),
        ("d9", {}, {"fid": "3.412", "kid": "0.001", "expected": "no figures are known of d9"}),
        (
            "d16",
            {"cfg_scale": 2.0, "num_samples": 100},
            {
                "fid": "3.412",
                "kid": "0.001",
                "expected": "not shown, since it holds for others: cfg_scale=2.0 in place of 1.5, "
                "num_samples=100 in place of 50000",
            },
        ),
    ],
)
def test_a_band_stands_beside_a_figure_where_the_protocol_is_its_own(model, given, words):
    figures = {"fid": 3.4123, "kid": 0.001}
    assert beside_expected(figures, BANDS, model, REQUIRED | given, REQUIRED) == words
    assert beside_expected(figures, {}, model, given | REQUIRED, REQUIRED) == {
        "fid": "3.412",
        "kid": "0.001",
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "(expected 0 to 1e+06)"),
        (["cfg_scale=2"], "not shown, since it holds for others: cfg_scale=2 in place of 1.5"),
        (["classes=[1,2]"], "classes=[1, 2] in place of all"),
        (["num_samples=32"], "num_samples=32 in place of 40"),
    ],
)
def test_the_program_shows_the_band_under_its_protocol_alone(options, said, trained, tmp_path):
    bands = ["evaluation.num_samples=40", "+evaluation.expected.d1.fid_classifier=[0,1000000]"]
    given = [o for o in FINAL if "num_samples=" not in o]
    folders = [f"ckpt={trained}", f"out_dir={tmp_path}/out", f"runs_dir={tmp_path}"]
    done = run("sample", *folders, *given, *bands, *options)
    assert done.code == 0 and said in done.out, done.err
    assert ("(expected" in done.out) == (not options)


# -- refused before anything is drawn --------------------------------------------------------


def write_statistics(path, trained, digits):
    np.savez(path, mu=np.zeros(5), sigma=np.eye(5))


def write_small_images(path, trained, digits):
    np.savez(path, np.zeros((20, 8, 8, 1), np.uint8))


def write_one_image(path, trained, digits):
    np.savez(path, np.zeros((1, 16, 16, 1), np.uint8))


def write_ours(**about):
    def write(path, trained, digits):
        network = train_or_load(trained / "evaluation" / "classifier.pt", digits)
        reference = reference_of(network, digits, "val", 20)
        save_reference(reference._replace(about=reference.about | about), path)

    return write


@pytest.mark.parametrize(
    ("write", "options", "said"),
    [
        (write_statistics, [], ["mu (5,)", "64 features", "another network", "evaluation.ref"]),
        (write_small_images, [], ["(8, 8), expected (16, 16)", "evaluation.reference"]),
        (write_one_image, [], ["at least 2 reference images, got 1 of reference.npz"]),
        (write_ours(network="inception"), [], ["network = inception, expected classifier"]),
        (write_ours(crop="adm"), [], ["crop = adm, expected None"]),
        (write_ours(image_size=[8, 8]), [], ["image_size = [8, 8], expected [16, 16]"]),
        (None, ["evaluation.reference=none.npz"], ["none.npz is missing"]),
        (None, ["evaluation.num_reference=1"], ["num_reference: expected a number >= 2"]),
        (None, ["evaluation.num_reference=0"], ["num_reference: expected a number >= 2"]),
        (None, ["num_samples=3"], ["whole number >= 4", "num_neighbours", "got 3"]),
        (None, ["evaluation.scores.num_neighbours=40"], [">= 41", "num_neighbours", "got 40"]),
        (None, ["evaluation.scores.kid_subsets=-1"], ["evaluation.scores.kid_subsets", "-1"]),
        (None, ["evaluation.num_samples_per_scale=1"], ["expected 0 or a number >= 2, got 1"]),
        (None, ["evaluation.num_samples_per_scale=many"], ["num_samples_per_scale", "'many'"]),
        (None, ["evaluation=inception", "evaluation.weights=none.pth"], ["none.pth"]),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_drawn(
    write, options, said, trained, digits, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    if write:
        write(tmp_path / "reference.npz", trained, digits)
        options = ["evaluation.reference=reference.npz"]
    drawn = count_calls(monkeypatch, sampling, "iterate_samples")
    done = run("sample", f"ckpt={trained}", "out_dir=out", *SCORED, *options)
    (line,) = done.err.splitlines()
    assert done.code == 1 and line.startswith("error: ")
    assert all(words in line for words in said), line
    assert drawn == [] and not (tmp_path / "out").exists()


def test_a_portable_folder_needs_a_reference_to_be_scored_against(trained, tmp_path):
    options = ["num_samples=0", f"export={tmp_path}/pair", f"out_dir={tmp_path}/none"]
    assert run("sample", f"ckpt={trained}", *options).code == 0
    done = run("sample", f"ckpt={tmp_path}/pair", f"out_dir={tmp_path}/scored", *SCORED)
    assert done.code == 1
    assert "evaluation.reference" in done.errors[0] and "is in no run folder" in done.errors[0]
    assert not (tmp_path / "scored").exists()


def test_images_of_another_size_than_the_models_are_refused(digits):
    sampler = tiny_sampler()
    with pytest.raises(ValueError, match=r"digits are of \(16, 16\) .* of the model of \(10, 10\)"):
        RealImages(JudgingProjection((10, 10)), digits, sampler.tokenizer.image_size)
