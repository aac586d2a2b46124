"""The CUDA kernels of add_rms_norm and swiglu, emulated, against the references."""

import pytest
import torch

from alitok_fast.ops.add_rms_norm import add_rms_norm_reference
from alitok_fast.ops.swiglu import swiglu_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_delta", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 48), (2, 768), (1, 2050)])
def test_add_rms_norm(simt, dtype, with_delta, rows, width):
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(rows, width, generator=generator)
    delta = torch.randn(rows, width, generator=generator).to(dtype) if with_delta else None
    weight = (1 + 0.1 * torch.randn(width, generator=generator)).to(dtype)
    outputs = {"normed": ((rows, width), dtype)}
    if with_delta:
        outputs["sum"] = ((rows, width), torch.float32)
    inputs = {"x": x, "delta": delta, "weight": weight, "rows": rows, "width": width, "dtype": DTYPES.index(dtype)}
    result = simt.program("add_rms_norm").run(inputs, outputs, schedules=2)
    total, normed = add_rms_norm_reference(x, delta, weight, 1e-5)
    if with_delta:
        assert torch.equal(result["sum"], total)
    torch.testing.assert_close(result["normed"], normed, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_add_rms_norm_has_no_data_race(simt):
    x = torch.randn(2, 300)
    inputs = {"x": x, "delta": x, "weight": x[0].clone(), "rows": 2, "width": 300, "dtype": 0}
    simt.program("add_rms_norm", "thread").run(inputs, {"normed": ((2, 300), torch.float32)}, schedules=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 8, 13, 2048, 2049])
def test_swiglu(simt, dtype, size):
    generator = torch.Generator().manual_seed(size)
    gate, up = (4 * torch.randn(2, size, generator=generator)).to(dtype)
    result = simt.program("swiglu").run(
        {"gate": gate, "up": up, "size": size, "dtype": DTYPES.index(dtype)}, {"out": ((size,), dtype)}, schedules=2
    )
    torch.testing.assert_close(result["out"], swiglu_reference(gate, up), rtol=TOLERANCE[dtype], atol=1e-6)
