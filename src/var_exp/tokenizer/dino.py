"""DINO: features of a vision transformer that was trained without labels.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (arXiv 2104.14294).
timm has the network, under the names of the published ViT-S/16, and gives the features of its
patches at several depths.

    B batch, N = (image_size / patch)^2 patches, F width of the transformer
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from var_exp.io.pretrained import Published, State, as_rgb, fill, load
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


class DinoFeatures(nn.Module):
    """The outputs of some blocks of a vision transformer.

    Args:
        transformer: timm's, of `load_transformer` or `assemble_transformer`.
        image_size: side in pixels that images are resized to, a multiple of the patch size.
        depths: of the blocks whose outputs are wanted, from 0.

    Raises:
        ValueError: another image_size, or depths that the transformer does not have.
    """

    width: int
    mean: Tensor
    std: Tensor

    def __init__(self, transformer: Any, image_size: int, depths: Sequence[int]):
        from timm.layers import resample_abs_pos_embed

        super().__init__()
        patch_size, num_blocks = transformer.patch_embed.patch_size[0], len(transformer.blocks)
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
        self.image_size, self.depths, self.width = image_size, depths, transformer.embed_dim
        transformer.patch_embed.set_input_size(image_size)
        # As DINO resizes them, without timm's antialiasing.
        grid = [image_size // patch_size] * 2
        positions = resample_abs_pos_embed(transformer.pos_embed.detach(), grid, antialias=False)
        transformer.pos_embed = nn.Parameter(positions)  # (1, 1 + N, F)
        self.transformer = transformer
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) in [-1, 1], C = 1 or 3 -> for each depth features (B, F, N).

        The class token is added to every patch, so that each knows of the whole image.
        """
        images = resize(as_rgb(images), self.image_size)
        images = ((images + 1) / 2 - self.mean) / self.std
        depths = sorted(set(self.depths))
        outputs = self.transformer.forward_intermediates(
            images,
            depths,
            return_prefix_tokens=True,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        features = {
            depth: (patches + token).transpose(1, 2)  # (B, F, N)
            for depth, (patches, token) in zip(depths, outputs, strict=True)
        }
        return [features[depth] for depth in self.depths]


def load_transformer(weights: str | None) -> nn.Module:
    """The transformer of a published file, see `var_exp.io.pretrained.load`.

    Raises:
        ValueError: timm is not installed, or what `load` raises.
    """
    try:
        import timm  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError(
            f"discriminator: DINO needs timm, which is not installed; type pip install "
            f"'var-exp[gan]', or {DINO.without}"
        ) from None
    return load(DINO, weights, assemble_transformer)


def assemble_transformer(state: State) -> nn.Module:
    """timm's VisionTransformer with the weights of a published DINO transformer.

    Its sizes are read off the tensors.

    Raises:
        KeyError, ValueError: the tensors are not those of such a network.
    """
    from timm.models.vision_transformer import VisionTransformer

    width, _, patch_size, _ = state["patch_embed.proj.weight"].shape
    if width % HEAD_WIDTH:
        raise ValueError(f"its width {width} is not a multiple of {HEAD_WIDTH}")
    with torch.device("meta"):
        transformer = VisionTransformer(
            img_size=math.isqrt(state["pos_embed"].shape[1] - 1) * patch_size,
            patch_size=patch_size,
            embed_dim=width,
            depth=sum(name.endswith(".norm1.weight") for name in state),
            num_heads=width // HEAD_WIDTH,
            mlp_ratio=len(state["blocks.0.mlp.fc1.bias"]) / width,
            num_classes=0,
            weight_init="skip",
        )
    return fill(transformer, state)


def resize(images: Tensor, size: int) -> Tensor:
    """Images (B, C, H, W) -> (B, C, size, size): area to shrink, bicubic to grow.

    By matrices, whose backward is deterministic on every device, and in float32. They are made
    where the images are: a copy from the CPU would wait for the device in every step.
    """
    with torch.autocast(images.device.type, enabled=False), images.device:
        rows, columns = (_resize_matrix(side, size) for side in images.shape[-2:])
        return rows @ images @ columns.T


def _resize_matrix(source: int, target: int) -> Tensor:
    return (area_matrix if target < source else bicubic_matrix)(source, target)
