"""Refuse a configuration whose keys, types or ranges are wrong, before anything is built.

What the programs read themselves is in `schema.py`. A part with a `_target_` is a list of
arguments, so the signature that takes it says what each of them must be: `clip: float` is a number,
`freeze: Sequence[str]` a list of words. Both are annotations, which pydantic validates strictly.
"""

import dataclasses
import difflib
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from os import PathLike
from typing import Annotated, Any, Literal, Union

from annotated_types import Ge, Lt
from hydra.utils import get_object
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from pydantic import PlainValidator, Strict
from pydantic.errors import PydanticUserError

from var_exp.configurable import check_value
from var_exp.experiment.config.plain import plain
from var_exp.experiment.config.schema import SampleConfig, TrainConfig

TARGET = "_target_"
OF_HYDRA = {TARGET: str, "_partial_": bool, "_convert_": str, "_recursive_": bool, "_args_": list}


def check_types(cfg: DictConfig) -> None:
    """Raise ValueError for a wrong configuration, in one line that names each key.

    Raises:
        ValueError: a value of another type or outside its range, a key or argument that nobody
            takes, one that is missing, or a `_target_` that does not exist.
    """
    written = plain(cfg, resolve=False)
    try:
        tree = plain(cfg)
    except OmegaConfBaseException as error:
        if key := key_of_missing(written, error):
            raise ValueError(f"{key}: {str(error).splitlines()[0]}") from None
        raise
    variables = {name for text in texts(written) for name in re.findall(r"\$\{([\w.]+)", text)}
    schema = SampleConfig if "out_dir" in tree else TrainConfig
    wrong = []
    try:
        for key, value, hint in values(tree, schema, variables):
            wrong += mistakes(key + source_of(written, key), value, hint)
    except ValueError as error:  # a key or part that nobody knows, nor what comes behind it
        wrong.append(str(error))
    if wrong:
        # What is taken from a wrong value is wrong, too; where it is known, the value says enough.
        raise ValueError("; ".join([w for w in wrong if " = ${" not in w] or wrong[:1]))


def mistakes(key: str, value: Any, hint: Any) -> list[str]:
    """What is wrong with one value, if something is."""
    try:
        check_value(key, value, of_yaml(hint), in_yaml)
    except PydanticUserError:  # an annotation that pydantic cannot read
        return []
    except ValueError as error:
        return [str(error)]
    return []


def values(tree: Any, hint: Any, variables: set[str], key: str = "") -> Iterator[tuple]:
    """Each (dotted key, value, annotation) that is known, a part before what is in it.

    Args:
        hint: the annotation of the tree, or a dataclass of the schema.
        variables: keys that values elsewhere refer to; nobody else needs to take them.
    """
    inside: Mapping[str, Any] = {}
    if dataclasses.is_dataclass(hint) and isinstance(tree, dict):
        inside = typing.get_type_hints(hint, include_extras=True)
        if TARGET not in tree:
            check_names(tree, inside, variables, key, "there is no such key")
        if missing := [name for name in inside if name not in tree]:
            raise ValueError(f"{key}.{missing[0]}: is missing".lstrip("."))
    elif isinstance(tree, dict) and typing.get_origin(hint) is dict:
        inside = dict.fromkeys(tree, typing.get_args(hint)[1])
        hint = dict
    if key:
        yield key, tree, dict if dataclasses.is_dataclass(hint) else hint
    if isinstance(tree, dict) and TARGET in tree:
        own = {name: value for name, value in tree.items() if name not in inside}
        inside = {**inside, **arguments(own, key)}
    for name, value in children(tree):
        where = f"{key}[{name}]" if isinstance(tree, list) else f"{key}.{name}".lstrip(".")
        yield from values(value, inside.get(name, Any), variables, where)


def check_names(
    names: Iterable[str], known: Iterable[str], variables: set[str], key: str, refused: str
) -> None:
    """Raise ValueError for a name that is not known and that no value refers to."""
    for name in names:
        where = f"{key}.{name}".lstrip(".")
        if name in known or any(v == where or v.startswith(f"{where}.") for v in variables):
            continue
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise ValueError(f"{where}: {refused}{hint}")


# -- what takes a part --------------------------------------------------------------------


def arguments(part: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The annotations of the arguments that a part's target takes, `Any` where there is none."""
    found: dict[str, Any] = {}
    for function in signatures(located(part, key)):
        parameters = inspect.signature(function).parameters.values()
        try:
            hints = typing.get_type_hints(function, include_extras=True)
        except (NameError, TypeError):  # names that only a type checker imports
            hints = {}
        more = [p.name for p in parameters if p.kind is p.VAR_KEYWORD]
        found = {p.name: hints.get(p.name, Any) for p in parameters} | found
        if not more:
            refused = f"{part[TARGET]} takes no such argument"
            check_names(part, found | OF_HYDRA, set(), key, refused)
            break
    return found | OF_HYDRA


def located(part: Mapping[str, Any], key: str) -> Callable[..., Any]:
    """The class or function that a part names."""
    name = part[TARGET]
    check_value(f"{key}.{TARGET}", name, str, in_yaml)
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
    yield from (vars(b)["__init__"] for b in target.__mro__[:-1] if "__init__" in vars(b))


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


# -- annotations of what YAML holds --------------------------------------------------------


@functools.cache
def of_yaml(hint: Any) -> Any:
    """An annotation with what YAML has in the place of objects: parts, lists, words for paths."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    kind = origin or hint
    if hint in (Any, str, float, bool, None, type(None)) or origin is Literal:
        return hint
    if hint is int:
        return Annotated[int, Ge(-(2**63)), Lt(2**63)]
    if origin is Annotated:
        return Annotated[(of_yaml(inner[0]), *hint.__metadata__)]
    if origin in (Union, types.UnionType):
        return Union[tuple(map(of_yaml, inner))]  # noqa: UP007
    if not inspect.isclass(kind):
        return Any
    if issubclass(kind, PathLike):
        return str
    if kind.__module__ not in ("builtins", "collections.abc") or kind is Callable:
        return Annotated[Any, PlainValidator(functools.partial(check_gives, kind))]
    inner = tuple(map(of_yaml, (one for one in inner if one is not Ellipsis)))
    if issubclass(kind, Mapping):
        return types.GenericAlias(dict, (Any, inner[1])) if len(inner) == 2 else dict
    if kind is tuple and len(inner) > 1:
        return Annotated[types.GenericAlias(tuple, inner), Strict(False)]
    return types.GenericAlias(list, inner or Any) if issubclass(kind, Iterable) else Any


def check_gives(kind: type, value: Any) -> Any:
    """Raise ValueError unless a value is a part that becomes an object of a class."""
    target: Any = None
    if is_part := isinstance(value, dict) and TARGET in value:
        try:
            target = located(value, "")
        except ValueError:  # which is told with the key of what is wrong in it
            return value
    made = inspect.isclass(target) and not value.get("_partial_", False)
    open_kind = kind is Callable or getattr(kind, "_is_protocol", False)
    if not is_part or made and not open_kind and not issubclass(target, kind):
        raise ValueError(f"{{{TARGET}: ...}} that gives a {getattr(kind, '__name__', 'object')}")
    return value


# -- how values are written -----------------------------------------------------------------


def in_yaml(value: Any) -> str:
    """A value as it is written in YAML, in one line."""
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    return " ".join(repr(value).split())


def children(tree: Any) -> Iterable[tuple[Any, Any]]:
    """(name or number, value) of what a mapping or list holds, nothing of anything else."""
    if isinstance(tree, dict):
        return tree.items()
    return enumerate(tree) if isinstance(tree, list) else ()


def texts(tree: Any) -> Iterator[str]:
    """All words in a tree."""
    if isinstance(tree, str):
        yield tree
    for _, one in children(tree):
        yield from texts(one)


def key_of_missing(tree: Any, error: Exception, key: str = "") -> str | None:
    """The key whose own text names what is not there, of those that lead to it."""
    missing = re.search("Interpolation key '(.*)' not found", str(error))
    if isinstance(tree, str):
        return key if missing and f"${{{missing[1]}}}" in tree else None
    found = (key_of_missing(one, error, f"{key}.{n}".strip(".")) for n, one in children(tree))
    return next(filter(None, found), None)


def source_of(tree: Any, key: str) -> str:
    """What a message adds to the key of a value that is written elsewhere: ` = ${there}`."""
    for name in re.findall(r"[^.\[\]]+", key):
        if not isinstance(tree, dict | list):
            break
        tree = tree[int(name)] if isinstance(tree, list) else tree.get(name)
    return f" = {tree}" if isinstance(tree, str) and "${" in tree else ""
