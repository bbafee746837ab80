"""The view of a W&B workspace has no dead panel, says what it would save without a network, and
says what to do where it cannot be saved."""

import csv
import re
import runpy
import sys

import pytest
import wandb
import wandb_workspaces.workspaces as ws

from var_exp.training.loggers import wandb_workspace as wandb_view
from var_exp.training.loggers.wandb_workspace import (
    SECTIONS,
    Chart,
    Pictures,
    describe,
    main,
    make_view,
)


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """Not logged in, and no network would answer."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    wandb.teardown()
    yield
    wandb.teardown()


def logged(run_dir, stage):
    """The names of the scalars and pictures that a stage logged."""
    with open(run_dir / "csv" / stage / "metrics.csv", newline="") as file:
        scalars = set(next(csv.reader(file)))
    pictures = {path.stem.rpartition("_")[0] for path in (run_dir / stage / "pictures").iterdir()}
    return scalars, {f"val/{name}" for name in pictures}


def test_every_panel_shows_something_that_one_of_the_stages_logs(trained):
    scalars, pictures = map(set.union, logged(trained, "tokenizer"), logged(trained, "var"))
    panels = [panel for section in SECTIONS.values() for panel in section]
    charts = [panel for panel in panels if isinstance(panel, Chart)]
    named = {name for chart in charts for name in chart.metrics}
    assert named and named <= scalars
    dead = [c for c in charts if c.pattern and not any(re.search(c.pattern, s) for s in scalars)]
    assert not dead
    assert {panel.key for panel in panels if isinstance(panel, Pictures)} <= pictures


def test_the_step_is_one_that_the_wandb_logger_writes(trained):
    files = list((trained / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    assert all(wandb_view.STEP.encode() in path.read_bytes() for path in files)


def test_each_scale_has_its_line(trained):
    """Whatever the schedule: those of this run are 1, 2, 3, 4."""
    scalars = set.union(*(logged(trained, stage)[0] for stage in ("tokenizer", "var")))
    for section, title in (
        ("Transformer", "Validation cross-entropy (nats), at each scale"),
        ("Transformer", "Token accuracy (share), at each scale"),
        ("Tokenizer", "Codebook usage (share), at each scale"),
        ("Tokenizer", "Codebook perplexity, at each scale"),
    ):
        (chart,) = [panel for panel in SECTIONS[section] if panel.title == title]
        found = sorted(name for name in scalars if re.search(chart.pattern, name))
        assert [name.rpartition("_")[2] for name in found] == ["1", "2", "3", "4"]


def test_what_is_saved_is_what_is_described():
    spec = make_view("me", "project")._spec["spec"]["section"]
    assert spec["settings"]["xAxis"] == "trainer/global_step"
    sections = spec["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == list(SECTIONS)
    lines = []
    for section in sections:
        lines.append(section["name"])
        for panel in section["panels"]:
            config = panel["config"]
            if panel["viewType"] == "Media Browser":
                shown = config["mediaKeys"]
            else:
                assert config["xAxis"] == "trainer/global_step"
                shown = config["metrics"] or [config["metricRegex"]]
            lines.append(f"  {config['chartTitle']}: {', '.join(shown)}")
    assert "\n".join(lines) == describe()


def test_a_dry_run_needs_neither_network_nor_login_nor_the_package(nowhere, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.setattr(sys, "argv", ["wandb_view", "me/project", "--dry-run"])
    monkeypatch.delitem(sys.modules, "var_exp.training.loggers.wandb_workspace")
    runpy.run_module("var_exp.training.loggers.wandb_workspace", run_name="__main__")
    assert capsys.readouterr().out == describe() + "\n"


def test_the_view_is_saved_where_it_was_asked_for(monkeypatch):
    def save(view):
        assert (view.entity, view.project) == ("me", "project")
        view._internal_name = "nw-x-v"
        return view

    monkeypatch.setattr(ws.Workspace, "save", save)
    monkeypatch.setattr(ws.Workspace, "url", property(lambda view: f"there/{view._internal_name}"))
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    assert main(["me/project"]) == "there/nw-x-v"


def test_who_is_not_logged_in_is_told_to(nowhere):
    with pytest.raises(ValueError, match="type: wandb login"):
        main(["me/project"])


def test_without_the_package_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(wandb_view.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'var-exp\[view\]'"):
        main(["me/project"])


def test_what_wandb_refuses_is_one_line(monkeypatch):
    def save(view):
        raise wandb.errors.CommError("permission\n denied")

    monkeypatch.setattr(ws.Workspace, "save", save)
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    with pytest.raises(ValueError, match=r"in me/project \(permission denied\)"):
        main(["me/project"])


@pytest.mark.parametrize("project", ["project", "/project", "me/", "me/project/run"])
def test_a_project_without_its_owner_is_refused(project):
    with pytest.raises(ValueError, match="expected ENTITY/PROJECT"):
        main([project, "--dry-run"])
