"""Operators under autocast, default dtypes and devices, vmap, torch.compile, torch.export and derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from alitok_fast._library import use_reference
from alitok_fast.ops import (
    LayerWeights,
    add_rms_norm,
    bf16_linear,
    cached_attention,
    decode,
    int8_linear,
    linear,
    pack_bf16,
    pack_int8,
    pack_weights,
    prefix_attention,
    quantize_weight,
    quantized_linear,
    sample_tokens,
    swiglu,
    vq_lookup,
)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


CODEBOOK, WEIGHT, BIAS, NORM = random(5, 8), 1 + 0.1 * random(16), random(6), torch.ones(8)
ROPE = random(4, 4, 2)
MATRIX, BF16 = random(6, 16), pack_bf16(random(6, 16))
INT8, (QUANTIZED, SCALE) = pack_int8(random(6, 16)), quantize_weight(random(6, 16), torch.int8)


def cached(qkv: Tensor) -> Tensor:
    keys, values = qkv.new_zeros(2, qkv.shape[0], 2, 4, 8).unbind(0)
    positions = torch.zeros(qkv.shape[0], dtype=torch.int64, device="cpu")
    return cached_attention(qkv, keys, values, positions, rope=ROPE)


def sampled(logits: Tensor) -> Tensor:
    images = torch.arange(logits.shape[0], device="cpu")
    return sample_tokens(logits, top_k=5, top_p=0.9, seed=0, image_ids=images, step=1)


class Case(NamedTuple):
    """An operator as a function of one tensor, whose first dimension is a batch of any size."""

    call: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]


CASES = {
    "add_rms_norm": Case(lambda x: add_rms_norm(x, 2 * x, WEIGHT, dropout=0.3, seed=4)[1], (16,)),
    "cached_attention": Case(cached, (2, 3, 2, 8)),
    "bf16_linear": Case(lambda x: bf16_linear(x, BF16, BIAS, 6), (16,)),
    "int8_linear": Case(lambda x: int8_linear(x, INT8, BIAS, 6), (16,)),
    "linear": Case(lambda x: linear(x, MATRIX, BIAS).float(), (16,)),
    "prefix_attention": Case(
        lambda qkv: prefix_attention(qkv, 1, q_norm_weight=NORM, k_norm_weight=NORM, rope=ROPE, dropout=0.2, seed=5),
        (4, 3, 2, 8),
    ),
    "quantized_linear": Case(lambda x: quantized_linear(x, QUANTIZED, SCALE, BIAS), (16,)),
    "sample_tokens": Case(sampled, (16,)),
    "swiglu": Case(lambda x: swiglu(x, 2 * x), (16,)),
    "vq_lookup": Case(lambda z: vq_lookup(z, CODEBOOK).quantized, (8,)),
    "vq_lookup loss": Case(lambda z: vq_lookup(z, CODEBOOK).loss, (8,)),
}
DIFFERENTIABLE = ["add_rms_norm", "linear", "prefix_attention", "swiglu", "vq_lookup loss"]
ALL = pytest.mark.parametrize("name", CASES)


def run(name: str, batch: int, reference: bool = False) -> Tensor:
    case = CASES[name]
    with use_reference(reference):
        return case.call(random(batch, *case.shape))


@pytest.mark.parametrize("reference", [False, True])
@ALL
def test_autocast_changes_nothing(name, reference):
    expected = run(name, 3, reference)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(name, 3, reference)
    assert found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@ALL
def test_default_dtype_changes_nothing(name, dtype, reference):
    case = CASES[name]
    x = random(3, *case.shape)
    with use_reference(reference):
        expected, before = case.call(x), torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            found = case.call(x)
        finally:
            torch.set_default_dtype(before)
    assert found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize("reference", [False, True])
@ALL
def test_default_device_changes_nothing(name, reference):
    """As while a large model is built without memory."""
    x = random(3, *CASES[name].shape)
    with use_reference(reference):
        expected = CASES[name].call(x)
        with torch.device("meta"):
            assert torch.equal(CASES[name].call(x), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_packing_knows_no_defaults(dtype):
    weight = random(40, 70)
    weight[3] = 0
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            packed, quantized = pack_int8(weight), quantize_weight(weight, torch.float8_e4m3fn)
    finally:
        torch.set_default_dtype(before)
    assert packed.shape == (2, 2, 2176) and torch.equal(packed, pack_int8(weight))
    for found, expected in zip(quantized, quantize_weight(weight, torch.float8_e4m3fn), strict=True):
        assert found.dtype == expected.dtype and torch.equal(found.float(), expected.float())


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_decode_knows_no_defaults(weight_dtype):
    vectors, matrices = random(6, 8).unbind(0), random(5, 8, 8)
    layer = LayerWeights(
        vectors[0], random(24, 8), random(24), *vectors[1:3], matrices[0], *vectors[3:5], *matrices[1:4]
    )
    rest = vectors[5], random(5, 8), random(5), random(9, 8), ROPE
    ids, positions, caches = torch.tensor([[3, 1], [4, 2]]), torch.tensor([0, 1]), torch.zeros(2, 1, 2, 1, 4, 8)

    def logits() -> Tensor:
        return decode(pack_weights([layer], *rest, weight_dtype), ids, *caches.clone(), positions)

    with use_reference():
        reference = logits()
    expected, before = logits(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
            found = logits()
            with use_reference():
                assert torch.equal(logits(), reference)
    finally:
        torch.set_default_dtype(before)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("name", [name for name in CASES if name != "cached_attention"])
def test_vmap_equals_a_loop(name):
    case = CASES[name]
    x = random(2, 3, *case.shape)
    assert torch.equal(torch.vmap(case.call)(x), torch.stack([case.call(part) for part in x]))


def test_vmap_of_cached_attention_is_refused():
    with pytest.raises(RuntimeError, match="cached_attention"):
        torch.vmap(CASES["cached_attention"].call)(random(2, 3, 2, 3, 2, 8))


@ALL
def test_export_with_a_batch_of_any_size(name):
    """Across MOST_ROWS of `quantized_linear`, too: the program chooses when it runs."""
    case = CASES[name]

    class Program(torch.nn.Module):
        def forward(self, x):
            return case.call(x)

    batch = torch.export.Dim("batch", min=1, max=100)
    program = torch.export.export(Program(), (random(3, *case.shape),), dynamic_shapes=({0: batch},)).module()
    for size in (1, 5, 70):
        assert torch.equal(program(random(size, *case.shape)), run(name, size)), size


def test_compiles_to_one_graph():
    """All operators in one graph, for any batch, with the gradients of eager mode."""

    def every(qkv: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(case.call(qkv if len(case.shape) == 4 else x[:, : case.shape[0]]) for case in chosen)

    chosen = [case for name, case in CASES.items() if name != "cached_attention"]
    compiled = torch.compile(every, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (3, 40):
        inputs = random(size, 4, 3, 2, 8), random(size, 16)
        for found, expected in zip(compiled(*inputs), every(*inputs), strict=True):
            assert torch.equal(found, expected)

    def loss(qkv: Tensor, x: Tensor) -> Tensor:
        return sum(CASES[name].call(qkv if "attention" in name else x[:, : CASES[name].shape[0]]).square().sum()
                   for name in DIFFERENTIABLE)  # fmt: skip

    leaves = [random(3, 4, 3, 2, 8).requires_grad_(), random(3, 16).requires_grad_()]
    with_graph = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(function(*leaves), leaves) for function in (loss, with_graph)]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_compiles_through_inductor():
    compiled = torch.compile(lambda x: 2 * swiglu(x + 1, add_rms_norm(x, x, WEIGHT)[1]), fullgraph=True)
    x = random(3, 16)
    torch.testing.assert_close(compiled(x), 2 * swiglu(x + 1, add_rms_norm(x, x, WEIGHT)[1]))


# ---- Derivatives: right, or an error ----


@pytest.mark.parametrize("name", ["add_rms_norm", "prefix_attention", "vq_lookup loss"])
def test_second_derivatives_are_refused(name):
    x = random(3, *CASES[name].shape).requires_grad_()

    def second() -> Tensor:
        (gradient,) = torch.autograd.grad(CASES[name].call(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    with pytest.raises(RuntimeError, match=f"{name.split()[0]}: expected to be differentiated once"):
        second()
    with use_reference():
        assert second().abs().max() > 0


def test_second_derivative_of_norm_weights_is_refused():
    weight, qkv = NORM.clone().requires_grad_(), random(1, 4, 3, 2, 8)
    loss = prefix_attention(qkv, 0, q_norm_weight=weight, k_norm_weight=weight).square().sum()
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="prefix_attention: expected to be differentiated once"):
        torch.autograd.grad(gradient.sum(), weight)


def test_gradient_of_a_rope_is_refused():
    rope = ROPE.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="prefix_attention: expected a rope without gradients"):
        prefix_attention(random(1, 4, 3, 2, 8), 0, rope=rope).sum().backward()


def test_forward_mode_is_refused_when_compiled():
    """A trace sees the operator, whose tangent would be zero."""
    x = random(2, 16)
    jvp = torch.compile(lambda x: torch.func.jvp(CASES["swiglu"].call, (x,), (x,))[1], backend="aot_eager")
    with pytest.raises(RuntimeError, match="swiglu: expected no forward-mode derivative"):
        jvp(x)


FLOATING = [name for name in CASES if name != "sample_tokens"]


@pytest.mark.parametrize("name", FLOATING)
def test_forward_mode_is_refused(name):
    """torch answers zeros for an operator of a library."""
    call, x = CASES[name].call, random(2, *CASES[name].shape)
    message = f"{name.split()[0]}: expected no forward-mode derivative"
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
        call(forward_ad.make_dual(x, torch.ones_like(x)))
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(call, (x,), (torch.ones_like(x),))
    if name != "cached_attention":
        with pytest.raises(RuntimeError, match=message):
            torch.func.jvp(torch.vmap(call), (x[None],), (torch.ones_like(x[None]),))
    torch.func.jvp(lambda y: y + call(x), (call(x),), (torch.ones_like(call(x)),))  # x itself has no tangent


@pytest.mark.parametrize("name", FLOATING)
def test_torch_func_derivatives_are_refused(name):
    call, x = CASES[name].call, random(2, *CASES[name].shape)
    with pytest.raises(RuntimeError, match=f"{name.split()[0]}: expected (no torch.func|inputs without)"):
        torch.func.grad(lambda x: call(x).sum())(x)
    if name != "cached_attention":
        with pytest.raises(RuntimeError, match=f"{name.split()[0]}: expected no torch.func"):
            torch.func.grad(lambda x: torch.vmap(call)(x).sum())(x[None])


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize(
    ("name", "reference"), [("int8_linear", False), ("int8_linear", True), ("quantized_linear", 0)]
)
def test_8_bit_products_have_no_gradients(name, rows, reference):
    x = random(rows, 16).requires_grad_()
    with use_reference(bool(reference)):
        out = CASES[name].call(x)
        with pytest.raises(RuntimeError, match=f"{name}: expected inputs without gradients"):
            out.sum().backward()


def test_cached_attention_has_no_gradients():
    qkv = random(2, 2, 3, 2, 8).requires_grad_()
    with pytest.raises(RuntimeError, match="cached_attention: expected inputs without gradients.* got qkv"):
        cached(qkv)
    with torch.no_grad():
        assert torch.equal(cached(qkv), cached(qkv.detach()))
