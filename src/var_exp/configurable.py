"""Networks that remember how they were built.

A checkpoint has to carry enough to build its networks again, as plain data that loads with
`weights_only=True`. `@recorded` keeps the constructor's arguments of a class in `module.spec`:
`{"_target_": "package.Class", argument: plain value or the spec of another recorded module}`,
the very form that the YAML files under `conf/` have. `build(spec)` is its inverse, and builds
recorded classes only, so that a checkpoint can never name code to run.
"""

import contextlib
import functools
import importlib
import inspect
from typing import Any

_RECORDED: dict[str, type] = {}


def recorded(cls: type) -> type:
    """Class decorator: store the constructor's arguments as plain data in `self.spec`."""
    init = cls.__init__
    target = f"{cls.__module__}.{cls.__qualname__}"
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapped(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        arguments = dict(list(bound.arguments.items())[1:])
        spec = {"_target_": target} | {name: _plain(v) for name, v in arguments.items()}
        init(self, *args, **kwargs)
        if type(self) is cls:
            self.spec = spec

    cls.__init__ = wrapped
    _RECORDED[target] = cls
    return cls


def build(spec: dict[str, Any]) -> Any:
    """Build the module that a spec describes.

    Raises:
        ValueError: the spec names a class that is not a recorded network.
    """
    target = str(spec.get("_target_"))
    if target not in _RECORDED and target.startswith("var_exp."):
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(target.rpartition(".")[0])
    if target not in _RECORDED:
        raise ValueError(
            f"checkpoint: {target!r} is not a network of var-exp; expected one of "
            f"{sorted(_RECORDED)} (import your own recorded class first)"
        )
    arguments = {k: _build_value(v) for k, v in spec.items() if k != "_target_"}
    return _RECORDED[target](**arguments)


def _build_value(value: Any) -> Any:
    if isinstance(value, dict) and "_target_" in value:
        return build(value)
    return value


def _plain(value: Any) -> Any:
    if hasattr(value, "spec"):
        return value.spec
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a recorded constructor takes plain values, got {type(value).__name__}")
