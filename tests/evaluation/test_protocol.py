"""The protocol beside a figure says everything that the figure depends on."""

import json

import numpy as np
import torch

from var_exp.evaluation import ClassifierFeatures, ScoreSettings, protocol
from var_exp.evaluation.reference import Reference
from var_exp.scales import ScaleSchedule

REFERENCE = Reference(np.zeros(64), np.eye(64), 9, None, None, {"what": "digits train"})


def of_samples(labels, **changes):
    settings = {"cfg_scale": 1.5, "top_k": 900, "top_p": 0.96, "temperature": 1.0}
    others = {"seed": 0, "precision": "32-true", "weights": "averaged", "image_size": (16, 16)}
    return protocol.of_samples(labels, ScaleSchedule([1, 2, 4]), settings, **others | changes)


def test_it_is_plain_data():
    network = ClassifierFeatures((16, 16), 1, 10)
    found = of_samples([0, 1, 2]) | protocol.of_scores(network, REFERENCE, ScoreSettings())
    assert json.loads(json.dumps(found)) == found
    assert found["reference"] == {"what": "digits train"}
    assert found["scores"]["num_neighbours"] == 3
    assert "torch-fidelity" in found["libraries"]


def test_guidance_stands_scale_by_scale_and_images_class_by_class():
    found = of_samples([0, 1, 2, 0])
    assert found["sampling"]["guidance_weight_per_scale"] == [0.0, 0.75, 1.5]
    assert found["images"]["number"] == 4
    assert found["images"]["per_class"] == [1, 2]  # fewest and most
    assert of_samples([0, 1])["images"]["per_class"] == [1]


def test_other_weights_of_the_network_are_another_protocol():
    torch.manual_seed(0)
    one, other = (
        protocol.of_scores(ClassifierFeatures((16, 16), 1, 10), REFERENCE, ScoreSettings())
        for _ in range(2)
    )
    assert one["network"]["name"] == other["network"]["name"]
    assert one["network"]["weights"] != other["network"]["weights"]


def test_reconstructions_say_their_crop():
    found = protocol.of_reconstructions(
        50, precision="32-true", weights="raw", image_size=(256, 256), crop="adm"
    )
    assert found["images"]["crop"] == "adm" and found["images"]["number"] == 50
