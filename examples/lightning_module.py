"""Train the tokenizer (stage 1) under Lightning: a LightningModule with our loss, and a Trainer that brings precision,
gradient accumulation and processes. The clustering of the codebook is no gradient: it happens in the hook before the
optimizer's step, over all micro-batches and all processes.

    pip install lightning
    python examples/lightning_module.py --data PHOTOS --out runs/lightning
    python examples/lightning_module.py --data PHOTOS --out runs/lightning --preset 256 --devices 8 --compile
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, Dataset

from alitok_fast import Tokenizer, save_model
from alitok_fast.config import tokenizer_preset
from alitok_fast.data import open_source, to_tensor, train_crop
from alitok_fast.models import aux_target
from alitok_fast.training import auxiliary_loss, clusters_of, layers_of, reconstruction_loss, update_codebook


class Crops(Dataset):
    """A random crop of each picture, (3, H, W) floats in [0, 1]."""

    def __init__(self, source, size):
        self.source, self.size = source, size

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        rng = np.random.default_rng(torch.randint(1 << 62, ()).item())  # torch seeds each worker process anew
        return to_tensor(train_crop(self.source.image(index), self.size, rng)[None])[0]


class Stage1(LightningModule):
    """Without the perceptual and adversarial terms, which `alitok_fast.training` has too."""

    def __init__(self, config, lr):
        super().__init__()
        self.config, self.lr = config, lr
        self.tokenizer = Tokenizer(config)
        self.clusters = []

    def training_step(self, images, index):
        output = self.tokenizer(images)
        aux = auxiliary_loss(aux_target(images, self.config), output.aux, self.config, weight=10.0)
        loss = reconstruction_loss(images, output.reconstruction) + aux + output.vq.loss
        self.clusters.append(clusters_of(output.z, output.vq, self.tokenizer.quantize.codebook))
        self.log("loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def on_before_optimizer_step(self, optimizer):
        update_codebook(self.tokenizer.quantize, self.clusters)
        self.clusters = []

    def configure_optimizers(self):
        return torch.optim.AdamW(self.tokenizer.parameters(), lr=self.lr, betas=(0.9, 0.99))


def main(args):
    seed_everything(0)
    config = replace(tokenizer_preset(args.preset), stage=1)
    source = open_source(args.data, image_size=config.image_size)
    loader = DataLoader(
        Crops(source, config.image_size), args.batch_size, shuffle=True, drop_last=True, num_workers=args.workers
    )
    module = Stage1(config, args.lr)
    if args.compile:
        for layer in layers_of(module.tokenizer):  # alike layers share a graph: much sooner compiled than the whole
            layer.compile()
    trainer = Trainer(
        max_steps=args.steps,
        max_epochs=-1,
        accumulate_grad_batches=args.accumulate,
        precision=args.precision,
        devices=args.devices,
        logger=CSVLogger(args.out),
        log_every_n_steps=args.log_every,
        enable_checkpointing=False,
    )
    trainer.fit(module, loader)
    if trainer.is_global_zero:
        save_model(args.out / "model", module.tokenizer, {"data": source.name})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder of pictures")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the model and for Lightning's logs")
    parser.add_argument("--preset", default="demo", help="sizes: demo, 256 or 512")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=48, help="pictures in a micro-batch, of each process")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches in an optimizer step")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--precision", default="bf16-mixed", help="as Lightning calls it, such as 32-true")
    parser.add_argument("--devices", default="auto", help="how many GPUs; without a GPU, how many processes")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--workers", type=int, default=0, help="processes that read pictures")
    main(parser.parse_args())
