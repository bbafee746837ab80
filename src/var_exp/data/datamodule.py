"""From a source to loaders: the one LightningDataModule that both stages share.

`plan` says how large and how many the batches of the coming stage are; the loaders are
built when Lightning asks for them, from the trainer's rank and world size. One Lightning
epoch is the whole stage, so the training loader has `num_batches` batches and is iterated
once. Whatever is random about an item comes from (seed, epoch, index), so neither the
number of workers nor an interruption changes it. Where the images were encoded beforehand
(`codes`), codes take their places in batches, of the same images in the same order.
"""

from collections.abc import Iterable
from typing import Annotated, Literal

import lightning as L
import torch
from annotated_types import Ge, Le
from pydantic import PositiveInt
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from var_exp.configurable import Seed, checked
from var_exp.data.sampler import GlobalBatchSampler
from var_exp.data.source import Batch, CodeBatch, Images, ImageSource, RawImage, rng_for
from var_exp.data.tokens.cache import TokenCache
from var_exp.data.tokens.dataset import TrainCodes, ValCodes
from var_exp.data.workers import AUTO, Workers, number_of_workers
from var_exp.distributed.signals import ignore_signals

Prefetch = Annotated[int, Ge(1), Le(1000)]


class ImageDataModule(L.LightningDataModule):
    """Serves a source's images as `Batch`es, or their codes as `CodeBatch`es.

    seed:           of the order of images and of their augmentation
    num_workers:    processes that load ahead; 0 loads in the training process. "auto": a number
                    that fits the machine where images are costly, else 0
    pin_memory:     page-locked batches, for faster copies to a GPU. "auto": where there is one
    prefetch:       batches that each of those processes has ready at most; they take memory
    val_batch_size: images per validation batch of one process
    """

    batch_size: int
    num_batches: int

    @checked
    def __init__(
        self,
        source: ImageSource,
        seed: Seed = 0,
        num_workers: Workers = 0,
        pin_memory: bool | Literal["auto"] = False,
        prefetch: Prefetch = 2,
        val_batch_size: PositiveInt = 64,
    ):
        super().__init__()
        self.source = source
        self.seed = seed
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.prefetch = prefetch
        self.val_batch_size = val_batch_size
        self.batch_size = self.num_batches = None  # type: ignore[assignment]  # until `plan`
        self.start_batch = 0
        self.codes: TokenCache | None = None  # whole, of this source and this seed

    def plan(self, batch_size: int, num_batches: int) -> None:
        """States the coming stage: its global batch size, and its length in batches."""
        self.batch_size, self.num_batches, self.start_batch = batch_size, num_batches, 0

    @property
    def rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def prepare_data(self) -> None:
        self.source.prepare()

    def setup(self, stage: str | None = None) -> None:
        self.source.setup()

    def train_dataloader(self) -> DataLoader:
        """`num_batches` global batches, less the `start_batch` that a resumed run has seen."""
        assert self.batch_size is not None, "call plan(batch_size, num_batches) before training"
        sampler = GlobalBatchSampler(
            num_samples=len(self.source.train),
            batch_size=self.batch_size,
            num_batches=self.num_batches,
            seed=self.seed,
            rank=self.rank,
            world_size=self.world_size,
            start_batch=self.start_batch,
            order=self.source.order,
        )
        items: Dataset = TrainItems(self.source, self.seed)
        if self.codes is not None:
            items = TrainCodes(self.codes, stride_of(self.source))
        return self._loader(items, batch_sampler=sampler)

    def val_dataloader(self) -> DataLoader:
        """The whole validation set in order, every world_size-th image from the rank-th."""
        items = ValItems(self.source) if self.codes is None else ValCodes(self.codes)
        shard = Subset(items, range(self.rank, len(items), self.world_size))
        return self._loader(shard, batch_size=self.val_batch_size, shuffle=False)

    def encoding_loader(self, batches: Iterable[list[tuple[int | None, int]]]) -> DataLoader:
        """Batches of (view, index): images as a view shows them, those of validation for None."""
        items = ShownItems(self.source, self.seed)
        own = torch.Generator()  # or the global one would draw a number more
        return self._loader(items, batch_sampler=batches, generator=own)

    def _loader(self, items: Dataset, **options) -> DataLoader:
        num_workers = self._num_workers()
        return DataLoader(
            items,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            prefetch_factor=self.prefetch if num_workers > 0 else None,
            pin_memory=self._pins(),
            worker_init_fn=ignore_signals,
            collate_fn=collate,
            **options,
        )

    def _num_workers(self) -> int:
        if isinstance(self.num_workers, int):
            return self.num_workers
        processes = self.trainer.num_devices if self.trainer else 1
        costly = self.source.costly and self.codes is None
        return number_of_workers(AUTO, processes) if costly else 0

    def _pins(self) -> bool:
        if isinstance(self.pin_memory, bool):
            return self.pin_memory
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"


class TrainItems(Dataset):
    """Augmented training images by (epoch, index)."""

    def __init__(self, source: ImageSource, seed: int):
        self.source, self.seed = source, seed

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple[Tensor, int, int]]:
        stride = stride_of(self.source)
        numbers = [epoch * stride + index for epoch, index in keys]
        return [
            (self.source.train_transform(image, rng_for(self.seed, *key)), label, number)
            for (image, label), number, key in zip(
                read(self.source.train, numbers), numbers, keys, strict=True
            )
        ]


class ValItems(Dataset):
    """Validation images, as they are, by index."""

    def __init__(self, source: ImageSource):
        self.source = source

    def __len__(self) -> int:
        return len(self.source.val)

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int, int]]:
        return [
            (self.source.val_transform(image), label, index)
            for (image, label), index in zip(read(self.source.val, indices), indices, strict=True)
        ]


class ShownItems(Dataset):
    """Images by (view, index), where epoch v shows view v; validation images for the view None."""

    def __init__(self, source: ImageSource, seed: int):
        self.train, self.val = TrainItems(source, seed), ValItems(source)

    def __getitems__(self, keys: list[tuple[int | None, int]]) -> list[tuple[Tensor, int, int]]:
        if keys[0][0] is None:
            return self.val.__getitems__([index for _, index in keys])
        return self.train.__getitems__([(view, i) for view, i in keys if view is not None])


def stride_of(source: ImageSource) -> int:
    """By how much the number of image i grows from one epoch to the next."""
    return len(source.train) if source.endless else 0


def read(dataset: Images, indices: list[int]) -> list[tuple[RawImage, int]]:
    """The raw items, all at once where the dataset is quicker that way."""
    if hasattr(dataset, "__getitems__"):
        return dataset.__getitems__(indices)
    return [dataset[index] for index in indices]


def collate(items: list[tuple[Tensor, int, int]] | CodeBatch) -> Batch | CodeBatch:
    if isinstance(items, CodeBatch):
        return items  # a batch at once
    images, labels, indices = zip(*items, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), torch.tensor(indices))
