"""Images to token maps of growing size, and back."""

from var_exp.tokenizer.autoencoder import Decoder, Encoder
from var_exp.tokenizer.codebook import Codebook, EMACodebook
from var_exp.tokenizer.quantizer import MultiScaleQuantizer, Quantized
from var_exp.tokenizer.vqvae import VQVAE

__all__ = [
    "VQVAE",
    "Codebook",
    "Decoder",
    "EMACodebook",
    "Encoder",
    "MultiScaleQuantizer",
    "Quantized",
]
