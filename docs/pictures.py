"""Draws the pictures of the README and of docs/: `python docs/pictures.py --data FASHION_MNIST [--stage1 MODEL]`.

samples.png      garments of every class, drawn by the demo model
test_set.png     photographs of the Fashion-MNIST test set and their reconstructions
completion.png   upper halves of test photographs, completed by the generator (prompt_tokens)
growing.png      one drawing as its rows appear (on_rows); needs the stage-1 model that the demo was trained with
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from alitok_fast import Pipeline, load_tokenizer, on_rows, sample
from alitok_fast.data import open_source, to_tensor
from alitok_fast.images import grid, to_uint8, write_image
from alitok_fast.models import Tokenizer
from alitok_fast.reconstruction import reconstruct

HERE = Path(__file__).parent / "images"
COLUMNS = 10


def samples(pipe: Pipeline) -> Image.Image:
    """Eight of each class, a class a column."""
    labels = list(range(pipe.generator.config.classes)) * 8
    names = [pipe.label_name(label) for label in labels]
    return grid(pipe(labels, seed=0).images, COLUMNS, names[:COLUMNS] + [""] * (len(labels) - COLUMNS), scale=2)


def test_photographs(data: Path, size: int) -> tuple[list[np.ndarray], list[int]]:
    """The first test photograph of each class, and its label."""
    source = open_source(data, "test", size)
    first = [int(np.flatnonzero(source.labels == label)[0]) for label in range(len(source.classes))]
    return [source.image(i) for i in first], list(range(len(first)))


def reconstructions(tokenizer: Tokenizer, photos: list[np.ndarray]) -> Image.Image:
    """Originals above, reconstructions below with their PSNR."""
    results = [reconstruct(tokenizer, photo) for photo in photos]
    pictures = [r.original for r in results] + [r.image for r in results]
    return grid(pictures, len(photos), ["test photo"] * len(photos) + [f"{r.psnr:.1f} dB" for r in results], scale=2)


def completions(pipe: Pipeline, photos: list[np.ndarray], labels: list[int]) -> Image.Image:
    """Photographs; what the generator is given of them; three completions."""
    config = pipe.tokenizer.config
    kept = config.prefix_tokens + config.image_tokens // 2
    tokens = pipe.tokenizer.encode(to_tensor(np.stack(photos)))
    half = np.stack(photos).copy()
    half[:, config.image_size // 2 :] = 255
    rows = [*photos, *half]
    for seed in range(3):
        rows += pipe(labels, seed=seed, prompt_tokens=tokens[:, :kept]).images
    names = ["photo", "given", "completed", "completed", "completed"]
    return grid(rows, len(photos), [name for name in names for _ in photos], scale=2)


def growing(pipe: Pipeline, stage1: Tokenizer) -> Image.Image:
    """The causal decoder's rows so far, and last the bidirectional decoder's picture."""
    labels, frames = [0, 1, 7, 8, 9], []
    size = stage1.config.image_size

    def show(rows: int, images: torch.Tensor) -> None:
        blank = torch.full((len(images), 3, size - images.shape[2], size), 1.0)
        frames.append(to_uint8(torch.cat([images, blank], dim=2)))

    tokens = sample(pipe.generator, labels, seed=0, on_step=on_rows(stage1, show))
    frames.append(to_uint8(pipe.tokenizer.decode(tokens)))
    pictures = [frame[i] for i in range(len(labels)) for frame in frames]
    captions = [f"{row + 1} rows" for row in range(len(frames) - 1)] + ["finished"]
    return grid(pictures, len(frames), captions + [""] * (len(pictures) - len(captions)), scale=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the Fashion-MNIST IDX files")
    parser.add_argument("--model", default="demo", help="pipeline folder")
    parser.add_argument("--stage1", help="stage-1 tokenizer, for growing.png")
    arguments = parser.parse_args()
    HERE.mkdir(exist_ok=True)
    pipe = Pipeline.from_pretrained(arguments.model)
    photos, labels = test_photographs(arguments.data, pipe.tokenizer.config.image_size)
    write_image(HERE / "samples.png", samples(pipe))
    write_image(HERE / "test_set.png", reconstructions(pipe.tokenizer, photos))
    write_image(HERE / "completion.png", completions(pipe, photos, labels))
    if arguments.stage1:
        write_image(HERE / "growing.png", growing(pipe, load_tokenizer(arguments.stage1)))


if __name__ == "__main__":
    main()
