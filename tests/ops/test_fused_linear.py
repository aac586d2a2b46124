"""norm_linear and linear_add: against their definition in float64, on a GPU the fused kernels among the ways."""

import pytest
import torch

from alitok_fast._library import use_reference
from alitok_fast.ops import fused_linear as module
from alitok_fast.ops.fused_linear import (
    LinearWeights,
    embed_norm_linear,
    fused_linear_reference,
    linear_add,
    norm_linear,
)
from alitok_fast.ops.quantized_linear import dequantize_weight, quantize_weight

EPS = 1e-5
UNIT = {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-11}
KINDS = pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, torch.int8),
     (torch.bfloat16, torch.float8_e4m3fn)],
    ids=["fp32", "bf16", "fp16", "int8", "e4m3"],
)  # fmt: skip
ROWS = pytest.mark.parametrize("rows", [1, 2, 8, 16, 32, 33, 128])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(outputs, inputs, dtype, weight_dtype, device, bias=True, seed=1):
    """A layer, and the same in float64."""
    wide = randn(outputs, inputs, seed=seed) / inputs**0.5
    added = randn(outputs, seed=seed + 10).to(device, dtype) if bias else None
    exact_bias = None if added is None else added.double()
    if weight_dtype is None:
        weight = wide.to(device, dtype)
        return LinearWeights(weight, None, added), LinearWeights(weight.double(), None, exact_bias)
    weight, scale = (t.to(device) for t in quantize_weight(wide, weight_dtype))
    exact = dequantize_weight(weight, scale, torch.float64)
    return LinearWeights(weight, scale, added), LinearWeights(exact, None, exact_bias)


def close(got, expected, dtype, units):
    error = (got.double() - expected).abs().max() / expected.abs().max()
    assert error <= units * UNIT[dtype], f"error {error:.3g}"


@KINDS
@ROWS
@pytest.mark.parametrize("gated", [False, True])
def test_norm_linear(device, dtype, weight_dtype, rows, gated):
    x, weight = randn(rows, 192).to(device), (1 + 0.2 * randn(192, seed=3)).to(device, dtype)
    layer, exact = layer_of(104, 192, dtype, weight_dtype, device, bias=not gated)
    gate, exact_gate = layer_of(104, 192, dtype, weight_dtype, device, bias=False, seed=5) if gated else (None, None)
    total, out = norm_linear(x, None, weight, EPS, layer, gate)
    expected = fused_linear_reference(x.double(), weight.double(), EPS, exact, exact_gate)
    assert total is x and out.dtype == dtype
    close(out, expected, dtype, 4)


@KINDS
@ROWS
@pytest.mark.parametrize("outputs", [70, 72])
def test_linear_add(device, dtype, weight_dtype, rows, outputs):
    x, residual = randn(rows, 512).to(device, dtype), randn(rows, outputs, seed=2).to(device)
    layer, exact = layer_of(outputs, 512, dtype, weight_dtype, device)
    expected = fused_linear_reference(x.double(), None, EPS, exact, residual=residual.double())
    total, delta = linear_add(residual, x, layer)
    close(total if delta is None else total + delta.float(), expected, dtype, 4)


@KINDS
@ROWS
def test_embed_norm_linear(device, dtype, weight_dtype, rows):
    table, weight = randn(50, 192).to(device), (1 + 0.2 * randn(192, seed=3)).to(device, dtype)
    ids = torch.randint(50, (rows,), generator=torch.Generator().manual_seed(rows)).to(device)
    layer, exact = layer_of(104, 192, dtype, weight_dtype, device)
    x, out = embed_norm_linear(ids, table, weight, EPS, layer)
    assert torch.equal(x, table[ids]) and out.dtype == dtype
    close(out, fused_linear_reference(x.double(), weight.double(), EPS, exact), dtype, 4)


@KINDS
def test_what_must_still_be_added_is_added_before_the_norm(device, dtype, weight_dtype):
    x, delta, weight = randn(3, 64).to(device), randn(3, 64, seed=2).to(device, dtype), torch.ones(64).to(device, dtype)
    layer, exact = layer_of(24, 64, dtype, weight_dtype, device)
    total, out = norm_linear(x, delta, weight, EPS, layer)
    assert torch.equal(total, x + delta.float())
    close(out, fused_linear_reference(total.double(), weight.double(), EPS, exact), dtype, 4)


def test_the_kernel_refuses_gradients(monkeypatch):
    """Before it is called, so that no GPU is needed."""
    monkeypatch.setattr(module, "_fits", lambda *_: True)
    layer, x = LinearWeights(torch.ones(64, 64, requires_grad=True)), torch.ones(1, 64)
    with pytest.raises(RuntimeError, match="norm_linear: .* got weight that requires one; it is for sampling"):
        norm_linear(x, None, x[0], EPS, layer)
    with pytest.raises(RuntimeError, match="linear_add: .* got residual that requires one; it is for sampling"):
        linear_add(torch.ones(1, 64, requires_grad=True), x, LinearWeights(torch.ones(64, 64)))


def on_a_gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return torch.device("cuda")


@pytest.mark.parametrize("clusters", [False, True])
@pytest.mark.parametrize("kind", [None, torch.int8], ids=["bf16", "int8"])
@pytest.mark.parametrize("rows", [1, 16, 33, 128])
def test_both_cuda_kernels(clusters, kind, rows):
    device = on_a_gpu()
    if clusters and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the GPU has no clusters")
    x, norm = randn(rows, 768).to(device), (1 + 0.2 * randn(768, seed=3)).to(device, torch.bfloat16)
    (layer, exact), (gate, exact_gate) = (
        layer_of(2048, 768, torch.bfloat16, kind, device, bias=seed == 1, seed=seed) for seed in (1, 5)
    )
    out = torch.ops.alitok.fused_linear(x, norm, EPS, *layer[:2], *gate[:2], layer.bias, clusters)
    close(out, fused_linear_reference(x.double(), norm.double(), EPS, exact, exact_gate), torch.bfloat16, 4)
    down, exact = layer_of(768, 2048, torch.bfloat16, kind, device)
    residual = randn(rows, 768, seed=2).to(device)
    expected = fused_linear_reference(out.double(), None, EPS, exact, residual=residual.double())
    torch.ops.alitok.fused_linear_add(out, *down, residual, clusters)
    close(residual, expected, torch.bfloat16, 4)


@pytest.mark.parametrize(
    ("capability", "weight_dtype", "rows", "inputs", "outputs", "fits", "clusters"),
    [
        ((8, 0), torch.bfloat16, 32, 768, 768, True, False),
        ((8, 0), torch.bfloat16, 33, 768, 768, False, False),
        ((8, 6), torch.int8, 32, 768, 768, True, False),
        ((8, 6), torch.int8, 33, 768, 768, False, False),
        ((9, 0), torch.bfloat16, 8, 768, 768, True, False),
        ((9, 0), torch.float16, 9, 768, 768, True, True),
        ((9, 0), torch.bfloat16, 128, 3584, 768, True, True),
        ((9, 0), torch.bfloat16, 129, 768, 768, False, False),
        ((9, 0), torch.int8, 1, 768, 768, True, True),
        ((9, 0), torch.float8_e4m3fn, 2, 8192, 768, True, False),
        ((9, 0), torch.bfloat16, 64, 8192, 768, False, False),
        ((10, 0), torch.bfloat16, 16, 768, 100, True, False),
        ((9, 0), torch.float32, 16, 768, 768, False, False),
    ],
)
def test_which_kernel(monkeypatch, capability, weight_dtype, rows, inputs, outputs, fits, clusters):
    class OnAGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(module, "has_clusters", lambda _: capability >= (9, 0))
    scale = torch.ones(1) if weight_dtype.itemsize == 1 else None
    weight = torch.empty(outputs, inputs, dtype=weight_dtype).as_subclass(OnAGpu)
    layer = LinearWeights(weight, scale)
    activations = torch.empty(1, dtype=torch.bfloat16 if scale is not None else weight_dtype)
    assert module._fits(rows, True, activations, layer) == fits
    assert (fits and module._by_clusters(rows, layer)) == clusters
    most = module.fused_rows(weight_dtype, torch.device("cuda"))
    assert rows <= most or not fits
    assert module.fused_rows(weight_dtype, torch.device("cpu")) == 0


@pytest.mark.parametrize(("value", "rows"), [(None, 128), ("1", 128), ("0", 32)])
def test_the_environment_forbids_clusters(monkeypatch, value, rows):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.delenv("ALITOK_CLUSTERS", raising=False)
    if value is not None:
        monkeypatch.setenv("ALITOK_CLUSTERS", value)
    module.has_clusters.cache_clear()
    try:
        assert module.fused_rows(torch.bfloat16, torch.device("cuda")) == rows
    finally:
        module.has_clusters.cache_clear()


def test_cuda_uses_one_kernel_for_few_rows_of_16_bits(monkeypatch):
    device = on_a_gpu()
    layer, _ = layer_of(64, 64, torch.bfloat16, None, device)
    norm = torch.ones(64, dtype=torch.bfloat16, device=device)
    monkeypatch.setattr(module, "linear", None)  # the other way would fail
    residual = torch.zeros(32, 64, device=device)
    _, out = norm_linear(residual, None, norm, EPS, layer)
    assert linear_add(residual, out, layer) == (residual, None) and residual.any()
    for rows, dtype in ((module.fused_rows(torch.bfloat16, device) + 1, torch.bfloat16), (2, torch.float32)):
        with pytest.raises(TypeError):
            linear_add(residual, torch.zeros(rows, 64, dtype=dtype, device=device), layer)
    with use_reference(), pytest.raises(TypeError):
        linear_add(residual, out, layer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=torch.zeros(2, 60)), "a multiple of 64 inputs"),
        (dict(x=torch.zeros(200, 64)), "at most 128 rows"),
        (dict(weight=torch.zeros(8, 128).bfloat16()), "weight: expected size 64 along dimension 1"),
        (dict(bias=torch.zeros(9).bfloat16()), "bias: expected size 8 along dimension 0"),
        (dict(norm_weight=torch.zeros(64)), "norm_weight: expected bfloat16 or float16"),
        (dict(gate=torch.zeros(8, 64).half()), "gate: expected bfloat16"),
        (dict(scale=torch.ones(8, 1).bfloat16()), "scale: expected given exactly beside 8-bit weights"),
        (dict(weight=torch.zeros(12, 64).bfloat16(), clusters=True), "weight: expected a multiple of 8 outputs"),
    ],
)
def test_cuda_refuses_what_does_not_fit(changes, message):
    device = on_a_gpu()
    given = dict(x=torch.zeros(2, 64), norm_weight=torch.ones(64).bfloat16(), norm_eps=EPS,
                 weight=torch.zeros(8, 64).bfloat16(), scale=None, gate=None, gate_scale=None, bias=None,
                 clusters=False)  # fmt: skip
    given |= changes
    given = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    with pytest.raises(ValueError, match=message):
        torch.ops.alitok.fused_linear(**given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(ids=torch.zeros(200, dtype=torch.int64)), "ids: expected at most 128 rows"),
        (dict(ids=torch.zeros(2, dtype=torch.int32)), "ids: expected int64"),
        (dict(table=torch.zeros(5, 60)), "table: expected a multiple of 64 inputs"),
        (dict(table=torch.zeros(5, 64).half()), "table: expected float32"),
    ],
)
def test_cuda_refuses_an_embedding_that_does_not_fit(changes, message):
    device = on_a_gpu()
    given = dict(ids=torch.zeros(2, dtype=torch.int64), table=torch.zeros(5, 64), norm_weight=torch.ones(64).bfloat16(),
                 norm_eps=EPS, weight=torch.zeros(8, 64).bfloat16(), scale=None, bias=None, clusters=False)  # fmt: skip
    given |= changes
    given = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    with pytest.raises(ValueError, match=message):
        torch.ops.alitok.fused_linear_embed(**given)
