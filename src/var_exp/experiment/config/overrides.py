"""Overrides of the command line: how they are written, which keys exist, and the nearest one."""

import difflib
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ValueType
from hydra.errors import HydraException

from var_exp.experiment.config.plain import plain

CONF = Path(__file__).resolve().parents[4] / "conf"

# Keys of earlier versions: pattern, and what it is called now.
RENAMED = (
    (r"^(model\.\w+)\.module\b", r"\1"),
    (r"^(model\.\w+)\.average_decay$", r"\1.ema_decay"),
    (r"^(model\.\w+)\.micro_batch$", r"\1.micro_batch_size"),
    (r"^model\.var\.label_drop$", "model.var.class_dropout_prob"),
    (r"^model\.var\.corrupt$", "model.var.self_correction_prob"),
    (r"^model\.var\.recompute$", "model.var.activation_checkpointing"),
    (r"^tokenizer\.quantizer\.scale_drop\b", "tokenizer.quantizer.quantizer_dropout"),
    (r"^tokenizer\.quantizer\.scale_drop_from$", "tokenizer.quantizer.quantizer_dropout_from"),
    (r"^data\.buffer$", "data.shuffle_buffer"),
    (r"^data\.lanes$", "data.num_streams"),
    (r"^recipe$", "data"),
)
PLAIN = re.compile(r"(?!(true|false|null|nan|inf)$)[a-z_./][\w./-]*", re.ASCII | re.IGNORECASE)


def as_override(key: str, value: Any) -> str:
    """`key=value` as Hydra reads it, whatever is in the value; a shell needs `shlex.quote` of it.

    Args:
        value: plain data, mappings with names as keys; `${` in a word is no interpolation.
    """
    return f"{key}={_as_value(value)}"


def _as_value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{k}:{_as_value(v)}' for k, v in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_as_value, value))}]"
    text = str(value)
    if not isinstance(value, str | Path) or PLAIN.fullmatch(text):
        return text
    # Backslashes count only before an interpolation, a quote and the end; there they are doubled.
    text = re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + r"\${", text)
    text = re.sub(r"(\\*)(\"|\Z)", lambda found: 2 * found[1] + found[2].replace('"', r"\""), text)
    return f'"{text}"'


def shape_of_job(config_name: str, arguments: list[str]) -> list[object]:
    """Devices and machines, as a command line without its sweep names them; each may be missing."""
    GlobalHydra.instance().clear()
    shaping = [a for a in arguments if a.startswith(("experiment=", "trainer=", "trainer."))]
    with initialize_config_dir(str(CONF), version_base=None):
        trainer = compose(config_name, overrides=shaping).get("trainer", {})
    return [trainer.get(key) for key in ("devices", "num_nodes")]


def config_groups() -> set[str]:
    return {path.parent.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml")} - {"."}


def current_name(key: str) -> str:
    """Return what a key of this or an earlier version is called now."""
    for pattern, name in RENAMED:
        key = re.sub(pattern, name, key)
    return key


def check_renamed(arguments: list[str]) -> None:
    """End where a key has another name since this version."""
    for argument in arguments:
        key, equals, _ = argument.lstrip("+~").partition("=")
        if not argument.startswith("-") and (name := current_name(key)) != key:
            sys.exit(f"error: {key}: is now called {name}")


def with_current_names(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration that an earlier version recorded, as this one writes it."""
    found: dict[str, Any] = {}
    for key, value in _leaves(config):
        *parents, last = current_name(key).split(".")
        tree = found
        for name in parents:
            tree = tree.setdefault(name, {})
        tree[last] = value
    return found


def _leaves(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def check_groups(arguments: list[str]) -> None:
    """End where a choice of a group is no name: Hydra would say so without saying where."""
    groups = config_groups()
    given = [a for a in arguments if "=" in a and not a.startswith("-")]
    for override in OverridesParser.create().parse_overrides(given):
        group, kind = override.key_or_group, override.value_type
        if group not in groups or override.is_sweep_override() or override.is_delete():
            continue
        if group.startswith("hydra") or override.package:  # which have other choices, or none
            continue
        if kind is not ValueType.ELEMENT or isinstance(override.value(), str | list | dict):
            continue
        names = ", ".join(sorted(path.stem for path in (CONF / group).glob("*.yaml")))
        text = override.input_line or ""
        sys.exit(f"error: {group}: expected one of {names}, got {text.partition('=')[2]}")


def nearest_keys(config_name: str, arguments: list[str]) -> list[str]:
    """A line for each override that Hydra cannot read, or whose key does not exist.

    It shows how the value is typed, or the nearest keys: those that end in the same word, else one
    that ends in a word which is spelt alike.
    """
    GlobalHydra.instance().clear()
    groups = config_groups()
    choices = [a for a in arguments if a.partition("=")[0].partition("@")[0] in groups]
    with initialize_config_dir(str(CONF), version_base=None):
        try:
            config = compose(config_name, overrides=choices)
        except Exception:  # a choice that does not exist, or no name at all: Hydra tells of it
            config = compose(config_name)
    known = groups | set(_flatten(plain(config, resolve=False)))
    hints = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key.startswith("-"):
            continue
        try:
            OverridesParser.create().parse_override(argument)
        except HydraException:
            typed = shlex.quote(as_override(key, value))
            hints.append(f"Hydra cannot read {argument!r}; if this is one word, type {typed}")
            continue
        if key.startswith(("+", "~", "hydra")) or key in known:
            continue
        ends = {name: name.rpartition(".")[2] for name in sorted(known)}
        last = key.rpartition(".")[2]
        near = difflib.get_close_matches(last, ends.values(), n=1)
        alike = [name for name, end in ends.items() if end in near]
        if near != [last]:
            alike = difflib.get_close_matches(key, alike, n=1, cutoff=0)
        if alike:
            names = " or ".join(map(repr, alike))
            hints.append(f"{key!r} is not a key of {config_name}; the nearest is {names}")
    return hints


def _flatten(tree: Mapping, prefix: str = "") -> list[str]:
    keys = []
    for name, value in tree.items():
        keys.append(prefix + name)
        if isinstance(value, dict):
            keys += _flatten(value, f"{prefix}{name}.")
    return keys
