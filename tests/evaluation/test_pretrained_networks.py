"""Published feature networks: torch-fidelity's figures, read from files with care.

The files here hold random weights; where the published ones would be needed, a stand-in for the
network is made that is as small as its form allows.
"""

import hashlib
import os
import shutil
import socket
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch_fidelity
from torch import nn
from torch.nn.functional import interpolate
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_clip import CLIPVisual, FeatureExtractorCLIP
from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from var_exp.evaluation import ScoreSettings, scores, to_uint8
from var_exp.evaluation.networks import pretrained
from var_exp.evaluation.reference import Reference

INCEPTION_NAME = "weights-inception-2015-12-05-6726825d.pth"


class Images(Dataset):
    def __init__(self, pixels):
        self.pixels = pixels

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return self.pixels[index]


def images_of(count, seed, channels=3):
    coarse = torch.rand(count, channels, 2, 2, generator=torch.Generator().manual_seed(seed))
    return interpolate(coarse, size=(16, 16), mode="bilinear")


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Nothing is fetched, and the cache is empty. Notes how long a connection may be silent."""
    tried = []

    def refuse(*_args, **_others):
        tried.append(socket.getdefaulttimeout())
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    return tried


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory) -> Path:
    """Random weights under which different images have different features."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url",
            lambda *_args, **_others: None,
        )
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_args: None)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    generator = torch.Generator().manual_seed(0)
    for weight in network.parameters():
        if weight.ndim == 4:
            spread = 1.1 * (2 / weight[0].numel()) ** 0.5
            nn.init.normal_(weight, 0.0, spread, generator=generator)
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(inception_file) -> pretrained.Pretrained:
    return pretrained.inception(weights=inception_file)


def test_scores_in_inception_are_torch_fidelitys(inception, inception_file):
    fake, real = images_of(9, seed=0), images_of(10, seed=1)
    settings = {"kid_subsets": 3, "kid_subset_size": 7}
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(to_uint8(fake)),
        input2=Images(to_uint8(real)),
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception_file),
        feature_layer_isc="logits_unbiased",
        feature_layer_fid="2048",
        feature_layer_kid="2048",
        feature_layer_prc="2048",
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        prc_neighborhood=3,
        isc_splits=3,
        **settings,
    )
    reals = inception(real).features
    statistics = reals.double().mean(dim=0).numpy(), np.cov(reals.double().numpy(), rowvar=False)
    reference = Reference(*statistics, len(real), reals, None, {})
    asked = ScoreSettings(num_splits=3, **settings)
    ours = scores(inception(fake), reference, inception.name, asked)
    assert ours == {
        "fid_inception": pytest.approx(theirs["frechet_inception_distance"], rel=1e-4),
        "inception_score_inception": pytest.approx(theirs["inception_score_mean"], rel=1e-4),
        "kid_inception": pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4),
        "precision_inception": pytest.approx(theirs["precision"], rel=1e-4),
        "recall_inception": pytest.approx(theirs["recall"], rel=1e-4),
    }
    assert ours["fid_inception"] > 0.1 and abs(ours["kid_inception"]) > 1e-3
    assert ours["inception_score_inception"] > 1.001
    assert 0 < ours["precision_inception"] < 1


def test_inception_sees_grey_images_as_colours_of_three_equal_channels(inception):
    grey = images_of(2, seed=0, channels=1)
    seen, repeated = inception(grey), inception(grey.repeat(1, 3, 1, 1))
    assert torch.equal(seen.features, repeated.features)
    assert torch.equal(seen.logits, repeated.logits)
    assert seen.features.shape == (2, 2048) and seen.logits.shape == (2, 1008)
    assert not torch.equal(seen.features, inception(images_of(2, seed=0)).features)


def test_inception_says_how_it_sees(inception, inception_file):
    digest = hashlib.sha256(inception_file.read_bytes()).hexdigest()
    assert inception.name == "inception" and inception.num_features == 2048
    assert inception.classify is None
    assert not any(p.requires_grad for p in inception.parameters())
    about = inception.about
    assert about["layer"].startswith("2048") and about["resize"].startswith("299 x 299")
    assert about["weights_file"] == "random.pth" and about["weights_sha256"] == digest[:16]
    assert str(inception_file.parent) not in str(about)


def test_it_is_made_like_the_classifier_quietly_and_without_random_numbers(
    inception, inception_file, tmp_path, capfd
):
    (tmp_path / "torch/hub/checkpoints").mkdir(parents=True)
    os.symlink(inception_file, tmp_path / "torch/hub/checkpoints" / INCEPTION_NAME)
    before, timeout = torch.get_rng_state(), socket.getdefaulttimeout()
    made = pretrained.inception(tmp_path / "classifier.pt", object())
    assert made.about["weights_file"] == INCEPTION_NAME
    assert made.fingerprint == inception.fingerprint
    assert torch.equal(torch.get_rng_state(), before)
    assert socket.getdefaulttimeout() == timeout
    assert capfd.readouterr() == ("", "")


# -- files that are missing or are something else ---------------------------------------------


def refusal(make, *args, **options):
    with pytest.raises(ValueError) as caught:
        make(*args, **options)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("evaluation: ")
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return message


@pytest.mark.parametrize(
    "make, name",
    [
        (pretrained.inception, INCEPTION_NAME),
        (pretrained.clip, "ViT-B-32.pt"),
        (pretrained.dinov2, "facebookresearch_dinov2_main"),
    ],
)
def test_without_file_and_network_one_line_says_what_to_put_where(
    make, name, no_network, tmp_path, capfd
):
    message = refusal(make)
    assert str(tmp_path / "torch" / "hub") in message and name in message
    assert "evaluation.weights=" in message and "evaluation=classifier" in message
    assert no_network and set(no_network) == {pretrained.PATIENCE}
    message = refusal(make, weights=tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in message and "is missing" in message
    assert capfd.readouterr() == ("", "")


class Smuggled:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_file_of_inception_is_refused_and_not_run(inception_file, tmp_path):
    file, trace = tmp_path / "weights.pth", tmp_path / "ran"
    torch.save(torch.load(inception_file) | {"fc.bias": Smuggled(trace)}, file)
    assert "holds code" in refusal(pretrained.inception, weights=file)
    assert not trace.exists()


def test_a_file_of_something_else_is_no_inception(inception_file, tmp_path):
    file = tmp_path / "weights.pth"
    state = torch.load(inception_file)
    for content, said in (
        (nn.Linear(2, 3).state_dict(), "Missing key"),
        (state | {"fc.bias": torch.zeros(1000)}, "fc.bias"),
        ({"state_dict": state}, "not a state dict"),
    ):
        torch.save(content, file)
        message = refusal(pretrained.inception, weights=file)
        assert "holds something else" in message and said in message and len(message) < 600
    file.write_bytes(inception_file.read_bytes()[:10_000])
    assert "is damaged" in refusal(pretrained.inception, weights=file)


# -- CLIP and DINOv2 --------------------------------------------------------------------------


class TextAndImages(nn.Module):
    """What the form of CLIP's files asks for, around a small image encoder."""

    def __init__(self):
        super().__init__()
        self.visual = CLIPVisual(24, 64, 1, 64, 32).visual
        self.text_projection = nn.Parameter(torch.zeros(8, 24))

    def forward(self, x):
        return x


@pytest.fixture
def clip_file(tmp_path, monkeypatch) -> Path:
    torch.manual_seed(0)
    file = tmp_path / "ViT-B-32.pt"
    torch.jit.trace(TextAndImages(), torch.zeros(1)).save(file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setitem(pretrained.CLIP_FILES, "clip-vit-b-32", {"hash": digest})
    return file


def test_clip_is_torch_fidelitys(clip_file, capfd):
    network = pretrained.clip(weights=clip_file)
    theirs = FeatureExtractorCLIP(
        "clip-vit-b-32", ["clip"], feature_extractor_weights_path=str(clip_file), verbose=False
    )
    images = images_of(3, seed=0)
    seen = network(images)
    assert torch.equal(seen.features, theirs(to_uint8(images))[0]) and seen.logits is None
    assert seen.features.shape == (3, network.num_features) == (3, 24)
    assert seen.features.std(dim=0).min() > 1e-3
    assert network.name == "clip" and network.about["resize"].startswith("64 x 64")
    assert network.about["size"] == "vit-b-32"
    assert capfd.readouterr() == ("", "")


def test_a_file_that_is_not_the_published_clip_is_not_opened(clip_file, monkeypatch):
    monkeypatch.setattr(torch.jit, "load", None)
    clip_file.write_bytes(clip_file.read_bytes() + b" ")
    assert "SHA-256" in refusal(pretrained.clip, weights=clip_file)


CODE = """
import torch
from torch import nn

class Tiny(nn.Module):
    embed_dim = 6

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 112, 112)

    def forward(self, x):
        return self.patches(x).flatten(1)[:, :6]

def dinov2_vits14(pretrained=True):
    network = Tiny()
    if pretrained:
        folder = torch.hub.get_dir() + "/checkpoints/"
        network.load_state_dict(torch.load(folder + "dinov2_vits14_pretrain.pth"))
    return network
"""


@pytest.fixture
def hub(tmp_path) -> Path:
    """A folder like torch.hub's, with code and weights."""
    code, weights = tmp_path / "hub/facebookresearch_dinov2_main", tmp_path / "hub/checkpoints"
    for folder in (code, weights):
        folder.mkdir(parents=True)
    (code / "hubconf.py").write_text(CODE)
    state = {f"patches.{name}": t for name, t in nn.Conv2d(3, 6, 112, 112).state_dict().items()}
    torch.save(state, weights / "dinov2_vits14_pretrain.pth")
    return tmp_path / "hub"


def test_dinov2_is_torch_fidelitys(hub, tmp_path, no_network):
    network = pretrained.dinov2(weights=hub, size="vit-s-14")
    assert not no_network
    shutil.copytree(hub, tmp_path / "torch/hub")
    theirs = FeatureExtractorDinoV2("dinov2-vit-s-14", ["dinov2"])
    images = images_of(3, seed=0)
    seen = network(images)
    assert torch.equal(seen.features, theirs(to_uint8(images))[0]) and seen.logits is None
    assert seen.features.shape == (3, network.num_features) == (3, 6)
    assert network.name == "dinov2" and network.about["size"] == "vit-s-14"
    assert network.about["weights_file"] == "dinov2_vits14_pretrain.pth"
    assert pretrained.dinov2(size="vit-s-14").fingerprint == network.fingerprint


def test_a_hub_folder_that_lacks_something_is_refused(hub):
    def say():
        return refusal(pretrained.dinov2, weights=hub, size="vit-s-14")

    file = hub / "checkpoints/dinov2_vits14_pretrain.pth"
    torch.save({"patches.bias": torch.zeros(6)}, file)
    assert "patches.weight" in say()
    file.unlink()
    assert f"{file} is missing" in say()
    (hub / "facebookresearch_dinov2_main/hubconf.py").write_text("import nothing_of_that_name")
    assert "could not be run (ModuleNotFoundError)" in say()


@pytest.mark.parametrize("make", [pretrained.clip, pretrained.dinov2])
def test_an_unknown_size_is_refused(make):
    assert "got 'huge' (evaluation.network.size)" in refusal(make, size="huge")
