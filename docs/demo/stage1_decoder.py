"""Train a causal (stage-1) decoder for the codes that ship, so that `alitok-fast watch` has one on the demo.

    python docs/demo/stage1_decoder.py --data /usr/share/datasets/fashion-mnist --out runs/causal
    alitok-fast convert runs/causal/model alitok_fast/weights/demo/stage1 --dtype float16

Encoder, latent tokens and codebook are those of the demo's tokenizer, and stay as they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from alitok_fast import Tokenizer, TokenizerConfig, load_tokenizer
from alitok_fast.data import open_source
from alitok_fast.models.tokenizer import encoder_fingerprint
from alitok_fast.training.config import TOKENIZER_PRESETS
from alitok_fast.training.loop import StepOutput, train
from alitok_fast.training.run_folder import open_run
from alitok_fast.training.tokenizer import TokenizerTask


class CausalDecoder(TokenizerTask):
    """Stage 1 with everything frozen but the decoder: the codebook's clustering, too."""

    def after_backward(self, outputs: Sequence[StepOutput]) -> None:
        pass


def causal_twin(tokenizer: Tokenizer) -> Tokenizer:
    """A stage-1 tokenizer with the tokens of `tokenizer`, frozen, and a fresh causal decoder."""
    twin = Tokenizer(TokenizerConfig.from_dict({**tokenizer.config.to_dict(), "stage": 1}))
    for part in ("encoder", "quantize"):
        getattr(twin, part).load_state_dict(getattr(tokenizer, part).state_dict(), strict=False)
        getattr(twin, part).requires_grad_(False)
    twin.latent_tokens.data.copy_(tokenizer.latent_tokens)
    twin.latent_tokens.requires_grad_(False)
    assert encoder_fingerprint(twin.state_dict()) == encoder_fingerprint(tokenizer.state_dict())
    return twin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    config = TOKENIZER_PRESETS[2]["demo"]  # as many steps as the bidirectional decoder had
    source = open_source(arguments.data, "train", 32)
    torch.manual_seed(config.seed)
    model = causal_twin(load_tokenizer("demo"))
    resume = arguments.out.exists()
    with open_run(arguments.out, "causal decoder", config, model.config.to_dict(), resume, {}, False) as run:
        print(train(CausalDecoder(model, source, config), config, run))


if __name__ == "__main__":
    main()
