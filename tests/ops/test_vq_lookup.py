"""vq_lookup against its definition in float64, on every instruction set."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from alitok_fast._library import use_reference
from alitok_fast.config import TOKENIZERS
from alitok_fast.ops.vq_lookup import vq_lookup, vq_lookup_reference
from alitok_fast.testing import assert_nearest, vq_inputs

COMMITMENT = 0.25
OFFICIAL = TOKENIZERS["256"]
SHAPES = [
    (0, 5, 3),
    (1, 1, 1),
    (7, 5, 3),
    (7, 1000, 1),
    (64, 16, 16),
    (64, 1, 64),
    (1031, 1000, 64),
    (1, OFFICIAL.codebook_size, OFFICIAL.code_dim),
    (2 * OFFICIAL.num_tokens, OFFICIAL.codebook_size, OFFICIAL.code_dim),
    (3 * TOKENIZERS["demo"].num_tokens, TOKENIZERS["demo"].codebook_size, TOKENIZERS["demo"].code_dim),
]


def inputs(device, *sizes):
    return [t.to(device) for t in vq_inputs(*sizes)]


def assert_agrees(result, z, codebook, with_closest=True):
    """Everything that vq_lookup returns, given that its indices are right."""
    assert_nearest(z, codebook, result.indices, result.closest if len(z) else None)
    assert torch.equal(result.quantized, codebook[result.indices])
    assert torch.equal(result.usage, torch.bincount(result.indices, minlength=len(codebook)))
    assert (result.closest is not None) == with_closest
    if with_closest and len(z) == 0:
        assert torch.equal(result.closest, torch.full_like(result.closest, -1))
    squares = (codebook.double()[result.indices] - z.double()).square()
    expected = (1 + COMMITMENT) * squares.sum() / max(z.numel(), 1)
    torch.testing.assert_close(result.loss.double(), expected, rtol=1e-6, atol=0)
    assert result.loss.shape == () and result.loss.dtype == torch.float32


@pytest.mark.parametrize(("features", "codes", "channels"), SHAPES)
def test_reference(device, features, codes, channels):
    z, codebook = inputs(device, features, codes, channels)
    with use_reference():
        result = vq_lookup(z.double(), codebook, COMMITMENT)  # cast to float32 by the public function
    assert_nearest(z, codebook, vq_lookup_reference(z.double(), codebook.double()).indices)
    assert result.quantized.dtype == torch.float32
    assert int(result.usage.sum()) == features


@pytest.mark.parametrize(("features", "codes", "channels"), SHAPES)
def test_native(target, features, codes, channels):
    z, codebook = inputs(target, features, codes, channels)
    assert_agrees(vq_lookup(z, codebook, COMMITMENT), z, codebook)


def test_without_closest(target):
    z, codebook = inputs(target, 100, 70, 16)
    assert_agrees(vq_lookup(z, codebook, COMMITMENT, with_closest=False), z, codebook, with_closest=False)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_features_far_from_the_codes(target, scale):
    """A codebook as initialised is tiny beside the features: |z|^2 must not drown the differences between codes."""
    z, codebook = inputs(target, 500, 300, 32)
    codebook *= scale
    exact = vq_lookup_reference(z.double(), codebook.double()).indices
    result = vq_lookup(z, codebook)
    assert_nearest(z, codebook, result.indices)
    assert (result.indices == exact).float().mean() > 0.99


def test_any_strides_and_alignment(device):
    z, codebook = inputs(device, 65, 37, 8)
    expected = vq_lookup(z, codebook)
    wide = torch.randn(37, 17, device=device)
    wide[:, 1::2] = codebook
    shifted = torch.randn(65 * 8 + 1, device=device)
    shifted[1:] = z.flatten()
    for got in (vq_lookup(z.T.contiguous().T, wide[:, 1::2]), vq_lookup(shifted[1:].view(65, 8), codebook)):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_same_result_on_any_number_of_threads(cpu_isa):
    z, codebook = vq_inputs(777, 100, 16)
    grad = torch.randn(777, 16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            result = vq_lookup(z, codebook)
            gradients = torch.ops.alitok.vq_lookup_backward(grad, result.loss, z, codebook, result.indices, COMMITMENT)
            results.append([*result, *gradients])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("features", "codes", "channels"), SHAPES)
def test_gradients(target, features, codes, channels):
    z, codebook = inputs(target, features, codes, channels)
    grad_quantized, grad_loss = torch.randn_like(z), torch.tensor(100.0, device=target)

    def gradients(operator, dtype):
        inputs = [t.to(dtype).requires_grad_() for t in (z, codebook)]
        result = operator(*inputs, COMMITMENT)
        return torch.autograd.grad(
            [result.quantized, result.loss], inputs, [grad_quantized.to(dtype), grad_loss.to(dtype)]
        )

    assert torch.equal(vq_lookup(z, codebook).indices, vq_lookup_reference(z.double(), codebook.double()).indices)
    exact = gradients(vq_lookup_reference, torch.float64)
    low = gradients(vq_lookup_reference, torch.float32)
    for got, own, expected in zip(gradients(vq_lookup, torch.float32), low, exact, strict=True):
        error = (own - expected).abs().amax() if own.numel() else 0.0
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=4 * float(error) + 1e-7)


def test_reference_gradient_is_straight_through():
    z, codebook = (t.double().requires_grad_() for t in vq_inputs(20, 6, 4))
    weight = torch.randn(20, 4, dtype=torch.float64)
    grad_z, grad_codebook = torch.autograd.grad(
        (vq_lookup_reference(z, codebook).quantized * weight).sum(), [z, codebook], allow_unused=True
    )
    assert torch.equal(grad_z, weight) and grad_codebook is None
    loss = vq_lookup_reference(z, codebook, COMMITMENT)
    grad_z, grad_codebook = torch.autograd.grad(loss.loss, [z, codebook])
    difference = 2 * (z - loss.quantized).detach() / z.numel()
    torch.testing.assert_close(grad_z, COMMITMENT * difference)
    torch.testing.assert_close(grad_codebook, torch.zeros_like(codebook).index_add(0, loss.indices, -difference))


@pytest.mark.parametrize("with_closest", [True, False])
def test_opcheck(device, with_closest):
    for features in (0, 9):
        z, codebook = (t.requires_grad_() for t in inputs(device, features, 5, 3))
        torch.library.opcheck(torch.ops.alitok.vq_lookup, (z, codebook, COMMITMENT, with_closest))
    z, codebook = inputs(device, 9, 5, 3)
    indices, grad_loss = torch.arange(9, device=device) % 5, torch.tensor(1.0, device=device)
    torch.library.opcheck(torch.ops.alitok.vq_lookup_backward, (z, grad_loss, z, codebook, indices, COMMITMENT))


def test_second_derivative_is_refused():
    z, codebook = (t.requires_grad_() for t in vq_inputs(9, 5, 3))
    (grad_z,) = torch.autograd.grad(vq_lookup(z, codebook).loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        grad_z.sum().backward()


def test_compiles_without_graph_break(device):
    def step(z, codebook):
        result = vq_lookup(z, codebook)
        return result.quantized * 2, result.loss, result.indices

    z, codebook = (t.requires_grad_() for t in inputs(device, 40, 20, 8))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(z, codebook), step(z, codebook), strict=True):
        assert torch.equal(got, expected)
    gradients = [torch.autograd.grad(sum(f(z, codebook)[:2]).sum(), [z, codebook]) for f in (compiled, step)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("reference", [True, False])
def test_autocast_and_low_precision_compute_in_float32(device, reference):
    z, codebook = inputs(device, 50, 40, 16)
    z = z.bfloat16().requires_grad_()
    expected = vq_lookup_reference(z.detach().float(), codebook)
    with use_reference(reference), torch.autocast(device.type, torch.bfloat16):
        result = vq_lookup(z, codebook)
    assert result.quantized.dtype == result.loss.dtype == torch.float32
    assert torch.equal(result.indices, expected.indices)
    assert torch.autograd.grad(result.loss, z)[0].dtype == torch.bfloat16


def test_not_a_number_never_wins(target):
    z, codebook = inputs(target, 20, 70, 8)
    expected = vq_lookup(z[4:], codebook[7:])
    z[:4] = float("nan")
    codebook[:5] = float("nan")
    codebook[5:7] = float("inf")
    result = vq_lookup(z, codebook)
    assert not result.indices[:4].any()
    assert torch.equal(result.indices[4:], expected.indices + 7)
    assert not result.closest[:7].any()
    assert torch.equal(result.closest[7:], expected.closest + 4)
    assert result.loss.isnan()


@pytest.mark.parametrize(
    ("z_shape", "codebook_shape", "message"),
    [
        ((3,), (4, 2), r"z: expected 2 dimensions, got shape \(3,\)"),
        ((3, 0), (4, 0), r"z: expected at least one channel, got shape \(3, 0\)"),
        ((3, 2), (0, 2), r"codebook: expected 1 to 2\^31 - 1 codes, got shape \(0, 2\)"),
        ((3, 2), (4, 5), r"codebook: expected size 2 along dimension 1, got shape \(4, 5\)"),
    ],
)
def test_bad_shapes(z_shape, codebook_shape, message):
    with pytest.raises(ValueError, match=message):
        vq_lookup(torch.ones(z_shape), torch.ones(codebook_shape))


def test_bad_types():
    z, codebook = vq_inputs(3, 4, 2)
    with pytest.raises(TypeError, match="z: expected a floating-point tensor, got int64"):
        vq_lookup(z.long(), codebook)
    with pytest.raises(TypeError, match="codebook: expected a tensor, got list"):
        vq_lookup(z, codebook.tolist())


def test_bad_commitment_and_dtype_of_the_native_operator():
    z, codebook = vq_inputs(3, 4, 2)
    with pytest.raises(ValueError, match="commitment: expected a finite number, got nan"):
        vq_lookup(z, codebook, float("nan"))
    with pytest.raises(ValueError, match="z: expected float32, got float64"):
        torch.ops.alitok.vq_lookup(z.double(), codebook, COMMITMENT, True)


@pytest.mark.device
def test_never_holds_the_distances_on_cuda(cuda):
    z, codebook = (torch.randn(size, 8, device=cuda, requires_grad=True) for size in (20000, 4096))
    torch.cuda.reset_peak_memory_stats(cuda)
    before = torch.cuda.memory_allocated(cuda)
    vq_lookup(z, codebook).loss.backward()
    assert torch.cuda.max_memory_allocated(cuda) - before < 20000 * 4096 * 4 / 20


def test_never_holds_the_distances():
    """In a process of its own, whose peak memory nothing else has raised."""
    script = """
import resource, torch
from alitok_fast.ops.vq_lookup import vq_lookup
z, codebook = torch.randn(20000, 8, requires_grad=True), torch.randn(4096, 8, requires_grad=True)
vq_lookup(z[:64], codebook).loss.backward()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
vq_lookup(z, codebook).loss.backward()
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    distances_kib = 20000 * 4096 * 4 / 1024
    assert int(done.stdout) < distances_kib / 20
