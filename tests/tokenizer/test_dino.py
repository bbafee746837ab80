"""DINO's published tensors do in torchvision's transformer what they do in DINO's."""

import pytest
import torch
import torch.nn.functional as F

from var_exp.tokenizer.dino import DinoFeatures, assemble_transformer, resize, resize_positions


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
    assert transformer.encoder.layers[0].num_heads == 6 and transformer.image_size == 224


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


def test_positions_keep_their_direction_on_another_grid():
    rows = torch.arange(4.0).repeat_interleave(4)
    columns = torch.arange(4.0).repeat(4)
    positions = torch.stack([rows, columns], dim=1).unsqueeze(0)  # (1, 16, 2)
    positions = torch.cat([torch.full((1, 1, 2), 9.0), positions], dim=1)
    torch.testing.assert_close(resize_positions(positions, 4), positions)
    larger = resize_positions(positions, 6)
    assert larger.shape == (1, 37, 2) and larger[0, 0].tolist() == [9, 9]
    down, across = larger[0, 1:].unflatten(0, (6, 6)).unbind(2)
    assert (down.diff(dim=0) > 0).all() and down.diff(dim=1).abs().max() < 1e-5
    assert (across.diff(dim=1) > 0).all() and across.diff(dim=0).abs().max() < 1e-5


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
