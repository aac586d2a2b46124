"""Each operator once against its definition in float64, forward and backward, at awkward and at real sizes.

The first thing to run on a GPU that no kernel has met (with CUDA_LAUNCH_BLOCKING=1, so that a fault names its launch),
and, at the small sizes of `--quick`, what compute-sanitizer watches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from alitok_fast.config import GENERATORS
from alitok_fast.ops.add_rms_norm import add_rms_norm, add_rms_norm_reference
from alitok_fast.ops.cached_attention import cached_attention, cached_attention_reference
from alitok_fast.ops.fused_linear import LinearWeights, embed_norm_linear, linear_add, norm_linear
from alitok_fast.ops.fused_linear import fused_linear_reference as reference
from alitok_fast.ops.norm_head import norm_head, norm_head_reference
from alitok_fast.ops.prefix_attention import prefix_attention, prefix_attention_reference
from alitok_fast.ops.quantized_linear import (
    dequantize_weight,
    quantize_weight,
    quantized_linear,
    quantized_linear_reference,
    widen_weight,
)
from alitok_fast.ops.sample_tokens import guided_logits, gumbel_noise, kept_logits, sample_tokens
from alitok_fast.ops.swiglu import swiglu, swiglu_reference
from alitok_fast.ops.vq_lookup import vq_lookup, vq_lookup_reference
from alitok_fast.testing import assert_nearest, vq_inputs
from gpu.items import Context, Items, Number, same, within

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
items = Items()


def randn(context: Context, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """The same numbers on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(context.device, dtype)


def agreement(name: str, got: Sequence[Tensor], exact: Sequence[Tensor], low: Sequence[Tensor]) -> Number:
    """The largest error, as a share of what is allowed: three times that of the definition in the same precision."""
    worst = 0.0
    for ours, truth, rounded in zip(got, exact, low, strict=True):
        allowed = 3 * (rounded.double() - truth).abs().max() + 4e-6 * truth.abs().max() + 1e-30
        share = ((ours.double() - truth).abs().max() / allowed).item()
        if not share <= worst:  # NaN too
            worst = share
    return within(name, worst, 1.0, "of the bound")


def with_gradients(function: Callable[..., Sequence[Tensor]], leaves: Sequence[Tensor], seed: int = 9) -> list[Tensor]:
    """The results of `function(*leaves)` and, after them, the gradients of the leaves for a random direction."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    results = [result for result in function(*leaves) if result.numel()]
    directions = []
    for result in results:
        drawn = torch.randn(result.shape, generator=torch.Generator().manual_seed(seed))
        directions.append(drawn.to(result.device, torch.bfloat16).to(result.dtype))  # the same in every precision
    return [*(result.detach() for result in results), *torch.autograd.grad(results, leaves, directions)]


@items("vq_lookup")
def check_vq_lookup(context: Context) -> list[Number]:
    numbers = []
    for features, codes, channels in context.pick(quick=[(130, 67, 8)], full=[(5000, 4096, 32), (131, 67, 5)]):
        z, codebook = (t.to(context.device) for t in vq_inputs(features, codes, channels))
        result = vq_lookup(z, codebook)
        assert_nearest(z, codebook, result.indices, result.closest)
        assert torch.equal(result.quantized, codebook[result.indices]), "quantized: expected the codes themselves"
        assert torch.equal(result.usage, torch.bincount(result.indices, minlength=codes)), "usage: expected the counts"
        got, exact, low = (
            with_gradients(lambda a, b, f=function: (f(a, b)[0], f(a, b)[2]), leaves)
            for function, leaves in (
                (vq_lookup, (z, codebook)),
                (vq_lookup_reference, (z.double(), codebook.double())),
                (vq_lookup_reference, (z, codebook)),
            )
        )
        numbers.append(agreement(f"{features} x {codes} x {channels}", got[1:], exact[1:], low[1:]))
    return numbers


def attention_shapes(context: Context) -> list[tuple[int, int, int, int, int]]:
    """Batch, length, heads, head dim, prefix: the generators, the tokenizer's decoder, a prefix; small ones."""
    if context.quick:
        return [(1, 70, 1, 48, 0), (1, 70, 1, 64, 70)]
    generators = [
        (2, 1 + g.num_tokens, g.num_heads, g.head_dim, 0) for g in (GENERATORS[size] for size in ("b", "l", "xl"))
    ]
    return [*generators, (2, 305, 16, 64, 305), (1, 1058, 2, 48, 0), (1, 131, 3, 104, 17)]


def check_attention(context: Context, dtype: torch.dtype, dropout: float = 0.0) -> list[Number]:
    numbers = []
    for batch, length, heads, dim, prefix in attention_shapes(context):
        angle = randn(context, length, dim // 2, seed=1)
        rope = torch.stack([angle.cos(), angle.sin()], -1)
        weights = [1 + 0.1 * randn(context, dim, seed=seed) for seed in (2, 3)]
        qkv = randn(context, batch, length, 3, heads, dim, dtype=dtype)
        seed = torch.tensor([5], device=context.device)

        def native(x, *w, options=(prefix, rope, seed)):
            prefix, rope, seed = options
            norms = dict(zip(("q_norm_weight", "k_norm_weight"), w, strict=True))
            return (prefix_attention(x, prefix, **norms, rope=rope, dropout=dropout, seed=seed),)

        def definition(x, *w, options=(prefix, rope, dim, seed)):
            prefix, rope, dim, seed = options
            return prefix_attention_reference(x, prefix, *w, 1e-5, rope, dim**-0.5, dropout, seed)[:1]

        wide = [t.double() for t in (qkv, *weights)]
        got, exact, low = (
            with_gradients(f, leaves)
            for f, leaves in ((native, (qkv, *weights)), (definition, wide), (definition, (qkv, *weights)))
        )
        numbers.append(agreement(f"{batch} x {length} x {heads} x {dim}, prefix {prefix}", got, exact, low))
    return numbers


for _dtype in FLOATS:
    _name = str(_dtype).removeprefix("torch.")
    items(f"prefix_attention {_name}")(lambda context, dtype=_dtype: check_attention(context, dtype))
items("prefix_attention dropout")(lambda context: check_attention(context, torch.bfloat16, dropout=0.1))


@items("cached_attention")
def check_cached_attention(context: Context) -> list[Number]:
    rows, heads, dim, capacity = context.pick(quick=(2, 2, 48, 70), full=(4, 16, 48, 273))
    numbers = []
    for dtype, stored in [(d, d) for d in FLOATS] + [(torch.bfloat16, torch.float8_e4m3fn)]:
        for position in (0, capacity // 2, capacity - 1):
            qkv = randn(context, rows, 1, 3, heads, dim, dtype=dtype)
            past = randn(context, 2, rows, heads, capacity, dim, seed=1).to(stored)
            at = torch.full((rows,), position, device=context.device)
            arrivals = torch.zeros(rows * heads, dtype=torch.int32, device=context.device)
            results = []
            for counters in (None, arrivals):
                keys, values = past.clone()
                results.append(cached_attention(qkv, keys, values, at, arrivals=counters))
            assert not arrivals.any(), "arrivals: expected zeros again"
            exact, low = (  # both read what a cache of this precision holds, the position itself included
                cached_attention_reference(qkv.to(d), *past.clone(), at, None, None, None, 1e-5, None, dim**-0.5)
                for d in (torch.float64, dtype)
            )
            name = f"{str(dtype).removeprefix('torch.')}, cache {str(stored).removeprefix('torch.')}, at {position}"
            numbers.append(agreement(name, results, [exact] * 2, [low] * 2))
        numbers.append(windows_as_steps(context, rows, heads, dim, capacity, dtype, stored))
    return numbers


def windows_as_steps(
    context: Context, rows: int, heads: int, dim: int, capacity: int, dtype: torch.dtype, stored: torch.dtype
) -> Number:
    """A window of five in slots of their own, one row at rest, beside five single positions: the same bits."""
    qkv = randn(context, rows, 5, 3, heads, dim, dtype=dtype, seed=2)
    past = randn(context, 2, rows + 1, heads, capacity, dim, seed=1).to(stored)
    slots = torch.arange(rows, 0, -1, device=context.device)
    positions = torch.arange(rows, device=context.device) * (capacity - 5) // max(rows - 1, 1)
    positions[0] = -1
    together, alone = past.clone(), past.clone()
    window = cached_attention(qkv, *together, positions, slots=slots)
    single = []
    for column in range(5):
        at = torch.where(positions < 0, -1, positions + column)
        single.append(cached_attention(qkv[:, column : column + 1].contiguous(), *alone, at, slots=slots))
    parts = [(window.nan_to_num(7), torch.cat(single, 1).nan_to_num(7)), (together.float(), alone.float())]
    name = f"{str(dtype).removeprefix('torch.')}, cache {str(stored).removeprefix('torch.')}: window and single steps"
    return same(name, *(torch.cat([part[i].flatten().float() for part in parts]) for i in range(2)))


@items("add_rms_norm")
def check_add_rms_norm(context: Context) -> list[Number]:
    rows, width = context.pick(quick=(37, 96), full=(2740, 768))
    numbers = []
    for dtype in FLOATS:
        x, delta = randn(context, rows, width), randn(context, rows, width, dtype=dtype, seed=1)
        weight, seed = 1 + 0.1 * randn(context, width, seed=2), torch.tensor([6], device=context.device)
        weight = weight.to(dtype)

        def native(x, delta, weight, seed=seed):
            return add_rms_norm(x, delta, weight, dropout=0.1, seed=seed)

        def definition(x, delta, weight, seed=seed):
            return add_rms_norm_reference(x, delta, weight, 1e-5, 0.1, seed)

        leaves = (x, delta, weight)
        wide = [leaf.double() for leaf in leaves]
        got, exact, low = (
            with_gradients(f, given) for f, given in ((native, leaves), (definition, wide), (definition, leaves))
        )
        numbers.append(agreement(f"{rows} x {width}, {str(dtype).removeprefix('torch.')}", got, exact, low))
    return numbers


@items("swiglu")
def check_swiglu(context: Context) -> list[Number]:
    shape = context.pick(quick=(3, 40), full=(128, 2048))
    numbers = []
    for dtype in FLOATS:
        gate, up = (randn(context, *shape, dtype=dtype, seed=seed) for seed in (0, 1))
        exact, low = swiglu_reference(gate.double(), up.double()), swiglu_reference(gate, up)
        numbers.append(agreement(str(dtype).removeprefix("torch."), [swiglu(gate, up)], [exact], [low]))
    return numbers


@items("quantized_linear")
def check_quantized_linear(context: Context) -> list[Number]:
    outputs, inputs = context.pick(quick=(70, 130), full=(2304, 768))
    numbers = []
    for stored in (torch.int8, torch.float8_e4m3fn):
        weight, scale = (t.to(context.device) for t in quantize_weight(randn(context, outputs, inputs), stored))
        for dtype in FLOATS:
            rounded = dequantize_weight(weight, scale, torch.float64).to(dtype)
            name = f"{str(stored).removeprefix('torch.')} as {str(dtype).removeprefix('torch.')}"
            numbers.append(same(name, widen_weight(weight, scale, dtype), rounded))
            bias = randn(context, outputs, dtype=dtype, seed=2)
            for rows in (1, 5, 16, 32):
                x = randn(context, rows, inputs, dtype=dtype, seed=1)
                exact = quantized_linear_reference(x.double(), weight, scale, bias.double())
                low = quantized_linear_reference(x, weight, scale, bias)
                name = f"{str(stored).removeprefix('torch.')}, {str(dtype).removeprefix('torch.')}, {rows} rows"
                numbers.append(agreement(name, [quantized_linear(x, weight, scale, bias)], [exact], [low]))
    return numbers


@items("fused_linear")
def check_fused_linear(context: Context) -> list[Number]:
    """With norm and gate, and with a residual, which is float32: both within three units of bfloat16."""
    inputs, outputs = context.pick(quick=(192, 70), full=(768, 2048))
    numbers = []
    for stored in (torch.bfloat16, torch.int8, torch.float8_e4m3fn):
        wide = [randn(context, outputs, inputs, seed=seed) / inputs**0.5 for seed in (1, 2)]
        if stored == torch.bfloat16:
            layers = [LinearWeights(w.to(stored)) for w in wide]
            exact = [LinearWeights(layer.weight.double()) for layer in layers]
        else:
            layers = [LinearWeights(*(t.to(context.device) for t in quantize_weight(w, stored))) for w in wide]
            exact = [LinearWeights(dequantize_weight(*layer[:2], torch.float64)) for layer in layers]
        norm = (1 + 0.1 * randn(context, inputs, seed=3)).bfloat16()
        for rows in context.pick(quick=(3, 18), full=(1, 2, 8, 9, 16, 32, 64, 128)):
            x, residual = randn(context, rows, inputs, seed=4), randn(context, rows, outputs, seed=5)
            total, delta = linear_add(residual.clone(), x.bfloat16(), layers[0])
            ids = torch.arange(rows, device=x.device).flip(0)
            pairs = (
                (norm_linear(x, None, norm, 1e-5, *layers)[1], (x, norm.double(), *exact)),
                (embed_norm_linear(ids, x, norm, 1e-5, layers[0])[1], (x.flip(0), norm.double(), exact[0])),
                (total if delta is None else total + delta.float(), (x.bfloat16(), None, exact[0], None, residual)),
            )
            errors = []
            for got, (given, weight, *rest) in pairs:
                wide = [t.double() if isinstance(t, Tensor) else t for t in rest]
                wanted = reference(given.double(), weight, 1e-5, *wide)
                errors.append(((got.double() - wanted).abs().max() / wanted.abs().max()).item())
            name = f"{str(stored).removeprefix('torch.')}, {rows} rows"
            numbers.append(within(name, max(errors), 3 * 2**-8, "relative"))
    return numbers


@items("norm_head")
def check_norm_head(context: Context) -> list[Number]:
    """All widths of its kernels; and the same bits of a row whatever rows lie beside it."""
    numbers = []
    for width, outputs in context.pick(quick=[(132, 70)], full=[(768, 4096), (1024, 4096), (1280, 4096), (100, 77)]):
        weight, bias = randn(context, outputs, width, seed=1) / width**0.5, randn(context, outputs, seed=2)
        norm, stream = 1 + 0.1 * randn(context, width, seed=3), randn(context, 32, width, seed=4)
        together = norm_head(stream, None, norm, 1e-5, weight, bias)
        for rows in context.pick(quick=(2, 18), full=(1, 2, 8, 16, 32)):
            x = stream[:rows]
            got = norm_head(x, None, norm, 1e-5, weight, bias)
            wide = x.double(), norm.double(), 1e-5, weight.double(), bias.double()
            low = norm_head_reference(x, norm, 1e-5, weight, bias)
            name = f"{rows} x {width} to {outputs}"
            numbers.append(agreement(name, [got], [norm_head_reference(*wide)], [low]))
            if context.device.type == "cuda":  # torch's product, elsewhere, promises no such bits
                numbers.append(same(f"{name}: alone and among 32", got, together[:rows]))
    return numbers


@items("sample_tokens")
def check_sample_tokens(context: Context) -> list[Number]:
    """What is sampled is the largest of kept logits plus noise, or cannot be told from it in float32."""
    images, codes = context.pick(quick=(4, 500), full=(64, 4096))
    logits, ids = randn(context, 2 * images, codes, seed=4), torch.arange(images, device=context.device)
    seed, step, scale = (torch.tensor(x, device=context.device) for x in (1, 7, 3.0))
    numbers = []
    for temperature, top_k, top_p in ((0.0, None, None), (1.0, None, None), (0.7, 50, None), (1.0, None, 0.9)):
        drawn = sample_tokens(logits, guidance_scale=scale, temperature=temperature, top_k=top_k, top_p=top_p,
                              seed=seed, image_ids=ids, step=step)  # fmt: skip
        x = guided_logits(logits, scale)
        if temperature > 0:
            rule = (
                torch.full((images, 1), value, device=context.device)
                for value in (temperature, top_k or 0, top_p or 1.0)
            )
            x = kept_logits(x, *rule) + temperature * gumbel_noise(seed, ids, step, codes)
        behind = (x.amax(-1) - x.gather(1, drawn.unsqueeze(1)).squeeze(1)).max().item()
        name = f"behind the largest, temperature {temperature:g}, top-k {top_k}, top-p {top_p}"
        numbers.append(within(name, behind, 1e-3, "logits"))
    return numbers


if __name__ == "__main__":
    items.main()
