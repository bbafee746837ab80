"""Networks that others trained, and that only look on here.

A perceptual loss and a projected discriminator see through published networks. What they need is
in this file: where a published file lies, reading it into a network, and holding that network
where training does not find it.
"""

import os
import re
from collections.abc import Callable, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

State = Mapping[str, Tensor]
Network = TypeVar("Network", bound=nn.Module)


class Frozen:
    """A network that is used and never trained, hidden from the module that owns it.

    On purpose no `nn.Module`. A submodule's weights go into every checkpoint, to the optimizer
    and through data parallelism's copies, and they are cast along with their owner: hundreds of
    megabytes that a file has already, and none of it wanted. Held like this they follow the
    images to their device instead. A copy of the owner shares them, since nobody changes them.
    """

    def __init__(self, network: nn.Module):
        self.network = network.eval().requires_grad_(False)

    def __call__(self, images: Tensor, *others: Tensor):
        if next(self.network.parameters()).device != images.device:
            # Validation runs in inference mode; weights that moved in it could not serve a
            # backward pass later.
            with torch.inference_mode(False):
                self.network.to(images.device)
        return self.network(images, *others)

    def __deepcopy__(self, memo: dict) -> "Frozen":
        return self


class Published(NamedTuple):
    """A published file of weights, and what to tell a user who lacks it.

    part: of ours, that needs it; messages begin with it.
    what: the network that it holds.
    url:  where it is published; its last part is the file's name.
    key:  the setting that says where it lies.
    without: how to do without.
    """

    part: str
    what: str
    url: str
    key: str
    without: str

    def refusal(self, file: Path, problem: str) -> ValueError:
        return ValueError(
            f"{self.part}: {file} {problem}; put {self.what}, published as "
            f"{os.path.basename(self.url)}, there, or name its place ({self.key}=PATH), or "
            f"{self.without}"
        )


def load(
    published: Published, path: str | os.PathLike | None, assemble: Callable[[State], Network]
) -> Network:
    """The network of a published file.

    Args:
        path: of the file. None looks in torch.hub's cache, where the file is fetched to if it
            is missing.
        assemble: builds the network from its state dict; raises KeyError or ValueError where
            that is of another network.

    Raises:
        ValueError: the file is missing and cannot be fetched, is damaged, or holds another
            network.
    """
    file = find(published, path)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises anything, from KeyError to struct.error
        problem = f"is damaged or holds code ({type(error).__name__})"
        raise published.refusal(file, problem) from None
    try:
        return assemble(_tensors(state))
    except (KeyError, ValueError) as error:
        raise published.refusal(file, f"holds something else ({error})") from None


def find(published: Published, path: str | os.PathLike | None) -> Path:
    """The published file: at `path`, or for None in torch.hub's cache, as `load` says.

    Raises:
        ValueError: it is missing and cannot be fetched.
    """
    file = _cached(published) if path is None else Path(path).expanduser()
    if not file.is_file():
        raise published.refusal(file, "is missing")
    return file


def _cached(published: Published) -> Path:
    """The file's place in torch.hub's cache, fetched if it is not there yet."""
    file = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(published.url))
    if not file.exists():
        digest = re.search(r"-([0-9a-f]{8,})\.", file.name)  # torch's files carry their hash
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(
                published.url, str(file), digest and digest[1], progress=False
            )
        except (OSError, RuntimeError, HTTPException) as error:
            problem = f"is missing and could not be fetched ({type(error).__name__})"
            raise published.refusal(file, problem) from None
    return file


def _tensors(state: object) -> State:
    if isinstance(state, Mapping) and all(isinstance(t, Tensor) for t in state.values()):
        return state
    raise ValueError("not a state dict")


def fill(network: Network, state: State) -> Network:
    """Give a network, which may be without memory, exactly these weights, in float32.

    Raises:
        ValueError: names or shapes differ; the first such tensor is named.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in expected | given:
        if given.get(name) != expected.get(name):
            raise ValueError(
                f"the shape of {name} is {given.get(name)}, expected {expected.get(name)}"
            )
    weights = {name: tensor.float() for name, tensor in state.items()}
    network.load_state_dict(weights, assign=True)
    return network


def as_rgb(images: Tensor) -> Tensor:
    """Images (B, 1 or 3, H, W) -> (B, 3, H, W) float32, grey ones repeated."""
    return images.float().expand(-1, 3, -1, -1)
