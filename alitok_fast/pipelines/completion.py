"""Photographs completed by the generator, and pictures that are watched while they grow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from alitok_fast.data.transforms import centre_crop, to_tensor
from alitok_fast.inference.params import SamplingParams
from alitok_fast.inference.streaming import on_rows
from alitok_fast.models import Tokenizer
from alitok_fast.models.tokenizer import check_causal
from alitok_fast.pipelines.class_names import Label
from alitok_fast.pipelines.pipeline import Pipeline
from alitok_fast.storage.images import grid, to_uint8

BLANK = 255


def complete(
    pipe: Pipeline, photos: Sequence[np.ndarray], label: Label, rows: int, variants: int, params: SamplingParams
) -> Image.Image:
    """Complete photographs (H, W, 3) uint8 from their upper part: a sheet with one line per photograph.

    Each line shows the photograph (its centre crop, as ADM takes it), what the generator is given of it, and
    `variants` completions as pictures of class `label`. `rows` rows of patches are given, 0 <= rows <= grid (and the
    prefix tokens, which stand for the first row).
    """
    config = pipe.tokenizer.config
    if not 0 <= rows <= config.grid:
        raise ValueError(f"rows: expected 0..{config.grid}, the rows of patches in an image, got {rows}")
    if variants < 1:
        raise ValueError(f"variants: expected at least 1, got {variants}")
    cropped = np.stack([centre_crop(photo, config.image_size) for photo in photos])
    tokens = pipe.tokenizer.encode(to_tensor(cropped).to(pipe.tokenizer.device))
    prompt = tokens[:, : config.num_prefix_tokens + rows * config.grid].repeat_interleave(variants, 0)
    completed = pipe(pipe.classes.ids(label) * len(prompt), params, prompt_tokens=prompt).pixels
    given = cropped.copy()
    given[:, rows * config.patch_size :] = BLANK
    pictures, captions = [], []
    for i in range(len(photos)):
        pictures += [cropped[i], given[i], *completed[i * variants : (i + 1) * variants]]
        captions += ["photograph", f"{rows} of {config.grid} rows", *["completed"] * variants]
    return grid(pictures, 2 + variants, captions)


def grow(pipe: Pipeline, stage1: Tokenizer, labels: Sequence[Label], params: SamplingParams) -> list[np.ndarray]:
    """Frames (B, H, W, 3) uint8: one after each row of patches, the last one decoded by `pipe`.

    `stage1` is the causal tokenizer that the pipeline's codes come from; what it has not painted yet is white.
    Raises ValueError if its codebook is a different one, or its sequences are, or its decoder is bidirectional.
    """
    check_stage1(pipe, stage1)
    config = stage1.config
    parts: list[list[np.ndarray]] = []  # a batch too large for the memory comes in several

    def show(rows: int, images: torch.Tensor) -> None:
        if rows == 1:
            parts.append([])
        frame = np.full((len(images), config.image_size, config.image_size, 3), BLANK, np.uint8)
        frame[:, : images.shape[2]] = to_uint8(images)
        parts[-1].append(frame)

    tokens = pipe.sampler(pipe.classes.ids(labels), params, on_step=on_rows(stage1, show))
    frames = [np.concatenate(row) for row in zip(*parts, strict=True)]
    return [*frames, to_uint8(pipe.image_decoder(tokens))]


def check_stage1(pipe: Pipeline, stage1: Tokenizer) -> None:
    """ValueError about `stage1` unless it is a causal tokenizer that can paint the pipeline's tokens."""
    config = stage1.config
    check_causal("stage1", config)
    for name in ("grid", "num_prefix_tokens"):
        want, have = getattr(pipe.tokenizer.config, name), getattr(config, name)
        if have != want:
            raise ValueError(f"stage1: expected {name} {want} as in the pipeline's tokenizer, got {have}")
    ours, theirs = (model.quantize.embedding.weight.float() for model in (pipe.tokenizer, stage1))
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs.to(ours.device), atol=1e-2, rtol=1e-2):
        raise ValueError("stage1: expected the tokenizer whose codebook the pipeline has, got one with other codes")


def film(frames: Sequence[np.ndarray], captions: Sequence[str]) -> list[Image.Image]:
    """Frames (B, H, W, 3) as pictures of all B images beside each other, ten in a row."""
    return [grid(list(frame), min(10, len(frame)), captions) for frame in frames]


def filmstrip(frames: Sequence[np.ndarray]) -> Image.Image:
    """Frames (B, H, W, 3) as one picture: a line for each image, time from left to right."""
    names = [f"{row} rows" for row in range(1, len(frames))] + ["finished"]
    pictures = [frame[i] for i in range(len(frames[0])) for frame in frames]
    return grid(pictures, len(frames), names + [""] * (len(pictures) - len(names)))
