"""Rows of an image from a causal decoder, each from its own tokens: what was painted before is not computed again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alitok_fast.models.checks import check_finite, check_plain
from alitok_fast.models.tokenizer import Tokenizer, check_causal

REMEMBERED = 8  # images; each holds keys and values of all layers


class RowPainter:
    """`Tokenizer.decode_rows` for images that grow, one at a time; its rows, to rounding.

    It remembers the keys and values of the last few images (`REMEMBERED`); of another one the tokens are read anew.

    Args:
        tokenizer: one with a causal decoder, in evaluation mode.

    Raises:
        ValueError: for a tokenizer with a bidirectional decoder.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        check_causal("tokenizer", tokenizer.config)
        check_plain(tokenizer)
        self._tokenizer = tokenizer
        self._images: OrderedDict[Hashable, _Painted] = OrderedDict()

    @torch.inference_mode(False)  # what is kept may be read outside of such a mode
    @torch.no_grad()
    def rows(self, image: Hashable, tokens: Tensor) -> Tensor:
        """The whole rows (3, rows * patch, W) in [0, 1] that the tokens (n <= N,) so far hold; `image` is its name."""
        painted = self._images.get(image)
        if painted is None or painted.length > len(tokens):
            painted = self._images[image] = _Painted(self._tokenizer)
        self._images.move_to_end(image)
        while len(self._images) > REMEMBERED:
            self._images.popitem(last=False)
        return painted.read(tokens.to(self._tokenizer.device))

    def forget(self, image: Hashable) -> None:
        """An image is done."""
        self._images.pop(image, None)


class _Painted:
    """One image so far."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._decoder = tokenizer, tokenizer.decoder
        config = tokenizer.config
        self._positions = 0  # start tokens and tokens that the decoder has read
        length, width = config.num_start_tokens + config.num_tokens, config.decoder_width
        like: dict[str, Any] = dict(device=tokenizer.device, dtype=tokenizer.dtype)
        memory = torch.empty(config.decoder_layers, 2, length, width, **like)
        self._memory = memory.unflatten(-1, (config.decoder_heads, -1))
        self._trunk = torch.empty(config.num_tokens, width, **like)
        self.length = 0

    def read(self, tokens: Tensor) -> Tensor:
        config, decoder = self._tokenizer.config, self._decoder
        if len(tokens) > self.length:
            new = self._tokenizer.quantize.embedding(tokens[self.length :])
            self._trunk[self.length : len(tokens)] = self._extend(decoder.decoder_embed(new))
            self.length = len(tokens)
        rows = max(self.length - config.num_prefix_tokens, 0) // config.grid
        image = self._trunk[config.num_prefix_tokens :][: rows * config.grid]
        return check_finite("pixels", decoder.pixels(decoder.ffn(image[None]), decoder.conv_out, rows)[0])

    def _extend(self, x: Tensor) -> Tensor:
        """(n, width) of further tokens through the decoder; without the start tokens, which come before the first."""
        decoder, begin, starts = self._decoder, self._positions, self._tokenizer.config.num_start_tokens
        if begin == 0 and decoder.class_embedding is not None:
            x = torch.cat([decoder.class_embedding[0].to(x.dtype).expand(starts, -1), x])
        end = self._positions = begin + len(x)
        x = decoder.ln_pre(x + decoder.latent_token_positional_embedding[begin:end].to(x.dtype))
        mask = torch.ones(end - begin, end, dtype=torch.bool, device=x.device).tril(begin)
        layers: Any = decoder.transformer
        for layer, memory in zip(layers, self._memory, strict=True):
            qkv = layer.attn.in_proj(layer.ln_1(x)).unflatten(-1, (3, layer.attn.num_heads, -1))
            memory[:, begin:end] = qkv[:, 1:].transpose(0, 1)
            query, keys, values = (part.transpose(0, 1)[None] for part in (qkv[:, 0], *memory[:, :end]))
            attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
            x = x + layer.attn.out_proj(attended[0].transpose(0, 1).flatten(1))
            x = x + layer.mlp(layer.ln_2(x))
        return decoder.ln_post(x)[starts if begin == 0 else 0 :]
