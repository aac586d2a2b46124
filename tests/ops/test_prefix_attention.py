"""prefix_attention: the reference against PyTorch's own attention, native kernels against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alitok_fast._library import use_reference
from alitok_fast.config import GENERATORS
from alitok_fast.ops.prefix_attention import dropout_keep_mask, prefix_attention, prefix_attention_reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
UNIT = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}
operator = torch.ops.alitok.prefix_attention


def make(batch=2, length=33, heads=2, head_dim=48, dtype=torch.float32, norm=True, rope=True, seed=0, device="cpu"):
    """qkv and the optional arguments; the first rotary row is zeros, as in the generator."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, length, 3, heads, head_dim, generator=generator).to(dtype)
    options = {}
    if norm:
        weights = 1 + 0.2 * torch.randn(2, head_dim, generator=generator)
        options |= {"q_norm_weight": weights[0], "k_norm_weight": weights[1]}
    if rope:
        angles = 3 * torch.randn(length, head_dim // 2, generator=generator)
        options["rope"] = torch.stack((angles.cos(), angles.sin()), -1)
        options["rope"][0] = 0
    return qkv.to(device), {name: option.to(device) for name, option in options.items()}


def outputs_and_gradients(qkv: Tensor, prefix_len: int, options: dict, seed=1) -> dict[str, Tensor]:
    """The output and the gradients of a random projection of it, for qkv and the weights."""
    leaves = {"qkv": qkv.detach().clone(memory_format=torch.preserve_format).requires_grad_()}
    for name in ("q_norm_weight", "k_norm_weight"):
        if name in options:
            leaves[name] = options[name].to(torch.promote_types(qkv.dtype, torch.float32)).requires_grad_()
    arguments = options | {name: leaf for name, leaf in leaves.items() if name != "qkv"}
    out = prefix_attention(leaves["qkv"], prefix_len, **arguments)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(qkv)
    gradients = torch.autograd.grad(out, list(leaves.values()), direction.to(out.dtype))
    return {"out": out.detach()} | {f"grad {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def assert_as_exact_as_reference(qkv: Tensor, prefix_len: int, options: dict, multiple: float = 3.0) -> None:
    """Errors against float64 stay below a small multiple of those of the reference in the tested precision."""
    native = outputs_and_gradients(qkv, prefix_len, options)
    with use_reference():
        exact = outputs_and_gradients(qkv.double(), prefix_len, options)
        reference = outputs_and_gradients(qkv, prefix_len, options)
    for name, expected in exact.items():
        error = (native[name].double() - expected).abs().max()
        floor = 4 * UNIT[qkv.dtype] * expected.abs().max()
        bound = multiple * (reference[name].double() - expected).abs().max() + floor
        assert native[name].dtype == reference[name].dtype, name
        assert error <= bound, f"{name}: error {error:.2e} above {bound:.2e}"


@pytest.fixture(autouse=True)
def poisoned_allocations():
    """Fresh tensors hold NaN: an element that a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


# ---- the reference ----


@pytest.mark.parametrize("prefix_len", [0, 1, 17, 32, 33])
def test_reference_is_sdpa_after_norm_and_rotation(prefix_len):
    qkv, options = make(dtype=torch.float64)
    q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, H, L, D)
    turn = torch.view_as_complex(options["rope"].double())

    def prepared(x, weight):
        x = torch.nn.functional.rms_norm(x, x.shape[-1:], weight.double(), 1e-5)
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)

    i, j = torch.arange(33)[:, None], torch.arange(33)
    expected = torch.nn.functional.scaled_dot_product_attention(
        prepared(q, options["q_norm_weight"]), prepared(k, options["k_norm_weight"]), v, (j < prefix_len) | (j <= i)
    )
    with use_reference():
        out = prefix_attention(qkv, prefix_len, **options)
    torch.testing.assert_close(out.transpose(1, 2), expected)


def test_reference_gradients():
    qkv, options = make(batch=1, length=5, heads=2, head_dim=8, dtype=torch.float64)
    weights = [options[name].double().requires_grad_() for name in ("q_norm_weight", "k_norm_weight")]

    def attend(qkv, *weights):
        seed = torch.tensor([5])
        return prefix_attention_reference(qkv, 2, *weights, 1e-5, options["rope"], 0.3, 0.25, seed)

    assert torch.autograd.gradcheck(attend, (qkv.requires_grad_(), *weights))


def test_dropout_mask_is_documented_philox():
    """The counter written out for single elements."""
    from alitok_fast.ops.philox import DOMAIN_DROPOUT, philox4x32

    keep, kept = dropout_keep_mask(torch.tensor([77]), 2, 3, 300, 0.3)
    assert kept == 1 - round(0.3 * 65536) / 65536
    for b, h, i, j in [(0, 0, 0, 0), (1, 2, 5, 17), (0, 1, 299, 128), (1, 0, 7, 255), (1, 1, 100, 299)]:
        counter = (DOMAIN_DROPOUT + j // 128 * 16 + j % 16, i, b * 3 + h, 0)
        words = philox4x32(torch.tensor(77), *(torch.tensor(c) for c in counter))
        part = j % 128 // 16
        bits = int(words[part // 2]) >> 16 * (part % 2) & 0xFFFF
        assert bool(keep[b, h, i, j]) == (bits >= round(0.3 * 65536))
    assert abs(keep.double().mean() - kept) < 0.003


# ---- native kernels ----


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("length", [1, 2, 17, 31, 274, 305, 529])
def test_lengths(device, dtype, length):
    qkv, options = make(batch=1, length=length, dtype=dtype, device=device)
    for prefix_len in sorted({0, 1, min(17, length), length - 1, length}):
        assert_as_exact_as_reference(qkv, prefix_len, options)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("head_dim", [8, 24, 48, 64, 80, 104, 128])
def test_head_dims(target, dtype, head_dim):
    qkv, options = make(length=50, head_dim=head_dim, dtype=dtype, device=target)
    assert_as_exact_as_reference(qkv, 0, options)
    assert_as_exact_as_reference(qkv, 17, options | {"dropout": 0.2, "seed": 2**62 + 12345, "scale": 0.3})


def test_every_head_dim_and_odd_length(device):
    for head_dim in range(8, 129, 8):
        length = head_dim // 2 + 3
        qkv, options = make(1, length, 1, head_dim, norm=False, seed=head_dim, device=device)
        assert_as_exact_as_reference(qkv, 2, options)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("rope", [False, True])
def test_norm_and_rotation_are_optional(device, norm, rope):
    qkv, options = make(norm=norm, rope=rope, dtype=torch.bfloat16, device=device)
    assert_as_exact_as_reference(qkv, 33, options)


@pytest.mark.parametrize("preset", ["b", "l", "xl"])
def test_generator_shapes(device, preset):
    config = GENERATORS[preset]
    qkv, options = make(1, 1 + config.num_tokens, 2, config.head_dim, torch.bfloat16, device=device)
    assert_as_exact_as_reference(qkv, 0, options)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_log_sum_exp(target, dtype):
    qkv, options = make(dtype=dtype, norm=False, rope=False, device=target)
    arguments = (qkv, 3, None, None, 1e-5, None, 0.5, 0.1, torch.tensor([1], device=target))
    lse, expected = operator(*arguments)[1], prefix_attention_reference(*arguments)[1]
    torch.testing.assert_close(lse, expected, atol=2e-5, rtol=1e-5)


def test_large_logits_do_not_overflow(device):
    qkv, _ = make(norm=False, rope=False, device=device)
    assert_as_exact_as_reference(qkv, 0, {"scale": 40.0}, multiple=5)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales_that_are_not_positive(target, dtype, scale):
    """Masked logits must not come back as 0 * -inf or as -0.3 * -inf."""
    qkv, options = make(length=70, dtype=dtype, device=target)
    for prefix_len in (0, 17):
        assert_as_exact_as_reference(qkv, prefix_len, options | {"scale": scale})


def test_nan_is_not_hidden(target):
    qkv, options = make(batch=1, length=40, heads=2, device=target)
    qkv[0, 20, 1, 0, 3] = torch.nan  # one key of head 0
    broken = prefix_attention(qkv, 0, **options)[0].isnan()
    assert broken[20:, 0].all() and not broken[:, 1].any() and not broken[:16, 0].any()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_strided_input_is_the_same(device, dtype):
    qkv, options = make(batch=3, length=20, dtype=dtype, device=device)
    expected = outputs_and_gradients(qkv, 4, options)
    wide = torch.full((3, 2, 20, 3, 2, 48), torch.nan, dtype=dtype, device=device)
    wide[:, 1] = qkv
    by_rows = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    heads_first = qkv.transpose(2, 3).contiguous().transpose(2, 3)  # read through a copy
    for other in (wide[:, 1], by_rows, heads_first):
        assert not other.is_contiguous()
        for name, value in outputs_and_gradients(other, 4, options).items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_output_gradient_may_be_strided(device):
    qkv, options = make(device=device)
    qkv.requires_grad_()
    out = prefix_attention(qkv, 0, **options)
    expanded = torch.ones((), device=device).expand_as(out)
    a, b = (torch.autograd.grad(out, qkv, g, retain_graph=True)[0] for g in (expanded, expanded.contiguous()))
    assert torch.equal(a, b)


def test_empty_batch(device):
    qkv, options = make(batch=0, device=device)
    gradients = outputs_and_gradients(qkv, 0, options)
    assert gradients["out"].shape == (0, 33, 2, 48)
    assert gradients["grad qkv"].shape == qkv.shape
    assert gradients["grad q_norm_weight"].eq(0).all()


def test_rows_of_a_batch_do_not_depend_on_it(device):
    qkv, options = make(batch=3, device=device)
    whole = prefix_attention(qkv, 0, **options)
    assert torch.equal(prefix_attention(qkv[1:2], 0, **options), whole[1:2])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_same_bits_for_every_number_of_threads(dtype):
    qkv, options = make(batch=1, length=100, heads=3, dtype=dtype)
    options |= {"dropout": 0.1, "seed": 3}
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(outputs_and_gradients(qkv, 0, options))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in other.items():
            assert torch.equal(value, results[0][name]), name


def test_dropout_is_the_reference_mask(target):
    """With one-hot values the output is the matrix of probabilities itself."""
    qkv, _ = make(batch=2, length=40, heads=3, head_dim=40, norm=False, rope=False, device=target)
    qkv[:, :, 2] = torch.eye(40, device=target)[:, None]
    plain = prefix_attention(qkv, 40).transpose(1, 2)
    dropped = prefix_attention(qkv, 40, dropout=0.4, seed=-5).transpose(1, 2)
    keep, kept = dropout_keep_mask(torch.tensor([-5], device=target), 2, 3, 40, 0.4)
    assert torch.equal(dropped != 0, keep)
    torch.testing.assert_close(dropped, plain * keep / kept)


def test_seed(device):
    qkv, options = make(device=device)

    def attend(seed):
        return prefix_attention(qkv, 0, dropout=0.5, seed=seed, **options)

    assert torch.equal(attend(4), attend(torch.tensor(4, device=device)))
    assert not torch.equal(attend(4), attend(5))
    torch.manual_seed(0)
    first, second = attend(None), attend(None)
    torch.manual_seed(0)
    assert torch.equal(attend(None), first) and not torch.equal(first, second)


# ---- with torch ----


@pytest.mark.parametrize("options", ["all", "none"])
def test_opcheck(device, options):
    qkv, given = make(batch=2, length=9, head_dim=16, device=device)
    weights = [given[name].requires_grad_() for name in ("q_norm_weight", "k_norm_weight")]
    qkv.requires_grad_()
    arguments = (qkv, 3, *weights, 1e-5, given["rope"], 0.25, 0.1, torch.tensor([1], device=device))
    if options == "none":
        arguments = (qkv, 3, None, None, 1e-5, None, 0.25, 0.0, None)
    torch.library.opcheck(operator, arguments)
    arguments = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in arguments)
    out, lse = operator(*arguments)
    # Without gradients, which the derivative does not have.
    torch.library.opcheck(
        torch.ops.alitok.prefix_attention_backward, (torch.ones_like(out), arguments[0], out, lse, *arguments[1:])
    )


def test_compiles_without_graph_breaks(device):
    qkv, options = make(device=device)

    def attend(qkv):
        return prefix_attention(qkv, qkv.shape[1], dropout=0.1, seed=6, **options)

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for x in (qkv, torch.cat((qkv, qkv))):
        x = x.clone().requires_grad_()
        expected, out = attend(x), compiled(x)
        assert torch.equal(out, expected)
        assert torch.equal(*(torch.autograd.grad(o.sum(), x)[0] for o in (expected, out)))


def test_autocast_runs_in_the_dtype_of_qkv(device):
    qkv, options = make(device=device)
    expected = prefix_attention(qkv, 0, **options)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(prefix_attention(qkv, 0, **options), expected)
        assert prefix_attention(qkv.bfloat16(), 0, **options).dtype == torch.bfloat16
        with use_reference():
            torch.testing.assert_close(prefix_attention(qkv, 0, **options), expected)


def test_bfloat16_weights_get_bfloat16_gradients(device):
    qkv, options = make(dtype=torch.bfloat16, device=device)
    weights = [options[name].bfloat16().requires_grad_() for name in ("q_norm_weight", "k_norm_weight")]
    prefix_attention(qkv, 0, q_norm_weight=weights[0], k_norm_weight=weights[1]).sum().backward()
    assert [weight.grad.dtype for weight in weights] == [torch.bfloat16] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(2, 9, 3, 2, 16, dtype=torch.float64)}, "qkv: expected float32 or bfloat16 or float16"),
        ({"qkv": torch.zeros(2, 9, 3, 32)}, r"qkv: expected 5 dimensions, got shape \(2, 9, 3, 32\)"),
        ({"qkv": torch.zeros(2, 9, 2, 2, 16)}, "qkv: expected size 3 along dimension 2"),
        ({"qkv": torch.zeros(2, 9, 3, 2, 20)}, "qkv: expected a head dimension .* multiple of 8 in 8..128, got 20"),
        ({"qkv": torch.zeros(2, 9, 3, 2, 136)}, "qkv: expected a head dimension .* got 136"),
        ({"qkv": torch.zeros(2, 0, 3, 2, 16)}, r"qkv: expected \(B, L, 3, H, D\) with L >= 1"),
        ({"prefix_len": 10}, r"prefix_len: expected a value in 0..9, got 10"),
        ({"prefix_len": -1}, r"prefix_len: expected a value in 0..9, got -1"),
        ({"q_norm_weight": None}, "k_norm_weight: expected both norm weights or neither, got k_norm_weight alone"),
        ({"k_norm_weight": torch.ones(8)}, "k_norm_weight: expected size 16 along dimension 0"),
        ({"rope": torch.zeros(8, 8, 2)}, "rope: expected size 9 along dimension 0"),
        ({"rope": torch.zeros(9, 8, 2).double()}, "rope: expected float32, got float64"),
        ({"rope": torch.zeros(8, 9, 2).transpose(0, 1)}, "rope: expected a contiguous tensor"),
        ({"norm_eps": -1.0}, "norm_eps: expected a number >= 0, got -1"),
        ({"scale": float("inf")}, "scale: expected a finite number, got inf"),
        ({"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\), got 1"),
        ({"dropout": 0.1, "seed": torch.zeros(1)}, "seed: expected int64, got float32"),
        ({"dropout": 0.1, "seed": torch.zeros(2, dtype=torch.int64)}, r"seed: expected one element, got shape \(2,\)"),
    ],
)
def test_messages(change, message):
    qkv, options = make(batch=2, length=9, head_dim=16)
    arguments = {"qkv": qkv, "prefix_len": 0} | options | change
    with pytest.raises(ValueError, match=message):
        prefix_attention(**arguments)
