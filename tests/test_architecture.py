"""Which package may import which, and what no file may do: read from the sources alone."""

import ast
import functools
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

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


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


@functools.cache
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


def test_a_package_imports_only_what_the_table_allows():
    offenders = {}
    for path in PACKAGE.rglob("*.py"):
        package = package_of(path)
        allowed = MAY_IMPORT[package] | {package}
        if refused := [name for name in our_imports(path) if not is_allowed(name, allowed)]:
            offenders[name_of(path)] = refused
    assert not offenders


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
    assert not [name_of(path) for path in SOURCES if "TYPE_CHECKING" in path.read_text()]


def test_libraries_stay_in_their_packages():
    offenders = []
    for path in SOURCES:
        package = "experiment" if path in SCRIPTS else package_of(path)
        libraries = {name.split(".")[0] for name in imports(path)} & ONLY_IN.keys()
        offenders += [(name_of(path), lib) for lib in libraries if package not in ONLY_IN[lib]]
    assert not offenders


def test_nothing_is_imported_by_wildcard():
    found = [(name_of(path), name) for path in SOURCES for name in imports(path)]
    assert not [(path, name) for path, name in found if name.endswith(".*")]


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


def test_importing_a_file_prints_nothing_and_starts_nothing():
    forbidden = ("print", "subprocess.", "os.system", "os.popen", "exec", "eval")
    found = [(name_of(p), call) for p in SOURCES for call in called(run_at_import(tree_of(p)))]
    assert not [(path, call) for path, call in found if call.startswith(forbidden)]


def test_constructors_print_nothing_and_nothing_is_moved_to_a_fixed_device():
    offenders = []
    for path in SOURCES:
        nodes = list(ast.walk(tree_of(path)))
        for node in nodes:
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                offenders += [name_of(path)] * ("print" in called(ast.walk(node)))
        offenders += [(name_of(path), c) for c in called(nodes) if c.endswith(".cuda")]
    assert not offenders


def test_a_file_is_small_enough_to_see():
    lines = {name_of(path): len(path.read_text().splitlines()) for path in SOURCES + TESTS}
    assert not {name: count for name, count in lines.items() if count >= 400}


def test_a_file_opens_with_its_idea():
    assert not [name_of(path) for path in SOURCES if not ast.get_docstring(tree_of(path))]
