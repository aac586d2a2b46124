"""Train the tokenizer (stage 1) under Hugging Face Accelerate, which brings precision, gradient accumulation,
torch.compile and processes. The clustering of the codebook is no gradient: it happens where Accelerate lets the
optimizer step (`sync_gradients`), over all micro-batches and all processes.

    pip install accelerate
    python examples/accelerate_loop.py --data PHOTOS --out runs/accelerate
    accelerate launch --num_processes 8 examples/accelerate_loop.py --data PHOTOS --out runs/accelerate --preset 256
"""

import argparse
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, TorchDynamoPlugin, set_seed
from torch.utils.data import DataLoader, Dataset

from alitok_fast import Tokenizer, save_model
from alitok_fast.config import tokenizer_preset
from alitok_fast.data import open_source, to_tensor, train_crop
from alitok_fast.models import aux_target
from alitok_fast.training import auxiliary_loss, clusters_of, reconstruction_loss, update_codebook


class Crops(Dataset):
    """A random crop of each picture, (3, H, W) floats in [0, 1]."""

    def __init__(self, source, size):
        self.source, self.size = source, size

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        rng = np.random.default_rng(torch.randint(1 << 62, ()).item())  # torch seeds each worker process anew
        return to_tensor(train_crop(self.source.image(index), self.size, rng)[None])[0]


def stage1_loss(images, output, config):
    """Without the perceptual and adversarial terms, which `alitok_fast.training` has too."""
    aux = auxiliary_loss(aux_target(images, config), output.aux, config, weight=10.0)
    return reconstruction_loss(images, output.reconstruction) + aux + output.vq.loss


def endless(loader):
    while True:
        yield from loader


def main(args):
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=args.precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=args.accumulate, sync_with_dataloader=False),
        dynamo_plugin=TorchDynamoPlugin(backend="inductor" if args.compile else "no", use_regional_compilation=True),
    )
    set_seed(0, device_specific=True)
    config = replace(tokenizer_preset(args.preset), stage=1)
    source = open_source(args.data, image_size=config.image_size)
    loader = DataLoader(
        Crops(source, config.image_size), args.batch_size, shuffle=True, drop_last=True, num_workers=args.workers
    )
    tokenizer = Tokenizer(config).train()
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=args.lr, betas=(0.9, 0.99))
    model, optimizer, loader = accelerator.prepare(tokenizer, optimizer, loader)

    step, clusters, losses = 0, [], []
    for images in endless(loader):
        with accelerator.accumulate(model):
            output = model(images)
            loss = stage1_loss(images, output, config)
            accelerator.backward(loss)
            losses.append(loss.detach())
            clusters.append(clusters_of(output.z, output.vq, tokenizer.quantize.codebook))
            if accelerator.sync_gradients:
                update_codebook(tokenizer.quantize, clusters)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            step += 1
            mean = accelerator.reduce(torch.stack(losses).mean(), "mean")
            accelerator.print(f"step {step}: loss {mean.item():.6f}", flush=True)
            clusters, losses = [], []
        if step == args.steps:
            break

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_model(args.out, tokenizer, {"data": source.name})
    accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder of pictures")
    parser.add_argument("--out", required=True, help="the model's folder, for load_tokenizer")
    parser.add_argument("--preset", default="demo", help="sizes: demo, 256 or 512")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=48, help="pictures in a micro-batch, of each process")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches in an optimizer step")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], default="bf16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--workers", type=int, default=0, help="processes that read pictures")
    main(parser.parse_args())
