"""A folder of images: its layouts, its file formats, its crop, and what bad files do."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from var_exp.data import ImageDataModule, ImageFolder
from var_exp.data.encoded import resize_to_cover
from var_exp.data.image_folder import read_image
from var_exp.data.source import rng_for


def write(path, size=(20, 20), colour=(200, 40, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, format="png")
    return path


def folder(root, **changes) -> ImageFolder:
    source = ImageFolder(str(root), **{"image_size": 16} | changes)
    source.setup()
    return source


@pytest.fixture
def classes(tmp_path):
    """Ten images of each of two classes, and things that are no images."""
    for name, colour in (("bee", (200, 40, 40)), ("ant", (40, 40, 200))):
        for number in range(10):
            write(tmp_path / name / f"{number}.png", colour=colour)
    (tmp_path / "bee" / "notes.txt").write_text("not an image")
    (tmp_path / "bee" / ".hidden.png").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "empty").mkdir()
    return tmp_path


# Layouts


def test_class_folders_are_classes_in_alphabetical_order(classes):
    source = folder(classes)
    assert source.class_names == ("ant", "bee") and source.num_classes == 2
    for image, label in (source.train[0], source.train[17]):
        assert image.getpixel((0, 0)) == [(40, 40, 200), (200, 40, 40)][label]


def test_a_tenth_of_each_class_is_set_aside_for_good(classes):
    source, again, other = folder(classes), folder(classes), folder(classes, seed=1)
    assert sorted(source.val.labels) == [0, 1] and len(source.train) == 18
    assert not set(source.val.paths) & set(source.train.paths)
    assert again.val.paths == source.val.paths != other.val.paths
    assert len(folder(classes, val_fraction=0.5).val) == 10


def test_images_in_folders_below_a_class_belong_to_it(classes):
    write(classes / "bee" / "more" / "deep.JPG")
    assert len(folder(classes).train) == 19


def test_train_and_val_folders_are_the_split(tmp_path):
    for path in ("train/a/1.png", "train/b/1.png", "train/c/1.png", "val/c/1.png", "val/a/1.png"):
        write(tmp_path / path)
    source = folder(tmp_path)
    assert source.class_names == ("a", "b", "c")
    assert source.train.labels == [0, 1, 2] and source.val.labels == [0, 2]


def test_a_folder_of_images_alone_has_no_classes(tmp_path):
    for number in range(5):
        write(tmp_path / f"{number}.png")
    source = folder(tmp_path)
    assert source.num_classes == 0 and len(source.train) == 4 and len(source.val) == 1
    assert {label for _, label in (source.train[0], source.val[0])} == {0}


def test_flat_train_and_val_folders_have_no_classes(tmp_path):
    for path in ("train/1.png", "train/2.png", "val/1.png"):
        write(tmp_path / path)
    source = folder(tmp_path)
    assert (source.num_classes, len(source.train), len(source.val)) == (0, 2, 1)


def test_a_lone_train_folder_is_split(tmp_path):
    for path in ("train/a/1.png", "train/a/2.png", "train/b/1.png", "train/b/2.png"):
        write(tmp_path / path)
    source = folder(tmp_path)
    assert source.class_names == ("a", "b") and len(source.train) == len(source.val) == 2


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "no images under"),
        (["a/notes.txt"], "no images under"),
        (["one.png"], "holds one image"),
        (["a/1.png", "2.png"], "images beside class folders"),
        (["train/a/1.png", "val/b/1.png"], r"has the classes \['b'\], expected some of"),
        (["train/a/1.png", "val/1.png"], r"has the classes \[\]"),
        (["train/a/1.png", "val/notes.txt"], "no images under .*val"),
        (["train/a/1.png", "test/a/1.png"], "expected 'train' and 'val'"),
    ],
)
def test_a_folder_that_makes_no_set_says_what_was_expected(tmp_path, files, words):
    for file in files:
        write(tmp_path / file)
    with pytest.raises(ValueError, match=words) as error:
        folder(tmp_path)
    assert str(tmp_path) in str(error.value) and "data.root=DIR" in str(error.value)


@pytest.mark.parametrize("root", [None, "no/such/folder", __file__])
def test_a_root_that_is_no_folder_is_named(root):
    with pytest.raises(ValueError, match="is not a folder.*data.root=DIR") as error:
        ImageFolder(root).prepare()
    assert str(root) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"val_fraction": 0}, "val_fraction: expected a number > 0, got 0"),
        ({"val_fraction": 1.0}, "val_fraction: expected a number < 1, got 1.0"),
        (
            {"on_bad_image": "ignore"},
            "on_bad_image is 'ignore', expected one of raise, skip .*data",
        ),
    ],
)
def test_a_wrong_option_names_its_value_and_its_key(changes, words):
    with pytest.raises(ValueError, match=words):
        ImageFolder("any", **changes)


# Formats


def saved(tmp_path, image: Image.Image, name="image.png", **options) -> str:
    image.save(tmp_path / name, **options)
    return str(tmp_path / name)


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm"])
def test_sixteen_bits_are_scaled_and_not_cut(tmp_path, name):
    levels = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    if name.endswith("pgm"):
        (tmp_path / name).write_bytes(b"P5 4 1 65535\n" + levels.astype(">u2").tobytes())
    else:
        saved(tmp_path, Image.fromarray(levels), name)
    image = read_image(str(tmp_path / name), "L")
    assert np.asarray(image).tolist() == [[0, 1, 128, 255]]
    assert np.asarray(read_image(str(tmp_path / name), "RGB"))[0, 3].tolist() == [255] * 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
def test_transparency_is_laid_on_white(tmp_path, mode):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    if mode == "P":
        path = saved(tmp_path, image.quantize(4), "image.png")
    else:
        path = saved(tmp_path, image.convert(mode), "image.tif" if mode == "PA" else "image.png")
    read = read_image(path, "RGB")
    assert [read.getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK"])
def test_every_common_mode_becomes_the_mode_asked_for(tmp_path, mode):
    image = Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode)
    path = saved(tmp_path, image, "image.tif")
    for wanted in ("RGB", "L"):
        read = read_image(path, wanted)
        assert read.mode == wanted and np.asarray(read).min() == 255


def test_a_photograph_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path, Image.new("RGB", (30, 10)), "turned.jpg", exif=exif)
    assert read_image(path, "RGB").size == (10, 30)


def test_floating_point_images_are_refused_by_name(tmp_path):
    path = saved(tmp_path, Image.fromarray(np.ones((2, 2), dtype=np.float32)), "float.tif")
    with pytest.raises(ValueError, match=r"float\.tif.*32-bit floats, expected 8 or 16"):
        read_image(path, "RGB")


# The crop


@pytest.mark.parametrize("size", [(100, 40), (40, 100), (33, 33), (7, 300)])
def test_the_shorter_side_is_resized_to_an_eighth_more_than_the_crop(size):
    noise = np.random.default_rng(0).integers(0, 256, size=(*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    published = transforms.Resize(18, interpolation=transforms.InterpolationMode.LANCZOS)
    assert np.array_equal(np.asarray(resize_to_cover(image, (16, 16))), published(image))


@pytest.mark.parametrize("size", [(16, 16), (16, 32), (32, 16)])
def test_images_of_any_shape_come_out_at_the_size_asked_for(size):
    source = ImageFolder("any", image_size=size)
    for shape in ((5, 5), (300, 11), (11, 300)):
        image = Image.new("RGB", shape)
        assert source.val_transform(image).shape == (3, *size)
        assert source.train_transform(image, rng_for(0)).shape == (3, *size)


def test_training_crops_wander_and_validation_crops_stay_in_the_centre():
    ramp = np.add.outer(10 * np.arange(18), np.arange(18)).astype(np.uint8)  # 18 = 1.125 * 16
    image = Image.fromarray(ramp)
    source = ImageFolder("any", image_size=16, channels=1)
    corner = {source.train_transform(image, rng_for(i))[0, 0, 0].item() for i in range(200)}
    assert len(corner) == 9, "each of the 3 x 3 places must occur, and no mirroring"
    centre = torch.from_numpy(ramp[1:17, 1:17]) / 127.5 - 1
    assert torch.allclose(source.val_transform(image)[0], centre)

    mirroring = ImageFolder("any", image_size=16, channels=1, flip=True)
    rising = [
        bool(mirroring.train_transform(image, rng_for(i))[0, 0].diff().min() > 0) for i in range(99)
    ]
    assert 25 < sum(rising) < 75


def published_adm(image: Image.Image, size: int) -> np.ndarray:
    """ADM's `center_crop_arr`, told again: halve by boxes of 2 x 2, resize, cut."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    factor = size / min(image.size)
    image = image.resize([round(s * factor) for s in image.size], Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    top, left = ((side - size) // 2 for side in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("size", [(100, 40), (40, 101), (33, 33), (7, 300), (128, 64)])
def test_the_adm_crop_is_adms(size):
    noise = np.random.default_rng(0).integers(0, 256, size=(*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    adm, var = (ImageFolder("any", image_size=16, crop=crop) for crop in ("adm", "var"))
    expected = torch.tensor(published_adm(image, 16)).permute(2, 0, 1) / 127.5 - 1
    assert torch.allclose(adm.val_transform(image), expected)
    assert not torch.allclose(var.val_transform(image), expected)
    assert (adm.crop, var.crop) == ("adm", "var")


@pytest.mark.parametrize("crop", ["var", "adm"])
def test_both_crops_give_images_twice_as_wide_as_high(crop):
    source = ImageFolder("any", image_size=[16, 32], crop=crop)
    for shape in ((200, 30), (30, 200), (64, 32)):
        assert source.val_transform(Image.new("RGB", shape)).shape == (3, 16, 32)


def test_an_unknown_crop_is_refused():
    with pytest.raises(ValueError, match="crop is 'centre', expected one of var, adm"):
        ImageFolder("any", crop="centre")


def test_another_number_of_classes_than_expected_is_refused(classes):
    assert folder(classes, expected_classes=2).num_classes == 2
    with pytest.raises(ValueError, match="has 2 classes, expected 1000"):
        folder(classes, expected_classes=1000)


# Bad files


@pytest.fixture
def spoilt(classes):
    """Two of the twenty files do not decode: one is cut short, one is no image."""
    noise = np.random.default_rng(0).integers(0, 256, size=(30, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(classes / "ant" / "0.png")
    whole = (classes / "ant" / "0.png").read_bytes()
    (classes / "ant" / "0.png").write_bytes(whole[: len(whole) // 2])
    (classes / "bee" / "9.png").write_bytes(b"not an image")
    return classes


def bad_paths(root) -> set[str]:
    return {str(root / "ant" / "0.png"), str(root / "bee" / "9.png")}


def all_items(source: ImageFolder, num_workers: int) -> list:
    """Every image of both parts, through the loaders: (pixels, label), twice over."""
    loaders = ImageDataModule(source, num_workers=num_workers, val_batch_size=2)
    loaders.plan(batch_size=6, num_batches=2 * len(source.train) // 6)
    batches = [*loaders.train_dataloader(), *loaders.val_dataloader()]
    return [(b.images.sum().item(), b.labels.tolist(), b.indices.tolist()) for b in batches]


def test_a_bad_file_stops_the_run_and_is_named(spoilt):
    source = folder(spoilt)
    with pytest.raises(ValueError, match=r"(ant/0|bee/9)\.png.*data\.on_bad_image=skip"):
        all_items(source, num_workers=0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipping_goes_on_and_counts_the_bad_files_of_all_workers(spoilt, num_workers):
    source = folder(spoilt, on_bad_image="skip")
    assert source.bad_images == set(), "files are checked when they are needed"
    all_items(source, num_workers)
    assert source.bad_images == bad_paths(spoilt)


def test_what_stands_in_for_a_bad_file_is_the_same_in_every_run(spoilt):
    runs = [all_items(folder(spoilt, on_bad_image="skip"), workers) for workers in (0, 0, 2)]
    assert runs[0] == runs[1] == runs[2]


def test_the_stand_in_brings_its_own_label(spoilt):
    source = folder(spoilt, on_bad_image="skip", val_fraction=0.1)
    for split in (source.train, source.val):
        for index in range(len(split)):
            image, label = split[index]
            assert image.getpixel((0, 0)) == [(40, 40, 200), (200, 40, 40)][label]


def test_a_folder_of_bad_files_only_stops_even_when_skipping(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match="none of the 3 images decodes"):
        folder(tmp_path, on_bad_image="skip").train[0]
