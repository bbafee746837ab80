"""Compiled sampling draws what plain sampling draws, from one compilation for each scale."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from helpers.tiny import BLOCKS, SCALES, tiny_tokenizer, tiny_transformer
from var_exp.checkpoint.pipeline import VARPipeline
from var_exp.evaluation.sampler import Sampler
from var_exp.sampling.compile import check_compiler, compile_for_sampling
from var_exp.sampling.generate import generate, guided_logits


def test_each_scale_is_compiled_once_for_all_blocks_and_seeds_and_no_key_changes():
    torch._dynamo.reset()
    transformer = tiny_transformer(depth=10, drop_path=0.2).eval()
    tokenizer = tiny_tokenizer()
    keys = [list(network.state_dict()) for network in (transformer, tokenizer)]
    counter = CompileCounterWithBackend("aot_eager")
    plain = [generate(transformer, tokenizer, [0, 1], seed=seed) for seed in range(3)]
    compile_for_sampling(transformer, tokenizer, backend=counter)
    for seed in range(3):
        drawn = generate(transformer, tokenizer, [0, 1], seed=seed)
        torch.testing.assert_close(drawn, plain[seed], atol=1e-5, rtol=0)
        assert counter.frame_count == len(SCALES)
    assert [list(network.state_dict()) for network in (transformer, tokenizer)] == keys


@pytest.mark.parametrize(("device", "expected"), [("cpu", []), ("meta", ["inductor"])])
def test_the_decoder_is_compiled_but_on_a_cpu(device, expected, monkeypatch):
    networks, asked = (tiny_transformer().to(device), tiny_tokenizer().to(device)), []
    monkeypatch.setattr(networks[1].decoder, "compile", lambda backend, **_: asked.append(backend))
    compile_for_sampling(*networks)
    assert asked == expected


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("options", [{}, {"rope": True}, {"qk_norm": False, "mlp": "swiglu"}])
def test_whatever_the_blocks_are_made_of(block, options):
    torch._dynamo.reset()
    transformer, tokenizer = tiny_transformer(block=block, **options).eval(), tiny_tokenizer()
    plain = generate(transformer, tokenizer, [0, 1], return_indices=True)
    compile_for_sampling(transformer, tokenizer, backend="aot_eager")
    drawn = generate(transformer, tokenizer, [0, 1], return_indices=True)
    assert all(map(torch.equal, drawn.indices, plain.indices))
    torch.testing.assert_close(drawn.images, plain.images, atol=1e-5, rtol=0)


def test_in_bfloat16_logits_are_as_near_as_rounding_leaves_them():
    torch._dynamo.reset()
    transformer, tokenizer, found = tiny_transformer().eval(), tiny_tokenizer(), []
    pair, labels = (transformer, tokenizer), torch.tensor([0, 1])
    codes = generate(transformer, tokenizer, [0, 1], return_indices=True).indices
    for precision, compiled in (("fp32", False), ("bf16", False), ("bf16", True)):
        if compiled:
            compile_for_sampling(transformer, tokenizer, backend="aot_eager")
        given, logits = [], []
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, precision == "bf16"):
            for k, of_scale in guided_logits(*pair, labels, 1.5, given):
                logits.append(of_scale)
                given.append(codes[k])
        found.append(torch.cat(logits, dim=1))
    exact, plain, ours = found
    assert not torch.equal(exact, plain)
    assert (ours - exact).norm() <= 1.5 * (plain - exact).norm()


def test_each_batch_with_graphs_is_one_generation_on_caches_that_stay(monkeypatch):
    options, generations, caches = [], [], []
    transformer, tokenizer = tiny_transformer(depth=3).eval(), tiny_tokenizer()
    batches = [([0, 1], 0), ([1], 1), ([1, 1], 2), ([0, 1], 0)]
    plain = [generate(transformer, tokenizer, labels, seed=seed) for labels, seed in batches]
    monkeypatch.setattr(torch, "compile", lambda function, **o: options.append(o) or function)
    monkeypatch.setattr(
        torch.compiler, "cudagraph_mark_step_begin", lambda: generations.append(len(caches))
    )
    compile_for_sampling(transformer, tokenizer, graphs=True)
    assert [o["mode"] for o in options] == ["reduce-overhead"]
    make_cache = transformer.make_cache
    monkeypatch.setattr(
        transformer, "make_cache", lambda *size: caches.append(make_cache(*size)) or caches[-1]
    )
    for (labels, seed), expected in zip(batches, plain, strict=True):
        assert torch.equal(generate(transformer, tokenizer, labels, seed=seed), expected)
    assert generations == [0, 1, 2, 3]
    assert [cache.keys.shape[1] for cache in caches] == [4, 2, 4, 4]  # with and without a class
    assert caches[0] is caches[2] is caches[3] is not caches[1]
    for keys, values in caches[0].layers:
        assert keys._dynamo_static_input_type == values._dynamo_static_input_type == "unguarded"
    compile_for_sampling(transformer, tokenizer)
    assert make_cache(2) is not make_cache(2)


def test_more_batch_sizes_than_torch_compiles_by_default_are_compiled():
    torch._dynamo.reset()
    transformer, tokenizer = tiny_transformer(depth=2).eval(), tiny_tokenizer()
    counter = CompileCounterWithBackend("eager")
    compile_for_sampling(transformer, tokenizer, backend=counter)
    for batch_size in (1, 2, 3):
        generate(transformer, tokenizer, [0] * batch_size)
        assert counter.frame_count == batch_size * len(SCALES)
    assert counter.frame_count > torch._dynamo.config.recompile_limit


def test_without_a_compiler_it_is_refused_in_one_line(monkeypatch):
    def fails(function):
        def run(*_):
            raise RuntimeError("no g++ here\nand much more")

        return run

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(ValueError, match=r"compile: .*\(no g\+\+ here\); .*compile=false") as told:
        check_compiler(torch.device("cpu"))
    assert "\n" not in str(told.value)


def test_samples_of_compiled_networks_are_another_set():
    settings = {"cfg_scale": 1.5, "top_k": 0, "top_p": 0.0, "temperature": 1.0, "seed": 0}
    networks = tiny_transformer(), tiny_tokenizer()
    plans = [Sampler(*networks, "all", settings, "32-true", c).plan() for c in (False, True)]
    assert plans[1] == plans[0] | {"compiled": True} and "compiled" not in plans[0]


@pytest.mark.slow
def test_what_the_compiler_makes_of_a_pipeline_draws_the_same(tmp_path):
    torch._dynamo.reset()
    pipeline = VARPipeline(tiny_transformer().eval(), tiny_tokenizer())
    plain = pipeline([0, 1])
    pipeline.compile()
    torch.testing.assert_close(pipeline([0, 1]), plain, atol=1e-4, rtol=0)
    pipeline.save_pretrained(tmp_path)
    again = VARPipeline.from_pretrained(tmp_path)
    assert torch.equal(again([0, 1]), plain)
