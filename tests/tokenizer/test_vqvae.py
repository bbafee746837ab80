"""The tokenizer as a whole: images to codes and back."""

import pytest
import torch

from helpers.tiny import ODD_SCALES, SCALES, tiny_quantizer, tiny_tokenizer
from var_exp.tokenizer import VQVAE, Decoder, Encoder

ALL = {"five": SCALES, **ODD_SCALES}


def images_for(tokenizer, batch_size=2):
    return torch.rand(batch_size, tokenizer.channels, *tokenizer.image_size) * 2 - 1


@pytest.mark.parametrize("patch_nums", ALL.values(), ids=ALL)
@pytest.mark.parametrize("channels", [1, 3])
@torch.no_grad()
def test_decoding_the_codes_gives_the_reconstruction_of_the_forward(patch_nums, channels):
    tokenizer = tiny_tokenizer(tiny_quantizer(patch_nums, num_phi=1), channels)
    images = images_for(tokenizer)
    indices = tokenizer.encode(images)
    assert [i.shape for i in indices] == [(2, n) for n in tokenizer.schedule.num_tokens]
    assert all(0 <= i.min() and i.max() < tokenizer.quantizer.vocab_size for i in indices)
    output = tokenizer(images)
    assert all(map(torch.equal, output.indices, indices))
    assert output.images.shape == images.shape
    decoded = tokenizer.decode(indices)
    torch.testing.assert_close(decoded, output.images.clamp(-1, 1), atol=1e-5, rtol=0)


@torch.no_grad()
def test_per_scale_images_are_those_decoded_from_each_prefix(tokenizer):
    indices = tokenizer.encode(images_for(tokenizer))
    images = tokenizer.decode(indices, per_scale=True)
    assert len(images) == len(SCALES)
    for k, image in enumerate(images):
        assert torch.equal(image, tokenizer.decode(indices[: k + 1]))
    assert torch.equal(images[-1], tokenizer.decode(indices))
    assert not torch.equal(images[0], images[-1])


def test_decoded_images_stay_within_the_range_of_images(tokenizer):
    tokenizer.decoder.conv_out.weight.data *= 100
    decoded = tokenizer.decode(tokenizer.encode(images_for(tokenizer)))
    assert decoded.min() == -1 and decoded.max() == 1


def test_decoded_images_are_float32_also_under_autocast(tokenizer):
    indices = tokenizer.encode(images_for(tokenizer))
    with torch.autocast("cpu", torch.bfloat16):
        assert tokenizer.decode(indices).dtype == torch.float32


@pytest.mark.parametrize("shape", [(3, 12, 12), (3, 10, 20), (1, 10, 10), (4, 10, 10)])
def test_images_of_another_size_or_number_of_channels_are_refused(tokenizer, shape):
    with pytest.raises(ValueError) as error:
        tokenizer.encode(torch.zeros(2, *shape))
    assert f"{(3, 10, 10)}, got {shape}" in str(error.value)


def test_the_image_size_is_the_last_scale_times_the_stride():
    assert tiny_tokenizer(tiny_quantizer([1, 2, 4])).image_size == (8, 8)
    assert tiny_tokenizer(tiny_quantizer([[1, 2], [2, 4]])).image_size == (4, 8)


def test_parts_of_different_code_dimension_are_refused():
    sizes = {"width": 4, "multipliers": (1,)}
    with pytest.raises(ValueError, match=r"one code_dim, got \(4, 4, 5\)"):
        VQVAE(Encoder(3, 4, **sizes), tiny_quantizer(), Decoder(3, 5, **sizes))


def test_the_fingerprint_is_the_same_for_the_same_weights(tokenizer):
    again = tiny_tokenizer()
    assert again.fingerprint() != tokenizer.fingerprint()
    again.load_state_dict(tokenizer.state_dict())
    assert again.fingerprint() == tokenizer.fingerprint()
    assert len(tokenizer.fingerprint()) == 16 and int(tokenizer.fingerprint(), 16) >= 0


def test_the_fingerprint_changes_with_every_single_parameter(tokenizer):
    met = {tokenizer.fingerprint()}
    for parameter in tokenizer.parameters():
        parameter.data.view(-1)[-1] += 1e-3
        met.add(tokenizer.fingerprint())
    assert len(met) == 1 + len(list(tokenizer.parameters()))


def test_the_fingerprint_changes_with_ema_codes_and_with_the_schedule():
    one, other = (tiny_tokenizer(tiny_quantizer(s, ema=True)) for s in ([1, 2, 4], [1, 3, 4]))
    other.load_state_dict(one.state_dict(), strict=False)
    assert one.fingerprint() != other.fingerprint()
    before = one.fingerprint()
    one.train()(images_for(one))
    assert one.fingerprint() != before


def test_encoding_and_decoding_leave_no_gradient_but_the_forward_does(tokenizer):
    indices = tokenizer.encode(images_for(tokenizer))
    assert not tokenizer.decode(indices).requires_grad
    output = tokenizer(images_for(tokenizer))
    (output.images.square().mean() + output.loss).backward()
    assert all(p.grad is not None for p in tokenizer.parameters())


def test_an_encoder_and_a_decoder_of_other_strides_are_refused():
    sizes = {"code_dim": 4, "width": 8, "num_res_blocks": 1}
    with pytest.raises(ValueError, match="one stride, got 4 and 2"):
        VQVAE(
            Encoder(3, multipliers=(1, 2), patch_size=2, **sizes),
            tiny_quantizer(),
            Decoder(3, multipliers=(1, 2), **sizes),
        )
