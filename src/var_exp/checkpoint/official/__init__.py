"""The authors' published checkpoints, in and out."""

from var_exp.checkpoint.official.hub import MODELS, find_official
from var_exp.checkpoint.official.load import OfficialNetworks, load_official, read_official
from var_exp.checkpoint.official.save import OfficialFiles, official_state_dict, save_official

__all__ = [
    "MODELS",
    "OfficialFiles",
    "OfficialNetworks",
    "find_official",
    "load_official",
    "official_state_dict",
    "read_official",
    "save_official",
]
