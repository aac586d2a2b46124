"""Fine-tune a generator on classes of your own: folders of pictures, one per class, as many as the generator has
classes or fewer. The pictures are tokenized once (ten crops each), the generator goes on from its weights, and a
labelled sheet of the new classes is sampled, one sheet for each guidance scale. Interrupted, the same command goes on.

    python examples/finetune_generator.py --data PHOTOS --out runs/finetuned
    python examples/finetune_generator.py --data PHOTOS --out runs/finetuned --device cuda \\
        --generator alitok_b.bin --tokenizer alitok_tokenizer.pth --lr 5e-5 --steps 5000 --batch-size 64
"""

import argparse
from pathlib import Path

from alitok_fast import Pipeline, load_generator, load_tokenizer
from alitok_fast.data import open_source
from alitok_fast.storage.images import grid
from alitok_fast.training.config import GeneratorTrainConfig
from alitok_fast.training.generator import train_generator
from alitok_fast.training.tokenize import tokenize


def main(args):
    tokenizer = load_tokenizer(args.tokenizer, args.device)
    source = open_source(args.data, image_size=tokenizer.config.image_size, report=print)
    cache = tokenize(tokenizer, source, args.out / "tokens", crops=10)

    model = train_generator(
        cache,
        args.out / "run",
        load_generator(args.generator).config,
        GeneratorTrainConfig(
            steps=args.steps,
            batch_size=args.batch_size,
            lr=args.lr,
            end_lr=args.lr / 10,
            warmup=min(50, args.steps),
            precision=args.precision or ("fp32" if args.device == "cpu" else "bf16"),
            log_every=args.log_every,
            save_every=args.save_every,
        ),
        device=args.device,
        resume=True,
        init=args.generator,
        tokenizer=args.tokenizer,
    )

    pipeline = Pipeline.from_pretrained(model, args.device, tokenizer=args.tokenizer)
    labels = [name for name in source.class_names for _ in range(args.per_class)]
    for scale in args.guidance_scale:
        samples = pipeline(labels, guidance_scale=scale, seed=0, batch_size=64)
        sheet = args.out / f"samples_guidance_{scale:g}.png"
        grid(samples.images, args.per_class, labels).save(sheet)
        print(sheet)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder with a folder of pictures for each class")
    parser.add_argument("--out", type=Path, required=True, help="a folder for tokens, run, model and sheets")
    parser.add_argument("--generator", default="demo", help="'demo', a released file, a model's folder, or on the hub")
    parser.add_argument("--tokenizer", default="demo", help="the one that the generator was trained with")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="if not given, fp32 on a CPU and bf16 on a GPU")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--per-class", type=int, default=8, help="samples of each class")
    parser.add_argument("--guidance-scale", type=float, nargs="+", default=[0, 2, 4])
    main(parser.parse_args())
