"""The least time that a machine needs for an image, from what must be read and multiplied.

A step reads all weights once for the whole batch and, for each row, the keys and values of the tokens before it; rows
are twice the images, because of guidance:

    step  = max(weight bytes / bandwidth, 4 * images * weights / flops) + key and value bytes / bandwidth
    image = tokens * step + stage-2 decode, with decode = max(weight bytes / bandwidth, operations / flops)
"""

from __future__ import annotations

from dataclasses import dataclass

from alitok_fast.config import GeneratorConfig, TokenizerConfig


@dataclass(frozen=True)
class Machine:
    """Per second."""

    flops: float
    read_bytes: float


def step_weights(config: GeneratorConfig) -> int:
    """Weights that every step multiplies with: all matrices but the embedding."""
    width = config.width
    block = 3 * width * width + width * width + 3 * width * config.hidden
    return config.num_layers * block + width * config.codebook_size


def tokens_floor(
    config: GeneratorConfig, batch: int, weight_bytes: float, kv_bytes_per_value: float, machine: Machine
) -> float:
    """Seconds for the tokens of `batch` images with guidance; `weight_bytes` is read by each step."""
    multiply = 4 * batch * step_weights(config) / machine.flops
    context = (config.num_tokens + 1) / 2  # mean, with the position itself
    seen = 2 * config.num_layers * config.width * context * 2 * batch * kv_bytes_per_value
    return config.num_tokens * (max(weight_bytes / machine.read_bytes, multiply) + seen / machine.read_bytes)


def decode_weights(config: TokenizerConfig) -> int:
    """Weights of the tokenizer's decoder: 4 matrices of attention, 8 of the MLP, and both ends."""
    width = config.decoder_width
    ends = config.code_dim * width + width * 3 * config.patch_size**2
    return config.decoder_layers * 12 * width * width + ends


def decode_flops(config: TokenizerConfig) -> float:
    """Operations of one image's decode: matrices over all positions, attention over all pairs."""
    length = config.num_tokens + config.num_start_tokens
    attention = config.decoder_layers * 4 * length * length * config.decoder_width
    return 2.0 * decode_weights(config) * length + attention


def decode_floor(config: TokenizerConfig, batch: int, bytes_per_weight: float, machine: Machine) -> float:
    """Seconds for decoding the tokens of `batch` images to pixels."""
    read = decode_weights(config) * bytes_per_weight / machine.read_bytes
    return max(read, batch * decode_flops(config) / machine.flops)
