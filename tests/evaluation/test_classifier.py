"""The classifier that offline figures are measured with: trained, kept, read again."""

import pytest
import torch
from torch.utils.data import Dataset

from var_exp.data import Digits
from var_exp.evaluation import ClassifierFeatures, to_uint8, train_classifier, train_or_load
from var_exp.evaluation.networks import classifier


class Corners(Dataset):
    """Noisy images, one corner of each lit: the corner is the class."""

    def __init__(self, num_images, image_size, channels, seed, labelled=True):
        self.num_images, self.shape, self.seed = num_images, (channels, *image_size), seed
        self.labelled = labelled
        self.read = []

    def __len__(self):
        return self.num_images

    def __getitem__(self, index):
        self.read.append(index)
        generator = torch.Generator().manual_seed(self.seed + index)
        image = torch.randint(0, 90, self.shape, dtype=torch.uint8, generator=generator)
        (h, w), corner = self.shape[1:], index % 4
        top, left = h // 2 * (corner // 2), w // 2 * (corner % 2)
        image[:, top : top + h // 2, left : left + w // 2] += 150
        return image, corner if self.labelled else 0


class CornerSource:
    name = "corners"

    def __init__(self, image_size=(16, 16), channels=3, labelled=True, num_train=128):
        self.image_size, self.channels = image_size, channels
        self.class_names = ("nw", "ne", "sw", "se") if labelled else ()
        self.num_classes = len(self.class_names)
        self.train = Corners(num_train, image_size, channels, 0, labelled)
        self.val = Corners(64, image_size, channels, 10_000, labelled)

    def val_transform(self, image):
        return image.float() / 127.5 - 1


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(classifier, "NUM_STEPS", 20)


def images_of(source, dataset, count):
    return torch.stack([(source.val_transform(dataset[i][0]) + 1) / 2 for i in range(count)])


def same(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_it_tells_held_out_digits_and_its_features_have_unit_variance():
    source = Digits()
    source.setup()
    network = train_classifier(source)
    assert network.task == "classes"
    assert network.accuracy >= 0.975

    images = torch.stack([source.val_transform(image) for image, _ in source.val])
    labels = torch.tensor([label for _, label in source.val])
    assert (network.classify(images) == labels).double().mean() == pytest.approx(network.accuracy)

    seen = network(images_of(source, source.train, 1437)).features
    torch.testing.assert_close(seen.mean(dim=0), torch.zeros(64), atol=1e-3, rtol=0)
    torch.testing.assert_close(seen.std(dim=0), torch.ones(64), atol=1e-3, rtol=0)


def test_the_same_images_give_the_same_network_whatever_the_caller_draws(few_steps):
    source = CornerSource()
    torch.manual_seed(1)
    first = train_classifier(source)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    with torch.inference_mode():
        second = train_classifier(source)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(first, second)
    assert not same(first, train_classifier(source, seed=1))


@pytest.mark.parametrize("size, channels", [((16, 16), 1), ((32, 32), 3), ((24, 130), 3)])
def test_it_learns_from_images_of_any_size(few_steps, size, channels):
    network = train_classifier(CornerSource(size, channels))
    assert network.accuracy > 0.9
    seen = network(torch.rand(5, channels, *size))
    assert seen.features.shape == (5, network.num_features)
    assert seen.logits.shape == (5, 4)


def test_images_without_classes_are_told_apart_by_clusters(few_steps):
    source = CornerSource(labelled=False)
    network = train_classifier(source)
    assert network.task == "clusters"
    assert network(torch.rand(2, 3, 16, 16)).logits.shape == (2, classifier.NUM_CLUSTERS)
    assert network.accuracy > 0.5
    clusters = network.classify(2 * images_of(source, source.val, 64) - 1)
    corners = torch.arange(64) % 4
    together = clusters[:, None] == clusters[None]
    assert not together[corners[:, None] != corners[None]].any()


def test_a_large_set_is_read_in_part_and_evenly(few_steps, monkeypatch):
    monkeypatch.setattr(classifier, "MAX_TRAIN", 40)
    source = CornerSource(num_train=1_000_000)
    train_classifier(source)
    assert len(source.train.read) == 40
    assert min(source.train.read) < 200_000 and max(source.train.read) > 800_000


def test_it_sees_large_images_averaged_down():
    network = ClassifierFeatures((130, 130), 1, 10).eval()
    images = torch.rand(2, 1, 130, 130)
    rounded = to_uint8(images).double() / 255
    slow = torch.stack(
        [  # means of 3 x 3 pixels; what is left over at the edges is not seen
            torch.stack(
                [
                    rounded[:, :, 3 * i : 3 * i + 3, 3 * j : 3 * j + 3].mean(dim=(2, 3))
                    for j in range(43)
                ],
                dim=-1,
            )
            for i in range(43)
        ],
        dim=-2,
    )  # (B, 1, 43, 43)
    with torch.no_grad():
        expected = network.see(slow.float())
    torch.testing.assert_close(network(images), expected)
    assert network.about["resize"] == "means of 3 x 3 pixels"


def test_it_says_what_it_was_trained_to_tell(few_steps):
    network = train_classifier(CornerSource())
    assert network.about["trained_to_tell"] == "classes"
    assert network.about["accuracy"] == network.accuracy
    assert train_classifier(CornerSource(labelled=False)).about["trained_to_tell"] == "clusters"


def test_a_saved_classifier_is_plain_and_loads_instead_of_training(
    few_steps, tmp_path, monkeypatch
):
    source, path = CornerSource(), tmp_path / "run" / "classifier.pt"
    trained = train_or_load(path, source)
    assert [p.name for p in path.parent.iterdir()] == ["classifier.pt"]
    assert set(torch.load(path, weights_only=True)) == {"about", "state_dict"}

    monkeypatch.setattr(classifier, "train_classifier", None)
    loaded = train_or_load(path, source)
    assert same(trained, loaded)
    assert (loaded.task, loaded.accuracy) == (trained.task, trained.accuracy)
    assert loaded.about == trained.about and loaded.fingerprint == trained.fingerprint
    assert not any(p.requires_grad for p in loaded.parameters())
    images = torch.rand(3, 3, 16, 16)
    assert torch.equal(trained(images).logits, loaded(images).logits)


def test_a_classifier_of_other_images_is_refused(few_steps, tmp_path):
    path = tmp_path / "classifier.pt"
    train_or_load(path, CornerSource(num_train=128))
    with pytest.raises(ValueError, match="classifier.pt.*num_train = 128, expected 64"):
        train_or_load(path, CornerSource(num_train=64))
    with pytest.raises(ValueError, match="seed = 0, expected 1"):
        train_or_load(path, CornerSource(num_train=128), seed=1)


@pytest.mark.parametrize("content", [b"", b"no classifier", {"state_dict": {}}, [1, 2]])
def test_a_file_that_is_no_classifier_is_refused(tmp_path, content):
    path = tmp_path / "classifier.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match="classifier.pt is not a classifier"):
        train_or_load(path, CornerSource())


def test_images_of_another_size_are_refused():
    network = ClassifierFeatures((16, 16), 1, 10)
    with pytest.raises(ValueError, match=r"\(1, 16, 16\), got \(3, 32, 32\)"):
        network(torch.rand(2, 3, 32, 32))
