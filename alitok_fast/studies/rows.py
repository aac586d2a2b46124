"""What the alignment study compares: the rows of the paper's table, and tokenizers of one's own. Loads no torch."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alitok_fast.storage.text import shown


@dataclass(frozen=True)
class Row:
    """One tokenizer of the study, and the generator on its tokens.

    Args:
        name: of its folder; lower-case letters, digits and hyphens.
        title: in the table and the figure.
        settings: by which its stage 1 differs from the preset, by path ("model.prefix_tokens").
        second_stage_of: the row whose encoder, codebook, tokens and generator it has, with a decoder of stage 2.
        load: gives a tokenizer that is not trained here (`alitok_fast.evaluation.judge.ImageTokenizer`).
        paper: what the paper has for B: training accuracy (in %), gFID, rFID.
    """

    name: str
    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    second_stage_of: str | None = None
    load: Callable[[], Any] | None = None
    paper: tuple[float | None, float | None, float | None] | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", self.name):
            raise ValueError(
                f"name: expected lower-case letters, digits and hyphens, as of a folder, got {shown(self.name)!r}"
            )


_NO_PREFIX = {"model.prefix_tokens": 0, "model.auxiliary_loss": False}

ROWS = (
    Row(
        "bidirectional",
        "bidirectional",
        {**_NO_PREFIX, "model.causal_decoder": False},
        paper=(5.4, 2.96, 0.98),
    ),
    Row("causal-decoder", "+ causal decoder", _NO_PREFIX, paper=(10.7, 1.88, 1.07)),
    Row("prefix", "+ prefix tokens", {"model.auxiliary_loss": False}, paper=(9.7, 1.86, 1.01)),
    Row("auxiliary", "+ auxiliary loss", paper=(10.2, 1.82, 1.02)),
    Row("second-stage", "+ second stage", second_stage_of="auxiliary", paper=(10.5, 1.44, 0.86)),
    Row(
        "causal-encoder",
        "causal encoder instead",
        {**_NO_PREFIX, "model.causal_decoder": False, "model.causal_encoder": True},
        paper=(11.2, None, 1.56),
    ),
)
"""Of the paper (arXiv 2506.05289, the ablation of B), whose second stage follows a longer training of the row before
(800 epochs: 10.5%, 1.47, 0.91). The causal encoder has a bidirectional decoder and no prefix here."""


def own_row(text: str) -> Row:
    """A row from NAME=PLACE: a model folder or file of a tokenizer, or MODULE:FUNCTION, which is called to make one.

    Raises ValueError for another form. The place is looked at when the row's turn comes.
    """
    name, equals, place = text.partition("=")
    if not (equals and name and place):
        raise ValueError(f"tokenizer: expected NAME=PLACE, got {shown(text)!r}")
    return Row(name, name, load=lambda: _loaded(place))


def chosen_rows(rows: Sequence[Row], names: Sequence[str] | None) -> list[Row]:
    """Those called by name, or all, each after the row that it needs. Raises ValueError for unknown or equal names."""
    known = {row.name: row for row in rows}
    if len(known) < len(rows):
        twice = next(name for name in known if sum(row.name == name for row in rows) > 1)
        raise ValueError(f"tokenizer: expected a name of its own, got {twice!r} again")
    chosen: dict[str, Row] = {}
    for name in known if names is None else names:
        if name not in known:
            raise ValueError(f"rows: expected some of {', '.join(known)}, got {shown(name)!r}")
        if (needed := known[name].second_stage_of) is not None:
            chosen.setdefault(needed, known[needed])
        chosen.setdefault(name, known[name])
    return list(chosen.values())


def _loaded(place: str) -> Any:
    module, colon, function = place.partition(":")
    if not colon or Path(place).exists():
        from alitok_fast.models.loading import load_tokenizer

        return load_tokenizer(place)
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"tokenizer: expected MODULE:FUNCTION that makes a tokenizer, got {place!r} ({error})"
        ) from None
    made = make()
    if lacking := [name for name in ("codebook_size", "encode", "decode") if not hasattr(made, name)]:
        raise ValueError(f"tokenizer: expected one with {lacking[0]!r}, got a {type(made).__name__} from {place}")
    return made
