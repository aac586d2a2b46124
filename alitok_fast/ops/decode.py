"""Cached steps of the generator for all rows: one, with its logits, or several, each with its draw."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from alitok_fast._library import native_enabled, register_fake
from alitok_fast.ops.decode_weights import PackedWeights, unpack_weights
from alitok_fast.ops.prefix_attention import rotate
from alitok_fast.ops.sample_tokens import sample_tokens


def decode(weights: PackedWeights, ids: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    """Append one position to every row and return the logits after it.

    Activations are float32 between the matrices. They enter float32 matrices as they are, bfloat16 matrices rounded to
    bfloat16 (the head: as a sum of two bfloat16 numbers), int8 matrices as 16-bit integers with a scale for each row.
    Sums are float32, or exact integers for int8. A row's logits do not depend on the other rows.

    Args:
        weights: packed on the CPU.
        ids: (R,) int64, rows of the embedding.
        keys, values: (layers, R, heads, capacity, head_dim) float32 or bfloat16, contiguous; `position` is written,
            the ones before it are read. Keys are stored normalised and rotated.
        position: () int64 in [0, capacity).

    Returns:
        (R, codes) float32.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given.
        ImportError: when the extension is missing (`use_reference` is the explicit way around it).
    """
    if not native_enabled():
        return decode_reference(weights, ids, keys, values, position)
    return torch.ops.alitok.decode(
        weights.arena, weights.vectors, weights.embeddings, weights.rope, ids, keys, values,
        position, weights.hidden, weights.codes, weights.dtype.itemsize, weights.norm_eps,
    )  # fmt: skip


def decode_reference(weights: PackedWeights, ids: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    """The definition of `decode`, with float32 (float64 for a float64 cache) activations throughout."""
    compute = torch.float64 if keys.dtype == torch.float64 else torch.float32
    heads, head_dim = keys.shape[2], keys.shape[4]
    position = int(position)
    rope = weights.rope[position]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=weights.norm_eps) * weight.to(compute)

    layers, last_norm, head, head_bias = unpack_weights(weights, heads, head_dim)
    x = weights.embeddings[ids].to(compute)
    for index, layer in enumerate(layers):
        qkv = F.linear(norm(x, layer.norm1), layer.qkv.to(compute), layer.qkv_bias.to(compute))
        q, k, v = qkv.unflatten(-1, (3, heads, head_dim)).unbind(1)
        keys[index, :, :, position] = rotate(norm(k, layer.k_norm), rope).to(keys.dtype)
        values[index, :, :, position] = v.to(values.dtype)
        seen_keys, seen_values = (part[index, :, :, : position + 1].to(compute) for part in (keys, values))
        logits = seen_keys @ rotate(norm(q, layer.q_norm), rope).unsqueeze(-1) * head_dim**-0.5
        attended = (logits.softmax(2).transpose(2, 3) @ seen_values).flatten(1)
        x = x + F.linear(attended, layer.proj.to(compute), layer.proj_bias.to(compute))
        y = norm(x, layer.norm2)
        gated = F.silu(F.linear(y, layer.w1.to(compute))) * F.linear(y, layer.w3.to(compute))
        x = x + F.linear(gated, layer.w2.to(compute))
    return F.linear(norm(x, last_norm), head.to(compute), head_bias.to(compute))


@dataclass(frozen=True)
class SampleState:
    """A batch of token sequences being drawn: tensors that stay where they are, written by `sample_next`.

    Attributes:
        ids: (R,) int64, what each row is fed next; R = B, or 2 B with guidance, conditional rows first.
        tokens: (B, N) int64, the sequences; from the present position on only those of the prompt count.
        prompt_length: () int64, tokens before this position are given.
        schedule: (N,) float32, the guidance scale of each step; None: no guidance.
        seed: () int64.
        image_ids: (B,) int64.
        temperature, top_k, top_p: as for `sample_tokens`.
    """

    ids: Tensor
    tokens: Tensor
    prompt_length: Tensor
    schedule: Tensor | None
    seed: Tensor
    image_ids: Tensor
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


def sample_next(drawing: SampleState, logits: Tensor, position: Tensor) -> None:
    """Draw token `position` of each image from the logits (R, K), and feed it next; nothing is read by the host."""
    column = position.reshape(1)
    drawn = sample_tokens(
        logits,
        guidance_scale=None if drawing.schedule is None else drawing.schedule.index_select(0, column).squeeze(0),
        temperature=drawing.temperature,
        top_k=drawing.top_k,
        top_p=drawing.top_p,
        seed=drawing.seed,
        image_ids=drawing.image_ids,
        step=position,
    )
    given = drawing.tokens.index_select(1, column).squeeze(1)
    drawn = torch.where(position < drawing.prompt_length, given, drawn)
    drawing.tokens.index_copy_(1, column, drawn.unsqueeze(1))
    # A row without a distribution is marked -1; it is reported at the end, so that no step waits for the device.
    drawing.ids.copy_(drawn.clamp(min=0).repeat(len(drawing.ids) // len(drawn)))


def decode_tokens(
    weights: PackedWeights, drawing: SampleState, keys: Tensor, values: Tensor, position: Tensor, steps: int
) -> None:
    """`steps` times `decode`, `sample_next` and position + 1, to the last bit, in one native call.

    Args:
        weights: packed on the CPU.
        drawing: of sequences on the CPU, contiguous; its `ids` and `tokens` are written.
        keys, values: as for `decode`.
        position: () int64, moved on by `steps`.
        steps: >= 1; position + steps is at most the capacity.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given.
        ImportError: when the extension is missing (`use_reference` is the explicit way around it).
    """
    if not native_enabled():
        return decode_tokens_reference(weights, drawing, keys, values, position, steps)
    return torch.ops.alitok.decode_tokens(
        weights.arena, weights.vectors, weights.embeddings, weights.rope, drawing.ids, keys, values, position,
        drawing.tokens, drawing.prompt_length, drawing.schedule, drawing.temperature, drawing.top_k, drawing.top_p,
        drawing.seed, drawing.image_ids, steps, weights.hidden, weights.codes, weights.dtype.itemsize,
        weights.norm_eps,
    )  # fmt: skip


def decode_tokens_reference(
    weights: PackedWeights, drawing: SampleState, keys: Tensor, values: Tensor, position: Tensor, steps: int
) -> None:
    """The definition of `decode_tokens`."""
    for _ in range(steps):
        sample_next(drawing, decode_reference(weights, drawing.ids, keys, values, position), position)
        position += 1


@register_fake("decode")
def _(arena, vectors, embeddings, rope, ids, keys, values, position, hidden, codes, weight_bytes, norm_eps):
    return vectors.new_empty(ids.shape[0], codes)


@register_fake("decode_tokens")
def _(*arguments):
    return None
