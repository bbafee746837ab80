"""What the documentation shows is true: commands compose or run, Python runs, keys, paths and links
exist, and the examples of CONTRIBUTING.md work."""

import importlib
import importlib.util
import re
import shlex

import pytest
from omegaconf import OmegaConf

import var_exp
from helpers.command import ROOT, composed, run
from helpers.documents import (
    CONTRIBUTING,
    DOCUMENTS,
    PAGES,
    README,
    arguments_of,
    blocks,
    commands,
    lacks_something,
    named_files,
    run_small,
    runs_of,
    words,
)
from var_exp.experiment.config.overrides import config_groups

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
SHOWN = [command for path in [CONTRIBUTING, *PAGES] for command in commands(path)]
COMPOSED = [found for path in PAGES for c in commands(path) if (found := arguments_of(c))]
OTHERS = ("pip install", "pytest", "ruff", ".ci/run", "pre-commit", "scancel", "python -m var_exp.")


# -- commands -----------------------------------------------------------------------------


def test_every_command_is_one_of_ours_or_a_well_known_tool():
    assert not [c for c in SHOWN if not arguments_of(c) and not c.startswith(OTHERS)]


@pytest.mark.parametrize("program, arguments", COMPOSED, ids=[shlex.join(c[1]) for c in COMPOSED])
def test_every_command_composes(program, arguments):
    arguments = [argument.replace("<", "").replace(">", "") for argument in arguments]
    overrides = [a.split(",")[0] if "-m" in arguments else a for a in arguments if a[0] != "-"]
    overrides = [a for a in overrides if a not in ("job", "hydra/launcher=slurm")]
    cfg = composed(program, *(a for a in overrides if not a.startswith("hydra.launcher")))
    ours = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    assert OmegaConf.to_container(ours, resolve=True)


@pytest.mark.slow
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_command_that_lacks_nothing_works(path, workplace):
    for command in runs_of(path, "train"):
        if not lacks_something(words(command)):
            done = run_small(words(command))
            assert done.code == 0, (command, done.err)
    for command in runs_of(path, "sample"):
        if not lacks_something(words(command)):
            done = run("sample", *words(command))
            assert done.code == 0, (command, done.err)


def test_every_module_that_is_run_exists():
    texts = "\n".join(path.read_text() for path in DOCUMENTS)
    modules = set(re.findall(r"python -m ((?:var_exp|benchmarks)[\w.]*\w)", texts))
    assert {"var_exp.report", "var_exp.data.pack", "benchmarks.training"} <= modules
    for name in modules - moved_modules():
        spec = importlib.util.find_spec(name)
        assert spec, name
        if spec.submodule_search_locations:
            assert importlib.util.find_spec(f"{name}.__main__"), name


def moved_modules() -> set[str]:
    """Names that the changelog gives for what has another one now."""
    changelog = (ROOT / "CHANGELOG.md").read_text()
    return set(re.findall(r"`python -m ([\w.]+)` -> ", changelog))


def test_every_module_that_the_changelog_names_exists():
    table = (ROOT / "CHANGELOG.md").read_text().partition("Moved modules")[2].partition("###")[0]
    rows = re.findall(r"^\| `.*\| (`.*`.*) \|$", table, re.M)
    modules = [name for row in rows for name in re.findall(r"`([\w.]+)`", row)]
    assert len(modules) > 20
    assert not [name for name in modules if importlib.util.find_spec(f"var_exp.{name}") is None]


@pytest.mark.parametrize("page", ["python.md"])
def test_the_python_runs_from_the_first_block_to_the_last(page, workplace):
    known = {}
    for code in blocks(ROOT / "docs" / page, "python"):
        if ".pth" in code:  # needs the published files: what it calls must be there
            called = re.findall(r"\bvar_exp\.(\w+)\(", code)
            assert called and all(hasattr(var_exp, name) for name in called)
            compile(code, page, "exec")
        else:
            exec(compile(code, page, "exec"), known)


# -- keys, paths, links -------------------------------------------------------------------


def keys_of(*overrides: str, program: str = "train") -> set[str]:
    cfg = composed(program, *overrides)
    found: set[str] = set()

    def walk(tree, prefix: str) -> None:
        for key, value in tree.items():
            found.add(prefix + key)
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")

    walk(OmegaConf.to_container(cfg, resolve=False), "")
    return found


@pytest.fixture(scope="module")
def known_keys() -> set[str]:
    """Every key that some choice of the groups has."""
    choices = [
        "adversary=dino",
        "data=shards",
        "data=hugging_face",
        "experiment=imagenet256_tokenizer",
    ]
    keys = keys_of() | keys_of(program="sample") | keys_of("hydra/launcher=slurm")
    return keys.union(*(keys_of(choice) for choice in choices), config_groups())


@pytest.mark.parametrize("path", [README, *PAGES], ids=lambda path: path.name)
def test_every_setting_in_the_text_exists(path, known_keys):
    quoted = re.findall(r"`'?([^`\s]+?)=[^`]*`", path.read_text())
    keys = [key for key in quoted if re.fullmatch(r"[a-z][\w.@/]*", key)]
    keys = [key for key in keys if "." in key and "per_scale" != key]
    assert not [key for key in keys if key.partition("@")[0] not in known_keys]


@each_document
def test_every_link_into_the_repository_leads_somewhere(path):
    links = re.findall(r"\]\(([^)]+)\)", path.read_text())
    for link in links:
        if not link.startswith("http"):
            target, _, section = link.partition("#")
            file = (path.parent / target).resolve() if target else path
            assert file.exists(), link
            assert not section or section in sections(file), link


def sections(path) -> set[str]:
    """The anchors of a page's headings, as GitHub names them."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", [README, CONTRIBUTING, *PAGES], ids=lambda path: path.name)
def test_paths_in_the_text_exist(path):
    quoted = set(re.findall(r"`((?:src|conf|tests|docs|benchmarks)/[\w/.]+)`", path.read_text()))
    quoted -= set(named_files(path))
    if path.name == "speed.md":  # its tables name files of the package
        files = re.findall(
            r"`((?:ops|tokenizer|transformer|sampling|data)/[\w/.]+)`", path.read_text()
        )
        quoted |= {f"src/var_exp/{name}" for name in files}
    assert not [name for name in quoted if not (ROOT / name).exists()]


def test_the_index_lists_every_page_by_its_question():
    index = (ROOT / "docs" / "index.md").read_text()
    for page in PAGES:
        if page.name != "index.md":
            question = page.read_text().split("\n\n")[1]
            assert f"| {question} | [{page.name}]({page.name}) |" in index


def test_the_source_tree_names_only_what_exists_and_all_that_matters():
    (tree,) = [block for block in blocks(CONTRIBUTING, "") if block.startswith("train.py")]
    named = paths_in_tree(tree)
    assert {"train.py", "conf/train.yaml", "src/var_exp/tokenizer/"} <= set(named)
    assert not [path for path in named if not (ROOT / path).exists()]
    assert all((ROOT / path).is_dir() == path.endswith("/") for path in named)
    for folder in ("conf", "src/var_exp"):
        for path in (ROOT / folder).iterdir():
            if path.is_dir() and path.name != "__pycache__":
                assert f"{folder}/{path.name}/" in named


def paths_in_tree(tree: str) -> list[str]:
    """The paths of an annotated tree: names before two blanks, each below the last less indented.

    Names that share a line share their parent.
    """
    found, parents = [], {}
    for line in tree.splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split()
        indent = len(line) - len(line.lstrip())
        above = "".join(parents[i] for i in sorted(parents) if i < indent)
        parents = {i: name for i, name in parents.items() if i < indent}
        parents[indent] = names[-1]
        found += [above + name for name in names]
    return found


# -- the examples of CONTRIBUTING.md ------------------------------------------------------


@pytest.fixture
def extended(tmp_path, monkeypatch):
    """A folder with the files that CONTRIBUTING.md shows, which the package finds in its place."""
    for name, content in named_files(CONTRIBUTING).items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        if name.startswith("src/"):
            package = importlib.import_module(
                ".".join(file.parent.relative_to(tmp_path / "src").parts)
            )
            places = [*package.__path__, str(file.parent)]
            monkeypatch.setattr(package, "__path__", places)
    return tmp_path


def test_contributing_shows_an_example_for_each_seam():
    named = named_files(CONTRIBUTING)
    groups = {name.split("/")[1] for name in named if name.startswith("conf/")}
    assert groups == {"data", "transformer", "tokenizer", "evaluation", "callbacks", "logger"}


@pytest.mark.parametrize("command", runs_of(CONTRIBUTING, "train"))
def test_every_example_of_contributing_works(command, extended, workplace):
    arguments = words(command)
    done = run_small(arguments, "--config-dir", str(extended / "conf"))
    assert done.code == 0, done.err
    latest = workplace / "runs" / "latest"
    if "evaluation=thumbnail" in arguments:
        assert "var/fid_thumbnail" in (latest / "metrics.json").read_text()
    if "logger=jsonl" in arguments:
        assert (latest / "var" / "metrics.jsonl").exists()
    if "callbacks@callbacks.var=var_norm" in arguments:
        assert "val/weight_norm" in (latest / "csv" / "var" / "metrics.csv").read_text()
