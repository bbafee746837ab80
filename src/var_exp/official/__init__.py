"""The authors' published checkpoints, in and out."""

from var_exp.official.load import OfficialNetworks, load_official
from var_exp.official.save import OfficialFiles, official_state_dict, save_official

__all__ = [
    "OfficialFiles",
    "OfficialNetworks",
    "load_official",
    "official_state_dict",
    "save_official",
]
