"""Between the stages: the images are encoded once, and stage two trains from their codes.

Processes share the parts of the cache. All of them look at the note of a signal after each batch
and stop together; parts that are there are kept, and the same command goes on with the others.

    B batch, N images, L tokens
"""

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from tqdm import tqdm

from var_exp.data import ImageDataModule, ImageSource, TokenCache
from var_exp.data.tokens.cache import ROWS, Part, delete_codes
from var_exp.distributed.collectives import (
    all_reduce_max,
    barrier,
    broadcast,
    rank,
    world_size,
)
from var_exp.distributed.rank import is_main_process
from var_exp.distributed.signals import Interrupted, SignalHandler
from var_exp.evaluation.evaluator import Evaluator
from var_exp.evaluation.reference import data_fingerprint
from var_exp.evaluation.sampler import device_of
from var_exp.io.lock import locked
from var_exp.io.text import amount, shown_path
from var_exp.tokenizer import VQVAE
from var_exp.training.fit import TrainingStage, own_signals, quiet

PLACES = ("root", "download")  # of a description of images: where they are, not which
SECONDS = 10.0  # at least, between two lines of progress in a log file


@dataclass
class EncodingStage:
    """The stage `tokens`: encodes the images that the next stage trains from.

    Args:
        tokenizer: encodes; may still have to be trained by an earlier stage.
        data: serves the images, and afterwards their codes.
        trainer: returns the Trainer whose processes and devices share the work.
        folder: of the codes.
        description: configuration of the images, as plain data.
        num_views: augmentations of each training image that are encoded.
        batch_size: images that a device encodes at once.
        is_pretrained: whether the tokenizer is final already.
        is_owned: whether the folder belongs to this run alone, so that a restart deletes it.
        restarts: whether this run starts over.
        reader: the stage that trains from the codes; for one that is finished none are made.
        signals: those of this process.
    """

    tokenizer: VQVAE
    data: ImageDataModule
    trainer: Callable[..., L.Trainer]
    folder: Path
    description: Mapping[str, Any]
    num_views: int = 1
    batch_size: int = 64
    is_pretrained: bool = True
    is_owned: bool = True
    restarts: bool = False
    reader: TrainingStage | None = None
    signals: SignalHandler | None = None
    name = "tokens"

    def __str__(self) -> str:
        return f"{self.name} (into {shown_path(self.folder.resolve())})"

    def cache(self, is_pretrained: bool = True) -> TokenCache:
        """The files of the codes, which need not be there."""
        fingerprint = self.tokenizer.fingerprint() if is_pretrained else None
        source = self.data.source
        key = cache_key(source, self.description, self.data.seed, self.tokenizer, fingerprint)
        return TokenCache(self.folder, key, self.num_views)

    def check(self, num_processes: int = 1) -> None:
        """Raise ValueError where the folder holds other codes, as far as that is known yet."""
        if not (self.restarts and self.is_owned):
            self.cache(self.is_pretrained).check()

    def restart(self) -> None:
        """Delete the codes of this run."""
        if self.is_owned:
            delete_codes(self.folder)

    def run(self, evaluator: Evaluator) -> None:
        """Encode what is missing, and let the data module serve codes."""
        cache = self.cache()
        is_complete = cache.is_complete()
        if self.reader is not None and self.reader.is_finished and not is_complete:
            return
        writes = is_main_process() and not is_complete
        with locked(self.folder, "tokens.dir=...") if writes else nullcontext():
            encode_stage(
                self.tokenizer, self.data, self.trainer, cache, self.batch_size, self.signals
            )


def cache_key(
    source: ImageSource,
    data: Mapping[str, Any],
    seed: int,
    tokenizer: VQVAE,
    fingerprint: str | None,
    rows: int = ROWS,
) -> dict[str, Any]:
    """What codes depend on, as plain data.

    Args:
        source: set up.
        data: the source's configuration.
        seed: of the augmentation.
        fingerprint: of the tokenizer; None where it is still to be trained.
        rows: images of a part.
    """
    return {
        "tokenizer": fingerprint,
        "patch_nums": tokenizer.schedule.patch_nums,
        "vocab_size": tokenizer.quantizer.vocab_size,
        "data": {name: value for name, value in data.items() if name not in PLACES},
        "images": {part: data_fingerprint(source, part) for part in ("train", "val")},
        "num_train": len(source.train),
        "num_val": len(source.val),
        "seed": seed if source.augments else None,
        "rows": rows,
    }


def encode_stage(
    tokenizer: VQVAE,
    datamodule: ImageDataModule,
    trainer: Callable[..., L.Trainer],
    cache: TokenCache,
    batch_size: int,
    signal_handler: SignalHandler | None = None,
) -> None:
    """Encode what is missing in a cache, and let the datamodule serve codes from it.

    Args:
        trainer: called with what this function decides, gives the Trainer, whose processes and
            devices share the work.
        batch_size: images that a device encodes at once.
        signal_handler: the signals of this process; None to ignore them.

    Raises:
        ValueError: the folder holds other codes, cannot be written to, or the disk is too small.
        Interrupted: a signal came; parts that are whole are kept.
    """
    signal_handler = signal_handler or SignalHandler()
    with quiet():
        runner = trainer(
            strategy="auto",  # each process has the whole tokenizer
            logger=False,
            limit_val_batches=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            use_distributed_sampler=False,
        )
        own_signals(runner)
        with signal_handler.deferred():
            module = Encoding(tokenizer, datamodule, cache, batch_size, signal_handler)
            runner.validate(module, dataloaders=[], verbose=False)
    datamodule.codes = cache


class Encoding(L.LightningModule):
    """Encodes once processes have met, and does nothing else."""

    def __init__(
        self,
        tokenizer: VQVAE,
        datamodule: ImageDataModule,
        cache: TokenCache,
        batch_size: int,
        signal_handler: SignalHandler,
    ):
        super().__init__()
        self.work = tokenizer, datamodule, cache, batch_size  # in a tuple: no submodule
        self.datamodule, self.signal_handler = datamodule, signal_handler

    def setup(self, stage: str) -> None:
        device = self.trainer.strategy.root_device
        self.datamodule.trainer = self.trainer

        def stop_if_requested() -> None:
            if number := all_reduce_max(self.signal_handler.received or 0, device):
                raise Interrupted(number)

        encode(*self.work, device=device, on_batch=stop_if_requested)

    def validation_step(self, *_: Any) -> None:
        """Asked for by Lightning, and never called."""


def encode(
    tokenizer: VQVAE,
    datamodule: ImageDataModule,
    cache: TokenCache,
    batch_size: int,
    device: torch.device,
    on_batch: Callable[[], None] = lambda: None,
) -> None:
    """Write the missing parts of a cache; all processes must call.

    Args:
        on_batch: called by all processes equally often.
    """
    cache.check()
    if is_main_process():
        cache.begin()
    barrier()
    missing = missing_parts(cache, device)
    if missing:
        announce(cache, missing)
        shares = [missing[first :: world_size()] for first in range(world_size())]
        write_parts(tokenizer, datamodule, cache, shares, batch_size, device, on_batch)
    barrier()
    if is_main_process() and (missing or not cache.is_complete()):
        cache.finish()
    barrier()


def write_parts(
    tokenizer: VQVAE,
    datamodule: ImageDataModule,
    cache: TokenCache,
    shares: Sequence[Sequence[Part]],
    batch_size: int,
    device: torch.device,
    on_batch: Callable[[], None],
) -> None:
    """Encode this process's share of the parts; `on_batch` is called as often as by the others."""
    own, device_before = Batches(shares[rank()], batch_size), device_of(tokenizer)
    tokenizer.to(device).eval()
    batches, steps = iter(datamodule.encoding_loader(own)), own.steps()
    progress, codes = Progress(sum(part.rows for part in shares[rank()])), []
    for _ in range(max(len(Batches(share, batch_size)) for share in shares)):
        if (step := next(steps, None)) is not None:
            part, _, stop = step
            batch = next(batches)
            indices = torch.cat(tokenizer.encode(batch.images.to(device)), dim=1)  # (B, L)
            codes.append((indices.cpu(), batch.labels))
            if stop == part.rows:
                cache.write(part, *(torch.cat(whole).numpy() for whole in zip(*codes, strict=True)))
                codes = []
            progress.add(len(batch.labels))
        on_batch()
    progress.end()
    tokenizer.to(device_before)


def missing_parts(cache: TokenCache, device: torch.device) -> list[Part]:
    """What the first process finds missing or damaged, in all processes."""
    parts = cache.parts()
    found = set(cache.missing(say)) if is_main_process() else set()
    flags = torch.tensor([part in found for part in parts], dtype=torch.int32, device=device)
    return [part for part, flag in zip(parts, broadcast(flags).tolist(), strict=True) if flag]


def announce(cache: TokenCache, missing: Sequence[Part]) -> None:
    """Say what is going to be written; raise ValueError where there is no room for it."""
    num_images = sum(part.rows for part in missing)
    needed, free = num_images * cache.dtype.itemsize, shutil.disk_usage(cache.folder).free
    cache.check_room(num_images, free)
    kept = cache.num_images - num_images
    say(
        f"tokens: encoding {num_images:,} images ({cache.sizes}"
        f"{f'; {kept:,} are there' if kept else ''}): {amount(needed)} in {str(cache.folder)!r}, "
        f"where {amount(free)} are free"
    )


def say(line: str) -> None:
    if is_main_process():
        print(line, file=sys.stderr, flush=True)


# -- batches ----------------------------------------------------------------------------------


class Batches:
    """A batch sampler of (view, index), of which no batch has images of two parts."""

    def __init__(self, parts: Sequence[Part], batch_size: int):
        self.parts, self.batch_size = parts, batch_size

    def __len__(self) -> int:
        return sum(len(range(0, part.rows, self.batch_size)) for part in self.parts)

    def __iter__(self) -> Iterator[list[tuple[int | None, int]]]:
        for part, start, stop in self.steps():
            yield [(part.view, part.start + i) for i in range(start, stop)]

    def steps(self) -> Iterator[tuple[Part, int, int]]:
        """The same as (part, start, stop), counted within the part."""
        for part in self.parts:
            for start in range(0, part.rows, self.batch_size):
                yield part, start, min(start + self.batch_size, part.rows)


# -- progress ---------------------------------------------------------------------------------


class Progress:
    """Of the first process: a bar on a terminal; in a log file a line now and then.

    Args:
        total: images that this process encodes.
    """

    def __init__(self, total: int):
        self.total, self.done = total, 0
        self.started, self.reported = time.monotonic(), 0.0
        hidden = None if is_main_process() else True  # None: where there is no terminal
        self.bar = tqdm(total=total, desc="tokens", unit="image", leave=False, disable=hidden)

    def add(self, count: int) -> None:
        first, self.done = self.done == 0, self.done + count
        self.bar.update(count)
        now = time.monotonic()
        if first or (self.bar.disable and now - self.reported > SECONDS):
            left = (now - self.started) / self.done * (self.total - self.done)
            words = f"{left:.0f} s" if left < 600 else f"{left / 3600:.1f} hours"
            say(f"tokens: {self.done:,} of {self.total:,} images, about {words} left")
            self.reported = now

    def end(self) -> None:
        self.bar.close()
        say(f"tokens: encoded in {time.monotonic() - self.started:.1f} s")
