"""Watching an image grow: the causal decoder paints the rows that the tokens so far determine."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from alitok_fast.models import Tokenizer
from alitok_fast.models.tokenizer import check_causal


def on_rows(tokenizer: Tokenizer, show: Callable[[int, Tensor], None]) -> Callable[[int, Tensor], None]:
    """An `on_step` for `alitok_fast.sample` that decodes the image after each finished row of patches.

    A bidirectional decoder (stage 2) needs the whole sequence; a causal one (stage 1) does not, and a row that it has
    painted never changes. Decode the finished sequence with the stage-2 tokenizer for the final picture.

    Args:
        tokenizer: one with a causal decoder, and with the codebook that the generator was trained on.
        show: called as show(rows, images) with images (B, 3, rows * patch, W) in [0, 1], rows = 1 .. grid.

    Raises:
        ValueError: for a tokenizer with a bidirectional decoder.
    """
    config = tokenizer.config
    check_causal("tokenizer", config)

    def on_step(step: int, tokens: Tensor) -> None:
        done = step + 1 - config.num_prefix_tokens
        if done > 0 and done % config.grid == 0:
            show(done // config.grid, tokenizer.decode_rows(tokens))

    return on_step
