"""Which package may import which, and what no file may do: read from the sources alone."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "var_exp"
SCRIPTS = [ROOT / "train.py", ROOT / "sample.py"]
SOURCES = sorted(PACKAGE.rglob("*.py")) + SCRIPTS
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# Package: what it may import of ours, besides itself; a dotted name is one module.
GROUND = {"io", "distributed"}
NETWORKS = {"scales", "configurable", "ops", "tokenizer", "transformer"}
MAY_IMPORT = {
    "__init__": set(),
    "scales": set(),
    "configurable": set(),
    "io": set(),
    "distributed": set(),
    "ops": {"scales"},
    "tokenizer": {"scales", "configurable", "ops", "io", "distributed.collectives"},
    "transformer": {"scales", "configurable", "ops", "io", "distributed.collectives"},
    "sampling": NETWORKS,
    "api": NETWORKS | {"sampling"},
    "data": {"scales", "configurable"} | GROUND,
    "visualization": {"io"},
    "report": {"visualization", "io"},
    "checkpoint": NETWORKS | {"sampling"} | GROUND,
    "evaluation": NETWORKS | {"sampling", "visualization"} | GROUND,
    "training": NETWORKS
    | {"sampling", "visualization", "report", "data", "checkpoint", "evaluation"}
    | GROUND,
    "experiment": NETWORKS
    | {"sampling", "visualization", "report", "data", "checkpoint", "evaluation", "training"}
    | GROUND,
}

# Libraries that only some packages may import.
ONLY_IN = {
    "lightning": {"training", "data", "distributed"},
    "pytorch_lightning": set(),
    "hydra": {"experiment"},
    "omegaconf": {"experiment"},
    "wandb": {"training"},
    "wandb_workspaces": {"training"},
    "optuna": {"experiment"},
    "timm": {"tokenizer"},
    "huggingface_hub": {"checkpoint"},
    "datasets": {"data"},
    "pyarrow": {"data"},
    "fsspec": {"data"},
}

each_source = pytest.mark.parametrize(
    "path", SOURCES, ids=[str(p.relative_to(ROOT)) for p in SOURCES]
)


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(path: Path) -> list[str]:
    """Every module that a file imports, wherever in it, as full dotted names."""
    names = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def our_imports(path: Path) -> list[str]:
    """The same of our package, without its name."""
    ours = [name.removeprefix("var_exp.") for name in imports(path) if name.startswith("var_exp.")]
    assert "var_exp" not in imports(path), f"{path}: imports the whole package"
    return ours


def is_allowed(name: str, allowed: set[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in allowed)


@each_source
def test_a_package_imports_only_what_the_table_allows(path):
    if path in SCRIPTS:
        return
    package = package_of(path)
    allowed = MAY_IMPORT[package] | {package}
    assert not [name for name in our_imports(path) if not is_allowed(name, allowed)]


def test_every_package_is_in_the_table_and_exists():
    assert {package_of(path) for path in PACKAGE.rglob("*.py")} == set(MAY_IMPORT)


def file_of(name: str) -> Path | None:
    """The file that an imported name is read from: a module, or what defines the name."""
    while name:
        path = PACKAGE.joinpath(*name.split("."))
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file():
                return candidate
        name = name.rpartition(".")[0]
    return None


def test_no_files_import_each_other_in_a_circle():
    """A package's `__init__.py` only passes names on, so it counts as the files it imports."""
    graph = {
        path: {file_of(name) for name in our_imports(path)} - {path, None}
        for path in PACKAGE.rglob("*.py")
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = [str(path.relative_to(PACKAGE)) for path in error.args[1]]
        raise AssertionError(f"a circle: {' -> '.join(circle)}") from None


def test_no_import_hides_from_the_interpreter():
    assert not [path for path in SOURCES if "TYPE_CHECKING" in path.read_text()]


@each_source
def test_libraries_stay_in_their_packages(path):
    libraries = {name.split(".")[0] for name in imports(path)}
    package = "experiment" if path in SCRIPTS else package_of(path)
    for library, packages in ONLY_IN.items():
        assert library not in libraries or package in packages, f"{library} in {path}"


@each_source
def test_nothing_is_imported_by_wildcard(path):
    assert not [name for name in imports(path) if name.endswith(".*")]


def run_at_import(tree: ast.AST):
    """The nodes that importing a file runs: all but the bodies of functions and of `main`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            continue
        yield node
        yield from run_at_import(node)


def called(nodes) -> set[str]:
    return {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}


@each_source
def test_importing_a_file_prints_nothing_and_starts_nothing(path):
    calls = called(run_at_import(tree_of(path)))
    forbidden = ("print", "subprocess.", "os.system", "os.popen", "exec", "eval")
    assert not [call for call in calls if call.startswith(forbidden)]


@each_source
def test_constructors_print_nothing_and_nothing_is_moved_to_a_fixed_device(path):
    tree = tree_of(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            assert "print" not in called(ast.walk(node))
    assert not [call for call in called(ast.walk(tree)) if call.endswith(".cuda")]


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_is_small_enough_to_see(path):
    assert len(path.read_text().splitlines()) < 400


@each_source
def test_a_file_opens_with_its_idea(path):
    assert ast.get_docstring(tree_of(path))
