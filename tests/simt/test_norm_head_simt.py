"""The CUDA kernel of norm_head, emulated, against its definition in float64."""

import pytest
import torch

from alitok_fast.ops.norm_head import norm_head_reference

EPS = 1e-5


def make(rows, width, outputs, bias=True):
    generator = torch.Generator().manual_seed(rows + width + outputs)
    x = torch.randn(rows, width, generator=generator) * 4.0 ** (torch.arange(rows) % 5 - 2).unsqueeze(1)
    norm_weight = 1 + 0.2 * torch.randn(width, generator=generator)
    weight = torch.randn(outputs, width, generator=generator) / width**0.5
    return x, norm_weight, weight, torch.randn(outputs, generator=generator) if bias else None


def run(simt, x, norm_weight, weight, bias, sanitizer="address", patches=()):
    case = dict(x=x, norm_weight=norm_weight, weight=weight, bias=bias,
                rows=x.shape[0], width=x.shape[1], outputs=weight.shape[0])  # fmt: skip
    outputs = {"out": ((x.shape[0], weight.shape[0]), torch.float32)}
    return simt.program("norm_head", sanitizer, patches).run(case, outputs, schedules=2)["out"]


def check(simt, rows, width, outputs, bias=True, **how):
    x, norm_weight, weight, added = make(rows, width, outputs, bias)
    got = run(simt, x, norm_weight, weight, added, **how).double()
    wide = [None if t is None else t.double() for t in (x, norm_weight, weight, added)]
    expected = norm_head_reference(wide[0], wide[1], EPS, *wide[2:])
    error = (got - expected).abs().max() / expected.abs().max()
    assert error <= 2**-20, f"error {error:.3g}"


@pytest.mark.parametrize("rows", [1, 2, 3, 9, 32])
@pytest.mark.parametrize("width", [4, 64, 768, 1000, 1280])
def test_against_the_definition(simt, rows, width):
    check(simt, rows, width, 33 if rows < 32 else 20, bias=width != 64)


def test_bits_do_not_depend_on_the_rows_beside(simt):
    for width in (768, 1280):  # of the latter, few rows have a kernel of their own
        x, *weights = make(21, width, 19)
        together = run(simt, x, *weights)
        for rows in (slice(0, 1), slice(5, 7), slice(3, 8), slice(8, 20)):
            assert torch.equal(run(simt, x[rows].contiguous(), *weights), together[rows]), rows


@pytest.mark.slow
def test_has_no_data_race(simt):
    for rows, width in ((2, 320), (5, 768), (23, 132)):
        check(simt, rows, width, 35, sanitizer="thread")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("4 * lane + s * kStep < width && first + o < p.outputs", "first + o < p.outputs"),
        ("4 * lane + s * kStep < width && first + o < p.outputs", "4 * lane + s * kStep < width"),
        ("begin + row < rows && input", "input"),
        ("begin + row < rows && input + s * kStep < width", "begin + row < rows"),
        ("p.norm_weight + i, i < width", "p.norm_weight + i, i < width - 4"),
        ("const bool upper = (threadIdx.x & kOffset) != 0;", "const bool upper = (threadIdx.x & kOffset) == 0;"),
        ("part < kSquareParts", "part < 1"),
        ("writes && begin + result_row < rows", "writes"),
        ("fetch(begin + kHeld);", "fetch(begin + kRows);"),
        ("__syncthreads();  // the squares", "// the squares"),
        ("output < p.outputs;", "output <= p.outputs;"),
    ],
)
def test_seeded_bugs_are_caught(simt, old, new):
    patches = [("norm_head_cuda.cu", old, new)]
    with pytest.raises(AssertionError, match="^(error|exit code) "):  # not the compiler's
        check(simt, 3, 132, 33, patches=patches)
        check(simt, 21, 1276, 35, patches=patches)
        check(simt, 21, 132, 35, patches=patches, sanitizer="thread")
