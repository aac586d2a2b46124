"""Trains as one of several processes under torchrun: processes.py KIND DATA OUT RESUME SETTINGS-AS-JSON."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from training.conftest import GENERATOR, GENERATOR_TRAINING, TOKENIZER, TOKENIZER_TRAINING  # noqa: E402

from alitok_fast.data import open_source  # noqa: E402
from alitok_fast.data.token_cache import TokenCache, TokenCacheMeta  # noqa: E402
from alitok_fast.models.discriminator import Discriminator  # noqa: E402
from alitok_fast.training import adversary  # noqa: E402
from alitok_fast.training.config import TokenizerTrainConfig  # noqa: E402
from alitok_fast.training.generator import GeneratorTask, train_generator  # noqa: E402
from alitok_fast.training.tokenizer import TokenizerTask, train_tokenizer  # noqa: E402


def write_photographs(folder: Path) -> Path:
    """24 different pictures: patches of photographs are far from one another, so that rounding chooses no codes."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for index in range(24):
        picture = rng.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(picture).resize((8, 8), Image.Resampling.BICUBIC).save(folder / f"{index:02d}.png")
    return folder


def random_tokens() -> TokenCache:
    rng = np.random.default_rng(0)
    meta = TokenCacheMeta(24, 2, 7, 16, 8, ["a", "b", "c"], "random", "abc")
    return TokenCache(rng.integers(0, 16, (24, 2, 7)).astype(np.uint16), np.arange(24) % 3, meta)


def main(kind: str, data: str, out: str, resume: bool, settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    pause = settings.pop("pause", 0.0)
    for task in (GeneratorTask, TokenizerTask):
        after = task.after_backward
        task.after_backward = lambda self, outputs, after=after: (time.sleep(pause), after(self, outputs))
    options: dict[str, Any] = dict(resume=resume, progress=False, workers=0)
    if kind == "generator":
        model = replace(GENERATOR, dropout=0.0, class_dropout=0.0)
        train_generator(random_tokens(), out, model, replace(GENERATOR_TRAINING, **settings), **options)
        return
    adversary.Discriminator = lambda: Discriminator(32, 2)  # the published one is large
    config = TokenizerTrainConfig.from_dict({**TOKENIZER_TRAINING.to_dict(), **settings})
    model = replace(TOKENIZER, codebook_size=8)  # all in use: of unused codes drawn to one feature, rounding chooses
    train_tokenizer(open_source(data, image_size=8), out, 1, model, config, **options)


if __name__ == "__main__":
    kind, data, out, resume, settings = sys.argv[1:]
    main(kind, data, out, resume == "1", json.loads(settings))
