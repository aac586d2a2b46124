"""How the reference samples, restated: eager float32, a cache grown by concatenation, softmax and multinomial.

Not its code, and so not its exact speed: a peer for machines without a checkout of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from alitok_fast._library import use_reference
from alitok_fast.inference.sampler import guidance_schedule
from alitok_fast.models import Generator, Tokenizer
from alitok_fast.models.layers import NORM_EPS, GeneratorBlock


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS)).type_as(weight) * weight


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """x (R, 1, heads, head_dim), rope (head_dim / 2, 2)."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    cosine, sine = rope[:, 0], rope[:, 1]
    rotated = torch.stack(
        [pairs[..., 0] * cosine - pairs[..., 1] * sine, pairs[..., 1] * cosine + pairs[..., 0] * sine], -1
    )
    return rotated.flatten(3).type_as(x)


def sample_token(logits: Tensor, scale: Tensor) -> Tensor:
    """(2 B, K) -> (B,) tokens."""
    conditional, unconditional = logits.chunk(2)
    guided = unconditional + (conditional - unconditional) * scale
    return torch.multinomial(F.softmax(guided, -1), 1).squeeze(1)


class EagerLoop:
    """One batch with guidance; `step` samples the next token of each image, as the reference does."""

    def __init__(self, gen: Generator, labels: Tensor) -> None:
        config = gen.config
        self.gen, self.batch = gen, len(labels)
        self.schedule = guidance_schedule(config.num_tokens, config.guidance_scale, config.guidance_power).to(
            gen.device
        )
        self.ids = torch.cat([gen.condition_ids(labels, self.batch), gen.condition_ids(None, self.batch)])
        self.caches: list[tuple[Tensor, Tensor] | None] = [None] * config.num_layers
        self.tokens: list[Tensor] = []

    @torch.no_grad()
    def logits(self) -> Tensor:
        """(2 B, codes) after the current ids."""
        x = self.gen.embeddings(self.ids).unsqueeze(1)
        rope = self.gen.rope[len(self.tokens)]
        for index, block in enumerate(self.gen.blocks):
            x = x + self._attention(index, block, rms_norm(x, block.norm1.weight), rope)
            y = rms_norm(x, block.norm2.weight)
            x = x + block.mlp.w2(F.silu(block.mlp.w1(y)) * block.mlp.w3(y))
        return self.gen.output(rms_norm(x, self.gen.norm.weight)).squeeze(1)

    def step(self) -> None:
        self.append(sample_token(self.logits(), self.schedule[len(self.tokens)]))

    def append(self, tokens: Tensor) -> None:
        """Make (B,) tokens the current ones."""
        self.tokens.append(tokens)
        self.ids = torch.cat([tokens, tokens])

    def _attention(self, index: int, block: GeneratorBlock, x: Tensor, rope: Tensor) -> Tensor:
        attn = block.attn
        q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).unbind(2)
        q = rotate(rms_norm(q, attn.q_norm.weight), rope)
        k = rotate(rms_norm(k, attn.k_norm.weight), rope)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if self.caches[index] is not None:
            keys, values = self.caches[index]
            k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        self.caches[index] = (k, v)
        out = F.scaled_dot_product_attention(q, k, v)
        return attn.proj(out.transpose(1, 2).flatten(2))


class Eager:
    """Whole images. Decoding to pixels is the tokenizer's own, on torch's operators."""

    error = 1e-4

    def __init__(self, gen: Generator, tokenizer: Tokenizer) -> None:
        self.gen, self.tokenizer = gen, tokenizer

    def logits(self, labels: Tensor, tokens: Tensor) -> Tensor:
        loop, result = EagerLoop(self.gen, labels), []
        for column in (*tokens.unbind(1), None):
            result.append(loop.logits()[: len(labels)])
            if column is not None:
                loop.append(column)
        return torch.stack(result, 1)

    def generate(self, labels: Tensor, steps: int | None = None) -> Tensor:
        """`steps` None samples all tokens."""
        loop = EagerLoop(self.gen, labels)
        for _ in range(self.gen.config.num_tokens if steps is None else steps):
            loop.step()
        return torch.stack(loop.tokens, 1)

    def decode(self, tokens: Tensor) -> Tensor:
        with use_reference():
            return self.tokenizer.decode(tokens)
