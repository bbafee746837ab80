"""DINO: features of a vision transformer that was trained without labels.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (arXiv 2104.14294).
The published ViT-S/16 is read into torchvision's VisionTransformer, which is the same network
under other names, and gives the features of its patches at several depths.

    B batch, N = (image_size / patch)^2 patches, F width of the transformer
"""

import math
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from var_exp.io.pretrained import Published, State, as_rgb, fill
from var_exp.tokenizer.resize import area_matrix, bicubic_matrix

KEY = "adversary.discriminator"

DINO = Published(
    part="discriminator",
    what="the ViT-S/16 of DINO",
    url="https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/"
    "dino_deitsmall16_pretrain.pth",
    key=f"{KEY}.weights",
    without="take a discriminator that needs no file (adversary=patchgan)",
)

HEAD_WIDTH = 64  # of an attention head, in all of DINO's transformers

# (pattern in a published name, what torchvision has in its place), applied in this order.
NAMES = (
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "encoder.pos_embedding"),
    (r"^patch_embed\.proj\.", "conv_proj."),
    (r"^norm\.", "encoder.ln."),
    (r"^blocks\.(\d+)\.", r"encoder.layers.encoder_layer_\1."),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
    (r"\.attn\.proj\.", ".self_attention.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
)


class DinoFeatures(nn.Module):
    """What a vision transformer sees at some of its depths.

    Args:
        transformer: of `assemble_transformer`.
        image_size: side in pixels that images are resized to, a multiple of the patch size.
        depths: of the blocks whose outputs are wanted, from 0.

    Raises:
        ValueError: another image_size, or depths that the transformer does not have.
    """

    def __init__(self, transformer: VisionTransformer, image_size: int, depths: Sequence[int]):
        super().__init__()
        patch_size, num_blocks = transformer.patch_size, len(transformer.encoder.layers)
        if image_size < patch_size or image_size % patch_size:
            raise ValueError(
                f"discriminator: image_size must be a multiple of the {patch_size} pixels of a "
                f"patch, got {image_size} ({KEY}.image_size)"
            )
        if not depths or not set(depths) <= set(range(num_blocks)):
            raise ValueError(
                f"discriminator: depths must lie in 0..{num_blocks - 1}, got {list(depths)} "
                f"({KEY}.depths)"
            )
        self.image_size, self.depths, self.width = image_size, depths, transformer.hidden_dim
        self.patches, self.class_token = transformer.conv_proj, transformer.class_token
        positions = resize_positions(
            transformer.encoder.pos_embedding.detach(), image_size // patch_size
        )
        self.register_buffer("positions", positions)  # (1, 1 + N, F)
        self.blocks = transformer.encoder.layers[: max(depths) + 1]
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) in [-1, 1], C = 1 or 3 -> for each depth features (B, F, N).

        The class token is added to every patch, so that each knows of the whole image.
        """
        images = resize(as_rgb(images), self.image_size)
        images = ((images + 1) / 2 - self.mean) / self.std
        x = self.patches(images).flatten(2).transpose(1, 2)  #               (B, N, F)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + N, F)
        x = x + self.positions
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        seen = [outputs[depth] for depth in self.depths]
        return [(x[:, 1:] + x[:, :1]).transpose(1, 2) for x in seen]  # (B, F, N) each


def assemble_transformer(state: State) -> VisionTransformer:
    """torchvision's VisionTransformer with the weights of a published DINO transformer.

    Its sizes are read off the tensors.

    Raises:
        KeyError, ValueError: the tensors are not those of such a network.
    """
    state = {torchvision_name(name): tensor for name, tensor in state.items()}
    width, _, patch_size, _ = state["conv_proj.weight"].shape
    grid = math.isqrt(state["encoder.pos_embedding"].shape[1] - 1)
    if width % HEAD_WIDTH:
        raise ValueError(f"its width {width} is not a multiple of {HEAD_WIDTH}")
    with torch.device("meta"):
        transformer = VisionTransformer(
            image_size=grid * patch_size,
            patch_size=patch_size,
            num_layers=sum(name.endswith(".ln_1.weight") for name in state),
            num_heads=width // HEAD_WIDTH,
            hidden_dim=width,
            mlp_dim=len(state["encoder.layers.encoder_layer_0.mlp.0.bias"]),
        )
    transformer.heads = nn.Identity()
    return fill(transformer, state)


def torchvision_name(name: str) -> str:
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """Position embeddings (1, 1 + n^2, F), the class token's first, for another grid of patches."""
    token, patches = positions[:, :1], positions[:, 1:]
    side = math.isqrt(patches.shape[1])
    patches = patches.transpose(1, 2).unflatten(2, (side, side))  # (1, F, n, n)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic")
    return torch.cat([token, patches.flatten(2).transpose(1, 2)], dim=1)  # (1, 1 + grid^2, F)


def resize(images: Tensor, size: int) -> Tensor:
    """Images (B, C, H, W) -> (B, C, size, size): area to shrink, bicubic to grow.

    By matrices, whose backward is deterministic on every device, and in float32.
    """
    rows, columns = (_resize_matrix(side, size).to(images.device) for side in images.shape[-2:])
    with torch.autocast(images.device.type, enabled=False):
        return rows @ images @ columns.T


def _resize_matrix(source: int, target: int) -> Tensor:
    return (area_matrix if target < source else bicubic_matrix)(source, target)
