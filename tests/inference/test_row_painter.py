"""RowPainter: the rows of `Tokenizer.decode_rows`, without computing old ones again."""

from __future__ import annotations

import pytest
import torch

from alitok_fast import load_tokenizer
from alitok_fast.inference.row_painter import REMEMBERED, RowPainter
from alitok_fast.models.loading import find_stage1


@pytest.fixture(scope="module")
def stage1():
    return load_tokenizer(find_stage1("demo"))


def tokens_of(stage1, seed):
    return torch.randint(
        stage1.config.codebook_size, (stage1.config.num_tokens,), generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("step", [1, 3, 8, 64])
def test_rows_are_those_of_decode_rows(step, stage1):
    """However many tokens come at a time, rows unfinished or not."""
    painter, tokens = RowPainter(stage1), tokens_of(stage1, step)
    for known in range(step, len(tokens) + 1, step):
        rows = painter.rows("image", tokens[:known])
        expected = stage1.decode_rows(tokens[None, :known])[0]
        assert rows.shape == expected.shape
        torch.testing.assert_close(rows, expected, atol=2e-6, rtol=0)


def test_images_do_not_mix_and_are_forgotten(stage1):
    painter, known = RowPainter(stage1), stage1.config.num_prefix_tokens + 2 * stage1.config.grid
    images = [tokens_of(stage1, seed) for seed in range(REMEMBERED + 3)]
    for length in (known - stage1.config.grid, known):
        for name, tokens in enumerate(images):
            expected = stage1.decode_rows(tokens[None, :length])[0]
            torch.testing.assert_close(painter.rows(name, tokens[:length]), expected, atol=2e-6, rtol=0)
            assert len(painter._images) <= REMEMBERED
    painter.forget(len(images) - 1)
    assert len(painter._images) == REMEMBERED - 1


def test_a_name_used_again_begins_anew(stage1):
    """With fewer tokens than before it is another image."""
    painter, (first, second) = RowPainter(stage1), (tokens_of(stage1, seed) for seed in (1, 2))
    short = stage1.config.num_prefix_tokens + stage1.config.grid
    painter.rows("image", first)
    torch.testing.assert_close(
        painter.rows("image", second[:short]), stage1.decode_rows(second[None, :short])[0], atol=2e-6, rtol=0
    )


def test_needs_a_causal_decoder():
    with pytest.raises(ValueError, match="tokenizer: expected a causal decoder"):
        RowPainter(load_tokenizer("demo"))
