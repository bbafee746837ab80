"""The shapes are endless, seeded and fast to tell apart; their classifier reads pixels."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional import gaussian_blur

from var_exp.data import Shapes
from var_exp.data.shapes import BACKGROUND, COLOURS, SHAPES, coverage


def source(**changes) -> Shapes:
    shapes = Shapes(**changes)
    shapes.setup()
    return shapes


def drawn(shapes: Shapes, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """-> images (B, 3, H, W) in [-1, 1], labels (B,)"""
    items = shapes.val.__getitems__(list(range(number)))
    return torch.stack([shapes.val_transform(i) for i, _ in items]), torch.tensor(
        [label for _, label in items]
    )


@pytest.fixture(scope="module")
def real() -> tuple[torch.Tensor, torch.Tensor]:
    return drawn(source(), 1200)


def accuracy(images: torch.Tensor, labels: torch.Tensor) -> float:
    return (Shapes().classify(images.clamp(-1, 1)) == labels).float().mean().item()


def test_an_image_is_a_pure_function_of_seed_split_and_number():
    shapes, again = source(seed=1), source(seed=1)
    numbers = [7, 0, 123_456, 7]
    together = shapes.train.__getitems__(numbers)
    for (image, label), number in zip(together, numbers, strict=True):
        alone, alone_label = again.train[number]
        assert torch.equal(image, alone) and label == alone_label
        assert not torch.equal(image, shapes.val[number][0])
        assert not torch.equal(image, source(seed=2).train[number][0])


def test_the_set_never_repeats_and_its_classes_take_turns():
    shapes = source(num_train=24)
    assert shapes.endless and len(shapes.train) == 24
    images, labels = zip(*shapes.train.__getitems__(list(range(48))), strict=True)
    assert len({image.numpy().tobytes() for image in images}) == 48
    assert list(labels) == list(range(12)) * 4
    assert len(set(shapes.class_names)) == shapes.num_classes == len(COLOURS) * len(SHAPES)


def test_shapes_are_large_and_stand_clear_of_the_border(real):
    images, _ = real
    distance = (images.add(1).div(2) - BACKGROUND).norm(dim=1)  # (B, H, W)
    border = torch.cat([distance[:, 0], distance[:, -1], distance[..., 0], distance[..., -1]], 1)
    assert border.max() < 0.08
    share = (distance > 0.25).float().mean(dim=(1, 2))
    assert share.min() > 0.12 and share.max() < 0.5


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_an_outline_has_the_area_and_the_reach_it_claims(shape):
    radius, centre = torch.tensor([[[0.3]]]), (torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))
    mask = coverage(shape, radius, centre, (0.8, 0.6), (400, 400))[0]
    y, x = (mask > 0).nonzero().add(0.5).div(400).sub(0.5).unbind(1)
    assert mask.mean().item() == pytest.approx(shape.area * 0.3**2, rel=2e-3)
    assert torch.hypot(x, y).max().item() == pytest.approx(shape.reach * 0.3, abs=4e-3)
    assert (mask * torch.linspace(-1, 1, 400)).mean().abs() < 1e-3, "the centroid is the origin"


def test_the_classifier_is_right_on_real_images(real):
    assert accuracy(*real) >= 0.999


@pytest.mark.parametrize("size", [16, 64, [32, 64]], ids=str)
def test_the_classifier_is_right_at_other_sizes(size):
    assert accuracy(*drawn(source(image_size=size), 240)) >= 0.99


def test_the_classifier_sees_through_blur_noise_and_coarse_pixels(real):
    images, labels = real
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    blurred = gaussian_blur(images, [7, 7], [1.0, 1.0])
    coarse = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    for spoilt in (blurred, images + 0.1 * noise, blurred + 0.1 * noise, coarse):
        assert accuracy(spoilt, labels) >= 0.98


def test_the_classifier_names_the_shape_and_the_colour_that_changed(real):
    images, labels = real
    image = images[labels == Shapes().class_names.index("red cross")][:1]
    assert Shapes().class_names[Shapes().classify(image)] == "red cross"
    assert Shapes().class_names[Shapes().classify(image[:, [2, 1, 0]])] == "blue cross"
    assert Shapes().classify(image.flip(-1)) == Shapes().classify(image)


def test_the_classifier_does_not_see_shapes_where_there_are_none(real):
    images, _ = real
    square = torch.full((1, 3, 32, 32), 0.5)
    square[..., 2:30, 14:18] = torch.tensor([0.7, -0.6, -0.6])[:, None, None]  # a red bar
    nothing = torch.cat(
        [
            torch.zeros(1, 3, 32, 32),
            torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1),
            (images[:3] + images[6:9].roll(9, dims=-1)) / 2,  # red and blue at once
            images[:1, :, :, [*range(16), *range(16)]],  # half a shape, twice
            images[:1].mean(1, keepdim=True).expand(-1, 3, -1, -1),  # no colour
            square,
        ]
    )
    assert Shapes().classify(nothing).tolist() == [-1] * len(nothing)


def test_the_classifier_does_not_depend_on_the_batch(real):
    images, _ = real
    alone = torch.cat([Shapes().classify(image[None]) for image in images[:8]])
    assert torch.equal(Shapes().classify(images)[:8], alone)
