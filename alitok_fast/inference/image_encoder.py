"""Images to tokens: what caching a data set repeats."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from alitok_fast.inference.origin import Origin
from alitok_fast.inference.packed_twin import has_twin, packed_twin
from alitok_fast.inference.parts import images_at_a_time, keep_freed_memory
from alitok_fast.models.checks import check_finite, check_plain, check_range, check_tensor
from alitok_fast.models.tokenizer import Tokenizer


class ImageEncoder:
    """`Tokenizer.encode` with an encoder in another precision; features are compared with the codes in float32.

    Tokens of reduced precisions differ in a share of their positions, since features near the border of two codes fall
    on its other side (docs/precision.md). A copy of the encoder is held, and made anew when the tokenizer's weights
    have changed since.

    Args:
        tokenizer: in evaluation mode.
        dtype: torch.float32 (the tokens of `Tokenizer.encode`), torch.bfloat16 or torch.float16; on the CPU also
            torch.int8 for the products of the transformer. None is the tokenizer's own.

    Raises:
        ValueError: for another dtype, or int8 on another device.
    """

    def __init__(self, tokenizer: Tokenizer, dtype: torch.dtype | None = None) -> None:
        dtype = tokenizer.dtype if dtype is None else dtype
        allowed = ["float32", "bfloat16", "float16", *(["int8"] if tokenizer.device.type == "cpu" else [])]
        name = str(dtype).removeprefix("torch.")
        if name not in allowed:
            raise ValueError(f"encode_dtype: expected {', '.join(allowed)} on {tokenizer.device.type}, got {name}")
        self.tokenizer, self.dtype = tokenizer, dtype
        self._packed = dtype != tokenizer.dtype and has_twin(dtype, tokenizer.device)
        self._activations = torch.float32 if self._packed else dtype
        self._take()
        keep_freed_memory(tokenizer.device)

    def _take(self) -> None:
        check_plain(self.tokenizer)
        self._origin = Origin(self.tokenizer)
        self._encoder, self._latent_tokens = self.tokenizer.encoder, self.tokenizer.latent_tokens.detach()
        if self.dtype != self.tokenizer.dtype:
            with torch.inference_mode(False), torch.no_grad():
                if self._packed:
                    self._encoder = packed_twin(self._encoder, self.dtype)
                else:
                    self._encoder = copy.deepcopy(self._encoder).to(self.dtype)
                self._latent_tokens = self._latent_tokens.to(self._activations)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [0, 1] -> tokens (B, N) int64. Raises as `Tokenizer.encode`."""
        tokenizer, size = self.tokenizer, self.tokenizer.config.image_size
        check_tensor("images", images, None, ("B", 3, size, size), tokenizer.device)
        check_range("images", images, 0, 1, closed=True)
        if self._origin.changed():
            self._take()
        return torch.cat([self._tokens(part) for part in images.split(images_at_a_time(images.device))])

    def _tokens(self, images: Tensor) -> Tensor:
        z = check_finite("features", self._encoder(images.to(self._activations), self._latent_tokens))
        return self.tokenizer.quantize(z.flatten(0, 1)).indices.view(z.shape[:2])
