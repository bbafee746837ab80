"""The public names for type checkers; `__init__.py` imports each when it is first used."""

from var_exp.api import build as build
from var_exp.api import build_tokenizer as build_tokenizer
from var_exp.api import next_scale_prediction as next_scale_prediction
from var_exp.api import recommended_defaults as recommended_defaults
from var_exp.checkpoint.official import load_official as load_official
from var_exp.checkpoint.official import official_state_dict as official_state_dict
from var_exp.checkpoint.official import save_official as save_official
from var_exp.checkpoint.pipeline import VARPipeline as VARPipeline
from var_exp.ops.memory import keep_memory as keep_memory
from var_exp.sampling import generate as generate
from var_exp.scales import ScaleSchedule as ScaleSchedule
from var_exp.scales import total_tokens as total_tokens
