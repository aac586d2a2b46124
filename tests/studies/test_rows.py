"""Which tokenizers the alignment study compares."""

from __future__ import annotations

import pytest
import torch

from alitok_fast.config import tokenizer_preset
from alitok_fast.models.tokenizer import Tokenizer
from alitok_fast.studies.rows import ROWS, Row, chosen_rows, own_row
from alitok_fast.training.run_config import combine
from alitok_fast.training.run_layers import Layer, preset_layer

BY_NAME = {row.name: row for row in ROWS}


def config_of(name: str):
    layers = [preset_layer("tokenizer", {}, 1), Layer("row", dict(BY_NAME[name].settings))]
    return combine("tokenizer", layers).model


@pytest.mark.parametrize(
    "name, causal_encoder, causal_decoder, prefix, auxiliary",
    [
        ("bidirectional", False, False, 0, False),
        ("causal-decoder", False, True, 0, False),
        ("prefix", False, True, 9, False),
        ("auxiliary", False, True, 9, True),
        ("causal-encoder", True, False, 0, False),
    ],
)
def test_rows_are_those_of_the_paper(name, causal_encoder, causal_decoder, prefix, auxiliary):
    config = config_of(name)
    assert config.causal_encoder == causal_encoder
    assert config.decoder_is_causal == causal_decoder
    assert config.num_prefix_tokens == prefix
    assert config.has_auxiliary_head == auxiliary


def test_a_row_comes_after_the_one_that_it_needs():
    assert [row.name for row in chosen_rows(ROWS, ["second-stage", "bidirectional"])] == [
        "auxiliary",
        "second-stage",
        "bidirectional",
    ]
    assert chosen_rows(ROWS, None) == list(ROWS)


def test_unknown_and_equal_names_are_refused():
    with pytest.raises(ValueError, match=r"^rows: expected some of bidirectional, .*, got 'sideways'"):
        chosen_rows(ROWS, ["sideways"])
    with pytest.raises(ValueError, match=r"^tokenizer: expected a name of its own, got 'prefix' again"):
        chosen_rows([*ROWS, Row("prefix", "another")], None)
    with pytest.raises(ValueError, match=r"^name: expected lower-case letters, digits and hyphens, .* got '\.\./x'"):
        Row("../x", "x")


def made() -> Tokenizer:
    return Tokenizer(tokenizer_preset("demo"))


def test_a_tokenizer_of_ones_own_is_a_folder_or_a_function():
    assert isinstance(own_row("ours=demo").load(), Tokenizer)
    assert isinstance(own_row(f"mine={__name__}:made").load(), Tokenizer)
    for text in ("demo", "=demo", "demo="):
        with pytest.raises(ValueError, match="^tokenizer: expected NAME=PLACE, got"):
            own_row(text)
    with pytest.raises(ValueError, match="^tokenizer: expected MODULE:FUNCTION .*no_such_module"):
        own_row("x=no_such_module:make").load()
    with pytest.raises(ValueError, match="^tokenizer: expected one with 'codebook_size', got a Size"):
        own_row("x=torch:Size").load()
    assert torch.Size  # what the last line calls
