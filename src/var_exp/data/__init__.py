"""Images: one file per source, and the LightningDataModule that serves them."""

from var_exp.data.datamodule import ImageDataModule
from var_exp.data.digits import Digits
from var_exp.data.image_folder import ImageFolder
from var_exp.data.sampler import GlobalBatchSampler
from var_exp.data.shapes import Shapes
from var_exp.data.shards.dataset import Shards
from var_exp.data.source import Batch, CodeBatch, ImageSource
from var_exp.data.tokens.cache import TokenCache
from var_exp.data.torchvision_sets import CIFAR10, MNIST

__all__ = [
    "Batch",
    "CIFAR10",
    "CodeBatch",
    "Digits",
    "GlobalBatchSampler",
    "ImageDataModule",
    "ImageFolder",
    "ImageSource",
    "MNIST",
    "Shapes",
    "Shards",
    "TokenCache",
]
