"""PackedGenerator: parity with the reference's logits, and what bfloat16 and int8 weights change in what is drawn."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from alitok_fast._library import use_reference
from alitok_fast.config import generator_preset
from alitok_fast.inference import memory
from alitok_fast.inference.memory import plan
from alitok_fast.inference.packed_generator import PackedGenerator
from alitok_fast.inference.quantized_generator import QuantizedGenerator
from alitok_fast.inference.sampler import guidance_schedule, sample
from alitok_fast.models import load_generator
from alitok_fast.models.loading import build
from alitok_fast.ops.sample_tokens import guided_logits
from alitok_fast.storage.checkpoint import Checkpoint
from alitok_fast.testing import relative_error, step_logits

STEPS = 35  # of B's 273: holds eight of the golden positions, and stays quick
REDUCED = [(torch.bfloat16, None), (torch.int8, None), (torch.int8, torch.int8)]  # weights, activations
# Of guided logits: relative error (norm), and Kullback-Leibler divergence of the distribution in nats; two to three
# times what was measured (docs/precision.md). B is held to its largest guidance scale, 16, at every step: with random
# weights, which make conditional and unconditional logits independent, nothing amplifies rounding more. Measured there:
# bfloat16 1.1e-2 and 1.3e-2, int8 2.4e-2 and 3.3e-2. Demo, trained, along its own samples: 1.6e-2 and 1.1e-3, 1.7e-2
# and 1.6e-3; its first weights, of 16,000 steps, had 1.6e-2 and 5.4e-4, 1.4e-2 and 7.7e-4. int8 with 8-bit activations:
# B 3.9e-2 and 1.0e-1, demo 5.5e-2 and 8.0e-3.
B_BOUNDS = {REDUCED[0]: (2.5e-2, 2.5e-2), REDUCED[1]: (5e-2, 8e-2), REDUCED[2]: (8e-2, 0.25)}
DEMO_BOUNDS = {REDUCED[0]: (3e-2, 3e-3), REDUCED[1]: (3e-2, 4e-3), REDUCED[2]: (0.12, 2e-2)}
# Weights, cache: measured 3.2e-2, 3.5e-3; 3.3e-2, 2.5e-3; 6.6e-2, 1.8e-2; 1.6e-1, 8.6e-2; 1.9e-1, 9.8e-2.
CUDA_BOUNDS = {
    (torch.bfloat16, None): (6e-2, 7e-3),
    (torch.int8, None): (6e-2, 6e-3),
    (torch.float8_e4m3fn, None): (8e-2, 4e-2),
    (torch.bfloat16, torch.float8_e4m3fn): (0.35, 0.2),
    (torch.float8_e4m3fn, torch.float8_e4m3fn): (0.35, 0.2),
}
# B again, all else in float32: 2.4e-2, 3.2e-2 (with a scale an output 1.4e-1); 1.1e-1, 9.8e-1; 6.0e-2, 2.5e-1.
CUDA_B_BOUNDS = {
    (torch.int8, None): B_BOUNDS[torch.int8, None],
    (torch.float8_e4m3fn, None): (0.25, 2.0),
    (None, torch.float8_e4m3fn): (0.12, 0.5),
}


@pytest.fixture(scope="module")
def size_b(golden, recipe):
    """B with recipe weights, golden outputs, and the float32 decoder's logits along the golden tokens."""
    gen = build(Checkpoint(generator_preset("b"), recipe("ar_b"))).eval().requires_grad_(False)
    with np.load(golden / "ar_b.npz") as file:
        outputs = {name: torch.from_numpy(file[name]) for name in file.files}
    return gen, outputs, follow(PackedGenerator(gen), outputs["labels"], outputs["tokens"][:, :STEPS])


@pytest.fixture(scope="module")
def demo():
    return load_generator("demo").requires_grad_(False)


def follow(model, labels, tokens, kv_dtype=None):
    """(steps, 2 B, codes) logits before each token, conditional rows first."""
    batch = len(labels)
    condition = torch.cat([model.condition_ids(labels, batch), model.condition_ids(None, batch)])
    fed = torch.cat([condition[:, None], tokens[:, :-1].repeat(2, 1)], 1)
    return step_logits(model, fed, model.new_cache(2 * batch, kv_dtype)).transpose(0, 1)


def guided_errors(actual, expected, scales):
    """Relative error of guided logits and mean KL divergence (nats) of their softmax, the worst step of each."""
    errors, divergences = [], []
    for got, wanted, scale in zip(actual, expected, scales, strict=True):
        got, wanted = guided_logits(got, scale).double(), guided_logits(wanted, scale).double()
        errors.append(((got - wanted).norm() / wanted.norm()).item())
        log_p, log_q = wanted.log_softmax(-1), got.log_softmax(-1)
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1).mean().item())
    return max(errors), max(divergences)


def test_float32_matches_the_reference_implementation(size_b):
    _, outputs, logits = size_b
    positions = [i for i, position in enumerate(outputs["positions"]) if position < STEPS]
    assert len(positions) == 8
    got = logits[outputs["positions"][positions]].unflatten(1, (2, 2)).permute(1, 2, 0, 3)
    assert relative_error(got[0], outputs["logits_cond"][:, positions]) < 1e-4
    assert relative_error(got[1], outputs["logits_uncond"][:, positions]) < 1e-4


@pytest.mark.parametrize("dtypes", REDUCED)
def test_b_in_reduced_precision(size_b, dtypes):
    gen, outputs, expected = size_b
    got = follow(PackedGenerator(gen, *dtypes), outputs["labels"], outputs["tokens"][:, :STEPS])
    # The largest scale of the schedule at every step: what it amplifies shows best.
    error, divergence = guided_errors(got, expected, torch.full((STEPS,), gen.config.guidance_scale))
    print(f"B {dtypes}: guided logits {error:.1e}, KL {divergence:.1e}")
    assert 0 < error < B_BOUNDS[dtypes][0]
    assert 0 < divergence < B_BOUNDS[dtypes][1]


@pytest.mark.parametrize("dtypes", REDUCED)
def test_demo_in_reduced_precision(demo, dtypes):
    config, labels = demo.config, torch.arange(8)
    exact = PackedGenerator(demo)
    tokens = sample(exact, labels)
    schedule = guidance_schedule(config.num_tokens, config.guidance_scale, config.guidance_power)
    expected = follow(exact, labels, tokens)
    error, divergence = guided_errors(follow(PackedGenerator(demo, *dtypes), labels, tokens), expected, schedule)
    print(f"demo {dtypes}: guided logits {error:.1e}, KL {divergence:.1e}")
    assert 0 < error < DEMO_BOUNDS[dtypes][0]
    assert 0 < divergence < DEMO_BOUNDS[dtypes][1]


@pytest.mark.parametrize("weights, kv_dtype", CUDA_B_BOUNDS)
def test_b_in_the_precisions_of_cuda(size_b, weights, kv_dtype):
    """8-bit layers and caches through the CPU's kernels, all else in float32."""
    gen, outputs, expected = size_b
    model = gen if weights is None else QuantizedGenerator(gen, weights)
    got = follow(model, outputs["labels"], outputs["tokens"][:, :STEPS], kv_dtype)
    error, divergence = guided_errors(got, expected, torch.full((STEPS,), gen.config.guidance_scale))
    print(f"B {weights}, cache {kv_dtype}: guided logits {error:.1e}, KL {divergence:.1e}")
    assert 0 < error < CUDA_B_BOUNDS[weights, kv_dtype][0]
    assert 0 < divergence < CUDA_B_BOUNDS[weights, kv_dtype][1]


@pytest.mark.parametrize("weights, kv_dtype", CUDA_BOUNDS)
def test_demo_in_the_precisions_of_cuda(weights, kv_dtype):
    """Steps of the generator itself, as on a GPU, through the CPU's kernels of the same operators."""
    exact = load_generator("demo").requires_grad_(False)
    config, labels = exact.config, torch.arange(8)
    tokens = sample(PackedGenerator(exact), labels)
    schedule = guidance_schedule(config.num_tokens, config.guidance_scale, config.guidance_power)
    expected = follow(exact, labels, tokens)
    reduced = load_generator("demo", dtype=torch.bfloat16).requires_grad_(False)
    model = reduced if weights == torch.bfloat16 else QuantizedGenerator(reduced, weights)
    error, divergence = guided_errors(follow(model, labels, tokens, kv_dtype), expected, schedule)
    print(f"demo weights {weights}, cache {kv_dtype}: guided logits {error:.1e}, KL {divergence:.1e}")
    assert 0 < error < CUDA_BOUNDS[weights, kv_dtype][0]
    assert 0 < divergence < CUDA_BOUNDS[weights, kv_dtype][1]


def test_float32_equals_the_uncached_model(demo):
    labels, tokens = torch.tensor([3, 7]), sample(PackedGenerator(demo), [3, 7])
    got = follow(PackedGenerator(demo), labels, tokens)
    for logits, expected in ((got[:, :2], demo(tokens, labels)), (got[:, 2:], demo(tokens, None))):
        assert relative_error(logits.transpose(0, 1), expected[:, :-1]) < 1e-4


@pytest.mark.parametrize("dtypes", [(torch.float32, None), *REDUCED])
def test_an_image_is_the_same_in_any_batch(demo, dtypes):
    decoder, labels = PackedGenerator(demo, *dtypes), torch.arange(10).repeat(2)
    whole = sample(decoder, labels, seed=3)
    for begin, end in ((0, 1), (1, 3), (3, 20)):
        part = sample(decoder, labels[begin:end], seed=3, image_ids=range(begin, end))
        assert torch.equal(part, whole[begin:end])


def test_weights_are_a_copy(tiny_generator):
    gen = tiny_generator()
    decoder = PackedGenerator(gen)
    before = sample(decoder, [1, 2], temperature=0)
    gen.output.weight.data.zero_()
    assert torch.equal(sample(decoder, [1, 2], temperature=0), before)
    assert not torch.equal(sample(gen, [1, 2], temperature=0), before)


def test_reference_steps_are_the_explicit_choice(tiny_generator):
    gen = tiny_generator()
    native = sample(gen, [1, 2])
    with use_reference():
        assert torch.equal(sample(gen, [1, 2]), native)
        assert torch.equal(sample(PackedGenerator(gen), [1, 2]), native)


def test_a_batch_that_does_not_fit_is_split(tiny_generator, monkeypatch):
    gen = tiny_generator()
    labels = [0, 1, 2, 3, 4, 5, 6]
    whole = sample(gen, labels)
    batches = []
    per_image = plan(gen).bytes_per_image
    monkeypatch.setattr("alitok_fast.inference.memory.available_bytes", lambda device: 4 * per_image)
    assert plan(gen).largest_batch == 3
    split = sample(gen, labels, on_step=lambda step, tokens: batches.append(len(tokens)) if step == 0 else None)
    assert batches == [3, 3, 1]
    assert torch.equal(split, whole)


def test_an_allocation_failure_says_what_fits(tiny_generator, monkeypatch):
    decoder = PackedGenerator(tiny_generator())

    def fail(slots, dtype=None, columns=1):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(decoder, "new_cache", fail)
    with pytest.raises(MemoryError, match=r"expected a batch whose cache fits in memory, got 2 images, .* GiB"):
        sample(decoder, [1, 2])


def test_plan_counts_the_cache(tiny_generator):
    gen = tiny_generator()
    config = gen.config
    cache = 2 * config.num_layers * config.width * config.num_tokens * 4
    assert 2 * cache < plan(gen).bytes_per_image < 2 * (cache + 100_000)
    assert plan(gen, guided=False).bytes_per_image * 2 == plan(gen).bytes_per_image
    assert plan(PackedGenerator(gen, torch.int8)).bytes_per_image < plan(gen).bytes_per_image
    assert plan(gen).bytes_available > 0
    assert plan(gen).batch_bytes(3) == 3 * plan(gen).bytes_per_image


def test_plan_refuses_what_it_does_not_know(tiny_generator):
    gen = tiny_generator()
    with pytest.raises(TypeError, match="gen: expected a generator, got int"):
        plan(3)
    with pytest.raises(ValueError, match="device: expected cpu or cuda, whose free memory is known, got meta"):
        plan(gen, "meta")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: expected one that is there, got cuda"):
            plan(gen, "cuda")


def test_plan_counts_the_limits_of_containers(tmp_path):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    own = tmp_path / "cgroup"
    own.write_text("4:memory:/elsewhere\n0::/a/b\n")
    assert memory._left_in_groups(tmp_path, own) == [sys.maxsize]
    (inner / "memory.max").write_text("max\n")
    (tmp_path / "a" / "memory.max").write_text("1000\n")
    (tmp_path / "a" / "memory.current").write_text("700\n")
    (tmp_path / "a" / "memory.stat").write_text("anon 500\ninactive_file 150\nactive_file 50\n")
    assert min(memory._left_in_groups(tmp_path, own)) == 1000 - 700 + 150
    assert memory._left_in_groups(tmp_path, tmp_path / "none") == [sys.maxsize]


@pytest.mark.parametrize("seen_from", ["outside", "inside the container"])
def test_plan_counts_the_limits_of_the_first_version_of_control_groups(tmp_path, seen_from):
    group = tmp_path / "memory" / "docker" / "abc" if seen_from == "outside" else tmp_path / "memory"
    group.mkdir(parents=True)
    own = tmp_path / "cgroup"
    own.write_text("5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n")
    (group / "memory.limit_in_bytes").write_text("1000\n")
    (group / "memory.usage_in_bytes").write_text("700\n")
    (group / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 150\n")
    assert min(memory._left_in_groups(tmp_path, own)) == 1000 - 700 + 150


def test_bad_arguments(tiny_generator):
    gen = tiny_generator()
    with pytest.raises(ValueError, match="weight_dtype: expected float32, bfloat16 or int8 on the CPU, got float16"):
        PackedGenerator(gen, torch.float16)
    with pytest.raises(ValueError, match="kv_dtype: expected float32 or bfloat16 on the CPU, got float8_e4m3fn"):
        sample(PackedGenerator(gen), [1], kv_dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="gen: expected a generator on the CPU, got one on meta"):
        PackedGenerator(gen.to("meta"))
    training = tiny_generator().train()
    with pytest.raises(ValueError, match="gen: expected evaluation mode"):
        sample(PackedGenerator(training), [1])
    assert sample(PackedGenerator(training.eval()), [1]).shape == (1, gen.config.num_tokens)
