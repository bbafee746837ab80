"""DINO's published tensors do in timm's transformer what they do in DINO's."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from var_exp.tokenizer.dino import DinoFeatures, assemble_transformer, load_transformer, resize


def published_state(width=128, depth=3, patch=4, grid=4, device="cpu") -> dict[str, torch.Tensor]:
    """A random state dict with the names and shapes of DINO's published files."""
    hidden = 4 * width
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + grid**2, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    for i in range(depth):
        layers = {
            "norm1": (width,),
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "norm2": (width,),
            "mlp.fc1": (hidden, width),
            "mlp.fc2": (width, hidden),
        }
        for name, shape in layers.items():
            shapes[f"blocks.{i}.{name}.weight"] = shape
            shapes[f"blocks.{i}.{name}.bias"] = shape[:1]
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    return {name: 0.1 * torch.randn(shape, device=device) for name, shape in shapes.items()}


def slow_features(state, images, depths, heads, patch) -> list[torch.Tensor]:
    """DINO's forward pass, head by head, on images that are normalised already."""

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    rows = []
    for top in range(0, images.shape[2], patch):
        for left in range(0, images.shape[3], patch):
            pixels = images[:, :, top : top + patch, left : left + patch].flatten(1)
            rows.append(pixels @ state["patch_embed.proj.weight"].flatten(1).T)
    x = torch.stack(rows, dim=1) + state["patch_embed.proj.bias"]
    x = torch.cat([state["cls_token"].repeat(len(x), 1, 1), x], dim=1) + state["pos_embed"]
    outputs = []
    for i in range(1 + max(depths)):
        q, k, v = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").chunk(3, dim=-1)
        seen = []
        for qh, kh, vh in zip(*(t.chunk(heads, dim=-1) for t in (q, k, v)), strict=True):
            seen.append((qh @ kh.mT / qh.shape[-1] ** 0.5).softmax(-1) @ vh)
        x = x + linear(torch.cat(seen, dim=-1), f"blocks.{i}.attn.proj")
        hidden = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        x = x + linear(F.gelu(hidden), f"blocks.{i}.mlp.fc2")
        outputs.append((x[:, 1:] + x[:, :1]).transpose(1, 2))
    return [outputs[depth] for depth in depths]


@torch.no_grad()
def test_features_are_those_of_dinos_own_transformer():
    state = published_state()
    features = DinoFeatures(assemble_transformer(state), image_size=16, depths=(0, 2)).eval()
    images = torch.rand(2, 3, 16, 16)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    expected = slow_features(state, (images - mean) / std, depths=(0, 2), heads=2, patch=4)
    found = features(2 * images - 1)
    assert [f.shape for f in found] == [(2, 128, 16)] * 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_published_size_has_as_many_weights_as_published():
    state = published_state(width=384, depth=12, patch=16, grid=14, device="meta")
    transformer = assemble_transformer(state)
    assert sum(p.numel() for p in transformer.parameters()) == 21_665_664
    assert transformer.blocks[0].attn.num_heads == 6
    assert transformer.patch_embed.img_size == (224, 224)


@pytest.mark.parametrize("name", ["blocks.1.mlp.fc2.bias", "pos_embed", "cls_token"])
def test_a_tensor_too_few_or_too_many_is_refused(name):
    state = published_state()
    with pytest.raises(ValueError, match="ls1"):
        assemble_transformer(state | {"blocks.0.ls1.gamma": torch.ones(128)})
    del state[name]
    with pytest.raises((KeyError, ValueError)):
        assemble_transformer(state)


def test_a_width_that_dinos_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="100"):
        assemble_transformer(published_state(width=100))


@pytest.mark.parametrize("grid", [2, 4, 6])
def test_positions_are_resized_as_dino_does(grid):
    """By bicubic interpolation, those of the class token apart; 4 is the grid of the file."""
    state = published_state()
    features = DinoFeatures(assemble_transformer(state), image_size=4 * grid, depths=[0])
    found = features.transformer.pos_embed
    patches = state["pos_embed"][:, 1:].mT.unflatten(2, (4, 4))
    expected = F.interpolate(patches, size=(grid, grid), mode="bicubic").flatten(2).mT
    torch.testing.assert_close(found[:, 1:], expected)
    assert torch.equal(found[:, :1], state["pos_embed"][:, :1])


@torch.no_grad()
def test_depths_come_in_the_order_that_is_wanted():
    transformer, images = assemble_transformer(published_state()), torch.rand(2, 3, 16, 16)
    first, last = DinoFeatures(transformer, 16, (0, 2))(images)
    for ours, expected in zip(
        DinoFeatures(transformer, 16, (2, 0, 2))(images), [last, first, last], strict=True
    ):
        assert torch.equal(ours, expected)


def test_without_timm_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"^discriminator: .*pip install 'var-exp\[gan\]'"):
        load_transformer("dino.pth")


def test_timm_is_imported_for_dino_only():
    code = (
        "import sys; from var_exp.tokenizer.discriminator import PatchGAN; PatchGAN(); "
        "print('timm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_images_shrink_by_area_and_grow_bicubically():
    images = torch.rand(2, 3, 12, 8)
    for size, modes in ((6, ("area", "area")), (16, ("bicubic", "bicubic")), (8, ("area", None))):
        expected = images
        for axis, mode in zip((0, 1), modes, strict=True):
            sides = [size if i == axis else expected.shape[2 + i] for i in (0, 1)]
            expected = F.interpolate(expected, sides, mode=mode) if mode else expected
        torch.testing.assert_close(resize(images, size), expected)


def test_images_of_any_size_and_colour_are_seen():
    features = DinoFeatures(assemble_transformer(published_state()), image_size=8, depths=[1])
    grey = torch.rand(2, 1, 12, 20)
    (seen,) = features(grey)
    assert seen.shape == (2, 128, 4)
    torch.testing.assert_close(features(grey.repeat(1, 3, 1, 1)), [seen])
