"""Images to tokens, the cost of caching a data set: each precision of ours beside the reference's encoder."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alitok_fast.inference.image_encoder import ImageEncoder
from bench_training import encoder_flops
from peers.reference import load_reference
from timing import Contender, Missing

BUDGET = 10.0  # seconds of one system
PRECISIONS = {"cpu": {"int8": torch.int8, "bf16": torch.bfloat16, "fp32": torch.float32}}
PRECISIONS["cuda"] = {"bf16": torch.bfloat16, "fp32": torch.float32}
CROPS = 10  # of each image of a cache


def reference_encoder(checkout, generator, tokenizer, autocast: bool):
    """images -> tokens by the reference's own model, holding our weights; Missing where it cannot run."""
    loaded = load_reference(checkout, "b", generator("b"), tokenizer)
    if isinstance(loaded, Missing):
        return loaded
    model = loaded[1]

    def encode(images: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            _, result = model.encode(images, model.latent_tokens)
        return result["min_encoding_indices"].view(len(images), -1)

    return encode


@pytest.mark.quick("1")
@pytest.mark.parametrize("batch", [1, 8, 32])
def bench_encode(batch, generator, tokenizer, measure, mode, device, ceilings, reference_repo):
    if not mode.timed:
        batch = min(batch, 2)
    torch.manual_seed(0)
    size = tokenizer.config.image_size
    images = torch.rand(batch, 3, size, size, device=device)
    encoders = {f"alitok_fast {n}": ImageEncoder(tokenizer, dtype) for n, dtype in PRECISIONS[device.type].items()}
    expected = tokenizer.encode(images)
    contenders: dict[str, Contender | Missing] = {}
    for name, encoder in encoders.items():
        changed = float((encoder(images) != expected).float().mean())
        assert changed < (0.0 if encoder.dtype == torch.float32 else 0.5) + 1e-9
        contenders[name] = Contender(lambda encoder=encoder: encoder(images), facts={"changed_tokens": changed})
    for name, autocast in (("reference, fp32", False), ("reference, bf16 autocast", True)):
        contenders[name] = Missing("no checkout of the reference: --reference-repo PATH")
        if reference_repo is not None and mode.timed and not mode.quick:
            encode = reference_encoder(reference_repo, generator, tokenizer, autocast)
            contenders[name] = encode if isinstance(encode, Missing) else Contender(lambda e=encode: e(images))
            if not isinstance(encode, Missing) and not autocast:
                assert float((encode(images) != expected).float().mean()) < 0.01
    facts = {"kind": "operator", "work": encoder_flops(tokenizer.config, batch), "unit": "bf16_flops", "batch": batch}
    peak = ceilings.bf16_flops if mode.timed else None
    info = measure(contenders, budget=mode.pick(check=0.0, quick=1.0, full=BUDGET), ceiling=peak, **facts)
    if info is not None:
        median = info["contenders"][next(iter(encoders))]["seconds"]["median"]
        print(f"{batch / median:.3g} crops per second: {CROPS * median / batch:.3g} s for the ten crops of an image")
