"""The plain way of doing what we do, to compare with: the method as its published code works.

A dense additive mask, keys and values that grow by concatenation, float32, images encoded anew at
every step, reconstructions made anew for the discriminator, the class's vectors computed anew at
every scale, each operation on its own. Written from the method alone (arXiv 2404.02905; of the
tokenizer's training arXiv 2012.09841), and from nothing of ours: what is made faster in
`var_exp` must not become faster here. Modules and parameters have our names, so that our weights
load, and outputs can be compared.
"""

from benchmarks.baseline.sampling import sampling_plain
from benchmarks.baseline.tokenizer import PlainTokenizer
from benchmarks.baseline.tokenizer_training import PlainPatchGAN, PlainTokenizerTraining
from benchmarks.baseline.training import PlainTraining
from benchmarks.baseline.transformer import PlainTransformer

__all__ = [
    "PlainPatchGAN",
    "PlainTokenizer",
    "PlainTokenizerTraining",
    "PlainTraining",
    "PlainTransformer",
    "sampling_plain",
]
