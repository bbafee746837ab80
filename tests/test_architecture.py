"""Who may import whom, and what no file may do: read from the sources, without running them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "var_exp"
SCRIPTS = [ROOT / "train.py", ROOT / "sample.py"]
SOURCES = sorted(PACKAGE.rglob("*.py")) + SCRIPTS
TESTS = sorted((ROOT / "tests").glob("*.py"))

NETWORKS = {"scales", "spec", "tokenizer", "transformer"}
FILES = {"files"}  # how files are written and read
RANKS = {"ranks"}
SIGNALS = {"interruption"}

# room: the rooms of ours that it may import, besides itself.
MAY_IMPORT = {
    "__init__": set(),
    "scales": set(),
    "spec": set(),
    "files": set(),
    "environment": set(),
    "allocation": set(),
    "ranks": set(),
    "interruption": set(),
    "processes": SIGNALS,
    "onednn": set(),
    "tokenizer": {"scales", "spec", "onednn"} | RANKS,
    "transformer": {"scales", "spec", "onednn"},
    "api": NETWORKS | {"sampling"},
    "sampling": NETWORKS,
    "compiling": {"tokenizer", "transformer"},
    "checkpoint": NETWORKS | FILES,
    "official": NETWORKS | FILES | {"sampling"},
    "pipeline": NETWORKS | FILES | {"sampling", "checkpoint", "compiling"},
    "sources": NETWORKS | FILES | {"checkpoint", "official", "pipeline"},
    "transfer": NETWORKS | SIGNALS | {"sources"},
    "data": {"scales"} | FILES | SIGNALS,
    "evaluation": NETWORKS | FILES | RANKS | {"sampling", "checkpoint"},
    "training": NETWORKS
    | FILES
    | RANKS
    | SIGNALS
    | {"sampling", "checkpoint", "data", "evaluation", "onednn"},
    "lock": set(),
    "slurm": SIGNALS,
    "search": SIGNALS | {"cli", "lock", "search_space", "slurm"},
    "search_space": set(),
    "continuation": {"processes"},
    "wiring": NETWORKS
    | {"data", "evaluation", "options", "processes", "sampling", "sources", "training", "transfer"},
    "preflight": NETWORKS | FILES | SIGNALS | {"data", "training", "cli"},
    "options": set(),
    "cli": FILES | SIGNALS | RANKS | {"environment", "options", "processes", "slurm"},
}

# Libraries that only some rooms may know.
ONLY_IN = {
    "lightning": {"training", "data", "processes"},
    "pytorch_lightning": set(),
    "hydra": {"cli", "options", "search_space", "wiring"},
    "omegaconf": {"cli", "options", "wiring"},
    "wandb": {"training"},
    "wandb_workspaces": {"training"},
    "huggingface_hub": {"official"},
    "datasets": {"data"},
    "pyarrow": {"data"},
    "fsspec": {"data"},
}

each_source = pytest.mark.parametrize(
    "path", SOURCES, ids=[str(p.relative_to(ROOT)) for p in SOURCES]
)


def room_of(path: Path) -> str:
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


def our_rooms(path: Path) -> set[str]:
    ours = [name.split(".") for name in imports(path) if name.split(".")[0] == "var_exp"]
    assert all(len(parts) > 1 for parts in ours), f"{path}: imports the whole package"
    return {parts[1] for parts in ours}


@each_source
def test_a_room_imports_only_the_rooms_it_may(path):
    if path in SCRIPTS:
        assert our_rooms(path) <= set(MAY_IMPORT)
        return
    room = room_of(path)
    assert our_rooms(path) <= MAY_IMPORT[room] | {room}


def test_every_room_of_the_package_is_in_the_table_and_exists():
    assert {room_of(path) for path in PACKAGE.rglob("*.py")} == set(MAY_IMPORT)


@each_source
def test_libraries_stay_in_their_rooms(path):
    libraries = {name.split(".")[0] for name in imports(path)}
    room = "cli" if path in SCRIPTS else room_of(path)
    for library, rooms in ONLY_IN.items():
        assert library not in libraries or room in rooms, f"{library} in {path}"


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
