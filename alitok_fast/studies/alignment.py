"""The alignment study (arXiv 2506.05289, the ablation): tokenizers that differ in what is causal, and how well a
generator learns each one's tokens.

A folder OUT holds `study.json`, the judge, and for each seed and row the runs `tokenizer/` and `generator/`, the
`tokens/` of both splits, and `result.json`, which is written last. A study that was killed goes on where it was; one
that is begun again with more rows or seeds adds these.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from alitok_fast import __version__
from alitok_fast.data import ImageSource, TokenCache, source_fingerprint, validate_token_cache, write_token_cache
from alitok_fast.data.token_cache import META_NAME, TokenCacheMeta
from alitok_fast.device import check_device
from alitok_fast.evaluation.classifier import SmallClassifier, features, predict, train_classifier
from alitok_fast.evaluation.judge import (
    ImageTokenizer,
    all_images,
    evaluate_samples,
    evaluate_tokenizer,
    generate_samples,
)
from alitok_fast.evaluation.measures import frechet_distance
from alitok_fast.evaluation.moments import Moments
from alitok_fast.models.generator import Generator
from alitok_fast.models.loading import load_generator, load_tokenizer
from alitok_fast.models.tokenizer import Tokenizer
from alitok_fast.progress import tracked
from alitok_fast.storage.files import differences, locked, read_json, write_atomically, write_json
from alitok_fast.storage.tensor_files import read_tensors
from alitok_fast.studies.budget import Budget
from alitok_fast.studies.rows import Row, chosen_rows
from alitok_fast.training.generator import train_generator
from alitok_fast.training.losses import generator_loss
from alitok_fast.training.tokenize import tokenize
from alitok_fast.training.tokenizer import train_tokenizer

RESULT_NAME = "result.json"
LOG_TAIL = 0.1  # of the steps: the training accuracy is the mean over the last ones


@dataclass(frozen=True)
class Splits:
    """The images that models learn from, and those they are measured on: of one data set, with the same classes."""

    train: ImageSource
    test: ImageSource

    def __post_init__(self) -> None:
        if list(self.train.class_names) != list(self.test.class_names):
            raise ValueError("data: expected the same classes in both splits, got others in the second")


class AlignmentStudy:
    """Trains and measures rows in the folder `out`.

    Raises ValueError where `out` holds a study of other data or another budget, naming what differs.
    """

    def __init__(
        self,
        splits: Splits,
        out: Path,
        budget: Budget,
        device: str = "cpu",
        workers: int | None = None,
        progress: bool = True,
        say: Callable[[str], object] = print,
    ) -> None:
        self.splits, self.out, self.budget = splits, out, budget
        self.device, self.workers, self.progress, self.say = check_device(device), workers, progress, say
        self.image_size = budget.image_size
        description = {
            "study": "alignment",
            "data": {"train": source_fingerprint(splits.train), "test": source_fingerprint(splits.test)},
            "budget": json.loads(json.dumps(asdict(budget))),
            "versions": {"alitok_fast": __version__, "torch": torch.__version__},
        }
        file = out / "study.json"
        if file.exists():
            if found := differences(read_json(file, "a study"), description, {"versions"}):
                raise ValueError(f"out: expected the settings in {file}, got {'; '.join(found)}")
        elif out.exists() and any(out.iterdir()):
            raise ValueError(f"out: expected a new folder or a study's, got {out} with other things in it")
        else:
            out.mkdir(parents=True, exist_ok=True)
            write_json(file, description)

    def run(
        self,
        rows: Sequence[Row],
        seeds: int = 1,
        names: Sequence[str] | None = None,
        on_result: Callable[[], object] = lambda: None,
    ) -> None:
        """Train and measure what has no result yet: all rows with seed 0, then with seed 1, and so on.

        `names` are those of `rows` to run, all if not given; `on_result` is called after each. Raises as the trainings
        do; ValueError where another process is at the same row.
        """
        if seeds < 1:
            raise ValueError(f"seeds: expected at least 1, got {seeds}")
        for seed in range(seeds):
            for row in chosen_rows(rows, names):
                folder = self.out / f"seed-{seed}" / row.name
                folder.mkdir(parents=True, exist_ok=True)
                with locked(folder / ".study.lock", folder):
                    if not (folder / RESULT_NAME).exists():
                        self.say(f"{row.name}, seed {seed}")
                        write_json(folder / RESULT_NAME, self._result(row, seed, folder))
                on_result()

    def results(self) -> list[dict[str, Any]]:
        """What `result.json` of each row and seed holds, those of a seed together."""
        return [read_json(file, "a result") for file in sorted(self.out.glob(f"seed-*/*/{RESULT_NAME}"))]

    def judge(self) -> tuple[SmallClassifier, dict[str, float]]:
        """The classifier, trained once and kept, and what is known of it: `test_accuracy`, and `real_distance` of as
        many training images as samples are drawn from the test images, which a perfect generator would reach.

        Where another process trains it, waits. Holds all images of both splits in memory.
        """
        weights, known = self.out / "judge.safetensors", self.out / "judge.json"  # the latter is written last
        with locked(self.out / ".judge.lock", wait=True):
            if not known.exists():
                self._train_judge(weights, known)
        model = SmallClassifier(len(self.splits.train.class_names))
        model.load_state_dict(read_tensors(weights, check=bool))
        return model.eval(), read_json(known, "the judge")

    def _train_judge(self, weights: Path, known: Path) -> None:
        (train, labels), (test, asked) = self._images("train"), self._images("test")
        classes = len(self.splits.train.class_names)
        self.say(f"the judge: {self.budget.judge_epochs} epochs of {len(train):,} images")
        judge = train_classifier(train, labels, classes, self.budget.judge_epochs)
        order = torch.from_numpy(np.random.default_rng(0).permutation(len(train)))
        some = train[order[: self.budget.samples * classes]]
        real = [Moments.of(features(judge, images)) for images in (some, test)]
        state = {name: value.float() for name, value in judge.state_dict().items()}  # counts of batches too
        write_atomically(weights, lambda temporary: save_file(state, temporary))
        accuracy = float((predict(judge, test) == asked).double().mean())
        facts = {"test_accuracy": accuracy, "real_distance": frechet_distance(*real), "real_images": len(some)}
        write_json(known, facts)

    def _result(self, row: Row, seed: int, folder: Path) -> dict[str, Any]:
        owner = folder if row.second_stage_of is None else folder.with_name(row.second_stage_of)
        tokenizer = self._tokenizer(row, seed, folder, owner)
        caches = {name: self._tokens(tokenizer, name, owner) for name in ("train", "test")}
        generator, log = self._generator(caches["train"], seed, owner)
        judge, _ = self.judge()
        images, _ = self._images("test")
        real, meta, config = features(judge, images), caches["test"].meta, generator.config
        sampling = {
            "guided": {"guidance_scale": config.guidance_scale, "guidance_power": config.guidance_power},
            "unguided": {"guidance_scale": 0.0},
        }
        generation = {}
        for name, how in sampling.items():
            drawn, labels = generate_samples(generator, tokenizer.decode, self.budget.samples, seed, **how)
            generation[name] = {**how, **evaluate_samples(judge, drawn, labels, real)}
        return {
            "row": row.name,
            "title": row.title,
            "paper": row.paper,
            "seed": seed,
            "tokens": meta.num_tokens,
            "codebook_size": meta.codebook_size,
            "train": _tail(log),
            "test": held_out(generator, caches["test"]),
            "reconstruction": evaluate_tokenizer(tokenizer, images, classifier=judge, device=self.device),
            "generation": generation,
        }

    def _tokenizer(self, row: Row, seed: int, folder: Path, owner: Path) -> ImageTokenizer:
        if row.load is not None:
            made = row.load()
            if isinstance(made, nn.Module):
                made.to(self.device).eval()
            return made
        stage1 = None if row.second_stage_of is None else owner / "tokenizer" / "model"
        own = {**row.settings, "training.seed": seed}
        run = self.budget.run("tokenizer", self.budget.tokenizer, own, 1 if stage1 is None else 2)
        model = train_tokenizer(
            self.splits.train,
            folder / "tokenizer",
            run.model.stage,
            run.model,
            run.training,
            stage1,
            self.device,
            resume=True,
            progress=self.progress,
            workers=self.workers,
            run_file=run.to_toml(),
        )
        return load_tokenizer(model, self.device, torch.float32)

    def _tokens(self, tokenizer: ImageTokenizer, split: str, folder: Path) -> TokenCache:
        source, out = getattr(self.splits, split), folder / "tokens" / split
        if (out / META_NAME).exists():
            return validate_token_cache(out)
        if isinstance(tokenizer, Tokenizer):
            return tokenize(tokenizer, source, out, crops=1, progress=self.progress)
        with torch.inference_mode():
            first = tokenizer.encode(torch.zeros(1, 3, self.image_size, self.image_size, device=self.device))
            meta = TokenCacheMeta(
                num_images=len(source),
                num_crops=1,
                num_tokens=first.shape[1],
                codebook_size=tokenizer.codebook_size,
                image_size=self.image_size,
                class_names=list(source.class_names),
                source=source.name,
                tokenizer="",
                data=source_fingerprint(source),
            )

            def encode(images: Tensor) -> Tensor:
                return tokenizer.encode(images.to(self.device)).cpu()

            write_token_cache(
                out, source, encode, meta, progress=lambda batches: tracked(f"tokens, {split}", batches, self.progress)
            )
        return validate_token_cache(out)

    def _generator(self, cache: TokenCache, seed: int, folder: Path) -> tuple[Generator, list[dict[str, Any]]]:
        meta = cache.meta
        side = math.isqrt(meta.num_tokens)
        own = {
            "model.codebook_size": meta.codebook_size,
            "model.num_classes": len(meta.class_names),
            "model.grid": side,
            "model.prefix_tokens": meta.num_tokens - side**2,
            "training.seed": seed,
        }
        run = self.budget.run("generator", self.budget.generator, own)
        model = train_generator(
            cache,
            folder / "generator",
            run.model,
            run.training,
            self.device,
            resume=True,
            progress=self.progress,
            run_file=run.to_toml(),
        )
        log = [json.loads(line) for line in (folder / "generator" / "log.jsonl").read_text().splitlines()]
        return load_generator(model, self.device), log

    def _images(self, split: str) -> tuple[Tensor, Tensor]:
        """All images of a split, (n, 3, S, S) uint8, and their labels (n,)."""
        source = getattr(self.splits, split)
        return all_images(source, self.image_size), torch.from_numpy(np.asarray(source.labels).astype(np.int64))


@torch.inference_mode()
def held_out(generator: Generator, cache: TokenCache, batch_size: int = 250) -> dict[str, float]:
    """How well a generator predicts tokens that it has not learned from, each from those before it and the label.

    `loss` in nats per token, `accuracy` the share of tokens that are the likeliest, and `bits_per_image`, which
    compares tokenizers with different numbers of tokens.
    """
    loss = right = 0.0
    for begin in range(0, len(cache), batch_size):
        tokens = torch.from_numpy(cache.tokens[begin : begin + batch_size, 0].astype(np.int64)).to(generator.device)
        labels = torch.from_numpy(np.array(cache.labels[begin : begin + batch_size])).to(generator.device)
        logits = generator(tokens, labels)
        loss += float(generator_loss(logits, tokens)) * len(tokens)
        right += float((logits[:, : tokens.shape[1]].argmax(-1) == tokens).float().mean()) * len(tokens)
    nats = loss / len(cache)
    bits = nats * cache.meta.num_tokens / math.log(2)
    return {"loss": nats, "accuracy": right / len(cache), "bits_per_image": bits}


def _tail(log: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Loss and accuracy of the last steps of a training."""
    last = [entry for entry in log if entry["step"] > (1 - LOG_TAIL) * log[-1]["step"]]
    return {name: float(np.mean([entry[name] for entry in last])) for name in ("loss", "accuracy")}
