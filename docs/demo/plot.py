"""Plot curves.png from the logs beside this file (needs matplotlib)."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
CODES = 1024


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text().splitlines()]


def curve(axes: plt.Axes, log: list[dict], value: str, label: str | None = None, scale: float = 1.0) -> None:
    """The entries that have `value`: steps of the discriminator have other values than those of the tokenizer."""
    known = [entry for entry in log if value in entry]
    axes.plot([entry["step"] for entry in known], [scale * entry[value] for entry in known], label=label)


def main() -> None:
    figure, ((tokenizer, codebook), (discriminator, generator)) = plt.subplots(
        2, 2, figsize=(10, 6), layout="constrained"
    )
    first, second = read("stage1"), read("stage2")
    curve(tokenizer, first, "mse", "stage 1 (causal decoder)")
    curve(tokenizer, second, "mse", "stage 2 (bidirectional decoder)")
    begins = next(entry["step"] for entry in second if "adversarial" in entry)
    tokenizer.axvline(begins, color="grey", linestyle=":", label="adversarial loss begins in stage 2")
    tokenizer.set(title="tokenizer", xlabel="step", ylabel="training MSE", yscale="log")
    tokenizer.legend()
    curve(codebook, first, "perplexity", "perplexity")
    curve(codebook, first, "usage", "codes in use", CODES)
    codebook.set(title="codebook, stage 1", xlabel="step", ylabel=f"codes out of {CODES}")
    codebook.legend()
    curve(discriminator, second, "logits_real", "images")
    curve(discriminator, second, "logits_fake", "reconstructions")
    discriminator.set(title="discriminator, stage 2", xlabel="step", ylabel="mean logit")
    discriminator.legend()
    curve(generator, read("generator"), "loss")
    generator.set(title="generator", xlabel="step", ylabel="cross-entropy, nats per token")
    figure.savefig(HERE / "curves.png", dpi=90)


if __name__ == "__main__":
    main()
