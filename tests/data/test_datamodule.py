"""The datamodule adds order, ranks and augmentation, all of them functions of the seed."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from var_exp.data import Batch, Digits, ImageDataModule, ImageSource, Shapes
from var_exp.data.source import TensorImages


class Noisy(ImageSource):
    """Nine images of constant grey; augmentation adds noise."""

    def __init__(self):
        super().__init__("noisy", 4, channels=1, class_names=["a", "b", "c"])

    def load(self):
        images = torch.arange(9, dtype=torch.uint8).view(9, 1, 1, 1).expand(9, 1, 4, 4)
        labels = torch.arange(9) % 3
        return TensorImages(images, labels), TensorImages(images[:7], labels[:7])

    def train_transform(self, image, rng):
        return self.val_transform(image) + torch.tensor(rng.random((1, 4, 4)), dtype=torch.float32)


def datamodule(source=None, rank=0, world_size=1, plan=(4, 6), **changes) -> ImageDataModule:
    loaders = ImageDataModule(source or Noisy(), **changes)
    loaders.prepare_data()
    loaders.setup()
    loaders.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
    loaders.plan(*plan)
    return loaders


def rows(batches) -> list:
    """-> (image bytes, label, index) of each image in order"""
    return [
        (image.numpy().tobytes(), label.item(), index.item())
        for batch in batches
        for image, label, index in zip(*batch, strict=True)
    ]


def test_a_batch_names_its_parts():
    batch = next(iter(datamodule(Digits(), plan=(5, 1)).train_dataloader()))
    assert isinstance(batch, Batch)
    assert batch.images.shape == (5, 1, 16, 16) and batch.images.dtype == torch.float32
    assert batch.labels.dtype == batch.indices.dtype == torch.int64
    assert batch.images.min() >= -1 and batch.images.max() <= 1


@pytest.mark.parametrize("split", ["train", "val"])
def test_labels_and_indices_belong_to_their_images(split):
    loaders = datamodule(Digits(), plan=(64, 3))
    stored = getattr(loaders.source, split)
    for batch in getattr(loaders, f"{split}_dataloader")():
        for image, label, index in zip(*batch, strict=True):
            pixels, stored_label = stored[index.item()]
            assert torch.equal(image, loaders.source.val_transform(pixels))
            assert label == stored_label


def test_augmentation_is_the_same_with_and_without_workers():
    assert rows(datamodule(num_workers=0).train_dataloader()) == rows(
        datamodule(num_workers=2).train_dataloader()
    )


def test_augmentation_differs_by_epoch_image_and_seed():
    noise = rows(datamodule(plan=(9, 3)).train_dataloader())
    assert len({pixels for pixels, _, _ in noise}) == 27
    other = rows(datamodule(plan=(9, 3), seed=1).train_dataloader())
    assert not {pixels for pixels, _, _ in noise} & {pixels for pixels, _, _ in other}


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_ranks_together_train_on_what_one_process_trains_on(world_size):
    ranks = [
        rows(datamodule(rank=r, world_size=world_size).train_dataloader())
        for r in range(world_size)
    ]
    together = [row for share in zip(*ranks, strict=True) for row in share]
    assert together == rows(datamodule().train_dataloader())


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_ranks_together_validate_each_image_once(world_size):
    shares = [
        datamodule(rank=r, world_size=world_size, val_batch_size=2) for r in range(world_size)
    ]
    seen = [row for share in shares for row in rows(share.val_dataloader())]
    assert sorted(index for _, _, index in seen) == list(range(7))
    assert sorted(seen, key=lambda row: row[2]) == rows(datamodule().val_dataloader())


def test_a_resumed_loader_gives_the_tail_of_the_uninterrupted_one():
    loaders = datamodule()
    whole = rows(loaders.train_dataloader())
    loaders.start_batch = 4
    assert rows(loaders.train_dataloader()) == whole[4 * 4 :]


def test_an_endless_source_shows_new_images_in_every_epoch():
    batches = datamodule(Shapes(num_train=12), plan=(12, 3)).train_dataloader()
    for epoch, batch in enumerate(batches):
        assert sorted(batch.indices.tolist()) == list(range(12 * epoch, 12 * epoch + 12))


def test_a_plan_begins_at_its_start_and_serves_the_next_stage():
    loaders = datamodule(plan=(4, 6))
    loaders.start_batch = 5
    loaders.plan(batch_size=3, num_batches=2)
    assert [len(batch.labels) for batch in loaders.train_dataloader()] == [3, 3]


def test_without_a_trainer_there_is_one_process():
    loaders = ImageDataModule(Noisy())
    assert (loaders.rank, loaders.world_size) == (0, 1)


class Recorder(L.LightningModule):
    """Notes which images each batch number brought."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(16, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch_idx, batch.indices.tolist()))
        return self.layer(batch.images.flatten(1)).mean()

    def validation_step(self, batch, batch_idx):
        assert isinstance(batch, Batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(plan, start_batch=0, callbacks: list[Callback] = (), checkpoint=None) -> list:
    loaders, module = ImageDataModule(Noisy()), Recorder()
    loaders.plan(*plan)
    loaders.start_batch = start_batch
    L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        check_val_every_n_epoch=None,
        val_check_interval=4,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
    ).fit(module, loaders, ckpt_path=checkpoint)
    return module.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stop", [1, 3, 5, 9, 10])
def test_lightning_resumes_at_any_batch_and_runs_to_the_end(tmp_path, stop):
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit((4, 10), callbacks=[saver])
    assert len(whole) == 10
    assert fit((4, 10), stop, checkpoint=tmp_path / f"step={stop}.ckpt") == whole[stop:]
