"""What only a GPU can show: streams, devices, CUDA graphs, the same bits in every run. Skipped where there is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from alitok_fast.ops.add_rms_norm import add_rms_norm
from alitok_fast.ops.cached_attention import cached_attention
from alitok_fast.ops.prefix_attention import prefix_attention
from alitok_fast.ops.quantized_linear import quantize_weight, quantized_linear
from alitok_fast.ops.sample_tokens import sample_tokens
from alitok_fast.ops.swiglu import swiglu
from alitok_fast.ops.vq_lookup import vq_lookup

Case = tuple[Callable[..., tuple[torch.Tensor, ...]], dict[str, torch.Tensor]]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vq_lookup_case() -> Case:
    def run(z, codebook, grad):
        z, codebook = z.detach().requires_grad_(), codebook.detach().requires_grad_()
        result = vq_lookup(z, codebook)
        gradients = torch.autograd.grad((result.quantized * grad).sum() + result.loss, [z, codebook])
        return *(t.detach() for t in result), *gradients

    return run, {"z": randn(5000, 32), "codebook": randn(1000, 32, seed=1), "grad": randn(5000, 32, seed=2)}


def prefix_attention_case() -> Case:
    def run(qkv, q_norm_weight, k_norm_weight, rope, seed):
        leaves = [x.detach().requires_grad_() for x in (qkv, q_norm_weight, k_norm_weight)]
        options = {"q_norm_weight": leaves[1], "k_norm_weight": leaves[2], "rope": rope}
        out = prefix_attention(leaves[0], 17, **options, dropout=0.1, seed=seed)
        return out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))

    angles = randn(274, 24)
    return run, {
        "qkv": randn(4, 274, 3, 8, 48, seed=1).bfloat16(),
        "q_norm_weight": randn(48, seed=2),
        "k_norm_weight": randn(48, seed=3),
        "rope": torch.stack([angles.cos(), angles.sin()], -1),
        "seed": torch.tensor([5]),
    }


def cached_attention_case() -> Case:
    def run(qkv, keys, values, positions):
        keys, values = keys.clone(), values.clone()
        return cached_attention(qkv, keys, values, positions), keys, values

    keys, values = randn(2, 16, 8, 273, 48, seed=1).bfloat16()
    return run, {
        "qkv": randn(16, 1, 3, 8, 48).bfloat16(),
        "keys": keys,
        "values": values,
        "positions": torch.arange(200, 216),
    }


def shared_keys_case() -> Case:
    """cached_attention with counters of each call's own: on a GPU nine blocks share the keys of a row and head."""

    def run(qkv, keys, values, positions):
        keys, values = keys.clone(), values.clone()
        arrivals = torch.zeros(16, dtype=torch.int32, device=qkv.device)
        return cached_attention(qkv, keys, values, positions, arrivals=arrivals), keys, values, arrivals

    keys, values = randn(2, 2, 8, 273, 48, seed=1).bfloat16()
    return run, {
        "qkv": randn(2, 1, 3, 8, 48).bfloat16(),
        "keys": keys,
        "values": values,
        "positions": torch.tensor([200, 99]),
    }


def add_rms_norm_case() -> Case:
    def run(x, delta, weight, seed):
        leaves = [t.detach().requires_grad_() for t in (x, delta, weight)]
        results = add_rms_norm(*leaves, dropout=0.1, seed=seed)
        gradients = torch.autograd.grad(results, leaves, [torch.ones_like(result) for result in results])
        return *(result.detach() for result in results), *gradients

    tensors = {"x": randn(640, 768), "delta": randn(640, 768, seed=1), "weight": randn(768, seed=2)}
    return run, {**tensors, "seed": torch.tensor([6])}


def swiglu_case() -> Case:
    return lambda gate, up: (swiglu(gate, up),), {"gate": randn(64, 2048), "up": randn(64, 2048, seed=1)}


def sample_tokens_case() -> Case:
    def run(logits, guidance_scale, seed, image_ids, step):
        draws = dict(guidance_scale=guidance_scale, seed=seed, image_ids=image_ids, step=step)
        return sample_tokens(logits, **draws), sample_tokens(logits, top_k=50, top_p=0.9, **draws)

    scalars = {"guidance_scale": torch.tensor(3.0), "seed": torch.tensor(1), "step": torch.tensor(7)}
    return run, {"logits": randn(64, 4096), "image_ids": torch.arange(32), **scalars}


def quantized_linear_case() -> Case:
    def run(x, weight, scale, bias):
        return tuple(quantized_linear(x[:rows], weight, scale, bias) for rows in (1, 5, 16, 64))

    weight, scale = quantize_weight(randn(768, 2048, seed=1), torch.int8)
    return run, {"x": randn(64, 2048), "weight": weight, "scale": scale, "bias": randn(768, seed=2)}


CASES = {
    case.__name__.removesuffix("_case"): case
    for case in (
        vq_lookup_case,
        prefix_attention_case,
        cached_attention_case,
        shared_keys_case,
        add_rms_norm_case,
        quantized_linear_case,
        swiglu_case,
        sample_tokens_case,
    )
}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]()


def to(device, inputs):
    return {name: x.to(device) for name, x in inputs.items()}


def assert_same(results, others):
    for got, expected in zip(results, others, strict=True):
        assert torch.equal(got, expected)


def hold_back(stream: torch.cuda.Stream) -> None:
    """Keep a stream busy for some tens of milliseconds: work that should wait for it and does not, comes too early."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)


def test_cases_agree_with_the_reference_on_the_cpu(case):
    """So that the tests below compare something that is right."""
    from alitok_fast._library import use_reference

    function, inputs = case
    native = function(**inputs)
    with use_reference():
        for got, expected in zip(native, function(**inputs), strict=True):
            scale = expected.abs().max().double()
            assert (got.double() - expected.double()).abs().max() <= 0.03 * scale


@pytest.mark.device
def test_same_bits_in_every_run(cuda, case):
    function, inputs = case
    inputs = to(cuda, inputs)
    first = function(**inputs)
    for _ in range(3):
        assert_same(function(**inputs), first)


@pytest.mark.device
def test_runs_on_the_current_stream(cuda, case):
    """The inputs appear on a stream that is held back: a kernel on another one would read what was there before."""
    function, inputs = case
    right = to(cuda, inputs)
    expected = function(**right)
    late = {name: torch.zeros_like(x) for name, x in right.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    hold_back(stream)
    with torch.cuda.stream(stream):
        for name, x in late.items():
            x.copy_(right[name])
        results = function(**late)
    stream.synchronize()
    assert_same(results, expected)


@pytest.mark.device
def test_two_streams_at_once(cuda, case):
    """Neither uses the other's working memory."""
    function, inputs = case
    inputs = to(cuda, inputs)
    expected = function(**inputs)
    torch.cuda.synchronize()
    results = []
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            results += [function(**inputs) for _ in range(5)]
    torch.cuda.synchronize()
    for result in results:
        assert_same(result, expected)


@pytest.mark.device
def test_is_captured_in_a_cuda_graph(cuda, case):
    """Nothing waits for the device, and a replay reads the inputs as they are then."""
    function, inputs = case
    inputs = to(cuda, inputs)
    expected = function(**inputs)
    static = {name: torch.zeros_like(x) for name, x in inputs.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(**static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function(**static)
    for name, x in static.items():
        x.copy_(inputs[name])
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert_same(results, expected)


@pytest.mark.device
def test_runs_on_the_device_of_its_tensors(cuda, case):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    function, inputs = case
    expected = function(**to("cuda:0", inputs))
    with torch.cuda.device(0):
        results = function(**to("cuda:1", inputs))
    assert all(x.device == torch.device("cuda:1") for x in results)
    assert_same([x.to("cuda:0") for x in results], expected)


@pytest.mark.device
def test_tensors_on_other_devices_are_refused(cuda, case):
    function, inputs = case
    for name in inputs:
        mixed = to(cuda, inputs) | {name: inputs[name]}
        with pytest.raises((RuntimeError, ValueError), match="device"):
            function(**mixed)
