"""Overrides of the command line: the groups and keys that exist, and the nearest one."""

import difflib
import sys
from collections.abc import Mapping
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ValueType
from omegaconf import OmegaConf

CONF = Path(__file__).resolve().parents[4] / "conf"


def shape_of_job(config_name: str, arguments: list[str]) -> list[object]:
    """Devices and machines, as a command line without its sweep names them; each may be missing."""
    GlobalHydra.instance().clear()
    shaping = [a for a in arguments if a.startswith(("experiment=", "trainer=", "trainer."))]
    with initialize_config_dir(str(CONF), version_base=None):
        trainer = compose(config_name, overrides=shaping).get("trainer", {})
    return [trainer.get(key) for key in ("devices", "num_nodes")]


def config_groups() -> set[str]:
    return {path.parent.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml")} - {"."}


def check_groups(arguments: list[str]) -> None:
    """End where a choice of a group is no name: Hydra would say so without saying where."""
    groups = config_groups()
    given = [a for a in arguments if "=" in a and not a.startswith("-")]
    for override in OverridesParser.create().parse_overrides(given):
        group, kind = override.key_or_group, override.value_type
        if group not in groups or override.is_sweep_override() or override.is_delete():
            continue
        if group.startswith("hydra") or group == "callbacks":  # which have other choices, or none
            continue
        if kind is not ValueType.ELEMENT or isinstance(override.value(), str | list | dict):
            continue
        names = ", ".join(sorted(path.stem for path in (CONF / group).glob("*.yaml")))
        text = override.input_line
        sys.exit(f"error: {group}: expected one of {names}, got {text.partition('=')[2]}")


def nearest_keys(config_name: str, arguments: list[str]) -> list[str]:
    """For each override of a key that does not exist, a line with the nearest that does."""
    GlobalHydra.instance().clear()
    groups = config_groups()
    choices = [a for a in arguments if a.partition("=")[0].partition("@")[0] in groups]
    with initialize_config_dir(str(CONF), version_base=None):
        try:
            config = compose(config_name, overrides=choices)
        except Exception:  # a choice that does not exist, or no name at all: Hydra tells of it
            config = compose(config_name)
    known = groups | set(_flatten(OmegaConf.to_container(config, resolve=False)))
    hints = []
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if not equals or key.startswith(("+", "~", "-", "hydra")) or key in known:
            continue
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        if near:
            hints.append(f"{key!r} is not a key of {config_name}; the nearest is {near[0]!r}")
    return hints


def _flatten(tree: Mapping, prefix: str = "") -> list[str]:
    keys = []
    for name, value in tree.items():
        keys.append(prefix + name)
        if isinstance(value, dict):
            keys += _flatten(value, f"{prefix}{name}.")
    return keys
