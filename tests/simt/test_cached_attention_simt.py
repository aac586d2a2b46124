"""The CUDA kernel of cached_attention, emulated, against the reference."""

import pytest
import torch

from alitok_fast.ops.cached_attention import cached_attention_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def inputs(rows, heads, dim, capacity, position, dtype, cache_dtype, norm_and_rope):
    generator = torch.Generator().manual_seed(dim + position)
    arguments = {
        "qkv": torch.randn(rows, 3, heads, dim, generator=generator).to(dtype),
        "keys": torch.randn(rows, heads, capacity, dim, generator=generator).to(cache_dtype),
        "values": torch.randn(rows, heads, capacity, dim, generator=generator).to(cache_dtype),
        "position": torch.tensor(position),
        "q_norm_weight": None,
        "k_norm_weight": None,
        "norm_eps": 1e-5,
        "rope": None,
        "scale": dim**-0.5,
    }
    # Nothing behind the position may count, whatever is there.
    for cache in (arguments["keys"], arguments["values"]):
        cache[:, :, position:] = torch.nan
    if norm_and_rope:
        arguments["q_norm_weight"] = 1 + 0.1 * torch.randn(dim, generator=generator)
        arguments["k_norm_weight"] = 1 + 0.1 * torch.randn(dim, generator=generator)
        angles = torch.randn(capacity, dim // 2, generator=generator)
        arguments["rope"] = torch.stack([angles.cos(), angles.sin()], -1)
        arguments["rope"][0] = 0
    return arguments


def run(simt, arguments, sanitizer="address", **layout):
    qkv, keys = arguments["qkv"], arguments["keys"]
    rows, _, heads, dim = qkv.shape
    scalars = {"rows": rows, "heads": heads, "head_dim": dim, "capacity": keys.shape[2]}
    kinds = {"dtype": DTYPES.index(qkv.dtype), "cache_dtype": DTYPES.index(keys.dtype)}
    tensors = {name: value for name, value in arguments.items() if name != "norm_eps"}
    outputs = {"out": ((rows, heads, dim), qkv.dtype)}
    if not layout:
        outputs |= {name: (tuple(keys.shape), keys.dtype) for name in ("keys", "values")}
    inputs = {**tensors, **scalars, **kinds, **layout}
    return simt.program("cached_attention", sanitizer).run(inputs, outputs, schedules=2)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize(
    ("rows", "heads", "dim", "capacity", "position", "norm_and_rope"),
    [(1, 1, 8, 1, 0, True), (2, 1, 48, 21, 20, True), (1, 2, 80, 300, 290, True), (1, 1, 128, 9, 4, False)],
)
def test_matches_reference(simt, dtype, quantised, rows, heads, dim, capacity, position, norm_and_rope):
    cache_dtype = torch.float8_e4m3fn if quantised else dtype
    arguments = inputs(rows, heads, dim, capacity, position, dtype, cache_dtype, norm_and_rope)
    result = run(simt, arguments)
    expected = cached_attention_reference(**arguments)  # appends to the caches in place
    error = (result["out"].double() - expected.double()).abs().max()
    # A rounding of the new key that goes the other way moves a quantised key by a sixteenth.
    assert error < TOLERANCE[dtype] * (30 if quantised else 1)
    # The reference's rsqrt and the kernel's may round differently by a unit in the last place.
    unit = 2.0**-4 if quantised else 2 * TOLERANCE[dtype]
    torch.testing.assert_close(
        result["keys"][:, :, : position + 1].double(),
        arguments["keys"][:, :, : position + 1].double(),
        rtol=unit,
        atol=unit,
    )
    stored = result["values"][:, :, : position + 1].float()
    assert torch.equal(stored, arguments["values"][:, :, : position + 1].float())


def test_position_outside_is_nan_and_writes_nothing(simt):
    arguments = inputs(1, 1, 8, 4, 4, torch.float32, torch.float32, False)
    result = run(simt, arguments)
    assert result["out"].isnan().all()
    assert torch.equal(result["keys"], arguments["keys"])


def test_no_data_race(simt):
    arguments = inputs(1, 1, 48, 21, 20, torch.float32, torch.float32, True)
    run(simt, arguments, sanitizer="thread")


def test_rows_beyond_two_to_the_31_elements(simt):
    arguments = inputs(2, 2, 16, 5, 3, torch.float32, torch.float32, True)
    near, far = run(simt, arguments), run(simt, arguments, row_stride=2**31 + 64)
    assert torch.equal(near["out"], far["out"])
