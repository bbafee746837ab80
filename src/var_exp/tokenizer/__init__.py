"""Images to token maps of growing size, and back."""

from var_exp.tokenizer.autoencoder import Decoder, Encoder
from var_exp.tokenizer.codebook import BaseCodebook, Codebook, EMACodebook
from var_exp.tokenizer.implicit import BitwiseCodebook, FSQCodebook
from var_exp.tokenizer.quantizer import Corrupted, MultiScaleQuantizer, Quantized
from var_exp.tokenizer.vqvae import VQVAE

__all__ = [
    "VQVAE",
    "BaseCodebook",
    "BitwiseCodebook",
    "Codebook",
    "Corrupted",
    "Decoder",
    "EMACodebook",
    "Encoder",
    "FSQCodebook",
    "MultiScaleQuantizer",
    "Quantized",
]
