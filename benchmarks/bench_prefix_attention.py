"""prefix_attention at the generator's and the tokenizer's shapes, beside the eager chain that it replaces and every
attention there is: torch's back ends by name, and flash-attn where it is installed."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from alitok_fast._library import use_reference
from alitok_fast.config import GENERATORS, TOKENIZERS
from alitok_fast.models.rope import rope_table
from alitok_fast.ops.prefix_attention import prefix_attention, rms_norm, rotate
from timing import Missing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CEILINGS = {torch.float32: "fp32_flops", torch.bfloat16: "bf16_flops"}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
ROUNDINGS = {torch.float32: 2e-5, torch.bfloat16: 0.05}  # of outputs near 1


def eager_chain(qkv: Tensor, q_norm_weight=None, k_norm_weight=None, rope=None, causal=True) -> Tensor:
    """What a model without this operator does: split, norm, rotary, SDPA, transpose."""
    q, k, v = qkv.unbind(2)
    if q_norm_weight is not None:
        q, k = rms_norm(q, q_norm_weight, 1e-5), rms_norm(k, k_norm_weight, 1e-5)
    if rope is not None:
        q, k = rotate(q, rope[:, None]), rotate(k, rope[:, None])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).contiguous()


def make(batch, length, heads, head_dim, dtype, device, config=None):
    """qkv, and the generator's norm weights and rotary table when a config is given."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, length, 3, heads, head_dim, generator=generator).to(device, dtype)
    if config is None:
        return qkv, {}
    weights = (1 + 0.1 * torch.randn(2, head_dim, generator=generator)).to(device, dtype)
    rope = rope_table(config).to(device)
    return qkv, {"q_norm_weight": weights[0], "k_norm_weight": weights[1], "rope": rope}


def flops(qkv: Tensor, prefix_len: int, products: int) -> float:
    """Two for each multiply-add over the visible pairs, in `products` matrix products."""
    batch, length, _, heads, head_dim = qkv.shape
    pairs = sum(max(prefix_len, i + 1) for i in range(length))
    return 2.0 * products * pairs * head_dim * batch * heads


def plain_attentions(qkv: Tensor, causal: bool, backward: bool = False) -> dict[str, Callable[[], object] | Missing]:
    """Attention alone, without norm, rotary table or transposes, on inputs laid out as each likes them best.

    What does not run here is missing from the comparison, and the report says why.
    """
    functions: dict[str, Callable[[], object] | Missing] = {}
    for name, backend in BACKENDS.items():
        q, k, v = (x.transpose(1, 2).contiguous().requires_grad_(backward) for x in qkv.detach().unbind(2))

        def sdpa(q=q, k=k, v=v, backend=backend):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

        functions[f"SDPA, {name}"] = if_it_runs(with_gradients(sdpa, (q, k, v)) if backward else sdpa)
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_qkvpacked_func

        packed = qkv.detach().requires_grad_(backward)

        def flash_attn():
            return flash_attn_qkvpacked_func(packed, causal=causal)

        functions["flash-attn, packed"] = if_it_runs(with_gradients(flash_attn, (packed,)) if backward else flash_attn)
    else:
        functions["flash-attn, packed"] = Missing("flash-attn is not installed")
    return functions


def if_it_runs(function: Callable[[], object]) -> Callable[[], object] | Missing:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's reasons, one a warning
            function()
    except RuntimeError as error:
        return Missing(str(error).splitlines()[0])
    return function


def with_gradients(attention: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> Callable[[], object]:
    def run():
        out = attention()
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return run


def run_forward(compare, qkv, prefix_len, options):
    causal = prefix_len == 0
    with torch.no_grad():
        with use_reference():
            expected = prefix_attention(qkv[:1], prefix_len, **options)
        bound = ROUNDINGS[qkv.dtype]
        torch.testing.assert_close(prefix_attention(qkv, prefix_len, **options)[:1], expected, atol=bound, rtol=bound)
        torch.testing.assert_close(eager_chain(qkv, **options, causal=causal)[:1], expected, atol=bound, rtol=bound)
        alternatives = {
            "eager chain": lambda: eager_chain(qkv, **options, causal=causal),
            **plain_attentions(qkv, causal),
        }
        compare(
            lambda: prefix_attention(qkv, prefix_len, **options),
            alternatives,
            flops(qkv, prefix_len, 2),
            CEILINGS[qkv.dtype],
        )


@pytest.mark.quick("b-fp32", "b-bf16")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("preset", ["b", "l", "xl"])
def bench_generator_forward(preset, dtype, mode, device, compare):
    config = GENERATORS[preset]
    batch = mode.pick(check=1, quick=2, full=8)
    qkv, options = make(batch, 1 + config.num_tokens, config.num_heads, config.head_dim, dtype, device, config)
    run_forward(compare, qkv, 0, options)


@pytest.mark.quick("encoder-fp32")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def bench_tokenizer_forward(part, dtype, mode, device, compare):
    """Bidirectional, without norm and rotary; the decoder with its buffer tokens."""
    config = TOKENIZERS["256"]
    heads, width = getattr(config, f"{part}_heads"), getattr(config, f"{part}_width")
    length = config.num_tokens + (config.num_image_tokens if part == "encoder" else config.num_start_tokens)
    qkv, options = make(mode.pick(check=1, quick=1, full=4), length, heads, width // heads, dtype, device)
    run_forward(compare, qkv, length, options)


@pytest.mark.quick("bidirectional-bf16-forward")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("mask", ["causal", "bidirectional"])
def bench_plain(mask, dtype, backward, mode, device, compare):
    """Attention and nothing else: the generator's causal length, the tokenizer's decoder with its buffer tokens."""
    tokenizer, generator = TOKENIZERS["256"], GENERATORS["l"]
    causal = mask == "causal"
    length = 1 + generator.num_tokens if causal else tokenizer.num_tokens + tokenizer.num_start_tokens
    prefix_len, batch = 0 if causal else length, mode.pick(check=1, quick=2, full=8)
    qkv, _ = make(batch, length, generator.num_heads, generator.head_dim, dtype, device)
    qkv.requires_grad_(backward)

    def attention():
        return prefix_attention(qkv, prefix_len)

    with torch.no_grad():
        expected = eager_chain(qkv, causal=causal)
        torch.testing.assert_close(attention(), expected, atol=ROUNDINGS[dtype], rtol=ROUNDINGS[dtype])
    own = with_gradients(attention, (qkv,)) if backward else attention
    work = flops(qkv, prefix_len, 2 + 5 * backward)
    compare(own, plain_attentions(qkv, causal, backward), work, CEILINGS[dtype])


@pytest.mark.quick("b-fp32-0.1")
@pytest.mark.parametrize("dropout", [0.0, GENERATORS["b"].dropout])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("preset", ["b", "l", "xl"])
def bench_generator_forward_backward(preset, dtype, dropout, mode, device, compare):
    """With dropout the eager chain is timed without it."""
    config = GENERATORS[preset]
    batch = mode.pick(check=1, quick=2, full=8)
    qkv, options = make(batch, 1 + config.num_tokens, config.num_heads, config.head_dim, dtype, device, config)
    leaves = [qkv, options["q_norm_weight"], options["k_norm_weight"]]
    for leaf in leaves:
        leaf.requires_grad_()
    direction = torch.randn_like(qkv[:, :, 0])

    def gradients(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, direction)

    native = gradients(prefix_attention(qkv, 0, **options))
    for got, expected in zip(native, gradients(eager_chain(qkv, **options)), strict=True):
        error = (got.float() - expected.float()).abs().max() / expected.float().abs().max()
        assert error < ROUNDINGS[dtype]
    compare(
        lambda: gradients(prefix_attention(qkv, 0, dropout=dropout, seed=1, **options)),
        {"eager chain": lambda: gradients(eager_chain(qkv, **options))},
        flops(qkv, 0, 2 + 5),
        CEILINGS[dtype],
    )
