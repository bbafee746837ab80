"""Whether the values of a composition are of the types that they are for.

A part with a `_target_` is an argument list, so the signature that takes it says what each value
must be: `clip: float` is a number, `freeze: Sequence[str]` a list of words. What the programs read
themselves is written down in `OWN`. So a word in the place of a number is refused by its key
before anything is built, whatever part it is in.
"""

import difflib
import functools
import inspect
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import Any, Literal, NamedTuple, Union

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

TARGET = "_target_"
OF_HYDRA = {TARGET, "_partial_", "_convert_", "_recursive_", "_args_"}

Word = str | int | float  # a folder may be called 2024
Sampling = {"cfg_scale": float, "top_k": int, "top_p": float, "temperature": float}
Stage = {
    "batch_size": int,
    "num_batches": int | None,
    "epochs": int | float | None,
    "val_every": int,
    "save_every": int | None,
}
# What train.py and sample.py read themselves, where it is in the composition.
OWN: dict[str, Any] = {
    **dict.fromkeys(("seed", "batch_size", "devices", "num_nodes"), int),
    **dict.fromkeys(("num_threads", "num_samples"), int | None),
    **dict.fromkeys(("png", "npz", "evaluate"), bool),
    "compile": bool | str,
    **dict.fromkeys(("name", "runs_dir", "out_dir", "run_dir", "official_dir"), Word),
    **dict.fromkeys(("tokenizer_ckpt", "init_from", "ckpt"), Word | None),
    **dict.fromkeys(("objective", "weights", "official", "export", "export_official"), str | None),
    **dict.fromkeys(("resume", "precision", "device"), str),
    "check": bool | str,
    "stages": list[str],
    "classes": list[Any] | Any,
    "expected": dict[str, list[float]],
    "scales.patch_nums": list[int | list[int]],
    **{f"model.{s}.{name}": hint for s in ("tokenizer", "var") for name, hint in Stage.items()},
    **{f"sampling.{name}": hint for name, hint in Sampling.items()},
    **{f"evaluation.sampling.{name}": hint for name, hint in Sampling.items()},
    **Sampling,
    **{
        f"evaluation.{name}": int
        for name in ("num_samples", "num_samples_per_scale", "num_samples_val", "batch_size")
    },
    **{f"tokens.{name}": int for name in ("views", "batch_size")},
    "tokens.dir": Word | None,
    "evaluation.num_reconstructions_val": int | None,
    "evaluation.num_reference": int | None,
    "evaluation.network": Callable,
    "evaluation.both_weights": bool,
    **{f"evaluation.every_n_{unit}": int | None for unit in ("batches", "epochs")},
    **{f"evaluation.{name}": str | None for name in ("weights", "reference", "cache")},
    **{
        f"evaluation.scores.{name}": int
        for name in ("num_splits", "kid_subsets", "kid_subset_size", "num_neighbours", "seed")
    },
    "evaluation.expected": dict[str, dict[str, list[float]] | None],
    **dict.fromkeys(("scales", "sampling", "evaluation", "data", "tokens"), dict[str, Any]),
    "evaluation.scores": dict[str, Any],
}
Part = Callable[..., Any]
# What train.py makes its objects of.
PARTS: dict[str, Any] = {
    **dict.fromkeys(("data", "datamodule", "tokenizer", "transformer", "trainer"), Part),
    **dict.fromkeys(("model", "logger"), dict[str, Any]),
    "evaluation.network": Part,
    "callbacks": dict[str, dict[str, Any]],
    **{f"model.{stage}": dict[str, Any] for stage in ("tokenizer", "var")},
    **{f"model.{stage}.module": Part for stage in ("tokenizer", "var")},
}
CLOSED = ("sampling", "evaluation.sampling", "evaluation.scores")  # no keys but those in `OWN`
PART_OF_EACH = r"logger\.\w+|callbacks\.\w+\.\w+"  # entries that anyone may add
LARGEST = 2**63  # of whole numbers


class Value(NamedTuple):
    """A dotted key, its value, and the annotation of what takes it."""

    key: str
    value: Any
    hint: Any


def check_types(cfg: DictConfig) -> None:
    """Compare each value with what it is for.

    Raises:
        ValueError: one of another type, a key or argument that nobody takes, or a `_target_` that
            does not exist.
    """
    parts = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    try:
        tree = OmegaConf.to_container(parts, resolve=True)
    except OmegaConfBaseException as error:
        if key := names_missing(OmegaConf.to_container(parts, resolve=False), error):
            raise ValueError(f"{key}: {str(error).splitlines()[0]}") from None
        raise
    own = OWN | (PARTS if "trainer" in tree else {})
    for key, value, hint in typed(tree, own):
        if not fits(value, hint):
            taken = taken_from(OmegaConf.to_container(parts, resolve=False), key)
            raise ValueError(f"{key}{taken}: expected {words(hint)}, got {shown(value)}")


def names_missing(tree: Any, error: Exception, key: str = "") -> str | None:
    """The key whose own text names what is not there, of those that lead to it."""
    missing = re.search("Interpolation key '(.*)' not found", str(error))
    if isinstance(tree, str):
        return key if missing and f"${{{missing[1]}}}" in tree else None
    if not isinstance(tree, dict | list):
        return None
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found = (names_missing(one, error, f"{key}.{name}".strip(".")) for name, one in pairs)
    return next(filter(None, found), None)


def taken_from(tree: Any, key: str) -> str:
    """What a message adds to the key of a value that is written elsewhere: ` = ${there}`."""
    for name in re.findall(r"[^.\[\]]+", key):
        if isinstance(tree, str):
            break
        tree = tree[int(name)] if isinstance(tree, list) else tree[name]
    return f" = {tree}" if isinstance(tree, str) and "${" in tree else ""


def typed(tree: Any, own: Mapping[str, Any], key: str = "") -> Iterator[Value]:
    """The values of a composition whose types are known, those of parts before those in them."""
    if isinstance(tree, list):
        for i, value in enumerate(tree):
            yield from typed(value, own, f"{key}[{i}]")
    if not isinstance(tree, dict):
        return
    takes = arguments(tree, key) if TARGET in tree else {}
    for name, value in tree.items():
        where = f"{key}.{name}" if key else str(name)
        if where in own:
            yield Value(where, value, own[where])
        elif key in CLOSED:
            known = [one.rpartition(".")[2] for one in own if one.startswith(f"{key}.")]
            raise ValueError(f"{where}: there is no such key{nearest(name, known)}")
        elif "trainer" in own and re.fullmatch(PART_OF_EACH, where):
            yield Value(where, value, Part)
        if name == "_partial_":
            yield Value(where, value, bool)
        elif name in takes:
            yield Value(where, value, takes[name])
        yield from typed(value, own, where)


# -- what takes a part --------------------------------------------------------------------


def arguments(part: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The annotations of the arguments that a part's target takes, `Any` where there is none."""
    target = located(part, key)
    found, more = {}, False
    for function in signatures(target):
        parameters = inspect.signature(function).parameters.values()
        hints = hints_of(function)
        kinds = {p.kind for p in parameters}
        found = {p.name: hints.get(p.name, Any) for p in parameters} | found
        more = inspect.Parameter.VAR_KEYWORD in kinds
        if not more:
            break
    for name in part:
        if name not in found and name not in OF_HYDRA and not more:
            hint = nearest(name, found)
            raise ValueError(f"{key}.{name}: {part[TARGET]} takes no argument {name!r}{hint}")
    return found


def nearest(name: object, known: Iterable[str]) -> str:
    """What a message adds where one of the known names is like this one."""
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"; the nearest is {near[0]!r}" if near else ""


def located(part: Mapping[str, Any], key: str) -> Callable[..., Any]:
    name = part[TARGET]
    if not isinstance(name, str):
        raise ValueError(f"{key}.{TARGET}: expected the name of a class, got {shown(name)}")
    try:
        target = get_object(name)
    except Exception as error:  # an import may raise anything
        reason = " ".join(str(error).split())
        raise ValueError(f"{key}.{TARGET}: there is no {name!r} ({reason})") from None
    if not callable(target):
        raise ValueError(f"{key}.{TARGET}: expected a class or function, {name!r} is none")
    return target


def signatures(target: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """What takes the arguments: a function, or the constructors of a class and of its bases."""
    if not inspect.isclass(target):
        yield target
        return
    for base in target.__mro__[:-1]:
        if "__init__" in vars(base):
            yield base.__init__


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):  # names that only a type checker imports
        return {}


def check_part(made: Any, kind: type, key: str, *given: Any) -> None:
    """Raise ValueError for what is none of a kind, nor will be one when it is given the rest.

    Args:
        made: of the part at this key; what is `_partial_` there waits for `given`.
    """
    is_partial = isinstance(made, functools.partial)
    target = made.func if is_partial else type(made)
    if inspect.isclass(target) and not issubclass(target, kind):
        raise ValueError(
            f"{key}: expected a {kind.__name__}, got a {target.__name__} ({key}.{TARGET})"
        )
    if is_partial:
        try:
            inspect.signature(made).bind(*given)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{key}: {error}") from None


# -- values and annotations ---------------------------------------------------------------


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of YAML can be given for an annotation; unknown ones take everything."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, typing.TypeVar):
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:  # which of them is for whoever takes it
        return any(type(value) is type(one) for one in inner)
    if hint in (None, type(None)):
        return value is None
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    if hint in (int, bool):
        return type(value) is hint and abs(value) < LARGEST
    kind = origin or hint
    if kind is Callable or not inspect.isclass(kind):
        return isinstance(value, dict) and TARGET in value
    if issubclass(kind, str | PurePath | os.PathLike):
        return isinstance(value, str)
    if issubclass(kind, Mapping):
        inside = inner[1] if len(inner) == 2 else Any
        return isinstance(value, dict) and all(fits(one, inside) for one in value.values())
    if issubclass(kind, Iterable) and kind.__module__ in ("builtins", "collections.abc", "typing"):
        if not isinstance(value, list):
            return False
        hints = elements(inner, len(value))
        return len(hints) == len(value) and all(map(fits, value, hints))
    return is_part(value, kind)


def elements(inner: tuple[Any, ...], count: int) -> list[Any]:
    """The annotation of each of a list's elements; too few for a tuple of another length."""
    if len(inner) == 2 and inner[1] is Ellipsis:
        inner = inner[:1]
    return list(inner) if len(inner) > 1 else [*(inner or (Any,))] * count


def is_part(value: Any, kind: type) -> bool:
    """Whether a value is a part that becomes an object of a class."""
    if not isinstance(value, dict) or TARGET not in value:
        return False
    if not isinstance(value[TARGET], str):
        return False
    try:
        target = located(value, "")
    except ValueError:  # which is told with the key of what is wrong in it
        return True
    made = inspect.isclass(target) and not value.get("_partial_", False)
    return not made or getattr(kind, "_is_protocol", False) or issubclass(target, kind)


def words(hint: Any) -> str:
    """What an annotation takes, for people."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(words(one) for one in inner))
    if origin is Literal:
        return " or ".join(dict.fromkeys(words(type(one)) for one in inner))
    plain = {
        float: "a number",
        int: "a whole number",
        bool: "true or false",
        str: "a word (a number in quotes)",
    }
    if hint in plain:
        return plain[hint]
    if hint in (None, type(None)):
        return "null"
    kind = origin or hint
    if inspect.isclass(kind) and issubclass(kind, PurePath | os.PathLike):
        return "a path"
    if inspect.isclass(kind) and issubclass(kind, Mapping):
        return "{key: value}"
    if inspect.isclass(kind) and kind.__module__ in ("builtins", "collections.abc", "typing"):
        if kind is not Callable:
            return f"a list of {len(inner)}" if kind is tuple and len(inner) > 1 else "a list"
    name = getattr(kind, "__name__", "object")
    return f"{{_target_: ...}} that gives a {name}"


def shown(value: Any) -> str:
    """A value as it is written in YAML."""
    return {True: "true", False: "false", None: "null"}[value] if _is_bare(value) else repr(value)


def _is_bare(value: Any) -> bool:
    return value is None or isinstance(value, bool)
