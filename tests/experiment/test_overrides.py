"""Any value can be written as an override that a shell and Hydra read back as it was."""

import random
import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from var_exp.experiment.config.overrides import as_override, nearest_keys

LETTERS = "ab=~( )[]{}'\"\\$,:@#+-.:/01%&|;*?!^<>\n\t\u00e9\u4e2d"
WORDS = [
    *("", " ", "true", "Null", "nan", "-inf", "2024", "1e-3", "1_000", "0x1", "~", "-", "+x=1"),
    *("runs/lr=1e-3", "~/my runs (2)", "it's", 'say "so"', "a,b", "[1]", "{a: 1}", "a:b", "\n"),
    *(
        "${data.name}",
        "\\${x}",
        "a${",
        "$HOME",
        "\\",
        "ends in \\",
        "\\\\'",
        '\\\\"',
        "\u00e9t\u00e9",
    ),
]
RANDOM = random.Random(0)
WORDS += ["".join(RANDOM.choices(LETTERS, k=RANDOM.randint(1, 8))) for _ in range(300)]


def read_back(override: str):
    """The value that a configuration has, of an override typed in a shell."""
    (argument,) = shlex.split(shlex.join([override]))
    value = OverridesParser.create().parse_override(argument).value()
    return OmegaConf.to_container(OmegaConf.create({"key": value}), resolve=True)["key"]


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: [w, w], lambda w: {"a": [w], "b": w}])
def test_words_come_back_as_they_were(wrap):
    for word in WORDS:
        assert read_back(as_override("key", wrap(word))) == wrap(word)


@pytest.mark.parametrize("value", [None, True, 0, -3, 1e-5, 2.0, [], {}, [1, [2.5, None]]])
def test_other_values_keep_their_type(value):
    found = read_back(as_override("key", value))
    assert found == value and type(found) is type(value)


def test_plain_paths_are_written_without_quotes():
    assert as_override("run_dir", "runs/digits/2024-01-01") == "run_dir=runs/digits/2024-01-01"


def test_what_hydra_cannot_read_is_shown_as_it_is_typed():
    (hint,) = nearest_keys("train", ["run_dir=runs/lr=1e-3", "seed=1"])
    assert hint.endswith("""type 'run_dir="runs/lr=1e-3"'""")


@pytest.mark.parametrize(
    "wrong, nearest",
    [
        ("lr=1", ["model.tokenizer.optimizer.lr", "model.var.optimizer.lr"]),
        ("batch_size=8", ["model.tokenizer.batch_size", "model.var.batch_size"]),
        ("model.var.num_batch=3", ["'model.var.num_batches'"]),
        ("sede=1", ["nearest is 'seed'"]),
    ],
)
def test_the_nearest_key_is_one_that_ends_alike(wrong, nearest):
    (hint,) = nearest_keys("train", [wrong])
    assert all(name in hint for name in nearest)
