"""From scale to scale nothing is computed, copied or taken again that is already there."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.tiny import BLOCKS, tiny_tokenizer, tiny_transformer
from var_exp.sampling.generate import generate
from var_exp.transformer.attention import CachedAttention, KVCache


class Allocations(TorchDispatchMode):
    """The memory of what operations give: its address -> the shapes of those tensors."""

    def __init__(self):
        super().__init__()
        self.shapes: dict[int, set[tuple[int, ...]]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                address = tensor.untyped_storage().data_ptr()
                self.shapes.setdefault(address, set()).add(tuple(tensor.shape))
        return out


def places_of_all_keys_so_far(transformer, tokenizer, labels, monkeypatch) -> set[int]:
    """Addresses of tensors as long as all keys so far, of more than one scale."""
    caches = []
    make = transformer.make_cache
    monkeypatch.setattr(transformer, "make_cache", lambda n: caches.append(make(n)) or caches[-1])
    with Allocations() as seen:
        generate(transformer, tokenizer, labels, cfg_scale=1.5)
    (cache,) = caches
    ends = [where.stop for where in transformer.schedule.slices[1:]]
    shape = (2 * len(labels), transformer.num_heads)
    long = {(*shape, end, cache.keys.shape[-1]) for end in ends}
    taken = {cache.keys.untyped_storage().data_ptr(), cache.values.untyped_storage().data_ptr()}
    return {address for address, shapes in seen.shapes.items() if shapes & long} - taken


def test_keys_and_values_are_never_copied_from_scale_to_scale(monkeypatch):
    found = places_of_all_keys_so_far(
        tiny_transformer(depth=3), tiny_tokenizer(), [0, 1, 1], monkeypatch
    )
    assert found == set()


def test_a_cache_that_grows_by_concatenation_is_seen(monkeypatch):
    held = {}

    class Growing(CachedAttention):
        def __call__(self, q, k, v, scale, dropout):
            place = self.keys.storage_offset()
            before = held.get(place, (k[:, :, :0], v[:, :, :0]))
            held[place] = torch.cat((before[0], k), 2), torch.cat((before[1], v), 2)
            return torch.nn.functional.scaled_dot_product_attention(q, *held[place], scale=scale)

    transformer, tokenizer = tiny_transformer(depth=3), tiny_tokenizer()
    plain = generate(transformer, tokenizer, [0, 1, 1], cfg_scale=1.5)
    attend = lambda self, i, tokens: Growing(self.keys[i], self.values[i], tokens)  # noqa: E731
    monkeypatch.setattr(KVCache, "attend", attend)
    assert places_of_all_keys_so_far(transformer, tokenizer, [0, 1, 1], monkeypatch)
    held.clear()
    torch.testing.assert_close(generate(transformer, tokenizer, [0, 1, 1], cfg_scale=1.5), plain)


@pytest.mark.parametrize("block", BLOCKS)
def test_what_depends_on_the_class_alone_is_computed_once_for_all_scales(block, monkeypatch):
    transformer, calls = tiny_transformer(block=block, depth=3), []
    parts = [*transformer.blocks, transformer.head]
    for part in parts:

        def counted(condition, part=part, modulation=part.modulation):
            calls.append(part)
            return modulation(condition)

        monkeypatch.setattr(part, "modulation", counted)
    generate(transformer, tiny_tokenizer(), [0, 1])
    assert calls == parts
