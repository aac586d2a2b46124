"""Train the tokenizer (stage 1) in a plain PyTorch loop: our modules and operators, your autocast, gradient
accumulation, torch.compile and DistributedDataParallel. What only this model has is the clustering of its codebook,
which is no gradient: it happens once per optimizer step, over all micro-batches and all processes.

    python examples/pytorch_loop.py --data PHOTOS --out runs/plain
    torchrun --nproc-per-node 8 examples/pytorch_loop.py --data PHOTOS --out runs/plain --preset 256 --compile
"""

import argparse
import contextlib
import os
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from alitok_fast import Tokenizer, save_model
from alitok_fast.config import tokenizer_preset
from alitok_fast.data import DataOrder, open_source, to_tensor, train_crop
from alitok_fast.models import aux_target
from alitok_fast.training import auxiliary_loss, clusters_of, layers_of, reconstruction_loss, update_codebook


class Crops(Dataset):
    """Random crops, (3, H, W) floats in [0, 1]; the order says which (epoch, picture) comes next, and how it is cut."""

    def __init__(self, source, size, order):
        self.source, self.size, self.order = source, size, order

    def __getitem__(self, at):
        crop = train_crop(self.source.image(at[1]), self.size, self.order.rng(*at))
        return to_tensor(crop[None])[0]


def stage1_loss(images, output, config):
    """Without the perceptual and adversarial terms, which `alitok_fast.training` has too."""
    aux = auxiliary_loss(aux_target(images, config), output.aux, config, weight=10.0)
    return reconstruction_loss(images, output.reconstruction) + aux + output.vq.loss


def main(args):
    rank, local, world = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    world = max(world, 1)  # torchrun sets them; without it, this process is alone
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(0)
    config = replace(tokenizer_preset(args.preset), stage=1)
    tokenizer = Tokenizer(config).to(device).train()
    if args.compile:
        for layer in layers_of(tokenizer):  # alike layers share a graph: much sooner compiled than the whole
            layer.compile()
    model = DistributedDataParallel(tokenizer) if world > 1 else tokenizer
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=args.lr, betas=(0.9, 0.99))

    source = open_source(args.data, image_size=config.image_size)
    order = DataOrder(len(source), args.batch_size, seed=0, rank=rank, world=world)
    indices = map(order.at, range(args.steps * args.accumulate))
    batches = iter(DataLoader(Crops(source, config.image_size, order), batch_sampler=indices, num_workers=args.workers))

    for step in range(args.steps):
        clusters, losses = [], []
        for micro in range(args.accumulate):
            images = next(batches).to(device)
            apart = world > 1 and micro < args.accumulate - 1  # gradients meet in the last micro-batch alone
            with model.no_sync() if apart else contextlib.nullcontext():
                with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                    output = model(images)
                loss = stage1_loss(images, output, config) / args.accumulate
                loss.backward()
            losses.append(loss.detach() / world)
            clusters.append(clusters_of(output.z, output.vq, tokenizer.quantize.codebook))
        update_codebook(tokenizer.quantize, clusters)
        optimizer.step()
        optimizer.zero_grad()
        loss = torch.stack(losses).sum()
        if world > 1:
            dist.all_reduce(loss)
        if rank == 0:
            print(f"step {step + 1}: loss {loss.item():.6f}", flush=True)

    if rank == 0:
        save_model(args.out, tokenizer, {"data": source.name})
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder of pictures")
    parser.add_argument("--out", required=True, help="the model's folder, for load_tokenizer")
    parser.add_argument("--preset", default="demo", help="sizes: demo, 256 or 512")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=48, help="pictures in a micro-batch, over all processes")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches in an optimizer step")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--workers", type=int, default=0, help="processes that read pictures")
    main(parser.parse_args())
