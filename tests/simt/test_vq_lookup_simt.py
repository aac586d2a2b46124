"""vq_lookup's CUDA kernels, emulated: against the reference, and with the bugs that the checks must find."""

import pytest
import torch

from alitok_fast.ops.vq_lookup import vq_lookup_reference
from alitok_fast.testing import assert_nearest, vq_inputs

COMMITMENT = 0.25


def run_forward(program, z, codebook, with_closest=True, **options):
    (features, channels), codes = z.shape, len(codebook)
    inputs = {"z": z, "codebook": codebook, "features": features, "codes": codes, "channels": channels}
    inputs |= {"backward": False, "commitment": COMMITMENT, "with_closest": with_closest}
    outputs = {
        "quantized": ((features, channels), torch.float32),
        "indices": ((features,), torch.int64),
        "loss": ((1,), torch.float32),
        "usage": ((codes,), torch.int64),
    }
    if with_closest:
        outputs["closest"] = ((codes,), torch.int64)
    return program.run(inputs, outputs, **options)


def check_forward(result, z, codebook, with_closest=True):
    indices = result["indices"]
    assert_nearest(z, codebook, indices, result["closest"] if with_closest and len(z) else None)
    assert torch.equal(result["quantized"], codebook[indices])
    assert torch.equal(result["usage"], torch.bincount(indices, minlength=len(codebook)))
    squares = (codebook.double()[indices] - z.double()).square()
    expected = (1 + COMMITMENT) * squares.sum() / max(z.numel(), 1)
    torch.testing.assert_close(result["loss"][0].double(), expected, rtol=1e-6, atol=0)
    if with_closest and len(z) == 0:
        assert torch.equal(result["closest"], torch.full((len(codebook),), -1))


@pytest.mark.parametrize(
    ("features", "codes", "channels"),
    [(1, 1, 1), (7, 5, 3), (64, 100, 16), (129, 65, 32), (150, 70, 20), (0, 5, 4)],
)
@pytest.mark.parametrize("with_closest", [True, False])
def test_forward(simt, features, codes, channels, with_closest):
    z, codebook = vq_inputs(features, codes, channels)
    result = run_forward(simt.program("vq_lookup"), z, codebook, with_closest, schedules=2)
    check_forward(result, z, codebook, with_closest)


@pytest.mark.slow
def test_forward_has_no_race(simt):
    z, codebook = vq_inputs(130, 70, 20)
    check_forward(run_forward(simt.program("vq_lookup", sanitizer="thread"), z, codebook), z, codebook)


def test_not_a_number_never_wins(simt):
    z, codebook = vq_inputs(20, 70, 8)
    expected = vq_lookup_reference(z[4:], codebook[7:])
    z[:4] = float("nan")
    codebook[:5] = float("nan")
    codebook[5:7] = float("inf")
    result = run_forward(simt.program("vq_lookup"), z, codebook, schedules=2)
    assert torch.equal(result["indices"], torch.cat([torch.zeros(4, dtype=torch.int64), expected.indices + 7]))
    assert torch.equal(result["closest"], torch.cat([torch.zeros(7, dtype=torch.int64), expected.closest + 4]))


@pytest.mark.parametrize(("features", "codes", "channels"), [(1, 1, 1), (300, 40, 35), (0, 3, 2)])
@pytest.mark.parametrize("sanitizer", ["address", pytest.param("thread", marks=pytest.mark.slow)])
def test_backward(simt, features, codes, channels, sanitizer):
    z, codebook = vq_inputs(features, codes, channels)
    grad_quantized, grad_loss = torch.randn(features, channels), torch.tensor(1.7)
    indices = torch.randint(codes, (features,))
    inputs = {"z": z, "codebook": codebook, "features": features, "codes": codes, "channels": channels}
    inputs |= {"backward": True, "commitment": COMMITMENT, "indices": indices}
    inputs |= {"grad_quantized": grad_quantized, "grad_loss": grad_loss}
    outputs = {"grad_z": ((features, channels), torch.float32), "grad_codebook": ((codes, channels), torch.float32)}
    result = simt.program("vq_lookup", sanitizer).run(inputs, outputs, schedules=2)

    difference = 2 / max(z.numel(), 1) * grad_loss.double() * (codebook[indices].double() - z)
    expected = grad_quantized - COMMITMENT * difference
    torch.testing.assert_close(result["grad_z"].double(), expected, rtol=1e-5, atol=1e-6)
    expected = torch.zeros(codes, channels, dtype=torch.float64).index_add(0, indices, difference)
    torch.testing.assert_close(result["grad_codebook"].double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "sanitizer", "message"),
    [
        pytest.param("_wait<0>();\n    __syncthreads();", "_wait<0>();", "thread", "data race", id="no barrier"),
        pytest.param("column == 0 && n < p.features", "column == 0", "address", "overflow", id="past the last feature"),
        pytest.param("precedes(other, other_code", "precedes(other, -other_code", "address", "lowest", id="ties go up"),
    ],
)
def test_seeded_bugs_are_caught(simt, old, new, sanitizer, message):
    z, codebook = vq_inputs(130, 70, 20)
    program = simt.program("vq_lookup", sanitizer, patches=[("vq_lookup_cuda.cu", old, new)])
    with pytest.raises(AssertionError, match=message):
        check_forward(run_forward(program, z, codebook, schedules=2), z, codebook)


def test_backward_reads_nothing_for_an_index_out_of_range(simt):
    """Under the address sanitizer: its feature gets NaN, and no code counts it."""
    z, codebook = vq_inputs(70, 40, 35)
    indices = torch.randint(40, (70,), generator=torch.Generator().manual_seed(1))
    wrong = torch.tensor([3, 17, 30, 31, 32, 69])
    indices[wrong] = torch.tensor([-1, 40, 63, 2**40, -(2**63), 2**63 - 1])
    right = torch.ones(70, dtype=torch.bool)
    right[wrong] = False
    inputs = {"z": z, "codebook": codebook, "indices": indices, "features": 70, "codes": 40, "channels": 35}
    inputs |= {"grad_quantized": torch.zeros(70, 35), "grad_loss": torch.ones(1)}
    inputs |= {"backward": True, "commitment": COMMITMENT}
    outputs = {"grad_z": ((70, 35), torch.float32), "grad_codebook": ((40, 35), torch.float32)}
    result = simt.program("vq_lookup").run(inputs, outputs)
    assert torch.equal(result["grad_z"].isnan().any(1), ~right) and torch.equal(result["grad_z"].isnan().all(1), ~right)
    scaled = 2 / z.numel() * (codebook[indices[right]] - z[right])
    expected = torch.zeros_like(codebook).index_add(0, indices[right], scaled)
    torch.testing.assert_close(result["grad_codebook"], expected, rtol=1e-4, atol=1e-6)
