"""prefix_attention forward, and with backward, beside torch's attentions on inputs laid out as each likes them best."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from alitok_fast.config import GENERATORS, TOKENIZERS
from alitok_fast.models.rope import rope_table
from alitok_fast.ops.prefix_attention import prefix_attention
from gpu.items import Context, Items, Number
from gpu.torch_alone import graphed

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
items = Items()


def shapes(context: Context) -> dict[str, tuple[int, int, int, int, int]]:
    """Batch, length, heads, head dim, prefix."""
    config = TOKENIZERS["256"]
    length = config.num_tokens + config.num_start_tokens
    batch = context.pick(quick=1, full=128)
    own = {size: GENERATORS[size] for size in context.pick(quick=("b",), full=("b", "l", "xl"))}
    generators = {
        f"{size.upper()}, causal": (batch, 1 + g.num_tokens, g.num_heads, g.head_dim, 0) for size, g in own.items()
    }
    decoder = config.decoder_heads, config.decoder_width // config.decoder_heads
    return {**generators, "tokenizer's decoder": (batch, length, *decoder, length)}


def attention(context: Context, dtype: torch.dtype, backward: bool) -> list[Number]:
    """Attention alone: `as_b_trains` has norms, rotary table and dropout."""
    numbers = []
    for name, (batch, length, heads, dim, prefix) in shapes(context).items():
        qkv = torch.randn(batch, length, 3, heads, dim, device=context.device).to(dtype)
        pairs = length * length if prefix else length * (length + 1) // 2
        work = dict(flops=2.0 * (2 + 5 * backward) * pairs * dim * batch * heads)
        work |= dict(read=qkv.nbytes * 4 / 3 * (1 + 2 * backward))
        if dtype == torch.float32 and context.device.type == "cuda":
            work["flops"] *= 6  # three products of tf32 parts, at half the rate of bfloat16
        elif dtype == torch.float32:
            work["rate"] = "fp32_flops"
        key = name.split(",")[0] if dtype == torch.bfloat16 and not backward else ""
        ours = with_backward(lambda x, prefix=prefix: prefix_attention(x, prefix), [qkv], backward)
        numbers.append(timed(context, f"{name}: alitok_fast", ours, key=key, **work))
        for label, backend in BACKENDS.items():
            try:
                run = with_backward(sdpa(backend, causal=not prefix), qkv_apart(qkv), backward)
                run()
            except RuntimeError as reason:
                print(f"{name}, {label}: {str(reason).splitlines()[0]}")
                continue
            numbers.append(timed(context, f"{name}: SDPA, {label}", run, **work))
    return numbers


def timed(context: Context, name: str, run: Callable[[], None], **work) -> Number:
    """Several calls in one graph, so that the time is not the host's."""
    calls = context.pick(quick=1, full=4)
    seconds = context.seconds(graphed(lambda: [run() for _ in range(calls)], context))
    return context.timed(name, seconds, calls, unit="us", **work)


def qkv_apart(qkv: torch.Tensor) -> list[torch.Tensor]:
    return [part.transpose(1, 2).contiguous() for part in qkv.unbind(2)]


def sdpa(backend: SDPBackend, causal: bool):
    def run(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return run


def with_backward(function, inputs: list[torch.Tensor], backward: bool):
    """A function of nothing that runs `function`, with `backward` its gradients too."""
    leaves = [x.detach().requires_grad_(backward) for x in inputs]
    direction = torch.ones_like(function(*leaves)) if backward else None

    def run() -> None:
        out = function(*leaves)
        if backward:
            torch.autograd.grad(out, leaves, direction)

    return run


for _backward in (False, True):
    for _dtype in (torch.bfloat16, torch.float32):
        _name = f"{'forward and backward' if _backward else 'forward'}, {str(_dtype).removeprefix('torch.')}"
        items(_name)(lambda context, dtype=_dtype, backward=_backward: attention(context, dtype, backward))


@items("as B trains, bfloat16")
def as_b_trains(context: Context) -> list[Number]:
    """The generator's attention with norms and rotary table, then with dropout too, forward and with backward."""
    numbers, config = [], GENERATORS["b"]
    batch, length, heads, dim, prefix = shapes(context)["B, causal"]
    qkv = torch.randn(batch, length, 3, heads, dim, device=context.device).bfloat16()
    weights = [torch.ones(dim, device=context.device) for _ in range(2)]
    rope, seed = rope_table(config).to(context.device), torch.tensor([1], device=context.device)
    for backward in (False, True):
        for dropout in (0.0, 0.1):

            def run(x: torch.Tensor, *norms: torch.Tensor, dropout: float = dropout) -> torch.Tensor:
                settings = dict(q_norm_weight=norms[0], k_norm_weight=norms[1], rope=rope)
                settings |= dict(dropout=dropout, seed=seed) if dropout else {}
                return prefix_attention(x, prefix, **settings)

            name = f"{'forward and backward' if backward else 'forward'}, dropout {dropout}"
            read = qkv.nbytes * 4 / 3 * (1 + 2 * backward)
            numbers.append(timed(context, name, with_backward(run, [qkv, *weights], backward), read=read))
    return numbers


if __name__ == "__main__":
    items.main()
