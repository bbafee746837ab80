"""Sampling: each image is a function of its seed, number and label, drawn as the method says."""

import numpy as np
import pytest
import torch

from helpers.tiny import (
    BLOCKS,
    ODD_SCALES,
    QUANTIZERS,
    SCALES,
    tiny_quantizer,
    tiny_tokenizer,
    tiny_transformer,
)
from var_exp.sampling.generate import (
    draw,
    draw_uniforms,
    filter_top_k_top_p,
    generate,
    guidance_weight,
    guided_logits,
    iterate_samples,
)

ALL = {"five": SCALES, **ODD_SCALES}


def to_uint8(images):
    return (images * 255).round().to(torch.uint8)


def same(a, b):
    """Two `Samples`, to the bit in codes and in 8-bit pixels."""
    codes = all(map(torch.equal, a.indices, b.indices))
    return codes and torch.equal(to_uint8(a.images), to_uint8(b.images))


def row(samples, i):
    return type(samples)(samples.images[i : i + 1], [c[i : i + 1] for c in samples.indices])


def draw_many(transformer, tokenizer, labels, batch_size, sample_ids=None, **settings):
    """{sample id: Samples of one row}."""
    found = {}
    batches = iterate_samples(
        transformer,
        tokenizer,
        labels,
        batch_size=batch_size,
        sample_ids=sample_ids,
        **settings,
    )
    for ids, samples in batches:
        found |= {number: row(samples, i) for i, number in enumerate(ids)}
    return found


# -- a sample is its own ------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("cfg_scale", "autocast"), [(0.0, False), (1.5, False), (1.5, True)])
def test_sample_i_does_not_depend_on_the_batch_size(tokenizer, block, cfg_scale, autocast):
    transformer = tiny_transformer(block=block)
    labels = [i % 3 for i in range(70)]
    settings = {"seed": 7, "cfg_scale": cfg_scale, "top_k": 12, "top_p": 0.95}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        first, *others = (
            draw_many(transformer, tokenizer, labels, size, **settings) for size in (64, 1, 3, 8)
        )
    assert list(first) == list(range(70))
    for other in others:
        assert list(other) == list(range(70))
        assert all(same(first[i], other[i]) for i in range(70))


def test_sample_i_does_not_depend_on_the_order_nor_on_who_else_is_drawn(transformer, tokenizer):
    labels = torch.arange(20) % 3
    all_of_them = draw_many(transformer, tokenizer, labels.tolist(), 8, seed=1)
    order = torch.randperm(20).tolist()
    for ids in (order, order[:5], [13]):
        chosen = labels[ids].tolist()
        others = draw_many(transformer, tokenizer, chosen, 8, sample_ids=ids, seed=1)
        assert list(others) == ids
        assert all(same(all_of_them[i], others[i]) for i in ids)


def test_samples_differ_by_number_by_seed_and_by_label(transformer, tokenizer):
    drawn = draw_many(transformer, tokenizer, [0] * 8, 8, seed=1)
    assert len({drawn[i].images.numpy().tobytes() for i in range(8)}) == 8
    for other in (
        draw_many(transformer, tokenizer, [0] * 8, 8, seed=2),
        draw_many(transformer, tokenizer, [1] * 8, 8, seed=1),
    ):
        assert not any(same(drawn[i], other[i]) for i in range(8))
    again = draw_many(transformer, tokenizer, [0] * 8, 8, seed=1)
    assert all(same(drawn[i], again[i]) for i in range(8))


def test_sampling_neither_reads_nor_moves_the_global_random_state(transformer, tokenizer):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = generate(transformer, tokenizer, [0, 1])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    assert torch.equal(generate(transformer, tokenizer, [0, 1]), first)


def test_a_token_keeps_its_uniform_whatever_the_batch():
    together = draw_uniforms(5, range(6), 10)
    assert together.shape == (6, 10) and (0 <= together).all() and (together < 1).all()
    assert (draw_uniforms(5, [4, 1], 10) == together[[4, 1]]).all()
    assert len(np.unique(np.concatenate([together, draw_uniforms(6, range(6), 10)]))) == 120


# -- training and sampling meet the same inputs -------------------------------------------


@pytest.mark.parametrize("variant", QUANTIZERS.values(), ids=QUANTIZERS)
@pytest.mark.parametrize("cfg_scale", [0.0, 2.0])
@torch.no_grad()
def test_teacher_forcing_inputs_are_those_met_in_sampling_with_forced_indices(variant, cfg_scale):
    quantizer = tiny_quantizer(**variant)
    tokenizer, patch_nums = tiny_tokenizer(quantizer), quantizer.schedule.patch_nums
    transformer = tiny_transformer(patch_nums)
    images = torch.rand(2, 3, *tokenizer.image_size) * 2 - 1
    forced, met, indices = tokenizer.encode(images), [], []
    forward_scale = transformer.forward_scale

    def witness(k, inputs, *others):
        met.append(inputs)
        return forward_scale(k, inputs, *others)

    transformer.forward_scale = witness
    for k, _ in guided_logits(transformer, tokenizer, torch.tensor([0, 1]), cfg_scale, indices):
        indices.append(forced[k])
    assert met[0] is None and len(met) == quantizer.schedule.num_scales
    teacher_forced = quantizer.teacher_forcing_input(forced)
    slow = teacher_forced.split(quantizer.schedule.num_tokens[1:], dim=1)
    for inputs, expected in zip(met[1:], slow, strict=True):
        both = torch.cat((expected, expected)) if cfg_scale else expected
        torch.testing.assert_close(inputs, both, atol=1e-6, rtol=0)


# -- guidance -----------------------------------------------------------------------------


def full_logits(transformer, tokenizer, indices, labels):
    """One masked forward over all scales."""
    inputs = tokenizer.quantizer.teacher_forcing_input(indices)
    return transformer(inputs, torch.as_tensor(labels))


@pytest.mark.parametrize("patch_nums", ALL.values(), ids=ALL)
@pytest.mark.parametrize("cfg_scale", [0.0, 1.5, 4.0])
@torch.no_grad()
def test_guided_logits_are_the_formula_on_two_whole_forwards(patch_nums, cfg_scale):
    quantizer = tiny_quantizer(patch_nums, num_phi=1)
    tokenizer, transformer = tiny_tokenizer(quantizer), tiny_transformer(patch_nums)
    forced = tokenizer.encode(torch.rand(2, 3, *tokenizer.image_size) * 2 - 1)
    cond = full_logits(transformer, tokenizer, forced, [2, 0])
    uncond = full_logits(transformer, tokenizer, forced, [3, 3])
    labels, indices, num_scales = torch.tensor([2, 0]), [], len(patch_nums)
    for k, logits in guided_logits(transformer, tokenizer, labels, cfg_scale, indices):
        indices.append(forced[k])
        t = cfg_scale * k / (num_scales - 1) if num_scales > 1 else cfg_scale
        where = transformer.schedule.slices[k]
        expected = (1 + t) * cond[:, where] - t * uncond[:, where]
        torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-4)
    assert k == num_scales - 1


def test_the_weight_of_guidance_rises_from_zero_to_its_scale():
    assert [guidance_weight(1.5, k, 4) for k in range(4)] == [0.0, 0.5, 1.0, 1.5]
    assert guidance_weight(1.5, 0, 1) == 1.5


@torch.no_grad()
def test_zero_guidance_is_sampling_without_the_second_half_of_the_batch(transformer, tokenizer):
    labels, rows = torch.tensor([0, 2]), []
    forward_scale = transformer.forward_scale

    def witness(k, inputs, condition, *others):
        rows.append(len(condition.embedding))
        return forward_scale(k, inputs, condition, *others)

    transformer.forward_scale = witness
    drawn = generate(transformer, tokenizer, labels, cfg_scale=0, seed=3, return_indices=True)
    assert set(rows) == {2}
    uniforms = torch.from_numpy(draw_uniforms(3, range(2), transformer.schedule.seq_len))
    cond = full_logits(transformer, tokenizer, drawn.indices, labels)
    assert torch.equal(torch.cat(drawn.indices, 1), draw(cond, uniforms))
    almost = generate(transformer, tokenizer, labels, cfg_scale=1e-9, seed=3, return_indices=True)
    assert set(rows) == {2, 4} and all(map(torch.equal, almost.indices, drawn.indices))


@pytest.mark.parametrize("cfg_scale", [0.0, 3.0])
@torch.no_grad()
def test_top_1_is_the_argmax_of_whole_forwards_step_by_step(transformer, tokenizer, cfg_scale):
    labels, indices, schedule = torch.tensor([1, 2]), [], transformer.schedule
    for k, where in enumerate(schedule.slices):
        blank = [torch.zeros(2, n, dtype=torch.int64) for n in schedule.num_tokens[k:]]
        cond = full_logits(transformer, tokenizer, indices + blank, labels)[:, where]
        uncond = full_logits(transformer, tokenizer, indices + blank, [3, 3])[:, where]
        t = cfg_scale * k / (schedule.num_scales - 1)
        indices.append(((1 + t) * cond - t * uncond).argmax(dim=-1))
    settings = {"cfg_scale": cfg_scale, "top_k": 1, "seed": 11, "return_indices": True}
    drawn = generate(transformer, tokenizer, labels, **settings)
    assert all(map(torch.equal, drawn.indices, indices))
    torch.testing.assert_close(drawn.images, (tokenizer.decode(indices) + 1) / 2)


# -- filters and the draw -----------------------------------------------------------------


def slow_filter(logits, top_k, top_p):
    """One row of V logits in numpy: the set of codes that stay."""
    kept = np.argsort(-logits, kind="stable")
    if top_k:
        kept = kept[:top_k]
    if top_p:
        p = np.exp(logits[kept] - logits.max())
        p /= p.sum()
        count, mass = 0, 0.0
        while count < len(kept) and mass < top_p:
            mass += p[count]  # the code that crosses top_p stays
            count += 1
        kept = kept[:count]
    return set(kept.tolist())


@pytest.mark.parametrize("top_k", [0, 1, 3, 20, 99])
@pytest.mark.parametrize("top_p", [0.0, 0.01, 0.5, 0.9, 0.999, 1.0])
def test_top_k_then_top_p_keep_what_the_slow_filter_keeps(top_k, top_p):
    logits = 2 * torch.randn(4, 7, 20)
    filtered = filter_top_k_top_p(logits, top_k, top_p)
    for ours, raw in zip(filtered.flatten(0, 1), logits.flatten(0, 1), strict=True):
        kept = torch.nonzero(ours > -torch.inf).flatten().tolist()
        assert set(kept) == slow_filter(raw.double().numpy(), top_k, top_p)
        assert torch.equal(ours[kept], raw[kept])


def test_the_code_that_crosses_top_p_is_kept_with_all_that_are_as_likely():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    for top_p, kept in ((0.4, 1), (0.6, 2), (0.74, 2), (0.76, 3), (0.95, 4)):
        assert (filter_top_k_top_p(logits, 0, top_p) > -torch.inf).sum() == kept
    logits = torch.tensor([1.0, 3.0, 1.0, 0.0, 1.0])
    for filters in ((2, 0.0), (0, 0.75), (2, 0.95)):
        kept = filter_top_k_top_p(logits, *filters) > -torch.inf
        assert kept.tolist() == [True, True, True, False, True]


def test_no_filter_is_no_change():
    logits = torch.randn(2, 5, 9)
    assert torch.equal(filter_top_k_top_p(logits, 0, 0.0), logits)
    assert torch.equal(filter_top_k_top_p(logits, 9, 1.0), logits)


def test_draws_follow_the_distribution_and_never_leave_the_filter():
    logits = filter_top_k_top_p(torch.randn(1, 1, 12) * 1.5, 8, 0.97)
    number = 40_000
    uniforms = torch.from_numpy(np.random.default_rng(0).random((1, number)))
    codes = draw(logits.expand(1, number, 12), uniforms).flatten()
    p = logits.flatten().softmax(0)
    counts = torch.bincount(codes, minlength=12)
    assert (counts[p == 0] == 0).all() and (p == 0).sum() >= 4
    kept = p > 0
    chi_square = ((counts - number * p)[kept].square() / (number * p[kept])).sum()
    assert chi_square < 29  # of at most 7 degrees of freedom: one run in 7,000 fails


def test_the_draw_is_the_inverse_of_the_cumulative_distribution():
    p = [0.0, 0.2, 0.0, 0.5, 0.3, 0.0]
    logits = torch.tensor(p).log().expand(1, 1000, 6)
    uniforms = torch.arange(1000, dtype=torch.float64).unsqueeze(0) / 1000 + 5e-4
    expected = [next(v for v in range(6) if u < sum(p[: v + 1])) for u in uniforms[0].tolist()]
    assert draw(logits, uniforms)[0].tolist() == expected


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53, 1.0])
def test_not_even_the_ends_of_the_unit_interval_draw_a_filtered_code(uniform):
    for kept in ([1, 3], [3], [0, 5]):
        logits = torch.full((1, 1, 6), -torch.inf)
        logits[..., kept] = 0.0
        code = draw(logits, torch.tensor([[uniform]], dtype=torch.float64)).item()
        assert code == (kept[0] if uniform == 0 else kept[-1])


def test_generated_codes_respect_the_filters(transformer, tokenizer):
    labels = [0] * 40
    one = generate(transformer, tokenizer, labels, top_k=2, cfg_scale=0, return_indices=True)
    assert len(one.indices[0].unique()) == 2
    cold = generate(transformer, tokenizer, labels, temperature=1e-4, return_indices=True)
    greedy = generate(transformer, tokenizer, labels, top_k=1, return_indices=True)
    assert all(map(torch.equal, cold.indices, greedy.indices))
    hot = generate(transformer, tokenizer, labels, temperature=1e4, return_indices=True)
    assert len(torch.cat(hot.indices, 1).unique()) == transformer.vocab_size


# -- what comes out, and what is refused --------------------------------------------------


@pytest.mark.parametrize("patch_nums", ALL.values(), ids=ALL)
def test_images_are_in_the_unit_range_and_are_what_their_codes_decode_to(patch_nums):
    tokenizer = tiny_tokenizer(tiny_quantizer(patch_nums, num_phi=1))
    transformer = tiny_transformer(patch_nums)
    samples = generate(transformer, tokenizer, [0, 1, 2], return_indices=True)
    assert samples.images.shape == (3, 3, *tokenizer.image_size)
    assert 0 <= samples.images.min() and samples.images.max() <= 1
    assert [i.shape for i in samples.indices] == [(3, n) for n in tokenizer.schedule.num_tokens]
    torch.testing.assert_close(samples.images, (tokenizer.decode(samples.indices) + 1) / 2)
    assert torch.equal(samples.images, generate(transformer, tokenizer, torch.arange(3)))


def test_without_labels_images_are_drawn_without_a_class(transformer, tokenizer):
    assert generate(transformer, tokenizer, None).shape[0] == 1
    unlabelled = generate(transformer, tokenizer, None, num_samples=4, cfg_scale=0)
    assert torch.equal(unlabelled, generate(transformer, tokenizer, [3] * 4, cfg_scale=0))
    # Guidance away from "no class" towards "no class" goes nowhere.
    guided = generate(transformer, tokenizer, None, num_samples=4, cfg_scale=2.0)
    torch.testing.assert_close(guided, unlabelled, atol=1e-4, rtol=0)


def test_a_network_without_classes_samples(tokenizer):
    transformer = tiny_transformer(num_classes=0)
    assert generate(transformer, tokenizer, None, num_samples=2).shape == (2, 3, 10, 10)
    assert generate(transformer, tokenizer, [0, 0]).shape == (2, 3, 10, 10)


def test_sampling_under_autocast_gives_float32_images(transformer, tokenizer):
    with torch.autocast("cpu", torch.bfloat16):
        images = generate(transformer, tokenizer, [0, 1])
    assert images.dtype == torch.float32 and 0 <= images.min() and images.max() <= 1


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("cfg_scale", -0.1),
        ("cfg_scale", float("nan")),
        ("top_k", -1),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("temperature", 0.0),
        ("temperature", -1.0),
    ],
)
def test_a_setting_out_of_range_is_refused_with_its_value(transformer, tokenizer, setting, value):
    with pytest.raises(ValueError, match=f"{setting}: expected .*got {value}"):
        generate(transformer, tokenizer, [0], **{setting: value})
    with pytest.raises(ValueError, match=f"{setting}: expected .*got {value}"):
        list(iterate_samples(transformer, tokenizer, [0], batch_size=1, **{setting: value}))


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_out_of_range_is_refused(transformer, tokenizer, label):
    with pytest.raises(ValueError, match=f"got {label}"):
        generate(transformer, tokenizer, [0, label])


@pytest.mark.parametrize("number", [0, -1])
def test_fewer_than_one_sample_is_refused(transformer, tokenizer, number):
    with pytest.raises(ValueError, match="at least 1 sample"):
        generate(transformer, tokenizer, None, num_samples=number)
    with pytest.raises(ValueError, match="at least 1 sample"):
        generate(transformer, tokenizer, [])
    with pytest.raises(ValueError, match="at least 1 sample"):
        list(iterate_samples(transformer, tokenizer, [], batch_size=4))
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {number}"):
        list(iterate_samples(transformer, tokenizer, [0], batch_size=number))


@pytest.mark.parametrize("sample_ids", [[5], [5, 6, 7, 8]])
def test_each_label_needs_its_own_number(transformer, tokenizer, sample_ids):
    with pytest.raises(ValueError, match="got 3 labels and"):
        generate(transformer, tokenizer, [0, 1, 2], sample_ids=sample_ids)


def test_networks_that_do_not_fit_each_other_are_refused(transformer, tokenizer):
    for other, name in (
        (tiny_transformer([1, 2, 3, 5]), "schedule"),
        (tiny_transformer(vocab_size=17), "vocab_size"),
        (tiny_transformer(code_dim=5), "code_dim"),
    ):
        with pytest.raises(ValueError, match=f"one {name}, got .* and"):
            generate(other, tokenizer, [0])


def test_the_cache_does_not_outlive_a_failed_sampling(transformer, tokenizer):
    before = generate(transformer, tokenizer, [0, 1])
    steps = guided_logits(transformer, tokenizer, torch.tensor([0, 1]), 1.5, [])
    next(steps)
    with pytest.raises(IndexError):  # no codes were chosen for the first scale
        next(steps)
    assert torch.equal(generate(transformer, tokenizer, [0, 1]), before)
    assert full_logits(
        transformer, tokenizer, tokenizer.encode(torch.zeros(1, 3, 10, 10)), [0]
    ).shape == (1, 55, 16)
