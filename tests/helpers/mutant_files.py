"""Mutants of files: checkpoints, images, references and the records of a run, damaged at will.

Some are damaged as a disk damages them, byte by byte; others are well-formed files with something
else in them: a tensor less, another shape, a number that is none, an object that runs code.
"""

import io
import json
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from helpers.damage import DAMAGES
from helpers.damage import spoil as damage
from helpers.feature_networks import Projection
from helpers.mutants import Mutant
from helpers.parquet_files import write_parquet
from helpers.published import tokenizer_state, transformer_state
from helpers.reference_files import SIZE as REFERENCE_SIZE
from helpers.reference_files import images, of_ours, statistics
from var_exp.checkpoint.checkpoint import read_checkpoint, write_checkpoint
from var_exp.checkpoint.load import read_networks
from var_exp.checkpoint.pipeline import VARPipeline
from var_exp.data import Digits, ImageDataModule, ImageFolder, Shards, TokenCache
from var_exp.data.hugging_face import HuggingFace
from var_exp.data.pack import pack
from var_exp.evaluation.reference_file import reference_from_file, save_reference
from var_exp.experiment.resume import read_record
from var_exp.io.run_folder import read_metrics
from var_exp.report import write_report
from var_exp.training.encode import encode
from var_exp.training.resume import newest

NETWORK = Projection(REFERENCE_SIZE)
KINDS = (*DAMAGES, "noise", "doubled", "empty", "another answer")
SIZE = 16


class Smuggled:
    """An object that runs code where it is unpickled."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("smuggled"),)


def prepare(work: Path) -> None:
    """What files are made of, besides the run in work/run."""
    VARPipeline.from_checkpoint(work / "run").save_pretrained(work / "portable")
    (work / "official").mkdir()
    torch.save(transformer_state(), work / "official" / "var.pth")
    torch.save(tokenizer_state(), work / "official" / "vae.pth")
    for name in ("ant", "bee"):
        (work / "images" / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(work / "images" / name / f"{i}.png")
    pack(work / "images", work / "shards", max_bytes=6000)
    write_parquet(work / "parquet", {"train": 8, "validation": 4}, rows_of_group=3)
    save_reference(of_ours(NETWORK), work / "ours.npz")
    np.savez(work / "given.npz", **statistics())
    np.savez(work / "images.npz", arr_0=images(), **statistics())


def spoil(path: Path, draw: random.Random) -> str:
    """Damage a file as a disk or a download does; how."""
    return damage(path, draw, KINDS)


# -- checkpoints ----------------------------------------------------------------------------


def checkpoints(draw: random.Random, place: Path, work: Path) -> Mutant:
    """A checkpoint of ours, a portable folder, or a published file."""
    kind = draw.choice(["run", "run", "portable", "official"])
    if kind == "run":
        stage = draw.choice(["tokenizer", "var"])
        path = place / stage / "last.ckpt"
        path.parent.mkdir()
        shutil.copyfile(work / "run" / stage / "last.ckpt", path)
        feed = draw.choice([lambda: read_networks(path), lambda: newest(path.parent)])
    elif kind == "portable":
        shutil.copytree(work / "portable", place / "portable")
        path = draw.choice(sorted(p for p in (place / "portable").rglob("*") if p.is_file()))
        feed = lambda: read_networks(place / "portable")  # noqa: E731
    else:
        path = place / draw.choice(["var.pth", "vae.pth"])
        shutil.copyfile(work / "official" / path.name, path)
        feed = lambda: read_networks(path, patch_nums=(1, 2, 3, 4, 5))  # noqa: E731
    if draw.random() < 0.4 or path.suffix not in (".ckpt", ".pth"):
        what = spoil(path, draw)
    else:
        what = rewritten(path, draw)
    return Mutant(f"{path.name}: {what}", unsmuggled(feed), (path.name, path.parent.name), place)


def rewritten(path: Path, draw: random.Random) -> str:
    """Give a checkpoint other content, whole and sealed; what."""
    ours = path.suffix == ".ckpt"
    content = read_checkpoint(path) if ours else torch.load(path)
    if draw.random() < 0.1:
        torch.save({"state_dict": Smuggled()}, path)
        return "code"
    if draw.random() < 0.1:
        torch.save(draw.choice([None, [], {}, 3, "x", torch.zeros(3), {"state_dict": {}}]), path)
        return "something else"
    node, key = leaf(content, draw)
    value = node[key]
    change = draw.choice(["gone", "renamed", "other type", "other shape", "not a number"])
    if change == "gone":
        del node[key]
    elif change == "renamed":
        new = f"{key}x" if isinstance(node, dict) else key
        node[new] = node.pop(key) if isinstance(node, dict) else None
    elif change == "other shape" and isinstance(value, torch.Tensor):
        node[key] = value.new_zeros((*value.shape, 2))
    elif change == "not a number" and isinstance(value, torch.Tensor) and value.is_floating_point():
        node[key] = torch.full_like(value, torch.nan)
    else:
        node[key] = draw.choice([None, "x", -1, [], {}, 0.5, torch.zeros(2), 10**12])
    if ours:
        write_checkpoint(content, path)
    else:
        torch.save(content, path)
    return f"{key} {change}"


def leaf(tree: Any, draw: random.Random) -> tuple[Any, Any]:
    """Some entry of nested dicts and lists: what holds it, and its key."""
    node = tree
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = draw.choice(keys)
        inner = node[key]
        deeper = isinstance(inner, dict | list) and inner and draw.random() < 0.85
        if not deeper:
            return node, key
        node = inner


def unsmuggled(feed: Callable[[], object]) -> Callable[[], object]:
    """Feed, and see that no code was run that a file held."""

    def fed() -> None:
        try:
            feed()
        finally:
            assert not Path("smuggled").exists(), "code in a file was run"

    return fed


# -- images ---------------------------------------------------------------------------------


def pictures(draw: random.Random, place: Path, work: Path) -> Mutant:
    """Images of a folder, of shards or of parquet files, of which one is something else."""
    kind = draw.choice(["images", "images", "shards", "parquet"])
    root = place / kind
    shutil.copytree(work / kind, root)
    path = draw.choice(sorted(p for p in root.rglob("*") if p.is_file()))
    how = draw.choice([spoil, odd_image if kind == "images" else spoil, odd_member])
    what = how(path, draw) if how is not odd_member or path.suffix == ".tar" else spoil(path, draw)
    options = {"image_size": SIZE, "channels": draw.choice([1, 3])}
    make = {
        "images": lambda: ImageFolder(str(root), **options),
        "shards": lambda: Shards(str(root), **options),
        "parquet": lambda: HuggingFace(str(root), **options),
    }[kind]
    return Mutant(f"{kind} {path.name}: {what}", lambda: look_at(make()), (kind, path.name), place)


def look_at(source: Any) -> None:
    """Read all images as a training does; those that do not decode are skipped and counted."""
    source.prepare()
    source.setup()
    for part in (source.train, source.val):
        for i in range(len(part)):
            image, _ = part[i]
            assert torch.isfinite(source.val_transform(image)).all()


def odd_image(path: Path, draw: random.Random) -> str:
    """An image in another format, mode or size, or something that is none."""
    mode = draw.choice(["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F", "YCbCr"])
    size = draw.choice([(1, 1), (1, 500), (17, 16), (300, 2)])
    form = draw.choice(["png", "jpeg", "webp", "gif", "bmp", "tiff"])
    held = io.BytesIO()
    try:
        Image.new(mode, size).save(held, form)
    except (OSError, KeyError, ValueError):  # this format has no such mode
        path.unlink()
        draw.choice([path.mkdir, lambda: path.symlink_to("nowhere"), path.touch])()
        return "a folder, a broken link or empty"
    path.write_bytes(held.getvalue())
    return f"{form} {mode} {size}"


def odd_member(path: Path, draw: random.Random) -> str:
    """A tar file with a member more, of another kind or name."""
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo(draw.choice(["../out.png", "x", "x.png", "a/b.cls", "0.cls"]))
        member.type = draw.choice([tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE])
        tar.addfile(member)
    return f"member {member.name}"


# -- references -----------------------------------------------------------------------------


def references(draw: random.Random, place: Path, work: Path) -> Mutant:
    """Statistics and images in an npz file."""
    path = place / draw.choice(["ours.npz", "given.npz", "images.npz"])
    shutil.copyfile(work / path.name, path)
    what = spoil(path, draw) if draw.random() < 0.4 else other_arrays(path, draw)
    feed = lambda: reference_from_file(path, NETWORK, REFERENCE_SIZE, batch_size=8)  # noqa: E731
    return Mutant(f"{path.name}: {what}", unsmuggled(feed), (path.name,), place)


def other_arrays(path: Path, draw: random.Random) -> str:
    with np.load(path) as file:
        arrays = dict(file)
    key = draw.choice(sorted(arrays))
    array = arrays.pop(key)
    change = draw.choice(["gone", "shape", "dtype", "not a number", "code", "huge", "negative"])
    if change == "shape":
        arrays[key] = draw.choice([array[..., None], array.reshape(-1), array.reshape(-1)[:0]])
    elif change == "dtype":
        numbers = ["float16", "int8", "U8", "complex64", "bool"]  # a text becomes no number
        arrays[key] = array.astype(
            draw.choice(numbers if array.dtype.kind != "U" else ["U8", "S9"])
        )
    elif change == "not a number":
        arrays[key] = np.full(array.shape, np.nan)
    elif change == "code":
        arrays[key] = np.array([Smuggled()], dtype=object)
    elif change == "huge":
        arrays[key] = np.full(array.shape, 1e300)
    elif change == "negative":
        arrays[key] = -array if array.dtype.kind in "fi" else array
    np.savez(path, **arrays)
    return f"{key} {change}"


# -- tokens ---------------------------------------------------------------------------------


def tokens(draw: random.Random, place: Path, work: Path) -> Mutant:
    """A token cache: a part, or the record."""
    folder = place / "tokens"
    shutil.copytree(work / "run" / "tokens", folder)
    key = json.loads((folder / "tokens.json").read_text())["key"]
    path = draw.choice(sorted(folder.iterdir()))
    if path.suffix == ".json" and draw.random() < 0.6:
        what = odd(path, draw)
    elif path.suffix == ".npy" and draw.random() < 0.4:
        what = other_rows(path, draw)
    else:
        what = spoil(path, draw)
    names = [path.name, "holds other codes"]
    if draw.random() < 0.3:
        (folder / "tokens.json").unlink()
        names.append("tokens.json")
        what += ", without record"
    feed = unsmuggled(lambda: mend(TokenCache(folder, key), work))
    return Mutant(f"{path.name}: {what}", feed, tuple(names), place)


def other_rows(path: Path, draw: random.Random) -> str:
    """A well-formed part with something else in it."""
    rows = np.load(path)
    change = draw.choice(["shorter", "codes alone", "code", "one row"])
    others = {"shorter": rows[1:], "codes alone": rows["codes"], "one row": rows[0]}
    np.save(path, others.get(change, np.array([Smuggled()], dtype=object)))
    return change


def mend(cache: TokenCache, work: Path) -> None:
    """Encode what is missing or damaged, as a run does, and read everything."""
    source = Digits()
    source.setup()
    tokenizer = read_networks(work / "run" / "tokenizer").tokenizer
    encode(tokenizer, ImageDataModule(source), cache, 512, torch.device("cpu"))
    for view, count in ((0, len(source.train)), (None, len(source.val))):
        codes = cache.read(view, np.arange(count))["codes"]
        assert codes.max() < cache.key["vocab_size"]


# -- records --------------------------------------------------------------------------------


def records(draw: random.Random, place: Path, work: Path) -> Mutant:
    """What a run folder says of itself: figures, configuration, environment, log."""
    names = ["metrics.json", ".hydra/config.yaml", "environment.json", "csv/var/metrics.csv"]
    run = place / "run"
    shutil.copytree(work / "run", run, ignore=shutil.ignore_patterns("*.ckpt", "*.png", "*.npz"))
    path = run / draw.choice(names)
    what = spoil(path, draw) if path.suffix != ".json" or draw.random() < 0.5 else odd(path, draw)
    feed = {
        "metrics.json": lambda: (read_metrics(path), write_report(run)),
        "config.yaml": lambda: (write_report(run), read_record(run)),
        "environment.json": lambda: (write_report(run), read_record(run)),
        "metrics.csv": lambda: write_report(run),
    }[path.name]
    return Mutant(f"{path.name}: {what}", feed, (path.name, str(run)), place / "out")


def odd(path: Path, draw: random.Random) -> str:
    """JSON that is well-formed, with something else in it; what."""
    content = json.loads(path.read_text())
    node, key = leaf(content, draw)
    node[key] = draw.choice([None, "x", [], {}, -1, 1e400, True, {"a": [1]}, [[1]]])
    if draw.random() < 0.1:
        content = draw.choice([None, [], 3, "x"])
    path.write_text(json.dumps(content))
    return f"{key} {node[key]!r}"
