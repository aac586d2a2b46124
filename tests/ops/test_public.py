"""The public operators: functions with documentation, and errors that name the argument instead of a schema."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from alitok_fast import ops

FUNCTIONS = [name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))]
OPERATORS = ["vq_lookup", "prefix_attention", "cached_attention", "add_rms_norm", "swiglu", "sample_tokens",
             "quantized_linear", "bf16_linear", "int8_linear", "linear"]  # fmt: skip
X, Z, CODES = torch.ones(2, 16), torch.ones(4, 8), torch.ones(5, 8)
QKV, STEP, CACHE = torch.ones(1, 4, 3, 2, 8), torch.ones(1, 1, 3, 2, 8), torch.zeros(1, 2, 4, 8)
HUGE = 12345678901234567890


def test_names_are_functions_and_modules_still_import():
    from alitok_fast.ops.vq_lookup import VQLookup, vq_lookup, vq_lookup_reference

    assert set(OPERATORS) <= set(FUNCTIONS)
    assert ops.vq_lookup is vq_lookup and ops.VQLookup is VQLookup and callable(vq_lookup_reference)
    assert set(ops.__all__) <= set(dir(ops))


def test_importing_the_package_loads_no_operators():
    code = "import sys, alitok_fast; print([m for m in sys.modules if m == 'torch' or m.startswith('alitok_fast.ops')])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", OPERATORS)
def test_help_says_what_a_caller_needs(name):
    function = getattr(ops, name)
    text = inspect.getdoc(function)
    for part in ("Source:", "Devices:", "Gradients:", "Args:", "Returns:", "Raises:"):
        assert part in text, part
    arguments = text[text.index("Args:") : text.index("Returns:")]
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"^    {parameter}: ", arguments, re.MULTILINE), parameter


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_is_annotated_and_documented(name):
    function = getattr(ops, name)
    signature = inspect.signature(function)
    assert inspect.getdoc(function)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())


def sample(**changes):
    arguments = dict(seed=0, image_ids=torch.arange(2), step=0) | changes
    return ops.sample_tokens(arguments.pop("logits", X), **arguments)


def cached(*arguments, **changes):
    given = (STEP, CACHE.clone(), CACHE.clone(), torch.zeros(len(STEP), dtype=torch.int64))
    return ops.cached_attention(*arguments, *given[len(arguments) :], **changes)


BF16, INT8, (WEIGHT, SCALE) = (
    ops.pack_bf16(torch.ones(6, 16)),
    ops.pack_int8(torch.ones(6, 16)),
    ops.quantize_weight(torch.ones(6, 16), torch.int8),
)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        # integers
        (lambda: sample(top_k=HUGE), ValueError, f"top_k: expected a number in .*, got {HUGE}"),
        (lambda: sample(top_k=2**63), ValueError, f"top_k: expected a number in .*, got {2**63}"),
        (lambda: sample(top_k=5.0), TypeError, "top_k: expected an integer, got float 5.0"),
        (lambda: sample(top_k=True), TypeError, "top_k: expected an integer, got bool True"),
        (lambda: sample(top_k=torch.tensor(3.0)), ValueError, "top_k: expected int64, got float32"),
        (lambda: sample(seed=HUGE), ValueError, "seed: expected a number in"),
        (lambda: sample(seed=0.5), TypeError, "seed: expected an integer, got float 0.5"),
        (lambda: sample(step=HUGE), ValueError, r"step: expected a number in \[0, 4294967296\), got"),
        (lambda: sample(step="1"), TypeError, "step: expected an integer, got str '1'"),
        (lambda: ops.prefix_attention(QKV, HUGE), ValueError, "prefix_len: expected a number in"),
        (lambda: ops.prefix_attention(QKV, 1.0), TypeError, "prefix_len: expected an integer, got float 1.0"),
        (lambda: ops.prefix_attention(QKV, -1), ValueError, "prefix_len: expected"),
        (lambda: ops.prefix_attention(QKV, 0, dropout=0.5, seed=HUGE), ValueError, "seed: expected a number in"),
        (lambda: ops.add_rms_norm(X, X, X[0], dropout=0.5, seed=HUGE), ValueError, "seed: expected a number in"),
        (lambda: ops.int8_linear(X, INT8, None, HUGE), ValueError, "outputs: expected a number in"),
        (lambda: ops.int8_linear(X, INT8, None, 6.0), TypeError, "outputs: expected an integer, got float 6.0"),
        (lambda: ops.int8_linear(X, INT8, None, 6, "float32"), TypeError, "dtype: expected a torch.dtype, got str"),
        # numbers
        (lambda: sample(logits=torch.ones(4, 8), guidance_scale=1e39), ValueError, "guidance_scale: .* float32 holds"),
        (lambda: sample(logits=torch.ones(4, 8), guidance_scale=float("nan")), ValueError, "guidance_scale: .* finite"),
        (lambda: sample(logits=torch.ones(4, 8), guidance_scale="2"), TypeError, "guidance_scale: expected a number"),
        (lambda: sample(temperature="hot"), TypeError, "temperature: expected a number, got str 'hot'"),
        (lambda: sample(temperature=10**400), ValueError, "temperature: expected a number that a float holds"),
        (lambda: sample(top_p=[0.9]), TypeError, "top_p: expected a number, got list"),
        (lambda: ops.prefix_attention(QKV, 0, scale=float("inf")), ValueError, "scale: expected a finite number"),
        (lambda: ops.prefix_attention(QKV, 0, norm_eps=-1.0), ValueError, "norm_eps: expected a number >= 0, got -1"),
        (lambda: ops.prefix_attention(QKV, 0, dropout=None), TypeError, "dropout: expected a number, got NoneType"),
        (lambda: ops.prefix_attention(QKV, 0, dropout=1.5), ValueError, "dropout: expected a probability"),
        (lambda: cached(scale="1"), TypeError, "scale: expected a number, got str '1'"),
        (lambda: ops.add_rms_norm(X, None, X[0], eps=float("nan")), ValueError, "eps: expected a finite number"),
        (lambda: ops.vq_lookup(Z, CODES, "much"), TypeError, "commitment: expected a number, got str"),
        # tensors
        (lambda: ops.vq_lookup(Z, [1.0]), TypeError, "codebook: expected a tensor, got list"),
        (lambda: ops.prefix_attention(np.ones((1, 4, 3, 2, 8)), 0), TypeError, "qkv: expected a tensor, got ndarray"),
        (lambda: ops.prefix_attention(QKV[0], 0), ValueError, r"qkv: expected 5 dimensions, got shape \(4, 3, 2, 8\)"),
        (lambda: ops.prefix_attention(QKV, 0, rope=1), TypeError, "rope: expected a tensor or None, got int"),
        (lambda: ops.prefix_attention(QKV, 0, q_norm_weight=1), TypeError, "q_norm_weight: expected a tensor or None"),
        (lambda: cached(STEP[0]), ValueError, r"qkv: expected 5 dimensions, got shape \(1, 3, 2, 8\)"),
        (lambda: cached(STEP, None), TypeError, "keys: expected a tensor, got NoneType"),
        (lambda: sample(image_ids=[0, 1]), TypeError, "image_ids: expected a tensor, got list"),
        (lambda: ops.add_rms_norm(X, 0, X[0]), TypeError, "delta: expected a tensor or None, got int"),
        (lambda: ops.add_rms_norm(X, X, None), TypeError, "weight: expected a tensor, got NoneType"),
        (lambda: ops.int8_linear(X, INT8, 0, 6), TypeError, "bias: expected a tensor or None, got int"),
        (lambda: ops.int8_linear(X.sum(), INT8, None, 6), ValueError, r"x: expected at least 1 dimension"),
        (lambda: ops.quantized_linear(X, WEIGHT, 1.0), TypeError, "scale: expected a tensor, got float"),
        (lambda: ops.quantized_linear(torch.ones(40, 16), WEIGHT, WEIGHT), ValueError, "scale: expected bfloat16"),
        (
            lambda: ops.quantize_weight(X[0], torch.int8),
            ValueError,
            r"weight: expected 2 dimensions, got shape \(16,\)",
        ),
        (lambda: ops.pack_int8(torch.ones(2, 2).int()), TypeError, "weight: expected a floating-point tensor"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "Declaration" not in str(caught.value) and "alitok::" not in str(caught.value)


def test_numbers_of_numpy_are_numbers():
    expected = sample(top_k=3, top_p=0.5, temperature=1.0, seed=3, step=2)
    found = sample(
        top_k=np.int64(3), top_p=np.float64(0.5), temperature=np.float32(1), seed=np.int32(3), step=np.uint8(2)
    )
    assert torch.equal(found, expected)
    assert torch.equal(ops.prefix_attention(QKV, np.int64(2)), ops.prefix_attention(QKV, 2))


@pytest.mark.parametrize(
    "call",
    [
        lambda m: ops.vq_lookup(Z, m(CODES)),
        lambda m: ops.prefix_attention(QKV, 0, q_norm_weight=m(Z[0]), k_norm_weight=m(Z[0])),
        lambda m: ops.prefix_attention(QKV, 0, rope=m(torch.ones(4, 4, 2))),
        lambda m: cached(STEP, m(CACHE)),
        lambda m: cached(STEP, CACHE.clone(), CACHE.clone(), m(torch.zeros(len(STEP)).long())),
        lambda m: ops.add_rms_norm(X, m(X), X[0]),
        lambda m: ops.add_rms_norm(X, None, m(X[0])),
        lambda m: ops.swiglu(X, m(X)),
        lambda m: sample(step=m(torch.tensor(0))),
        lambda m: sample(image_ids=m(torch.arange(2))),
        lambda m: ops.quantized_linear(X, m(WEIGHT), SCALE),
        lambda m: ops.quantized_linear(torch.ones(40, 16), WEIGHT, m(SCALE)),
        lambda m: ops.int8_linear(X, m(INT8), None, 6),
        lambda m: ops.bf16_linear(X, m(BF16), None, 6),
        lambda m: ops.linear(X.bfloat16(), m(torch.ones(6, 16))),
    ],
)
def test_a_meta_tensor_among_others_is_refused(call):
    """The dispatcher takes it to the fake kernel, which would answer with memory that nothing has written."""
    with pytest.raises(ValueError, match=r"expected the device of \w+, cpu, got meta"):
        call(lambda tensor: tensor.to("meta"))


@pytest.mark.parametrize("size", [0, 1])
def test_sizes_without_rows(size):
    """A single vector, and no inputs at all."""
    assert ops.quantized_linear(X[0], WEIGHT, SCALE).shape == (6,)
    assert ops.int8_linear(X[0], INT8, None, 6).shape == (6,)
    assert ops.add_rms_norm(X[0], None, X[0])[1].shape == (16,)
    assert ops.quantized_linear(torch.ones(size, 2, 16), WEIGHT, SCALE).shape == (size, 2, 6)
    assert ops.int8_linear(torch.ones(size, 2, 16), INT8, None, 6).shape == (size, 2, 6)
    assert ops.add_rms_norm(torch.ones(size, 2, 16), None, X[0])[1].shape == (size, 2, 16)
