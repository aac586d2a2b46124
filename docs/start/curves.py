"""How soon the tokenizer learns, by its first weights: `python docs/start/curves.py --data PHOTOS [--device cuda]`.

Trains stage 1 on a few hundred pictures at 64 x 64 from several kinds of first weights, and writes to curves.jsonl the
mean squared error over all pictures, in evaluation mode and with the quantizer, every 50 steps. `--plot` draws
curves.png from it (needs matplotlib).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alitok_fast.config import TokenizerConfig
from alitok_fast.data import ImageSource, open_source, to_tensor
from alitok_fast.data.transforms import centre_crop
from alitok_fast.models import Tokenizer
from alitok_fast.models.initialization import initialize, place_codes, places_of_tokens
from alitok_fast.training.config import TokenizerTrainConfig
from alitok_fast.training.optim import adamw
from alitok_fast.training.tokenizer import TokenizerTask

HERE = Path(__file__).parent
MODEL = TokenizerConfig(
    image_size=64, patch_size=8, codebook_size=2048, encoder_width=256, encoder_layers=4, encoder_heads=4,
    decoder_width=256, decoder_layers=4, decoder_heads=4, stage=1,
)  # fmt: skip
TRAINING = TokenizerTrainConfig(
    steps=2000, batch_size=32, lr=1e-3, end_lr=2e-5, warmup=100, betas=(0.9, 0.99), weight_decay_on="matrices",
    max_grad_norm=1.0,
)  # fmt: skip


def random_weights(model: Tokenizer) -> None:
    """As in releases up to 0.2: noise everywhere, the identity on colours."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if name.endswith(("latent_tokens", "positional_embedding", "class_embedding")):
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    for head in (model.decoder.conv_out, model.decoder.conv_out_aux):
        nn.init.dirac_(head.weight)
    codebook = model.quantize.codebook
    nn.init.uniform_(codebook, -1 / len(codebook), 1 / len(codebook))


def shared_places(model: Tokenizer) -> None:
    """Random weights, but one two-dimensional code for a patch, its latent token and its place in the decoder."""
    random_weights(model)
    config, encoder, decoder = model.config, model.encoder, model.decoder
    tokens = places_of_tokens(config.grid, config.num_prefix_tokens)
    codes = place_codes(config.grid, config.encoder_width)
    encoder.positional_embedding.copy_(codes)
    encoder.latent_token_positional_embedding.copy_(codes[tokens])
    decoder.latent_token_positional_embedding[1:].copy_(place_codes(config.grid, config.decoder_width)[tokens])


def fetching(model: Tokenizer) -> None:
    """Places and the attention that fetches patches by them; random are what says how a patch becomes a code."""
    initialize(model)
    content = model.encoder.positional_embedding.shape[1] // 2
    embedding = model.encoder.patch_embed
    nn.init.normal_(embedding.weight[content:], std=0.08)  # about as strong as the cosines
    embedding.bias.copy_(-0.45 * embedding.weight.sum((1, 2, 3)))
    heads = (model.decoder.ffn[0], model.decoder.ffn_aux[0])
    for linear in (model.encoder.conv_out, model.decoder.decoder_embed, *heads):
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
    nn.init.normal_(model.quantize.codebook, std=0.3)  # as the features are


STARTS = {"random": random_weights, "places": shared_places, "fetching": fetching, "transform coder": initialize}


@torch.no_grad()
def error(model: Tokenizer, images: Tensor, precision: torch.autocast) -> dict[str, float]:
    model.eval()
    squares, used = [], set()
    for part in images.split(50):
        with precision:
            output = model(part)
        squares.append((output.reconstruction.float() - part).square().mean((1, 2, 3)))
        used |= set(output.vq.indices.unique().tolist())
    model.train()
    return {"mse": torch.cat(squares).mean().item(), "usage": len(used) / model.config.codebook_size}


def learn(start: str, source: ImageSource, steps: int, device: str, seed: int, every: int) -> Iterator[dict[str, Any]]:
    """The entries of one run of `steps` steps, of a schedule that is as long as TRAINING says."""
    torch.manual_seed(seed)
    model = Tokenizer(MODEL)
    with torch.no_grad():
        STARTS[start](model)
    task = TokenizerTask(model.to(device).train(), source, TRAINING)
    order, optimizer = task.order(), adamw(model, TRAINING)
    precision = torch.autocast(torch.device(device).type, torch.bfloat16)
    crops = [centre_crop(source.image(i), MODEL.image_size) for i in range(len(source))]
    images, begin = to_tensor(np.stack(crops)).to(device), time.perf_counter()
    for step in range(steps + 1):
        if step % every == 0 or step in (10, 20, 30):
            seconds = time.perf_counter() - begin
            yield {"start": start, "seed": seed, "step": step, **error(model, images, precision), "seconds": seconds}
        for group in optimizer.param_groups:
            group["lr"] = TRAINING.schedule.lr(step)
        batch = torch.from_numpy(np.stack([task.read(*sample)[0] for sample in order.at(step)])).to(device)
        with precision:
            output = task.loss(TRAINING.schedule.at(step), batch)
        output.loss.backward()
        task.after_backward([output])
        nn.utils.clip_grad_norm_(model.parameters(), TRAINING.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def plot(entries: list[dict[str, Any]]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for number, start in enumerate(dict.fromkeys(e["start"] for e in entries)):
        for seed in sorted({e["seed"] for e in entries if e["start"] == start}):
            run = [e for e in entries if (e["start"], e["seed"]) == (start, seed)]
            axes.plot([e["step"] for e in run], [e["mse"] for e in run], f"C{number}", label=None if seed else start)
    for level in (0.017, 0.010):
        axes.axhline(level, color="0.6", linewidth=0.8, linestyle="--")
    axes.set(xlabel="step", ylabel="MSE of all pictures", yscale="log")
    axes.legend()
    figure.savefig(HERE / "curves.png", dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of pictures")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--starts", default=",".join(STARTS))
    parser.add_argument("--steps", type=int, default=TRAINING.steps)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--log", type=Path, default=HERE / "curves.jsonl", help="entries are appended")
    parser.add_argument("--plot", action="store_true", help="only draw what the log has")
    options = parser.parse_args()
    if options.plot:
        plot([json.loads(line) for line in options.log.read_text().splitlines()])
        return
    source = open_source(options.data)
    for start in options.starts.split(","):
        for seed in map(int, options.seeds.split(",")):
            for entry in learn(start, source, options.steps, options.device, seed, options.every):
                entry = {key: round(value, 6) if isinstance(value, float) else value for key, value in entry.items()}
                print(json.dumps(entry), flush=True)
                with options.log.open("a") as log:
                    log.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
