"""norm_head: against its definition in float64, on a GPU the kernel among the ways."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from alitok_fast._library import use_reference
from alitok_fast.config import GENERATORS
from alitok_fast.ops import norm_head as module
from alitok_fast.ops.add_rms_norm import add_rms_norm
from alitok_fast.ops.norm_head import norm_head, norm_head_reference

EPS = 1e-5
WIDTHS = sorted({4, 64, 100, 1284, *(config.width for config in GENERATORS.values())})


def inputs(rows, width, outputs, device, bias=True):
    generator = torch.Generator().manual_seed(rows + width)
    x, norm = torch.randn(rows, width, generator=generator), 1 + 0.2 * torch.randn(width, generator=generator)
    weight, added = torch.randn(outputs, width, generator=generator) / width**0.5, torch.randn(outputs)
    return [None if t is None else t.to(device) for t in (x, norm, weight, added if bias else None)]


def close(got, expected):
    error = (got.double() - expected).abs().max() / expected.abs().max()
    assert error <= 2**-20, f"error {error:.3g}"


@pytest.mark.parametrize("rows", [1, 2, 3, 9, 32, 33])
@pytest.mark.parametrize("width", WIDTHS)
def test_against_the_definition(device, rows, width):
    x, norm, weight, bias = inputs(rows, width, 70, device, bias=width != 64)
    wide = [None if t is None else t.double() for t in (x, norm, weight, bias)]
    got = norm_head(x, None, norm, EPS, weight, bias)
    assert got.dtype == torch.float32 and got.shape == (rows, 70)
    close(got, norm_head_reference(wide[0], wide[1], EPS, *wide[2:]))


def test_no_rows(device):
    x, norm, weight, bias = inputs(0, 64, 70, device)
    assert norm_head(x, None, norm, EPS, weight, bias).shape == (0, 70)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_must_still_be_added_is_added_before_the_norm(device, dtype):
    x, norm, weight, bias = inputs(3, 64, 70, device)
    delta = torch.randn(3, 64).to(device, dtype)
    close(
        norm_head(x, delta, norm, EPS, weight, bias),
        norm_head_reference(x.double() + delta.double(), norm.double(), EPS, weight.double(), bias.double()),
    )


def test_on_a_cpu_it_is_the_two_operators_to_the_bit():
    x, norm, weight, bias = inputs(5, 96, 40, "cpu")
    expected = F.linear(add_rms_norm(x, None, norm, EPS)[1], weight, bias)
    assert torch.equal(norm_head(x, None, norm, EPS, weight, bias), expected)


def test_fake_kernel():
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, norm, weight, bias = (torch.empty(shape, device="cuda") for shape in ((3, 64), 64, (70, 64), 70))
        out = torch.ops.alitok.norm_head(x, norm, EPS, weight, bias)
        assert out.shape == (3, 70) and out.dtype == torch.float32 and out.device.type == "cuda"
        with pytest.raises(ValueError, match="bias: expected the device of x"):
            torch.ops.alitok.norm_head(x, norm, EPS, weight, torch.empty(70))


@pytest.mark.parametrize(
    "changes",
    [
        dict(x=torch.ones(33, 64)),
        dict(x=torch.ones(0, 64)),
        dict(x=torch.ones(2, 1284)),
        dict(x=torch.ones(2, 66)),
        dict(x=torch.ones(64, 2).T),
        dict(x=torch.ones(2, 64).double()),
        dict(norm_weight=torch.ones(64).bfloat16()),
        dict(weight=torch.ones(8, 64).bfloat16()),
        dict(weight=torch.ones(64, 8).T),
        dict(bias=torch.ones(8).half()),
        dict(bias=torch.ones(16)[::2]),
    ],
)
def test_what_the_kernel_takes(changes, monkeypatch):
    with FakeTensorMode(allow_non_fake_inputs=True):
        given = dict(x=torch.ones(2, 64), norm_weight=torch.ones(64), weight=torch.ones(8, 64), bias=torch.ones(8))
        on_cuda = {name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
                   for name, t in (given | changes).items()}  # fmt: skip
        usual = {name: torch.empty(t.shape, device="cuda") for name, t in given.items()}
        assert module._fits(*usual.values()) and module._fits(*list(usual.values())[:3], None)
        assert not module._fits(*on_cuda.values())
        with use_reference():
            assert not module._fits(*usual.values())
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        assert not module._fits(*usual.values())


def test_the_kernel_refuses_gradients(monkeypatch):
    """Before it is called, so that no GPU is needed."""
    monkeypatch.setattr(module, "_fits", lambda *_: True)
    x, norm, weight, bias = inputs(2, 64, 8, "cpu")
    with pytest.raises(RuntimeError, match="norm_head: .* got weight that requires one; it is for sampling"):
        norm_head(x, None, norm, EPS, weight.requires_grad_(), bias)


def on_a_gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return torch.device("cuda")


def test_cuda_uses_one_kernel(monkeypatch):
    x, norm, weight, bias = inputs(32, 768, 70, on_a_gpu())
    monkeypatch.setattr(module, "add_rms_norm", None)  # the other way would fail
    together = norm_head(x, None, norm, EPS, weight, bias)
    for rows in (slice(0, 1), slice(5, 7), slice(3, 8), slice(8, 20)):
        assert torch.equal(norm_head(x[rows].clone(), None, norm, EPS, weight, bias), together[rows])


def test_cuda_opcheck():
    x, norm, weight, bias = inputs(3, 64, 70, on_a_gpu())
    torch.library.opcheck(torch.ops.alitok.norm_head.default, (x, norm, EPS, weight, bias))
    torch.library.opcheck(torch.ops.alitok.norm_head.default, (x, norm, EPS, weight, None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=torch.zeros(2, 62)), "a multiple of 4"),
        (dict(x=torch.zeros(33, 64)), "at most 32 rows"),
        (dict(x=torch.zeros(2, 1284)), "a width of at most 1280"),
        (dict(x=torch.zeros(130)[1:129].view(2, 64)), "memory aligned to 16 bytes"),
        (dict(weight=torch.zeros(8, 128)), "weight: expected size 64 along dimension 1"),
        (dict(weight=torch.zeros(8, 64).bfloat16()), "weight: expected float32"),
        (dict(bias=torch.zeros(9)), "bias: expected size 8 along dimension 0"),
        (dict(norm_weight=torch.zeros(64).half()), "norm_weight: expected float32"),
    ],
)
def test_cuda_refuses_what_does_not_fit(changes, message):
    device = on_a_gpu()
    given = dict(x=torch.zeros(2, 64), norm_weight=torch.ones(64), norm_eps=EPS, weight=torch.zeros(8, 64), bias=None)
    given |= changes
    given = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    if "aligned" in message:
        given["x"] = torch.zeros(130, device=device)[1:129].view(2, 64)
    with pytest.raises(ValueError, match=message):
        torch.ops.alitok.norm_head(**given)
