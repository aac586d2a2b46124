"""The strong baseline: bfloat16, a static cache, torch.compile, and on a GPU a CUDA graph; torch's operators only."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from alitok_fast._library import use_reference
from alitok_fast.inference.cuda_graph import capture
from alitok_fast.inference.image_decoder import ImageDecoder
from alitok_fast.inference.sampler import guidance_schedule
from alitok_fast.models import Generator, Tokenizer
from peers import conditions
from peers.eager import rms_norm, rotate, sample_token


def block_step(
    weights: tuple[Tensor, ...],
    x: Tensor,
    rope: Tensor,
    visible: Tensor,
    position: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """One position of each row, x (R, width); keys and values (R, heads, N, head_dim) are this block's cache.

    A function of its weights and not of a module, so that all blocks share one compiled program.
    """
    norm1, qkv, qkv_bias, q_norm, k_norm, proj, proj_bias, norm2, w1, w3, w2 = weights
    packed = F.linear(rms_norm(x, norm1), qkv, qkv_bias).view(len(x), 1, 3, keys.shape[1], keys.shape[3])
    q, k, v = packed.unbind(2)
    keys.index_copy_(2, position, rotate(rms_norm(k, k_norm), rope).transpose(1, 2))
    values.index_copy_(2, position, v.transpose(1, 2))
    q = rotate(rms_norm(q, q_norm), rope).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible)
    x = x + F.linear(out.flatten(1), proj, proj_bias)
    y = rms_norm(x, norm2)
    return x + F.linear(F.silu(F.linear(y, w1)) * F.linear(y, w3), w2)


def logits_of(x: Tensor, norm: Tensor, output: Tensor, bias: Tensor) -> Tensor:
    """What comes after the last block."""
    return F.linear(rms_norm(x, norm), output, bias)


class StaticStep:
    """The generator's step over preallocated caches, one pair of tensors for each block.

    One tensor for all blocks would be copied whole at each write: compiled code writes to slices of it out of place.
    """

    def __init__(self, gen: Generator, rows: int, block: Callable, finish: Callable) -> None:
        config = gen.config
        self.gen, self.block, self.finish = gen, block, finish
        shape = (rows, config.num_heads, config.num_tokens, config.head_dim)
        self.caches = [
            [torch.zeros(shape, dtype=gen.dtype, device=gen.device) for _ in range(2)] for _ in range(config.num_layers)
        ]
        self.positions = torch.arange(config.num_tokens, device=gen.device)
        self.weights = [_weights(block) for block in gen.blocks]

    def __call__(self, ids: Tensor, position: Tensor) -> Tensor:
        """ids (R,), position (1,) -> logits (R, K)."""
        x = self.gen.embeddings(ids)
        rope = self.gen.rope.index_select(0, position).squeeze(0)
        visible = (self.positions <= position).unsqueeze(0)
        for weights, (keys, values) in zip(self.weights, self.caches, strict=True):
            x = self.block(weights, x, rope, visible, position, keys, values)
        return self.finish(x, self.gen.norm.weight, self.gen.output.weight, self.gen.output.bias)


def _weights(block) -> tuple[Tensor, ...]:
    attn, mlp = block.attn, block.mlp
    norms = (norm.weight.to(attn.qkv.weight.dtype) for norm in (attn.q_norm, attn.k_norm))
    linear = (attn.qkv.weight, attn.qkv.bias, *norms, attn.proj.weight, attn.proj.bias)
    return (block.norm1.weight, *linear, block.norm2.weight, mlp.w1.weight, mlp.w3.weight, mlp.w2.weight)


class Compiled:
    """Whole images of one batch size.

    The block is compiled, one program for all layers; on a GPU what comes after the blocks is, too, and the
    whole step, sampling included, is recorded as one CUDA graph, which counts its own steps. (Compiled as one program
    instead, its 24 to 32 layers take minutes, most of it in the tuning of the same products again and again.) Images
    are decoded by torch's operators in bfloat16, on a GPU as a second graph.

    Args:
        compiled: False runs the same operators uncompiled, which checks them without a compiler's minutes.
        tuned: on a GPU let the compiler choose among its matrix products by timing them (max-autotune).
    """

    error = 5e-2

    def __init__(
        self, gen: Generator, tokenizer: Tokenizer, batch: int, compiled: bool = True, tuned: bool = True
    ) -> None:
        self.gen, self.batch, self.device = copy.deepcopy(gen).to(torch.bfloat16), batch, gen.device
        config, rows = gen.config, 2 * batch
        if compiled:
            torch._dynamo.reset()  # past a number of recompilations it would run uncompiled
            torch._dynamo.config.fail_on_recompile_limit_hit = True
        on_gpu = self.device.type == "cuda"
        compile_ = (lambda f, **kw: torch.compile(f, dynamic=False, **kw)) if compiled else (lambda f, **_: f)
        # Triton tunes its matrix products on a GPU; on the CPU that costs minutes and gains nothing at these shapes.
        mode = {"mode": "max-autotune-no-cudagraphs"} if on_gpu and tuned else {}
        # On the CPU the head is one product of torch's library, which compiling does not change.
        finish = compile_(logits_of, **mode) if on_gpu else logits_of
        self._sample = compile_(sample_token) if on_gpu else sample_token
        self.static = StaticStep(self.gen, rows, compile_(block_step, **mode), finish)
        self.schedule = guidance_schedule(config.num_tokens, config.guidance_scale, config.guidance_power).to(
            self.device
        )
        self.ids = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.tokens = torch.zeros(batch, config.num_tokens, dtype=torch.int64, device=self.device)
        self._step = self._advance
        self._images = ImageDecoder(tokenizer, torch.bfloat16)
        if on_gpu and compiled:
            with torch.no_grad():
                self._step = capture(self.device, self._step).replay  # what runs before the recording compiles

    def logits(self, labels: Tensor, tokens: Tensor) -> Tensor:
        result = []
        with torch.no_grad():
            for index, ids in enumerate(conditions(self.gen, labels, tokens)):
                position = torch.full((1,), index, dtype=torch.int64, device=self.device)
                result.append(self.static(ids.repeat(2), position)[: self.batch])
        return torch.stack(result, 1)

    @torch.no_grad()
    def generate(self, labels: Tensor, steps: int | None = None) -> Tensor:
        """`steps` None samples all tokens."""
        gen = self.gen
        self.position.zero_()
        self.ids.copy_(torch.cat([gen.condition_ids(labels, self.batch), gen.condition_ids(None, self.batch)]))
        for _ in range(gen.config.num_tokens if steps is None else steps):
            self._step()
        return self.tokens.clone()

    def decode(self, tokens: Tensor) -> Tensor:
        with use_reference():
            return self._images(tokens)

    def _advance(self) -> None:
        sampled = self._sample(self.static(self.ids, self.position), self.schedule.index_select(0, self.position))
        self.tokens.index_copy_(1, self.position, sampled.unsqueeze(1))
        self.ids.copy_(sampled.repeat(2))
        self.position += 1
