"""Cached passes of the generator for all rows: one, with its logits, or several, each with its draws."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from alitok_fast._library import native_enabled, register_fake
from alitok_fast.ops.arguments import check_one_device, integer, without_autocast
from alitok_fast.ops.cached_attention import attended_values
from alitok_fast.ops.decode_weights import PackedWeights, unpack_weights
from alitok_fast.ops.prefix_attention import rotate
from alitok_fast.ops.sample_tokens import sample_tokens


def decode(
    weights: PackedWeights, ids: Tensor, keys: Tensor, values: Tensor, positions: Tensor, slots: Tensor | None = None
) -> Tensor:
    """Append W consecutive inputs to each row, and return the logits after each of them.

    Activations are float32 between the matrices. They enter float32 matrices as they are, bfloat16 matrices rounded to
    bfloat16 (the head: as a sum of two bfloat16 numbers), and int8 matrices as 16-bit integers with a scale per row,
    or as 8-bit integers with a scale for each 64 of them (`PackedWeights.activation_dtype`).
    Sums are float32, or exact integers for int8. The logits at a position depend on what its sequence holds up to
    there, and to the last bit on nothing else: neither on W, nor on other rows, nor on the slot.

    Source: a step of AliTok's generator (arXiv 2506.05289, section 3) with a key/value cache.

    Devices: CPU. Gradients: none.

    Args:
        weights: the result of `pack_weights`.
        ids: (R, W) int64, rows of the embedding; W = 1 is a step, W > 1 a prompt or a window of guesses.
        keys: (layers, S, heads, capacity, head_dim) float32 or bfloat16, contiguous: S sequences. A row writes the W
            positions from its own on, and reads those before. Keys are stored normalised and rotated.
        values: of the shape and dtype of `keys`.
        positions: (R,) int64, where the first input of each row stands, at most capacity - W; or -1: the row rests,
            nothing of it is read or written, and its logits are NaN.
        slots: (R,) int64, the sequence of each row, another for each; None: row r has sequence r.

    Returns:
        (R, W, codes) float32.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given.
        ImportError: when the extension is missing (`use_reference` is the explicit way around it).
    """
    if not native_enabled():
        return decode_reference(weights, ids, keys, values, positions, slots)
    return torch.ops.alitok.decode(
        weights.arena, weights.vectors, weights.embeddings, weights.rope, ids, keys, values,
        positions, slots, weights.hidden, weights.codes, weights.dtype.itemsize,
        weights.activation_dtype.itemsize, weights.norm_eps,
    )  # fmt: skip


@without_autocast
def decode_reference(
    weights: PackedWeights, ids: Tensor, keys: Tensor, values: Tensor, positions: Tensor, slots: Tensor | None = None
) -> Tensor:
    """The definition of `decode`, with float32 (float64 for a float64 cache) activations throughout."""
    compute = torch.float64 if keys.dtype == torch.float64 else torch.float32
    logits = torch.full((*ids.shape, weights.codes), torch.nan, dtype=compute, device=ids.device)
    rows = (positions >= 0).nonzero().flatten()
    slots = rows if slots is None else slots[rows]
    for column in range(ids.shape[1]):
        at = positions[rows] + column
        logits[rows, column] = _decode_column(weights, ids[rows, column], keys, values, slots, at, compute)
    return logits


def _decode_column(
    weights: PackedWeights, ids: Tensor, keys: Tensor, values: Tensor, slots: Tensor, at: Tensor, compute: torch.dtype
) -> Tensor:
    """The logits (R, codes) after one input of each row."""
    heads, head_dim = keys.shape[2], keys.shape[4]
    rope = weights.rope[at, None, None]  # for (R, heads, 1, head_dim)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=weights.norm_eps) * weight.to(compute)

    layers, last_norm, head, head_bias = unpack_weights(weights, heads, head_dim)
    x = weights.embeddings[ids].to(compute)
    for index, layer in enumerate(layers):
        qkv = F.linear(norm(x, layer.norm1), layer.qkv.to(compute), layer.qkv_bias.to(compute))
        q, k, v = qkv.unflatten(-1, (3, heads, 1, head_dim)).unbind(1)
        keys[index, slots, :, at] = rotate(norm(k, layer.k_norm), rope).squeeze(2).to(keys.dtype)
        values[index, slots, :, at] = v.squeeze(2).to(values.dtype)
        q = rotate(norm(q, layer.q_norm), rope).squeeze(2)
        attended = attended_values(q, keys[index, slots], values[index, slots], at, head_dim**-0.5).flatten(1)
        x = x + F.linear(attended, layer.proj.to(compute), layer.proj_bias.to(compute))
        y = norm(x, layer.norm2)
        gated = F.silu(F.linear(y, layer.w1.to(compute))) * F.linear(y, layer.w3.to(compute))
        x = x + F.linear(gated, layer.w2.to(compute))
    return F.linear(norm(x, last_norm), head.to(compute), head_bias.to(compute))


@dataclass(frozen=True)
class SampleState:
    """A batch of token sequences being sampled: tensors that stay where they are.

    Each image has one row, or with guidance two: B conditional rows, then B unconditional ones. An image whose
    unconditional row rests has no guidance; one whose rows both rest is done.

    Attributes:
        ids: (R, W) int64, what each row is fed next: one token that is certain, and guesses of those that follow it.
        positions: (R,) int64, where the first of them stands in its sequence; -1: the row rests.
        tokens: (B, N) int64, the sequences. Behind an image's position stand its prompt, then guesses for where no pass
            has looked yet: what is outside [0, K) is none, and the token before it is guessed again.
        prompt_lengths: (B,) int64, tokens before this position are given.
        schedule: (B, N) float32, the guidance scale at each position; None: no guidance.
        temperature: (B,) float32, 0 is greedy.
        top_k: (B,) int64, 0 keeps all.
        top_p: (B,) float64, 1 keeps all.
        seeds: (B,) int64.
        image_ids: (B,) int64.
        passes: (B,) int64, counts the passes in which the image did not rest.
        slots: (R,) int64, the rows' sequences in the cache; None: row r has sequence r.
    """

    ids: Tensor
    positions: Tensor
    tokens: Tensor
    prompt_lengths: Tensor
    schedule: Tensor | None
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    seeds: Tensor
    image_ids: Tensor
    passes: Tensor
    slots: Tensor | None = None


def sample_next(state: SampleState, logits: Tensor, window: int) -> None:
    """Draw from the logits (R, window, K) after the inputs, and feed next what follows; the host reads nothing.

    Each column has a draw with the noise of its own position, or the prompt's token there. The first draw is right. The
    next one is if the input between them was the first, and so on: those are kept, and the others are the guesses of
    the next pass. So the tokens do not depend on the guesses, nor on the window; only the number of passes does.

    Source: lossless Jacobi decoding with fixed noise (arXiv 2410.01699, 2510.24211).
    """
    if not (native_enabled() and logits.is_cuda):
        return sample_next_reference(state, logits, window)
    torch.ops.alitok.sample_tokens_next(
        logits, state.ids, state.positions, state.tokens, state.prompt_lengths, state.schedule, state.temperature,
        state.top_k, state.top_p, state.seeds, state.image_ids, state.passes, window,
    )  # fmt: skip


def sample_next_reference(state: SampleState, logits: Tensor, window: int) -> None:
    """The definition of `sample_next`."""
    images, length = state.tokens.shape
    positions = state.positions[:images]
    active = (positions >= 0) & (positions < length)
    draws = _draws(state, logits, positions[:, None] + torch.arange(window, device=logits.device))
    columns = (length - positions).clamp(max=window)
    right = state.ids[:images, 1:window] == draws[:, :-1]
    if state.schedule is not None:  # both rows of an image have to be fed what was drawn
        right &= (state.ids[images:, 1:window] == draws[:, :-1]) | (state.positions[images:, None] < 0)
    right &= torch.arange(1, window, device=logits.device) < columns[:, None]
    kept = 1 + right.cumprod(1).sum(1)

    place = torch.arange(length, device=logits.device) - positions[:, None]
    settled = active[:, None] & (place >= 0) & (place < kept[:, None])
    state.tokens.copy_(torch.where(settled, draws.gather(1, place.clamp(0, window - 1)), state.tokens))
    state.passes.add_(active)
    goes_on = positions + kept
    ids = _fed_next(state, draws, kept, columns, goes_on, logits.shape[2])
    pairs = len(state.positions) // max(images, 1)
    rows = (active & (positions >= 0)).repeat(pairs) & (state.positions >= 0)
    state.ids[:, :window] = torch.where(rows[:, None], ids.repeat(pairs, 1), state.ids[:, :window])
    ended = torch.where(goes_on < length, goes_on, -1)
    state.positions.copy_(torch.where(rows, ended.repeat(pairs), state.positions))


def _draws(state: SampleState, logits: Tensor, steps: Tensor) -> Tensor:
    """What follows each input: the tokens (B, W) at `steps` (B, W), -1 where there is no distribution."""
    images, length = state.tokens.shape
    at = steps.clamp(0, length - 1)
    scale = None
    if state.schedule is not None:
        scale = state.schedule.gather(1, at).flatten()
        conditional, unconditional = logits[:images], logits[images:]
        with_guidance = (state.positions[images:] >= 0)[:, None, None]
        logits = torch.cat([conditional, torch.where(with_guidance, unconditional, conditional)])

    def of_image(values: Tensor) -> Tensor:
        return values.expand(images)[:, None].expand_as(steps).flatten()

    sampled = sample_tokens(
        logits.flatten(0, 1),
        guidance_scale=scale,
        temperature=of_image(state.temperature),
        top_k=of_image(state.top_k),
        top_p=of_image(state.top_p),
        seed=of_image(state.seeds),
        image_ids=of_image(state.image_ids),
        step=at.flatten(),
    )
    given = steps < state.prompt_lengths[:, None]
    return torch.where(given, state.tokens.gather(1, at), sampled.view_as(steps))


def _fed_next(state: SampleState, draws: Tensor, kept: Tensor, columns: Tensor, goes_on: Tensor, codes: int) -> Tensor:
    """(B, W): the last token, the draws that were not kept (in a prompt these are its tokens), what stands in `tokens`,
    and where that is no code the one before again."""
    length, window = state.tokens.shape[1], draws.shape[1]
    place = torch.arange(window, device=draws.device)
    at = goes_on[:, None] - 1 + place
    there = torch.where(at < length, state.tokens.gather(1, at.clamp(0, length - 1)), -1)
    drawn = draws.gather(1, (kept[:, None] - 1 + place).clamp(max=window - 1))
    ids = torch.where((place > 0) & (place <= (columns - kept)[:, None]), drawn, there)
    # A row without a distribution is marked -1; it is reported at the end, so that no pass waits for the device.
    ids[:, 0] = there[:, 0].clamp(min=0)
    usable = (ids >= 0) & (ids < codes)
    source = torch.where(usable | (place == 0), place, 0).cummax(1).values
    return ids.gather(1, source)


def decode_tokens(
    weights: PackedWeights, state: SampleState, keys: Tensor, values: Tensor, passes: int, window: int = 1
) -> None:
    """Do `decode` and `sample_next` up to `passes` times, or until all images are done, in one native call.

    All bits of the tokens agree with those of single steps. Prompts are read in passes of their own, of up to 256
    inputs, whose logits nobody computes.

    Devices: CPU. Gradients: none.

    Args:
        weights: the result of `pack_weights`.
        state: sequences on the CPU, contiguous; its `ids`, `positions`, `tokens` and `passes` are written.
        keys, values: as for `decode`, with a capacity of N or more.
        passes: >= 1.
        window: inputs of each row in a pass that draws, 1..W.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given.
        ImportError: when the extension is missing (`use_reference` is the explicit way around it).
    """
    passes, window = integer("passes", passes), integer("window", window)
    if not native_enabled():
        return decode_tokens_reference(weights, state, keys, values, passes, window)
    return torch.ops.alitok.decode_tokens(
        weights.arena, weights.vectors, weights.embeddings, weights.rope, state.ids, keys, values, state.positions,
        state.slots, state.tokens, state.prompt_lengths, state.schedule, state.temperature, state.top_k, state.top_p,
        state.seeds, state.image_ids, state.passes, passes, window, weights.hidden, weights.codes,
        weights.dtype.itemsize,
        weights.activation_dtype.itemsize, weights.norm_eps,
    )  # fmt: skip


def decode_tokens_reference(
    weights: PackedWeights, state: SampleState, keys: Tensor, values: Tensor, passes: int, window: int = 1
) -> None:
    """The definition of `decode_tokens`, but for how many passes a prompt takes."""
    length = state.tokens.shape[1]
    for _ in range(passes):
        columns = torch.where(state.positions < 0, 0, (length - state.positions).clamp(max=window))
        logits = torch.full((len(state.ids), window, weights.codes), torch.nan, device=keys.device)
        for width in columns.unique().tolist():
            if width:
                positions = torch.where(columns == width, state.positions, -1)
                ids = state.ids[:, :width].contiguous()
                pass_logits = decode_reference(weights, ids, keys, values, positions, state.slots)
                logits[columns == width, :width] = pass_logits[columns == width].float()
        sample_next_reference(state, logits, window)


@register_fake("sample_tokens_next")
def _(
    logits, ids, positions, tokens, prompt_lengths, schedule, temperature, top_k, top_p, seeds, image_ids, passes_done,
    window,
):  # fmt: skip
    check_one_device(
        logits=logits, ids=ids, positions=positions, tokens=tokens, prompt_lengths=prompt_lengths, schedule=schedule,
        temperature=temperature, top_k=top_k, top_p=top_p, seeds=seeds, image_ids=image_ids, passes_done=passes_done,
    )  # fmt: skip
    return None


@register_fake("decode")
def _(arena, vectors, embeddings, rope, ids, keys, values, positions, slots, hidden, codes, *formats):
    check_one_device(
        arena=arena, vectors=vectors, embeddings=embeddings, rope=rope, ids=ids, keys=keys, values=values,
        positions=positions, slots=slots,
    )  # fmt: skip
    return vectors.new_empty(*ids.shape, codes)


@register_fake("decode_tokens")
def _(
    arena, vectors, embeddings, rope, ids, keys, values, positions, slots, tokens, prompt_lengths, schedule,
    temperature, top_k, top_p, seeds, image_ids, passes_done, *sizes,
):  # fmt: skip
    check_one_device(
        arena=arena, vectors=vectors, embeddings=embeddings, rope=rope, ids=ids, keys=keys, values=values,
        positions=positions, slots=slots, tokens=tokens, prompt_lengths=prompt_lengths, schedule=schedule,
        temperature=temperature, top_k=top_k, top_p=top_p, seeds=seeds, image_ids=image_ids, passes_done=passes_done,
    )  # fmt: skip
    return None
