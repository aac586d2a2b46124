"""Draws reconstructions.png and curves.png: `python docs/photos/reconstructions.py` (needs scikit-image, matplotlib).

The photographs are scikit-image's, which the tokenizer has not learned from: astronaut (NASA), chelsea and coffee
(CC0), rocket (SpaceX, CC0).
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from skimage import data

from alitok_fast import load_tokenizer
from alitok_fast.pipelines.reconstruction import reconstruct
from alitok_fast.storage.images import grid, write_image

HERE = Path(__file__).parent
NAMES = "astronaut", "chelsea", "coffee", "rocket"
SIZE = 256  # of a picture's middle, shown pixel by pixel


def middle(image: np.ndarray) -> Image.Image:
    top, left = (max(0, (side - SIZE) // 2) for side in image.shape[:2])
    return Image.fromarray(image[top : top + SIZE, left : left + SIZE])


def curves() -> None:
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    for name, label in (("stage1", "stage 1 (causal decoder)"), ("stage2", "stage 2 (bidirectional decoder)")):
        log = [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text().splitlines()]
        log = [entry for entry in log if "mse" in entry]
        axes.plot([e["step"] for e in log], [-10 * np.log10(e["mse"]) for e in log], label=label)
    axes.set(xlabel="step", ylabel="PSNR of the batch, dB")
    axes.legend()
    figure.savefig(HERE / "curves.png", dpi=90)


def main() -> None:
    tokenizer = load_tokenizer("photos-64")
    results = [reconstruct(tokenizer, getattr(data, name)(), tile=True) for name in NAMES]
    for name, result in zip(NAMES, results, strict=True):
        print(f"{name}: {result.psnr:.2f} dB, {result.tokens.numel()} tokens")
    pictures = [middle(r.original) for r in results] + [middle(r.image) for r in results]
    labels = [*NAMES, *(f"{r.psnr:.1f} dB" for r in results)]
    write_image(HERE / "reconstructions.png", grid([np.asarray(p) for p in pictures], len(NAMES), labels))
    curves()


if __name__ == "__main__":
    main()
