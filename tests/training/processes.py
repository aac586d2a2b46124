"""Trains as several processes, under torchrun: `python -m torch.distributed.run ... processes.py KIND OUT STEPS RESUME KEY=VALUE...`"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from training.conftest import GENERATOR, GENERATOR_TRAINING, TOKENIZER, TOKENIZER_TRAINING  # noqa: E402

from alitok_fast.data import open_source, validate_token_cache  # noqa: E402
from alitok_fast.training.config import TokenizerTrainConfig  # noqa: E402
from alitok_fast.training.generator import train_generator  # noqa: E402
from alitok_fast.training.tokenizer import train_tokenizer  # noqa: E402


def main(kind: str, data: str, out: str, resume: bool, settings: dict) -> None:
    torch.set_num_threads(1)
    options = dict(resume=resume, progress=False, workers=0)
    if kind == "generator":
        config = replace(GENERATOR_TRAINING, **settings)
        model = replace(GENERATOR, dropout=0.0, class_dropout=0.0)
        train_generator(validate_token_cache(data), out, model, config, **options)
    else:
        config = TokenizerTrainConfig.from_dict({**TOKENIZER_TRAINING.to_dict(), **settings})
        train_tokenizer(open_source(data, image_size=8), out, 1, TOKENIZER, config, **options)


if __name__ == "__main__":
    kind, data, out, resume, settings = sys.argv[1:]
    main(kind, data, out, resume == "1", json.loads(settings))
