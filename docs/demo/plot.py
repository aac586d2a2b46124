"""Plot curves.png from the logs beside this file (needs matplotlib)."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).parent


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text().splitlines()]


def main() -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    for name, label in (("stage1", "stage 1 (causal decoder)"), ("stage2", "stage 2 (bidirectional decoder)")):
        log = read(name)
        axes[0].plot([e["step"] for e in log], [e["mse"] for e in log], label=label)
    axes[0].set(title="tokenizer", xlabel="step", ylabel="training MSE", yscale="log")
    axes[0].legend()
    log = read("stage1")
    axes[1].plot([e["step"] for e in log], [e["perplexity"] for e in log], label="perplexity")
    axes[1].plot([e["step"] for e in log], [e["usage"] * 512 for e in log], label="codes in use")
    axes[1].set(title="codebook, stage 1", xlabel="step", ylabel="codes out of 512")
    axes[1].legend()
    log = read("generator")
    axes[2].plot([e["step"] for e in log], [e["loss"] for e in log])
    axes[2].set(title="generator", xlabel="step", ylabel="cross-entropy, nats per token")
    figure.savefig(HERE / "curves.png", dpi=90)


if __name__ == "__main__":
    main()
