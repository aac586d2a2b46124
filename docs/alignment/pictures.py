"""Gathers finished alignment studies into this folder: `python docs/alignment/pictures.py STUDY NOISE` (needs
matplotlib).

Copies table.md, results.json, figure.png and every training's log, as ROW-tokenizer.jsonl and ROW-generator.jsonl; of
the study NOISE, whose tokenizers begin as noise, the tables and the logs, with names that begin with noise-. Then it
draws curves.png from the logs, and samples.png, a row of pictures for each row of the study, one of every class.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from alitok_fast import Sampler, load_generator, load_tokenizer
from alitok_fast.storage.images import grid, write_image
from alitok_fast.studies.rows import ROWS, Row

HERE = Path(__file__).parent
WINDOW = 8  # log entries that a curve is averaged over


def copy(study: Path, names: tuple[str, ...], prefix: str = "") -> None:
    for name in names:
        shutil.copyfile(study / name, HERE / f"{prefix}{name}")
    for log in study.glob("seed-0/*/*/log.jsonl"):
        shutil.copyfile(log, HERE / f"{prefix}{log.parent.parent.name}-{log.parent.name}.jsonl")


def curve(axes: plt.Axes, name: str, key: str, row: Row) -> None:
    log = [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text().splitlines()]
    values = np.convolve([entry[key] for entry in log], np.ones(WINDOW) / WINDOW, "valid")
    axes.plot([entry["step"] for entry in log][WINDOW - 1 :], values, f"C{ROWS.index(row)}", label=row.title)


def curves() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    for row in ROWS:
        curve(left, f"{row.name}-tokenizer", "mse", row)
        if row.second_stage_of is None:
            curve(right, f"{row.name}-generator", "accuracy", row)
    left.set(title="tokenizers", xlabel="step", ylabel="training MSE", yscale="log")
    right.set(title="generators", xlabel="step", ylabel="tokens predicted (training)")
    left.legend()
    right.legend()
    figure.savefig(HERE / "curves.png", dpi=90)


def samples(study: Path) -> None:
    pictures: list[np.ndarray] = []
    for row in ROWS:
        folder = study / "seed-0" / row.name
        owner = folder.with_name(row.second_stage_of or row.name)
        tokenizer, generator = load_tokenizer(folder / "tokenizer" / "model"), load_generator(owner / "generator/model")
        images = tokenizer.decode(Sampler(generator)(list(range(generator.config.num_classes)), seed=0)).clamp(0, 1)
        pictures += list((255 * images).round().byte().permute(0, 2, 3, 1).numpy())
    write_image(HERE / "samples.png", grid(pictures, len(pictures) // len(ROWS), scale=2))


def main() -> None:
    study, noise = map(Path, sys.argv[1:])
    copy(study, ("table.md", "results.json", "figure.png"))
    copy(noise, ("table.md", "results.json"), "noise-")
    curves()
    samples(study)


if __name__ == "__main__":
    main()
