"""A composed configuration as plain data."""

from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf


def plain(cfg: DictConfig | ListConfig, resolve: bool = True) -> dict[str, Any]:
    """A configuration, or a part of one, as plain data; without Hydra's own part.

    Args:
        resolve: put values in the place of interpolations.
    """
    if isinstance(cfg, DictConfig) and "hydra" in cfg:
        cfg = OmegaConf.masked_copy(cfg, [key for key in map(str, cfg) if key != "hydra"])
    return OmegaConf.to_container(cfg, resolve=resolve)  # type: ignore[return-value]  # a mapping
