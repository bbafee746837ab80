"""Constructors that check their arguments, and networks that remember how they were built.

`@checked` refuses arguments outside the ranges that a signature names, the same way whether they
come from a configuration or from Python: `dropout: Annotated[float, Ge(0), Lt(1)]`.

A checkpoint has to carry enough to build its networks again, as plain data that loads with
`weights_only=True`. `@recorded` keeps the constructor's arguments of a class in `module.config`:
`{"_target_": "package.Class", argument: plain value or the config of another registered module}`,
the very form that the YAML files under `conf/` have. `build(config)` is its inverse, and builds
registered classes only, so that a checkpoint can never name code to run.
"""

import contextlib
import functools
import importlib
import inspect
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

import numpy as np
from annotated_types import Ge, Le, Lt
from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):  # False equals 0
        raise ValueError("a number")
    return value


# Ranges that several signatures name.
Zero = Annotated[Literal[0], BeforeValidator(_no_bool)]
Fraction = Annotated[float, Ge(0), Lt(1)]
Share = Annotated[float, Ge(0), Le(1)]
Weight = Annotated[float, Ge(0), Le(1e6)]  # of a term in a sum
VocabSize = Annotated[int, Ge(2)]
Seed = Annotated[int, Ge(0), Lt(2**63)]

STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
# What an annotation asks for, by the type of pydantic's error; its own words for all others.
EXPECTED = {
    "float_type": "a number",
    "finite_number": "a number",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "string_type": "a word (a number in quotes)",
    "none_required": "null",
    "list_type": "a list",
    "sequence_str": "a list",
    "is_instance_of": "a {class}",
    "dict_type": "{{key: value}}",
    "literal_error": "{expected}",
    "greater_than": "a number > {gt:g}",
    "greater_than_equal": "a number >= {ge:g}",
    "less_than": "a number < {lt:g}",
    "less_than_equal": "a number <= {le:g}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "missing": "a longer list",
    "string_pattern_mismatch": "a word like {pattern}",
    "value_error": "{error}",
}
P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=type)

_REGISTERED: dict[str, type] = {}
# Arguments of earlier versions, and what they are called now.
_RENAMED = {"scale_drop": "quantizer_dropout", "scale_drop_from": "quantizer_dropout_from"}


def register_config(cls: C) -> C:
    """Class decorator: store the constructor's arguments as plain data in `self.config`."""
    init = cls.__init__  # type: ignore[misc]  # of the class itself, not of an instance
    target = f"{cls.__module__}.{cls.__qualname__}"
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapped(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        arguments = dict(list(bound.arguments.items())[1:])
        config = {"_target_": target} | {name: _plain(v) for name, v in arguments.items()}
        init(self, *args, **kwargs)
        if type(self) is cls:
            self.config = config

    cls.__init__ = wrapped  # type: ignore[misc]
    _REGISTERED[target] = cls
    return cls


def build(config: dict[str, Any]) -> Any:
    """Build the module that a config describes.

    Raises:
        ValueError: the config names a class that is not a registered network.
    """
    config = with_current_names(config)
    target = str(config.get("_target_"))
    if target not in _REGISTERED and target.startswith("var_exp."):
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(target.rpartition(".")[0])
    if target not in _REGISTERED:
        raise ValueError(
            f"checkpoint: {target!r} is not a network of var-exp; expected one of "
            f"{sorted(_REGISTERED)} (import your own registered class first)"
        )
    arguments = {k: _build_value(v) for k, v in config.items() if k != "_target_"}
    return _REGISTERED[target](**arguments)


def with_current_names(config: Any) -> Any:
    """Return a config that an earlier version wrote, as this one writes it."""
    if isinstance(config, dict):
        return {_RENAMED.get(k, k): with_current_names(v) for k, v in config.items()}
    return [with_current_names(v) for v in config] if isinstance(config, list) else config


def _build_value(value: Any) -> Any:
    if isinstance(value, dict) and "_target_" in value:
        return build(value)
    return value


def _plain(value: Any) -> Any:
    if hasattr(value, "config"):
        return value.config
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a registered constructor takes plain values, got {type(value).__name__}")


# -- ranges of arguments ------------------------------------------------------------------


def checked(init: Callable[P, R]) -> Callable[P, R]:
    """Decorator of a constructor or function: check the arguments whose annotations name a range.

    Raises:
        ValueError: an argument of another type or outside its range, in one line that names it.
    """
    hints = typing.get_type_hints(init, include_extras=True)
    ranges = {name: hint for name, hint in hints.items() if _has_range(hint)}
    signature = inspect.signature(init)
    owner = init.__qualname__.removesuffix(".__init__")

    @functools.wraps(init)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        given = signature.bind_partial(*args, **kwargs).arguments
        for name in given.keys() & ranges.keys():
            check_value(f"{owner}: {name}", given[name], ranges[name])
        return init(*args, **kwargs)

    return wrapped


def check_value(key: str, value: Any, hint: Any, shown: Callable[[Any], str] = repr) -> None:
    """Raise ValueError, in one line, unless a value is of an annotation and within its range.

    Strictly: neither "3" nor True is a whole number, and a number that is not finite is none. A
    float may be written as a whole number.

    Args:
        shown: a value -> what the message says of it.
    """
    value = value.item() if isinstance(value, np.generic) else value
    try:
        _adapter(hint).validate_python(value)
    except ValidationError as refused:
        errors = refused.errors(include_url=False)
        words = [EXPECTED.get(e["type"], e["msg"]).format(**e.get("ctx", {})) for e in errors]
        if len(errors) == 1 and errors[0]["type"] != "missing":  # else no one element is to blame
            value = errors[0]["input"]
            key += "".join(f"[{i}]" if isinstance(i, int) else f".{i}" for i in errors[0]["loc"])
            words += ["null"] * (value is not None and type(None) in typing.get_args(hint))
        expected = " or ".join(dict.fromkeys(words))
        raise ValueError(f"{key}: expected {expected}, got {shown(value)}") from None


@functools.cache
def _adapter(hint: Any) -> TypeAdapter:
    return TypeAdapter(hint, config=STRICT)


def _has_range(hint: Any) -> bool:
    named = hasattr(hint, "__metadata__") or typing.get_origin(hint) is Literal
    return named or any(map(_has_range, typing.get_args(hint)))
