"""Makes the pictures of the README and of docs/: `python docs/pictures.py --data FASHION_MNIST [--before MODEL]`.

samples.png      garments of every class, sampled from the demo model
test_set.png     photographs of the Fashion-MNIST test set and their reconstructions; --before adds another tokenizer's
completion.png   upper halves of test photographs, completed by the generator (prompt_tokens)
growing.png      garments as their rows appear, by the decoder of the demo's stage-1 model
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from alitok_fast import Pipeline, SamplingParams, load_tokenizer
from alitok_fast.data import open_source, to_tensor
from alitok_fast.models import Tokenizer
from alitok_fast.models.loading import resolve
from alitok_fast.pipelines.completion import filmstrip, grow
from alitok_fast.pipelines.reconstruction import reconstruct
from alitok_fast.storage.images import grid, write_image

HERE = Path(__file__).parent / "images"
COLUMNS = 10


def samples(pipe: Pipeline) -> Image.Image:
    """Eight garments of each class, one class per column."""
    labels = list(range(pipe.generator.config.num_classes)) * 8
    names = [pipe.classes[label] for label in labels]
    return grid(pipe(labels, seed=0).images, COLUMNS, names[:COLUMNS] + [""] * (len(labels) - COLUMNS), scale=2)


def test_photographs(data: Path, size: int) -> tuple[list[np.ndarray], list[int]]:
    """The first test photograph of each class, and its label."""
    source = open_source(data, "test", size)
    first = [int(np.flatnonzero(source.labels == label)[0]) for label in range(len(source.class_names))]
    return [source.image(i) for i in first], list(range(len(first)))


def reconstructions(tokenizers: list[Tokenizer], photos: list[np.ndarray]) -> Image.Image:
    """Originals above, below them a row of reconstructions by each tokenizer with their PSNR."""
    pictures, names = list(photos), ["test photo"] * len(photos)
    for tokenizer in tokenizers:
        results = [reconstruct(tokenizer, photo) for photo in photos]
        pictures += [r.image for r in results]
        names += [f"{r.psnr:.1f} dB" for r in results]
    return grid(pictures, len(photos), names, scale=2)


def completions(pipe: Pipeline, photos: list[np.ndarray], labels: list[int]) -> Image.Image:
    """Rows: the photographs, what the generator is given of them, and three completions."""
    config = pipe.tokenizer.config
    kept = config.num_prefix_tokens + config.num_image_tokens // 2
    tokens = pipe.tokenizer.encode(to_tensor(np.stack(photos)))
    half = np.stack(photos).copy()
    half[:, config.image_size // 2 :] = 255
    rows = [*photos, *half]
    for seed in range(3):
        rows += pipe(labels, seed=seed, prompt_tokens=tokens[:, :kept]).images
    names = ["photo", "given", "completed", "completed", "completed"]
    return grid(rows, len(photos), [name for name in names for _ in photos], scale=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the Fashion-MNIST IDX files")
    parser.add_argument("--model", default="demo", help="pipeline folder")
    parser.add_argument("--before", help="an earlier tokenizer, for a row of test_set.png")
    arguments = parser.parse_args()
    HERE.mkdir(exist_ok=True)
    pipe = Pipeline.from_pretrained(arguments.model)
    photos, labels = test_photographs(arguments.data, pipe.tokenizer.config.image_size)
    write_image(HERE / "samples.png", samples(pipe))
    before = [load_tokenizer(arguments.before)] if arguments.before else []
    write_image(HERE / "test_set.png", reconstructions([*before, pipe.tokenizer], photos))
    write_image(HERE / "completion.png", completions(pipe, photos, labels))
    frames = grow(pipe, load_tokenizer(str(resolve(arguments.model, "stage1"))), [0, 1, 7, 8, 9], SamplingParams())
    write_image(HERE / "growing.png", filmstrip(frames))


if __name__ == "__main__":
    main()
