"""The CUDA kernels of fused_linear, emulated, against its definition in float64."""

import pytest
import torch

from alitok_fast.ops.fused_linear import LinearWeights, fused_linear_reference
from alitok_fast.ops.quantized_linear import dequantize_weight, quantize_weight

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]
UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
BF16, FP16, INT8, E4M3 = torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn


def matrix(generator, outputs, inputs, dtype, weight_dtype):
    """The weights as the kernel reads them, and as numbers."""
    wide = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    wide *= 4.0 ** -(torch.arange(inputs) // 64 % 3)  # another group's scale would show
    if weight_dtype == dtype:
        return wide.to(dtype), None, wide.to(dtype).double()
    weight, scale = quantize_weight(wide, weight_dtype)
    return weight, scale, dequantize_weight(weight, scale, torch.float64)


def check(simt, rows, inputs, outputs, dtype=BF16, weight_dtype=None, norm=True, gated=False, bias=True, add=False,
          clusters=False, sanitizer="address", patches=()):  # fmt: skip
    generator = torch.Generator().manual_seed(rows + inputs + outputs)
    weight_dtype = weight_dtype or dtype
    x = torch.randn(rows, inputs, generator=generator).to(torch.float32 if norm else dtype)
    norm_weight = (1 + 0.2 * torch.randn(inputs, generator=generator)).to(dtype) if norm else None
    weight, scale, exact = matrix(generator, outputs, inputs, dtype, weight_dtype)
    gate, gate_scale, exact_gate = matrix(generator, outputs, inputs, dtype, weight_dtype) if gated else 3 * (None,)
    added = torch.randn(outputs, generator=generator).to(dtype) if bias else None
    residual = torch.randn(rows, outputs, generator=generator) if add else None
    case = dict(x=x, norm_weight=norm_weight, weight=weight, scale=scale, gate=gate, gate_scale=gate_scale, bias=added,
                residual=residual, rows=rows, inputs=inputs, outputs=outputs, add=add,
                dtype=DTYPES.index(dtype), weight_dtype=DTYPES.index(weight_dtype))  # fmt: skip
    name, kind = ("residual", torch.float32) if add else ("out", dtype)
    program = simt.program("fused_linear_sm90" if clusters else "fused_linear", sanitizer, patches)
    got = program.run(case, {name: ((rows, outputs), kind)}, schedules=2)[name].double()
    wide = [None if t is None else t.double() for t in (norm_weight, added, residual)]
    layers = LinearWeights(exact, None, wide[1]), LinearWeights(exact_gate) if gated else None
    expected = fused_linear_reference(x.double(), wide[0], 1e-5, *layers, wide[2])
    error = (got - expected).abs().max() / expected.abs().max()
    assert error <= (3 if norm else 1) * UNIT[dtype], f"error {error:.3g}"


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"), [(BF16, BF16), (FP16, FP16), (BF16, INT8), (BF16, E4M3)], ids=str
)  # fmt: skip
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 64, 8), (2, 768, 20), (8, 192, 17), (9, 320, 40), (16, 1280, 9), (35, 128, 24)]
)
def test_norm_and_gate(simt, dtype, weight_dtype, rows, inputs, outputs):
    check(simt, rows, inputs, outputs, dtype, weight_dtype, bias=outputs != 20)
    check(simt, rows, inputs, outputs, dtype, weight_dtype, gated=True, bias=False)


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"), [(BF16, BF16), (FP16, FP16), (BF16, INT8), (BF16, E4M3)], ids=str
)  # fmt: skip
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 64, 3), (2, 2048, 16), (15, 512, 24), (32, 192, 10), (41, 3584, 8)]
)
def test_without_norm(simt, dtype, weight_dtype, rows, inputs, outputs):
    check(simt, rows, inputs, outputs, dtype, weight_dtype, norm=False, add=True, bias=outputs != 24)
    check(simt, rows, inputs, outputs, dtype, weight_dtype, norm=False)


KINDS = {"bf16": (BF16, BF16), "fp16": (FP16, FP16), "int8": (BF16, INT8), "e4m3": (BF16, E4M3)}


@pytest.mark.parametrize(
    ("kind", "rows", "inputs", "outputs"),
    [("bf16", 1, 64, 8), ("int8", 1, 64, 8), ("fp16", 9, 192, 136), ("e4m3", 9, 192, 136), ("bf16", 16, 1280, 40),
     ("int8", 16, 1280, 40), ("fp16", 35, 320, 24), ("e4m3", 35, 320, 24), ("bf16", 67, 768, 72),
     ("int8", 67, 768, 72)],
)  # fmt: skip
def test_clusters_with_norm(simt, kind, rows, inputs, outputs):
    check(simt, rows, inputs, outputs, *KINDS[kind], bias=outputs != 40, clusters=True)
    check(simt, rows, inputs, outputs, *KINDS[kind], gated=True, bias=False, clusters=True)


@pytest.mark.parametrize(
    ("kind", "rows", "inputs", "outputs"),
    [("bf16", 1, 64, 8), ("e4m3", 1, 64, 8), ("fp16", 15, 576, 72), ("int8", 15, 576, 72), ("bf16", 16, 3584, 16),
     ("e4m3", 16, 3584, 16), ("fp16", 33, 2048, 24), ("int8", 33, 2048, 24), ("bf16", 80, 2816, 8),
     ("e4m3", 80, 320, 8)],
)  # fmt: skip
def test_clusters_without_norm(simt, kind, rows, inputs, outputs):
    check(simt, rows, inputs, outputs, *KINDS[kind], norm=False, add=True, bias=outputs != 72, clusters=True)
    check(simt, rows, inputs, outputs, *KINDS[kind], norm=False, clusters=True)


def check_embedding(simt, rows, inputs, outputs, kind, clusters, sanitizer="address", patches=()):
    """An id in the middle is none of the table's."""
    dtype, weight_dtype = KINDS[kind]
    generator = torch.Generator().manual_seed(rows)
    table = torch.randn(7, inputs, generator=generator)
    ids = torch.randint(7, (rows,), generator=generator)
    ids[rows // 2] = -1 if clusters else 7
    norm_weight = (1 + 0.2 * torch.randn(inputs, generator=generator)).to(dtype)
    weight, scale, exact = matrix(generator, outputs, inputs, dtype, weight_dtype)
    case = dict(x=table, ids=ids, vocabulary=7, norm_weight=norm_weight, weight=weight, scale=scale, rows=rows,
                inputs=inputs, outputs=outputs, add=False, dtype=DTYPES.index(dtype),
                weight_dtype=DTYPES.index(weight_dtype))  # fmt: skip
    program = simt.program("fused_linear_sm90" if clusters else "fused_linear", sanitizer, patches)
    specs = {"out": ((rows, outputs), dtype), "stream": ((rows, inputs), torch.float32)}
    got = program.run(case, specs, schedules=2)
    known = ids == ids.clamp(0, 6)
    assert got["out"][~known].isnan().all(), "error at an id that is none"
    x = table[ids[known]]
    assert torch.equal(got["stream"][known], x), "error in the stream"
    expected = fused_linear_reference(x.double(), norm_weight.double(), 1e-5, LinearWeights(exact))
    error = (got["out"][known].double() - expected).abs().max() / expected.abs().max()
    assert error <= 3 * UNIT[dtype], f"error {error:.3g}"


@pytest.mark.parametrize("clusters", [False, True])
@pytest.mark.parametrize(
    ("kind", "rows", "inputs", "outputs"), [("bf16", 2, 192, 40), ("int8", 5, 704, 72), ("bf16", 35, 320, 24)]
)
def test_embedding(simt, kind, rows, inputs, outputs, clusters):
    check_embedding(simt, rows, inputs, outputs, kind, clusters)


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True])
def test_has_no_data_race(simt, gated):
    check(simt, 9, 320, 18, gated=gated, bias=not gated, sanitizer="thread")
    check(simt, 3, 640, 9, weight_dtype=INT8, norm=False, add=True, sanitizer="thread")
    check(simt, 18, 320, 40, gated=gated, bias=not gated, clusters=True, sanitizer="thread")
    check(simt, 9, 640, 8, weight_dtype=INT8, norm=False, add=True, clusters=True, sanitizer="thread")


# Those for up to 8 rows of bfloat16: the fewer kernels, the sooner they are compiled.
FEWER_KERNELS = [
    (f"{condition} {action};", "")
    for condition, action in [
        ("if (p.dtype == FusedLinearDtype::float16)", "return launch_for_rows<__half, __half>(p, stream)"),
        ("case FusedLinearDtype::e4m3:", "return launch_for_rows<__nv_bfloat16, e4m3>(p, stream)"),
        ("if (p.rows <= 16)", "return launch_for_layer<T, W, 16>(p, stream)"),
    ]
] + [("  launch_for_layer<T, W, 32>(p, stream);", "")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("there && output < p.outputs", "output < p.outputs"),
        ("if (!kOnce && first != begin) fetch(first);", ""),
        ("if (!readable || first + d * kStride >= inputs) continue;", "if (!readable) continue;"),
        ("first / kChunk<W> + d * kWarps]", "first / kChunk<W>]"),
        ("i < kResults && row < rows && output < p.outputs;", "i < kResults && output < p.outputs;"),
        ("total[m] += partial[(w * kSums", "total[m] += partial[(0 * kSums"),
        ("kNorm) __syncthreads();  // the", "kNorm)  // the"),
        ("added[own] += __ldcg(p.residual + place[own]);", "added[own] -= __ldcg(p.residual + place[own]);"),
        ("cp_async_wait<0>();", ""),
        ("for (int w = 0; w < kTeam; ++w)", "for (int w = 0; w < 1; ++w)"),
        ("float squares = exists && x == nullptr ? NAN : 0.0f;", "float squares = 0;"),
        ("p.stream + (first_row + row) * inputs;", "p.stream + first_row * inputs;"),
    ],
)
def test_seeded_bugs_are_caught(simt, old, new):
    patches = [("fused_linear_cuda.cu", *patch) for patch in [(old, new), *FEWER_KERNELS]]
    with pytest.raises(AssertionError, match="^(error|exit code) "):  # not the compiler's
        if "__syncthreads" in old:
            check(simt, 5, 1216, 20, patches=patches, sanitizer="thread")
        check(simt, 2, 1216, 20, patches=patches)
        check(simt, 5, 1216, 20, norm=False, add=True, patches=patches)
        check_embedding(simt, 5, 192, 40, "bf16", False, patches=patches)
        check(simt, 5, 4672, 20, weight_dtype=INT8, norm=False, add=True, patches=patches)


# Those for up to 16 rows, of bfloat16 and int8.
FEWER_CLUSTER_KERNELS = [
    (f"{condition} {action};", "")
    for condition, action in [
        ("if (p.dtype == FusedLinearDtype::float16)", "return launch_for_rows<__half, __half>(p, stream)"),
        ("case FusedLinearDtype::e4m3:", "return launch_for_rows<__nv_bfloat16, e4m3>(p, stream)"),
    ]
] + [("  launch_for_layer<T, W, kMany>(p, stream);", "")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("at < own && output < p.outputs);", "output < p.outputs);"),
        ("row < rows ? row_of(p, first_row + row)", "row < rows + 1 ? row_of(p, first_row + row)"),
        ("for (unsigned b = 0; b < blocks; ++b) sum +=", "for (unsigned b = 1; b < blocks; ++b) sum +="),
        ("first_input + at) / kGroup]", "first_input) / kGroup]"),
        ("if (place == 0) squares[row] = sum;\n  cluster_sync();", "if (place == 0) squares[row] = sum;"),
        ("add(total[0], added);", ""),
        ("float sum = row < rows && x == nullptr ? NAN : 0.0f;", "float sum = 0;"),
        ("* p.inputs + first_input;\n#pragma", "* p.inputs;\n#pragma"),
        ("cluster_sync();  // others have read", "// others have read"),
        ("  if (part == 1) for_each_pair", "  if (part == 2) for_each_pair"),
        ("item < last_item && row < rows", "item < last_item + 1 && row < rows + 1"),
        ("(d * kParts + part) * kGroup;\n    if (at >= own) break;", "(d * kParts + part) * kGroup;"),
    ],
)
def test_seeded_bugs_are_caught_with_clusters(simt, old, new):
    patches = [("fused_linear_sm90.cu", *patch) for patch in [(old, new), *FEWER_CLUSTER_KERNELS]]
    with pytest.raises(AssertionError, match="^(error|exit code) "):  # not the compiler's
        check(simt, 11, 1216, 88, bias=True, clusters=True, patches=patches)
        check(simt, 10, 128, 136, bias=True, gated=False, clusters=True, patches=patches)
        check_embedding(simt, 5, 320, 72, "bf16", True, patches=patches)
        check(simt, 13, 4032, 24, weight_dtype=INT8, norm=False, add=True, clusters=True, patches=patches)
