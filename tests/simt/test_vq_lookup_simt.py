"""vq_lookup's CUDA kernels, emulated: against the reference, and with the bugs that the checks must find."""

import pytest
import torch

from alitok_fast.ops.vq_lookup import vq_lookup_reference

COMMITMENT = 0.25


def features_and_codes(features, codes, channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(features, channels, generator=generator)
    codebook = torch.randn(codes, channels, generator=generator)
    # Equal codes and equal features, some of them in other tiles: ties that have one right answer.
    codebook[codes // 2 :: 3] = codebook[: len(codebook[codes // 2 :: 3])].clone()
    z[features // 2 :: 3] = z[: len(z[features // 2 :: 3])].clone()
    return z, codebook


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
    expected = vq_lookup_reference(z.double(), codebook.double(), COMMITMENT, with_closest)
    assert torch.equal(result["indices"], expected.indices)
    assert torch.equal(result["quantized"], codebook[expected.indices])
    assert torch.equal(result["usage"], expected.usage)
    torch.testing.assert_close(result["loss"][0].double(), expected.loss, rtol=1e-6, atol=0)
    if with_closest:
        assert torch.equal(result["closest"], expected.closest)


@pytest.mark.parametrize(
    ("features", "codes", "channels"),
    [(1, 1, 1), (7, 5, 3), (64, 100, 16), (129, 65, 32), (150, 70, 20), (0, 5, 4)],
)
@pytest.mark.parametrize("with_closest", [True, False])
def test_forward(simt, features, codes, channels, with_closest):
    z, codebook = features_and_codes(features, codes, channels)
    result = run_forward(simt.program("vq_lookup"), z, codebook, with_closest, schedules=2)
    check_forward(result, z, codebook, with_closest)


def test_forward_has_no_race(simt):
    z, codebook = features_and_codes(130, 70, 20)
    check_forward(run_forward(simt.program("vq_lookup", sanitizer="thread"), z, codebook), z, codebook)


def test_not_a_number_never_wins(simt):
    z, codebook = features_and_codes(20, 70, 8)
    z[3] = float("nan")
    codebook[5] = float("nan")
    codebook[6] = float("inf")
    result = run_forward(simt.program("vq_lookup"), z, codebook)
    assert result["indices"][3] == 0
    finite = vq_lookup_reference(z[4:], codebook[7:], COMMITMENT)
    assert torch.equal(result["indices"][4:], torch.where(finite.indices >= 0, finite.indices + 7, 0)) or set(
        result["indices"][4:].tolist()
    ) <= set(range(70)) - {5, 6}
    assert result["closest"][5] == result["closest"][6] == 0
    assert 3 not in result["closest"].tolist()


@pytest.mark.parametrize(("features", "codes", "channels"), [(1, 1, 1), (300, 40, 35), (0, 3, 2)])
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_backward(simt, features, codes, channels, sanitizer):
    z, codebook = features_and_codes(features, codes, channels)
    grad_quantized, grad_loss = torch.randn(features, channels), torch.tensor(1.7)
    indices = torch.randint(codes, (features,))
    inputs = {"z": z, "codebook": codebook, "features": features, "codes": codes, "channels": channels}
    inputs |= {"backward": True, "commitment": COMMITMENT, "indices": indices}
    inputs |= {"grad_quantized": grad_quantized, "grad_loss": grad_loss}
    outputs = {"grad_z": ((features, channels), torch.float32), "grad_codebook": ((codes, channels), torch.float32)}
    result = simt.program("vq_lookup", sanitizer).run(inputs, outputs, schedules=2)

    difference = 2 / max(z.numel(), 1) * grad_loss.double() * (codebook[indices].double() - z)
    torch.testing.assert_close(result["grad_z"].double(), grad_quantized - COMMITMENT * difference, rtol=1e-5, atol=1e-6)
    expected = torch.zeros(codes, channels, dtype=torch.float64).index_add(0, indices, difference)
    torch.testing.assert_close(result["grad_codebook"].double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("old", "new", "sanitizer", "message"),
    [
        pytest.param("    cp_async_wait<0>();\n    __syncthreads();", "    cp_async_wait<0>();", "thread", "data race", id="no barrier"),
        pytest.param("n < p.features) {", "true) {", "address", "overflow", id="write past the last feature"),
        pytest.param("k < p.codes ? workspace.half_norms[k] : INFINITY", "0.0f", "address", None, id="norm forgotten"),
        pytest.param("    cp_async_wait<0>();\n", "    cp_async_wait<1>();\n", "address", None, id="wait one group short"),
        pytest.param("if (k >= p.codes) return;", "if (k > p.codes) return;", "address", "overflow", id="one code too many"),
    ],
)  # fmt: skip
def test_seeded_bugs_are_caught(simt, old, new, sanitizer, message):
    z, codebook = features_and_codes(130, 70, 20)
    program = simt.program("vq_lookup", sanitizer, patch=("vq_lookup_cuda.cu", old, new))
    with pytest.raises(AssertionError, match=message):
        check_forward(run_forward(program, z, codebook), z, codebook)
