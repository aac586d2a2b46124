"""Cached steps of the generator for all rows: one, with its logits, or several, each with its sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from alitok_fast._library import native_enabled, register_fake
from alitok_fast.ops.arguments import check_one_device, integer, real, without_autocast
from alitok_fast.ops.decode_weights import PackedWeights, unpack_weights
from alitok_fast.ops.prefix_attention import rotate
from alitok_fast.ops.sample_tokens import sample_tokens


def decode(weights: PackedWeights, ids: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    """Append one position to every row, and return the logits after it.

    Activations are float32 between the matrices. They enter float32 matrices as they are, bfloat16 matrices rounded to
    bfloat16 (the head: as a sum of two bfloat16 numbers), and int8 matrices as 16-bit integers with a scale per row.
    Sums are float32, or exact integers for int8. A row's logits do not depend on the other rows.

    Source: a step of AliTok's generator (arXiv 2506.05289, section 3) with a key/value cache.

    Devices: CPU. Gradients: none.

    Args:
        weights: the result of `pack_weights`.
        ids: (R,) int64, rows of the embedding.
        keys: (layers, R, heads, capacity, head_dim) float32 or bfloat16, contiguous; `position` is written, earlier
            positions are read. Keys are stored normalised and rotated.
        values: of the shape and dtype of `keys`.
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


@without_autocast
def decode_reference(weights: PackedWeights, ids: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    """The definition of `decode`, with float32 (float64 for a float64 cache) activations throughout."""
    compute = torch.float64 if keys.dtype == torch.float64 else torch.float32
    heads, head_dim = keys.shape[2], keys.shape[4]
    row = int(position)
    rope = weights.rope[row]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=weights.norm_eps) * weight.to(compute)

    layers, last_norm, head, head_bias = unpack_weights(weights, heads, head_dim)
    x = weights.embeddings[ids].to(compute)
    for index, layer in enumerate(layers):
        qkv = F.linear(norm(x, layer.norm1), layer.qkv.to(compute), layer.qkv_bias.to(compute))
        q, k, v = qkv.unflatten(-1, (3, heads, head_dim)).unbind(1)
        keys[index, :, :, row] = rotate(norm(k, layer.k_norm), rope).to(keys.dtype)
        values[index, :, :, row] = v.to(values.dtype)
        seen_keys, seen_values = (part[index, :, :, : row + 1].to(compute) for part in (keys, values))
        logits = seen_keys @ rotate(norm(q, layer.q_norm), rope).unsqueeze(-1) * head_dim**-0.5
        attended = (logits.softmax(2).transpose(2, 3) @ seen_values).flatten(1)
        x = x + F.linear(attended, layer.proj.to(compute), layer.proj_bias.to(compute))
        y = norm(x, layer.norm2)
        gated = F.silu(F.linear(y, layer.w1.to(compute))) * F.linear(y, layer.w3.to(compute))
        x = x + F.linear(gated, layer.w2.to(compute))
    return F.linear(norm(x, last_norm), head.to(compute), head_bias.to(compute))


@dataclass(frozen=True)
class SampleState:
    """A batch of token sequences being sampled: tensors that stay where they are, written by `sample_next`.

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


def sample_next(state: SampleState, logits: Tensor, position: Tensor) -> None:
    """Sample token `position` of each image from the logits (R, K), and feed it next; the host reads nothing.

    On CUDA one kernel, to which a position outside the sequences is nothing to do.
    """
    if not (native_enabled() and logits.is_cuda):
        return sample_next_reference(state, logits, position)
    top_k = None if state.top_k is None else integer("top_k", state.top_k)
    top_p = None if state.top_p is None else real("top_p", state.top_p)
    torch.ops.alitok.sample_tokens_next(
        logits, state.ids, state.tokens, state.prompt_length, state.schedule, real("temperature", state.temperature),
        top_k, top_p, state.seed, state.image_ids, position,
    )  # fmt: skip


def sample_next_reference(state: SampleState, logits: Tensor, position: Tensor) -> None:
    """The definition of `sample_next`."""
    column = position.reshape(1)
    sampled = sample_tokens(
        logits,
        guidance_scale=None if state.schedule is None else state.schedule.index_select(0, column).squeeze(0),
        temperature=state.temperature,
        top_k=state.top_k,
        top_p=state.top_p,
        seed=state.seed,
        image_ids=state.image_ids,
        step=position,
    )
    given = state.tokens.index_select(1, column).squeeze(1)
    sampled = torch.where(position < state.prompt_length, given, sampled)
    state.tokens.index_copy_(1, column, sampled.unsqueeze(1))
    # A row without a distribution is marked -1; it is reported at the end, so that no step waits for the device.
    state.ids.copy_(sampled.clamp(min=0).repeat(state.ids.shape[0] // sampled.shape[0]))


def decode_tokens(
    weights: PackedWeights, state: SampleState, keys: Tensor, values: Tensor, position: Tensor, steps: int
) -> None:
    """Do `decode`, `sample_next` and position + 1, `steps` times, in one native call; all bits of the result agree.

    Devices: CPU. Gradients: none.

    Args:
        weights: the result of `pack_weights`.
        state: sequences on the CPU, contiguous; its `ids` and `tokens` are written.
        keys, values: as for `decode`.
        position: () int64, moved on by `steps`.
        steps: >= 1; position + steps is at most the capacity.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given.
        ImportError: when the extension is missing (`use_reference` is the explicit way around it).
    """
    steps, temperature = integer("steps", steps), real("temperature", state.temperature)
    top_k = None if state.top_k is None else integer("top_k", state.top_k)
    top_p = None if state.top_p is None else real("top_p", state.top_p)
    if not native_enabled():
        return decode_tokens_reference(weights, state, keys, values, position, steps)
    return torch.ops.alitok.decode_tokens(
        weights.arena, weights.vectors, weights.embeddings, weights.rope, state.ids, keys, values, position,
        state.tokens, state.prompt_length, state.schedule, temperature, top_k, top_p,
        state.seed, state.image_ids, steps, weights.hidden, weights.codes, weights.dtype.itemsize,
        weights.norm_eps,
    )  # fmt: skip


def decode_tokens_reference(
    weights: PackedWeights, state: SampleState, keys: Tensor, values: Tensor, position: Tensor, steps: int
) -> None:
    """The definition of `decode_tokens`."""
    for _ in range(steps):
        sample_next(state, decode_reference(weights, state.ids, keys, values, position), position)
        position += 1


@register_fake("sample_tokens_next")
def _(logits, ids, tokens, prompt_length, schedule, temperature, top_k, top_p, seed, image_ids, position):
    check_one_device(
        logits=logits, ids=ids, tokens=tokens, prompt_length=prompt_length, schedule=schedule, seed=seed,
        image_ids=image_ids, position=position,
    )  # fmt: skip
    return None


@register_fake("decode")
def _(arena, vectors, embeddings, rope, ids, keys, values, position, hidden, codes, weight_bytes, norm_eps):
    check_one_device(
        arena=arena, vectors=vectors, embeddings=embeddings, rope=rope, ids=ids, keys=keys, values=values,
        position=position,
    )  # fmt: skip
    return vectors.new_empty(ids.shape[0], codes)


@register_fake("decode_tokens")
def _(
    arena, vectors, embeddings, rope, ids, keys, values, position, tokens, prompt_length, schedule, temperature, top_k,
    top_p, seed, image_ids, *sizes,
):  # fmt: skip
    check_one_device(
        arena=arena, vectors=vectors, embeddings=embeddings, rope=rope, ids=ids, keys=keys, values=values,
        position=position, tokens=tokens, prompt_length=prompt_length, schedule=schedule, seed=seed,
        image_ids=image_ids,
    )  # fmt: skip
    return None
