"""LPIPS: how different two images look, rather than how far their pixels are apart.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (arXiv
1801.03924). Both images pass a frozen VGG16; at five depths the features of each place are
brought to length one, and their squared differences are weighted by channel with weights that
were fitted to people's judgements.

    B batch, (C, H, W) an image, F channels and (h, w) places of one depth's features
"""

from collections.abc import Iterator, Sequence
from importlib import resources

import torch
import torchvision
from torch import Tensor, nn

from var_exp.io.pretrained import Frozen, Published, State, as_rgb, fill, load

VGG16 = Published(
    part="perceptual",
    what="torchvision's VGG16",
    url=torchvision.models.VGG16_Weights.IMAGENET1K_V1.url,
    key="model.tokenizer.loss.perceptual.weights",
    without="train without this term (model.tokenizer.loss.perceptual=null "
    "model.tokenizer.loss.lpips=0)",
)

# Of VGG16's features: relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3, each before a pooling.
DEPTHS = (3, 8, 15, 22, 29)

# Each of the four poolings before relu5_3 halves the sides, and something must remain.
SMALLEST_SIDE = 16


class LPIPS(nn.Module):
    """The perceptual distance of images.

    It has neither parameters nor a state: see `Frozen`.

    Args:
        weights: torchvision's file of VGG16. None looks in torch.hub's cache, and tries to fetch
            the file there if it is missing. The weights of the channels come with torchmetrics.

    Raises:
        ValueError: the file is missing and cannot be fetched, is damaged, or holds another
            network.
    """

    def __init__(self, weights: str | None = None):
        super().__init__()
        features = load(VGG16, weights, assemble_features)
        self.smallest_side = SMALLEST_SIDE
        self.network = Frozen(Distance(features, published_channel_weights()))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1], C = 1 or 3 -> distances (B,) >= 0, float32.

        Under autocast VGG runs in its precision; differences are taken in float32.

        Raises:
            ValueError: images below 16 pixels a side.
        """
        if min(a.shape[-2:]) < SMALLEST_SIDE:
            raise ValueError(
                f"perceptual: LPIPS takes images of at least {SMALLEST_SIDE} pixels a side, got "
                f"(H, W) = {tuple(a.shape[-2:])} (model.tokenizer.loss.lpips=0 does "
                f"without it)"
            )
        return self.network(a, b)


class Distance(nn.Module):
    """Equation 1 of the paper.

    Args:
        features: of VGG16, up to relu5_3.
        channel_weights: one (F, 1, 1) for each depth.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, features: nn.Sequential, channel_weights: Sequence[Tensor]):
        super().__init__()
        self.features = features
        self.channel_weights = nn.ParameterList(channel_weights)
        # Mean and deviation of ImageNet's colours, for images in [-1, 1].
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        distance = torch.zeros(len(a), device=a.device)
        for x, y, weight in zip(self.see(a), self.see(b), self.channel_weights, strict=True):
            difference = (unit_length(x) - unit_length(y)).square()  # (B, F, h, w)
            distance = distance + (weight * difference).sum(dim=1).mean(dim=(1, 2))  # (B,)
        return distance

    def see(self, images: Tensor) -> Iterator[Tensor]:
        """The features (B, F, h, w) at each depth."""
        x = (as_rgb(images) - self.mean) / self.std
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in DEPTHS:
                yield x


def unit_length(x: Tensor) -> Tensor:
    """The features of each place at length one, in float32; zeros keep a finite gradient."""
    x = x.float()
    return x / (x.square().sum(dim=1, keepdim=True) + 1e-8).sqrt()


def assemble_features(state: State) -> nn.Sequential:
    """The convolutions of torchvision's VGG16 up to relu5_3; the classifier is left out."""
    prefix = "features."
    mine = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    with torch.device("meta"):  # the classifier alone would take half a gigabyte
        network = torchvision.models.vgg16().features
    return fill(network, mine)[: DEPTHS[-1] + 1]


def published_channel_weights() -> list[Tensor]:
    """For each depth (F, 1, 1), fitted by the authors; torchmetrics carries the file."""
    place = resources.files("torchmetrics").joinpath("functional/image/lpips_models/vgg.pth")
    with resources.as_file(place) as file:
        state = torch.load(file, map_location="cpu", weights_only=True)
    return [state[f"lin{i}.model.1.weight"][0] for i in range(len(DEPTHS))]
