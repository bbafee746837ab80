"""`import var_exp` offers the design in a few functions, with the design's defaults."""

import inspect

import pytest
import torch
from torch import nn

import var_exp
from var_exp import build, build_tokenizer, next_scale_prediction
from var_exp.tokenizer import VQVAE

SMALL = {"image_size": 16, "scales": (1, 2, 4), "codebook_size": 8, "embed_dim": 4}
SMALL_MODEL = {
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "scales": (1, 2, 4),
    "codebook_size": 8,
    "embed_dim": 4,
    "num_classes": 5,
}


def small_tokenizer(**changes):
    encoder, decoder = build_tokenizer(**{**SMALL, "width": 8, "num_res_blocks": 1} | changes)
    return encoder.eval(), decoder.eval()


def small_model(**changes):
    model = build(**SMALL_MODEL | {"dropout": 0.0} | changes)
    with torch.no_grad():
        model.head.linear.weight *= 50  # a fresh head hardly tells one input from another
        model.level_embedding.weight *= 10
    return model.eval()


def defaults(function):
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters}


def test_the_names_that_scripts_lean_on_are_there():
    for name in (
        "ScaleSchedule",
        "build",
        "build_tokenizer",
        "generate",
        "next_scale_prediction",
        "recommended_defaults",
        "total_tokens",
    ):
        assert callable(getattr(var_exp, name)) and name in var_exp.__all__


# -- the tokenizer ------------------------------------------------------------------------


def test_the_tokenizers_defaults_are_those_of_the_design():
    expected = {
        "image_size": 256,
        "scales": (1, 2, 4, 8, 16),
        "codebook_size": 1024,
        "embed_dim": 256,
        "in_channels": 3,
    }
    found = defaults(build_tokenizer)
    assert {name: found[name] for name in expected} == expected
    assert list(found)[:5] == list(expected)  # also by position


def test_the_default_tokenizer_has_a_codebook_for_each_scale_and_stride_16():
    with torch.device("meta"):
        encoder, decoder = build_tokenizer()
        features = encoder.tokenizer.features(torch.empty(2, 3, 256, 256))
        assert features.shape == (2, 256, 16, 16)
        assert decoder.tokenizer.to_images(features).shape == (2, 3, 256, 256)
    quantizer = encoder.quantizer
    assert quantizer.schedule.patch_nums == [1, 2, 4, 8, 16]
    assert [tuple(book.weight.shape) for book in quantizer.codebooks] == [(1024, 256)] * 5


@pytest.mark.parametrize("in_channels", [1, 3])
def test_encoder_and_decoder_are_modules_that_share_one_quantizer(in_channels):
    encoder, decoder = small_tokenizer(in_channels=in_channels)
    assert isinstance(encoder, nn.Module) and isinstance(decoder, nn.Module)
    assert encoder.quantizer is decoder.quantizer
    assert isinstance(encoder.tokenizer, VQVAE) and encoder.tokenizer is decoder.tokenizer
    images = torch.rand(2, in_channels, 16, 16) * 2 - 1
    indices = encoder(images)
    assert [(i.shape, i.dtype) for i in indices] == [
        ((2, 1), torch.int64),
        ((2, 4), torch.int64),
        ((2, 16), torch.int64),
    ]
    assert all(0 <= i.min() and i.max() < 8 for i in indices)
    decoded = decoder(indices)
    assert decoded.shape == images.shape and -1 <= decoded.min() and decoded.max() <= 1
    assert torch.equal(decoded, encoder.tokenizer.decode(encoder.tokenizer.encode(images)))


def test_codes_are_per_scale_unless_one_shared_codebook_is_asked_for():
    assert len(small_tokenizer()[0].quantizer.codebooks) == 3
    shared = small_tokenizer(shared_codebook=True, cosine=True)[0].quantizer
    assert len(shared.codebooks) == 1 and shared.codebook(2).cosine


def test_scales_and_image_may_be_oblong():
    scales, size = [[1, 2], [2, 4]], (8, 16)
    encoder, decoder = small_tokenizer(scales=scales, image_size=size)
    indices = encoder(torch.zeros(1, 3, *size))
    assert [i.shape for i in indices] == [(1, 2), (1, 8)]
    assert decoder(indices).shape == (1, 3, *size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": (1, 4, 2)}, r"larger than the one before, got \(2, 2\) after \(4, 4\)"),
        ({"scales": ()}, "at least one scale"),
        ({"image_size": 18}, r"last scale \(4, 4\) must be image size / stride"),
        ({"image_size": 12}, "power of two up to 64, got 3"),
        ({"image_size": 512}, "power of two up to 64, got 128"),
        ({"image_size": 2}, "last scale"),
        ({"image_size": (16, 32)}, "last scale"),
        ({"codebook_size": 1}, "vocab_size: expected a number >= 2, got 1"),
    ],
)
def test_a_tokenizer_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        small_tokenizer(**change)


# -- the transformer ----------------------------------------------------------------------


def test_the_transformers_defaults_are_those_of_the_design():
    expected = {
        "hidden_size": 512,
        "num_layers": 12,
        "num_heads": 8,
        "mlp_ratio": 4.0,
        "scales": (1, 2, 4, 8, 16),
        "codebook_size": 1024,
        "dropout": 0.1,
    }
    found = defaults(build)
    assert {name: found[name] for name in expected} == expected
    assert list(found)[:7] == list(expected)
    assert var_exp.recommended_defaults() == expected


def test_recommended_defaults_build_gpt2s_backbone():
    with torch.device("meta"):
        model = build(**var_exp.recommended_defaults())
        assert model(torch.empty(2, 340, 256), torch.zeros(2).long()).shape == (2, 341, 1024)
    assert len(model.blocks) == 12 and model.width == 512 and model.num_heads == 8
    block = model.blocks[0]
    assert block.norm1.weight.shape == block.norm2.bias.shape == (512,)  # affine
    assert block.mlp.fc1.out_features == 2048
    assert block.attn.dropout == block.mlp.dropout.p == model.dropout.p == 0.1
    assert model.position.shape == (1, 341, 512)
    assert var_exp.recommended_defaults() is not var_exp.recommended_defaults()


@pytest.mark.parametrize("block", ["gpt2", "adaln", "shared_adaln"])
def test_the_papers_backbone_is_a_choice_of_the_same_transformer(block):
    model = small_model(block=block, qk_norm=True)
    assert type(model) is type(build(**SMALL_MODEL))
    inputs = torch.randn(3, 20, 4)
    assert model(inputs).shape == (3, 21, 8)
    assert not torch.equal(model(inputs), model(inputs, torch.tensor([0, 1, 2])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": (1, 2, 2)}, "larger than the one before"),
        ({"codebook_size": 1}, "at least 2 codes, got 1"),
        ({"num_heads": 3}, "got width 16 and 3 heads"),
        ({"num_heads": 0}, "num_heads: expected a number > 0 or null, got 0"),
        ({"block": "dit"}, "got 'dit'"),
    ],
)
def test_a_transformer_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        build(**SMALL_MODEL | change)


def test_total_tokens_is_the_sum_of_squares():
    assert var_exp.total_tokens((1, 2, 4, 8, 16)) == 341
    assert var_exp.total_tokens([3]) == 9


# -- the two together ---------------------------------------------------------------------


@pytest.mark.parametrize("block", ["gpt2", "adaln"])
@pytest.mark.parametrize("labels", [None, torch.tensor([4, 0])])
@torch.no_grad()
def test_next_scale_prediction_is_the_full_forwards_slice(block, labels):
    (encoder, decoder), model = small_tokenizer(), small_model(block=block)
    indices = encoder(torch.rand(2, 3, 16, 16) * 2 - 1)
    full = model(encoder.quantizer.teacher_forcing_input(indices), labels)
    for k, where in enumerate(model.schedule.slices):
        for tokenizer in (encoder, decoder, (encoder, decoder), encoder.tokenizer):
            logits = next_scale_prediction(model, tokenizer, indices[:k], k, labels)
            if k == 0 and labels is None:
                assert logits.shape == (1, 1, 8)  # nothing says how many
            assert logits.shape[1:] == (model.schedule.num_tokens[k], 8)
            torch.testing.assert_close(
                logits.expand(2, -1, -1), full[:, where], atol=1e-5, rtol=1e-4
            )
        # Finer tokens than those before the scale are not looked at.
        more = next_scale_prediction(model, encoder, indices, k, labels)
        torch.testing.assert_close(more.expand(2, -1, -1), full[:, where], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_sampling_by_next_scale_prediction_alone_is_greedy_generation():
    (encoder, decoder), model = small_tokenizer(), small_model()
    labels, tokens = torch.tensor([1, 3]), []
    for k in range(3):
        logits = next_scale_prediction(model, encoder, tokens, k, labels)
        tokens.append(logits.argmax(dim=-1))
    images = var_exp.generate(model, encoder.tokenizer, labels, cfg_scale=0, top_k=1)
    torch.testing.assert_close(images, (decoder(tokens) + 1) / 2)


@pytest.mark.parametrize("scale_idx", [-1, 3, 99])
def test_a_scale_out_of_range_is_refused(scale_idx):
    with pytest.raises(ValueError, match=rf"expected 0\.\.2 for .*, got {scale_idx}"):
        next_scale_prediction(small_model(), small_tokenizer(), [], scale_idx)


def test_missing_coarser_tokens_are_refused():
    tokens = [torch.zeros(1, 1, dtype=torch.int64)]
    with pytest.raises(ValueError, match="scale 2 needs the 2 coarser scales, got 1"):
        next_scale_prediction(small_model(), small_tokenizer(), tokens, 2)


def test_a_label_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"classes in 0\.\.4 .* got 6"):
        next_scale_prediction(small_model(), small_tokenizer(), [], 0, torch.tensor([6]))


def test_the_first_scale_is_predicted_for_every_image_whose_tokens_are_given():
    encoder, model = small_tokenizer(), small_model()
    tokens = [torch.zeros(2, n, dtype=torch.int64) for n in model.schedule.num_tokens]
    logits = next_scale_prediction(model, encoder, tokens, 0)
    assert logits.shape == (2, model.schedule.num_tokens[0], model.vocab_size)
