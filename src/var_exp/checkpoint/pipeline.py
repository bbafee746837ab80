"""A trained pair of networks in one folder, without the training frameworks.

    config.json                     how the networks are built, and the names of the classes
    transformer/model.safetensors   their weights
    tokenizer/model.safetensors

    pipeline = VARPipeline.from_pretrained("digits")
    images = pipeline([3, 7], num_samples=16, seed=0)

The weights are plain tensors and the configuration plain data (`var_exp.configurable`), so nothing
in such a folder can run code.
"""

import json
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from var_exp.checkpoint.checkpoint import load_networks
from var_exp.configurable import build
from var_exp.io.files import atomic_write
from var_exp.sampling.compile import compile_for_sampling
from var_exp.sampling.generate import check_fit, generate
from var_exp.sampling.labels import take_turns
from var_exp.tokenizer import VQVAE
from var_exp.transformer import VAR

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
NETWORKS = ("transformer", "tokenizer")
Network = TypeVar("Network", VAR, VQVAE)


class VARPipeline:
    """A transformer and its tokenizer: labels to images.

    Args:
        transformer, tokenizer: networks that fit each other.
        class_names: of the classes in their order, where they have names.

    Raises:
        ValueError: the networks do not fit each other.
    """

    def __init__(self, transformer: VAR, tokenizer: VQVAE, class_names: Sequence[str] = ()):
        check_fit(transformer, tokenizer)
        self.transformer, self.tokenizer = transformer, tokenizer
        self.class_names = tuple(class_names)

    def __call__(
        self,
        labels: int | Sequence[int] | Tensor | None = None,
        *,
        num_samples: int | None = None,
        seed: int = 0,
        cfg_scale: float = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        temperature: float = 1.0,
        batch_size: int = 32,
    ) -> Tensor:
        """Draw images.

        Args:
            labels: one class or several; None draws without a class.
            num_samples: how many images; the labels take turns. One for each label unless
                given.
            seed, cfg_scale, top_k, top_p, temperature: as in `generate`.
            batch_size: images drawn at once; it changes no image by more than rounding.

        Returns:
            (num_samples, C, H, W) in [0, 1], on the device of the networks.

        Raises:
            ValueError: an argument out of its range.
        """
        classes = self._labels(labels, num_samples)
        if batch_size < 1:
            raise ValueError(f"pipeline: batch_size must be at least 1, got {batch_size}")
        images = [
            generate(
                self.transformer,
                self.tokenizer,
                classes[start : start + batch_size],
                sample_ids=range(start, min(start + batch_size, len(classes))),
                seed=seed,
                cfg_scale=cfg_scale,
                top_k=top_k,
                top_p=top_p,
                temperature=temperature,
            )
            for start in range(0, len(classes), batch_size)
        ]
        return torch.cat(images)

    def _labels(self, labels, num_samples: int | None) -> list[int]:
        labels = torch.as_tensor(self.transformer.num_classes if labels is None else labels)
        if labels.numel() and labels.is_floating_point():
            raise ValueError(f"pipeline: labels must be whole numbers, got {labels.tolist()}")
        asked = labels.flatten().tolist()
        count = len(asked) if num_samples is None else num_samples
        if not asked or count < 1:
            raise ValueError(
                f"pipeline: expected at least 1 label and 1 sample, got {len(asked)} labels and "
                f"num_samples={num_samples}"
            )
        return take_turns(asked, range(count))

    def to(self, device: str | torch.device) -> "VARPipeline":
        """Move both networks to a device."""
        self.transformer.to(device)
        self.tokenizer.to(device)
        return self

    def compile(self, graphs: bool = False) -> None:
        """Draw by compiled code from now on, which is made while the first images are drawn.

        It needs a C++ compiler, or on a GPU Triton. Call it on the device where it is to draw:
        a CPU's decoder stays as it is.

        Args:
            graphs: record CUDA graphs, too, on a GPU: see `compile_for_sampling`.
        """
        compile_for_sampling(self.transformer, self.tokenizer, graphs=graphs)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write the folder, over an older one of the same name."""
        folder = Path(folder)
        config = {
            "format": FORMAT,
            "networks": {name: getattr(self, name).config for name in NETWORKS},
            "class_names": list(self.class_names),
        }
        folder.mkdir(parents=True, exist_ok=True)
        # Without a configuration a folder is unfinished.
        (folder / CONFIG).unlink(missing_ok=True)
        for name in NETWORKS:
            state = getattr(self, name).state_dict()
            tensors = {key: value.cpu().contiguous() for key, value in state.items()}
            with atomic_write(folder / name / WEIGHTS) as unfinished:
                save_file(tensors, unfinished, metadata={"format": "pt"})
        with atomic_write(folder / CONFIG) as unfinished:
            unfinished.write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> "VARPipeline":
        """Read a folder that `save_pretrained` wrote; networks in evaluation mode, on the CPU.

        Raises:
            ValueError: the folder or a file in it is missing, damaged or of another format, or
                the weights do not fit the configuration.
        """
        folder = Path(folder)
        config = _read_config(folder / CONFIG)
        transformer = _read_network(folder, "transformer", VAR, config)
        tokenizer = _read_network(folder, "tokenizer", VQVAE, config)
        return cls(transformer, tokenizer, config.get("class_names", ()))

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike, weights: str | None = None) -> "VARPipeline":
        """The networks of a run folder or checkpoint that `train.py` wrote, on the CPU.

        Args:
            weights: "averaged", "raw" or None, as in `load_networks`.

        Raises:
            ValueError: as `load_networks`, or the checkpoint has no transformer yet.
        """
        networks = load_networks(path, weights)
        if networks.transformer is None:
            raise ValueError(
                f"pipeline: {str(path)!r} holds a tokenizer only; expected a checkpoint of the "
                f"var stage"
            )
        return cls(networks.transformer, networks.tokenizer, networks.info["class_names"])


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except OSError:
        raise ValueError(
            f"pipeline: {str(path)!r} is missing; expected a folder that save_pretrained wrote"
        ) from None
    except ValueError as error:  # also text that is no text
        raise ValueError(f"pipeline: {str(path)!r} is damaged ({error})") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else None
        raise ValueError(f"pipeline: {str(path)!r} has the format {found}, expected {FORMAT}")
    return config


def _read_network(folder: Path, name: str, kind: type[Network], config: dict[str, Any]) -> Network:
    path = folder / name / WEIGHTS
    if not path.is_file():
        raise ValueError(f"pipeline: {str(path)!r} is missing; the folder is not whole")
    try:
        network = build(config["networks"][name])
        network.load_state_dict(load_file(path))
    except SafetensorError as error:
        raise ValueError(f"pipeline: {str(path)!r} is damaged ({error})") from None
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 400, placeholder=" ...")
        raise ValueError(
            f"pipeline: {str(path)!r} does not fit {str(folder / CONFIG)!r} ({reason})"
        ) from None
    if not isinstance(network, kind):
        raise ValueError(
            f"pipeline: {str(folder / CONFIG)!r} has a {type(network).__name__} as its {name}, "
            f"expected a {kind.__name__}"
        )
    return network.eval().requires_grad_(False)
