"""Encode a data set once, for the generator's training."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from alitok_fast.data import (
    ImageSource,
    TokenCache,
    check_source,
    source_fingerprint,
    validate_token_cache,
    write_token_cache,
)
from alitok_fast.data.checks import require_choice, require_count
from alitok_fast.data.token_cache import TokenCacheMeta
from alitok_fast.data.transforms import CROP_COUNTS
from alitok_fast.models.tokenizer import Tokenizer, encoder_fingerprint
from alitok_fast.progress import tracked


def tokenize(
    tokenizer: Tokenizer,
    source: ImageSource,
    out: str | Path,
    crops: int = 10,
    batch_size: int = 64,
    progress: bool = True,
    workers: int | None = None,
    force: bool = False,
) -> TokenCache:
    """Write the token cache of an image source (alitok_fast.data.open_source) to the folder `out`, or finish it.

    `crops` is 1 (centre), 2 (and its mirror image) or 10 (section 3.3). The
    stage does not matter: stage 2 keeps the encoder and the codebook of stage 1.
    `workers` threads read pictures (one per core, at most 8, if not given).
    Raises as `write_token_cache`; `force` writes over what it would refuse.
    """
    require_count("batch_size", batch_size)
    require_choice("crops", require_count("crops", crops), CROP_COUNTS)
    check_source(source)
    config = tokenizer.config
    meta = TokenCacheMeta(
        num_images=len(source),
        num_crops=crops,
        num_tokens=config.num_tokens,
        codebook_size=config.codebook_size,
        image_size=config.image_size,
        class_names=list(source.class_names),
        source=source.name,
        tokenizer=encoder_fingerprint(tokenizer.state_dict()),
        data=source_fingerprint(source),
    )
    tokenizer.eval()

    def encode(images: Tensor) -> Tensor:
        return tokenizer.encode(images.to(tokenizer.device))

    with torch.inference_mode():
        write_token_cache(
            out,
            source,
            encode,
            meta,
            batch_size,
            lambda batches: tracked("tokenize", batches, progress),
            workers,
            force,
        )
    return validate_token_cache(out)
