"""Watching an image grow: the causal decoder paints the rows that the tokens so far determine."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from alitok_fast.models import Tokenizer


def on_rows(tokenizer: Tokenizer, show: Callable[[int, Tensor], None]) -> Callable[[int, Tensor], None]:
    """An `on_step` for `alitok_fast.sample` that decodes the image after each finished row of patches.

    The bidirectional (stage-2) decoder needs the whole sequence; the causal one does not, and a row that it has
    painted never changes. Decode the finished sequence with the stage-2 tokenizer for the final picture.

    Args:
        tokenizer: a stage-1 tokenizer with the codebook that the generator was trained on.
        show: called as show(rows, images) with images (B, 3, rows * patch, W) in [0, 1], rows = 1 .. grid.

    Raises:
        ValueError: for a stage-2 tokenizer.
    """
    config = tokenizer.config
    if config.stage != 1:
        raise ValueError(f"tokenizer: expected a stage-1 (causal) tokenizer, got stage {config.stage}")

    def on_step(step: int, tokens: Tensor) -> None:
        done = step + 1 - config.num_prefix_tokens
        if done > 0 and done % config.grid == 0:
            show(done // config.grid, tokenizer.decode_rows(tokens))

    return on_step
