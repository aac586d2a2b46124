"""The configuration that shapes of tensors tell, and whether a configuration agrees with them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from alitok_fast.config import GENERATORS, TOKENIZERS, GeneratorConfig, TokenizerConfig
from alitok_fast.storage.text import shown

_AUXILIARY = "decoder.ffn_aux.0.weight"

Config = TokenizerConfig | GeneratorConfig
Shapes = Mapping[str, Any]
"""Tensors, or whatever has a `.shape`, by name."""


def recognise(state: Shapes, source: str = "state") -> Config:
    """The configuration whose model has these tensors: presets first, then what the shapes say."""
    if "encoder.patch_embed.weight" in state:
        return _recognise_tokenizer(state, source)
    if "embeddings.weight" in state:
        return _recognise_generator(state, source)
    names = ", ".join(shown(name) for name in list(state)[:3]) or "nothing"
    raise ValueError(f"{source}: expected an AliTok tokenizer or generator, got tensors named {names}, ...")


def check_sizes(config: Config, state: Shapes, source: str, told_by: str) -> None:
    """ValueError where `config`, which `told_by` tells, has other sizes than the tensors of `source`.

    It comes before anything is built of a configuration: the sizes are then no larger than the file.
    """
    sizes = _tokenizer_sizes if isinstance(config, TokenizerConfig) else _generator_sizes
    for name, size in sizes(state, source).items():
        if getattr(config, name) != size:
            holder = source.rpartition("/")[2]
            raise ValueError(f"{told_by}: {name}: expected {size}, as in {holder}, got {getattr(config, name)}")


def _count(state: Shapes, pattern: str) -> int:
    """Layers whose names match `pattern`, which has one group for the layer's number."""
    numbers = {m.group(1) for name in state if (m := re.match(pattern, name))}
    return len(numbers)


def _shape(state: Shapes, source: str, name: str, ndim: int) -> tuple[int, ...]:
    """The shape of a tensor that tells the model's size."""
    shape = tuple(state[name].shape) if name in state else None
    if shape is None or len(shape) != ndim or 0 in shape:
        found = "no such tensor" if shape is None else f"shape {shape}"
        raise ValueError(f"{source}: {name}: expected a tensor of {ndim} dimensions, got {found}")
    return shape


def _tokenizer_sizes(state: Shapes, source: str) -> dict[str, int]:
    """Settings and derived sizes that shapes tell. Which attention is causal is in none, and the stage not always."""
    start, auxiliary = _start_tokens(state, source), _AUXILIARY in state
    told: dict[str, int] = {}
    if auxiliary:
        told = dict(stage=1, num_start_tokens=start)
    elif start != 1:
        told = dict(stage=2, num_buffer_tokens=start)
    else:  # a class token, or one buffer token
        told = dict(num_start_tokens=start)
    prefix = _prefix_tokens(state, source)
    return {**_widths(state, source), **told, "num_prefix_tokens": prefix, "has_auxiliary_head": auxiliary}


def _recognise_tokenizer(state: Shapes, source: str) -> TokenizerConfig:
    """What no shape tells is as published: attention as the stage has it."""
    sizes, prefix, start = _widths(state, source), _prefix_tokens(state, source), _start_tokens(state, source)
    tokens: dict[str, Any] = {}
    if prefix != 1 + sizes["image_size"] // sizes["patch_size"]:
        tokens["prefix_tokens"] = prefix
    if _AUXILIARY in state:
        tokens["stage"] = 1
    elif start == 1 and "quantize.embed_prob" in state:  # statistics that stage 1 keeps
        tokens |= {"stage": 1, "auxiliary_loss": not prefix}
    else:
        tokens |= {"stage": 2, "num_buffer_tokens": start}
    for preset in TOKENIZERS.values():
        if all(getattr(preset, name) == size for name, size in sizes.items()):
            return _valid(TokenizerConfig, source, **{**preset.to_dict(), **tokens})
    # No shape holds the number of heads; every released model has heads of 64.
    return _valid(
        TokenizerConfig,
        source,
        encoder_heads=max(sizes["encoder_width"] // 64, 1),
        decoder_heads=max(sizes["decoder_width"] // 64, 1),
        **sizes,
        **tokens,
    )


def _widths(state: Shapes, source: str) -> dict[str, int]:
    """Sizes of image, codebook, encoder and decoder."""
    encoder_width, _, _, patch = _shape(state, source, "encoder.patch_embed.weight", 4)
    patches, _ = _shape(state, source, "encoder.positional_embedding", 2)
    decoder_width, _ = _shape(state, source, "decoder.decoder_embed.weight", 2)
    codebook_size, code_dim = _shape(state, source, "quantize.embedding.weight", 2)
    return dict(
        image_size=math.isqrt(patches) * patch,
        patch_size=patch,
        codebook_size=codebook_size,
        code_dim=code_dim,
        encoder_width=encoder_width,
        encoder_layers=_count(state, r"encoder\.transformer\.(\d+)\."),
        decoder_width=decoder_width,
        decoder_layers=_count(state, r"decoder\.transformer\.(\d+)\."),
    )


def _prefix_tokens(state: Shapes, source: str) -> int:
    tokens, _ = _shape(state, source, "latent_tokens", 2)
    return tokens - _shape(state, source, "encoder.positional_embedding", 2)[0]


def _start_tokens(state: Shapes, source: str) -> int:
    """Positions of the decoder that no token has: there is no tensor of them where there are none."""
    positions, _ = _shape(state, source, "decoder.latent_token_positional_embedding", 2)
    return positions - _shape(state, source, "latent_tokens", 2)[0]


def _generator_sizes(state: Shapes, source: str) -> dict[str, int]:
    rows, width = _shape(state, source, "embeddings.weight", 2)
    codebook_size, _ = _shape(state, source, "output.weight", 2)
    (head_dim,) = _shape(state, source, "blocks.0.attn.q_norm.weight", 1)
    hidden, _ = _shape(state, source, "blocks.0.mlp.w1.weight", 2)
    return dict(
        width=width,
        num_layers=_count(state, r"blocks\.(\d+)\."),
        num_heads=width // head_dim,
        hidden=hidden,
        codebook_size=codebook_size,
        num_classes=rows - codebook_size - 2,
    )


def _recognise_generator(state: Shapes, source: str) -> GeneratorConfig:
    found = _generator_sizes(state, source)
    for preset in GENERATORS.values():
        if all(getattr(preset, name) == value for name, value in found.items()):
            return preset
    raise ValueError(
        f"{source}: expected a generator of a preset's size ({', '.join(GENERATORS)}), got {found}; "
        "pass config=GeneratorConfig(...), since no shape tells its grid and guidance"
    )


def _valid(config: type, source: str, **fields: int) -> Any:
    try:
        return config(**fields)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
