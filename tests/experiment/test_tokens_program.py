"""The programs with a token cache: whose codes are used, made and deleted, and what is refused."""

import json
import shutil

from helpers.command import QUICK, files, run


def test_codes_of_another_run_are_used_where_they_fit_and_never_deleted(trained, tmp_path):
    kept = files(trained / "tokens")
    shutil.copytree(trained / "tokens", tmp_path / "codes")
    options = [f"tokenizer_ckpt={trained}", f"tokens.dir={tmp_path}/codes", *QUICK]
    options += [f"runs_dir={tmp_path}", f"run_dir={tmp_path}/run", "resume=never"]
    done = run("train", "stages=[tokens,var]", *options)
    assert done.code == 0 and "encoding" not in done.err, done.err
    assert files(tmp_path / "codes") == kept and not (tmp_path / "run" / "tokens").exists()
    (line,) = run("train", "stages=[tokenizer,tokens,var]", *options[1:], "seed=1").errors
    assert f"'{tmp_path}/codes' holds other codes: tokenizer " in line


def test_codes_alone_are_made_for_a_run_to_come(trained, tmp_path):
    options = [f"tokenizer_ckpt={trained}", *QUICK, f"runs_dir={tmp_path}"]
    done = run("train", "stages=[tokens]", f"run_dir={tmp_path}/run", *options)
    assert done.code == 0, done.err
    assert "encoding 1,797 images (1,437 to train on, 360 to validate): 115.0 kB in" in done.err
    assert files(tmp_path / "run" / "tokens") == files(trained / "tokens")
    assert json.loads((tmp_path / "run/tokens/tokens.json").read_text())["key"]["num_val"] == 360


def test_begun_anew_the_codes_of_the_run_are_made_anew(copied, tmp_path):
    before = files(copied / "tokens")
    options = [f"run_dir={copied}", f"runs_dir={tmp_path}", "resume=never", *QUICK]
    done = run("train", *options, "model.tokenizer.num_batches=3")
    assert done.code == 0, done.err
    after = files(copied / "tokens")
    assert after.keys() == before.keys() and after["tokens.json"] != before["tokens.json"]


def test_mistakes_are_named_before_anything_is_trained(trained, tmp_path):
    options = [f"run_dir={tmp_path}/run", f"runs_dir={tmp_path}", *QUICK]
    for wrong, said in [
        (["tokens.views=0"], "tokens.views"),
        (["tokens.batch_size=0"], "tokens.batch_size"),
        (["model.var.self_correction_prob=0.1"], "model.var.self_correction_prob=0.1"),
        (["stages=[var,tokens]"], "stages: expected [tokenizer,tokens,var]"),
        (["stages=[tokens]", "objective=var/loss", f"tokenizer_ckpt={trained}"], "objective"),
        (["tokens.dir=/dev/null/x"], "tokens"),
    ]:
        (line,) = run("train", *options, *wrong).errors
        assert said in line
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_with_other_views(tmp_path):
    images = ["data=shapes", "data.num_train=16", "data.num_val=8", "tokenizer.encoder.width=8"]
    options = [*images, *QUICK, f"run_dir={tmp_path}/run", f"runs_dir={tmp_path}"]
    assert run("train", *options).code == 0
    assert len(list((tmp_path / "run" / "tokens").glob("train-*"))) == 4  # of four epochs
    for other in (["tokens.views=2"], ["tokens.views=2", "tokens.dir=elsewhere"]):
        (line,) = run("train", *options, *other).errors
        assert "tokens.views all, now it is 2" in line
    assert run("train", *options, "stages=[var]").code == 0  # the same images
