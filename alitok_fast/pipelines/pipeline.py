"""Class labels in, pictures out."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from alitok_fast import __version__
from alitok_fast.inference.image_decoder import ImageDecoder
from alitok_fast.inference.params import SamplingParams, sampling_params
from alitok_fast.inference.quantized_generator import QuantizedGenerator
from alitok_fast.inference.sampler import Sampler, as_ids
from alitok_fast.inference.step_model import prepare
from alitok_fast.models import Generator, Tokenizer
from alitok_fast.models.loading import build, open_checkpoint
from alitok_fast.models.tokenizer import encoder_fingerprint
from alitok_fast.pipelines.class_names import ClassNames, Label, trained_classes
from alitok_fast.storage.checkpoint import Checkpoint
from alitok_fast.storage.images import to_uint8
from alitok_fast.storage.text import shown


@dataclass(frozen=True)
class Samples:
    """`pixels` (B, H, W, 3) uint8, `tokens` (B, N) int64, and all that is needed to sample them again."""

    pixels: np.ndarray
    tokens: Tensor
    metadata: dict[str, Any]

    @property
    def images(self) -> list[Image.Image]:
        """The pictures as PIL images, made at each call."""
        return [Image.fromarray(pixels) for pixels in self.pixels]

    def __len__(self) -> int:
        return len(self.pixels)


class Pipeline:
    """A generator, the tokenizer that it was trained on, and the names of its classes.

    It can be pickled and copied. Several threads may call it; they take turns (docs/tuning.md).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        generator: Generator | QuantizedGenerator,
        class_names: Sequence[str] | None = None,
        source: str = "memory",
        weight_dtype: torch.dtype | None = None,
        decode_dtype: torch.dtype | None = None,
        activation_dtype: torch.dtype | None = None,
    ) -> None:
        """A pipeline of two models.

        Args:
            class_names: one per class, in the order of their numbers; None where classes go by number. A generator
                with fewer names than columns has only the named classes.
            source: a name for the metadata.
            weight_dtype: dtype of the generator's packed matrices, as for `alitok_fast.prepare`: on the CPU
                torch.float32, torch.bfloat16 or torch.int8, elsewhere torch.int8 or torch.float8_e4m3fn; None takes
                the generator's. The packed weights are a copy, made anew when the generator's weights have changed.
            decode_dtype: dtype in which tokens are decoded to images, as for `ImageDecoder`: None is bfloat16 where the
                machine multiplies it faster, which is about half a grey level from float32. torch.int8 is for the CPU.
            activation_dtype: what int8 matrices of the generator are multiplied with on the CPU, as for
                `alitok_fast.prepare`: torch.int8 is faster for many images and less exact than None.

        Raises:
            TypeError, ValueError: the two models do not fit together, `class_names` do not name the generator's
                classes, `weight_dtype` does not fit it, or `decode_dtype` is one that `ImageDecoder` does not take.
        """
        for name in ("grid", "num_prefix_tokens", "codebook_size"):
            have, want = getattr(generator.config, name), getattr(tokenizer.config, name)
            if have != want:
                raise ValueError(f"generator: expected {name} {want} as in the tokenizer, got {have}")
        if tokenizer.device != generator.device:
            raise ValueError(f"tokenizer: expected device {generator.device}, got {tokenizer.device}")
        self.tokenizer = tokenizer
        self.generator = generator
        self.classes = ClassNames(class_names, generator.config.num_classes)
        self.source = source
        self.weight_dtype, self.activation_dtype = weight_dtype, activation_dtype
        self.image_decoder = ImageDecoder(tokenizer, decode_dtype)
        self._sampler: Sampler | None = None
        if weight_dtype is not None or activation_dtype is not None or generator.device.type != "cpu":
            # waits for what this stream still does to the weights
            self._sampler = Sampler(generator, weight_dtype, activation_dtype=activation_dtype)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        tokenizer: str | os.PathLike | None = None,
        weight_dtype: torch.dtype | None = None,
        decode_dtype: torch.dtype | None = None,
        weights: str = "ema",
        activation_dtype: torch.dtype | None = None,
    ) -> Pipeline:
        """Load both models; `weight_dtype`, `decode_dtype` and `activation_dtype` as for the constructor, `weights` as
        for `load_generator`.

        With `weight_dtype` on a GPU, the generator's block weights are kept in those 8 bits alone: `generator` is then
        the `QuantizedGenerator`, which samples but does not train.

        `name_or_path`: "demo" (shipped with the package), a folder that holds `tokenizer/` and `generator/`, a hub
        repository of that layout, or a generator's checkpoint, for which `tokenizer` names the tokenizer's. A
        generator of 1,000 classes that does not name them is taken for one of ImageNet's.
        Raises FileNotFoundError or ValueError saying what was expected and found.
        """
        opened = open_checkpoint("generator", name_or_path, weights=weights)
        other = open_checkpoint("tokenizer", name_or_path if tokenizer is None else tokenizer, weights=weights)
        _check_trained_together(opened, other)
        generator: Any = build(opened).to(device, dtype).eval()
        decoder: Any = build(other).to(device, dtype).eval()
        if weight_dtype is not None and generator.device.type != "cpu":
            generator = prepare(generator, weight_dtype)
        classes = trained_classes(opened.provenance.get("classes"), generator.config)
        dtypes = weight_dtype, decode_dtype, activation_dtype
        return cls(decoder, generator, classes.names or None, str(name_or_path), *dtypes)

    def label_ids(self, labels: Label | Sequence[Label] | Tensor | np.ndarray) -> list[int]:
        """Class numbers of labels given by number or by name, as `ClassNames.ids`."""
        return self.classes.ids(labels)

    @property
    def sampler(self) -> Sampler:
        """The sampler of the tokens. On the CPU, the generator is packed at the first use, once for all calls."""
        if self._sampler is None:
            self._sampler = Sampler(self.generator)
        return self._sampler

    def __call__(
        self,
        labels: Label | Sequence[Label] | Tensor | np.ndarray,
        params: SamplingParams | None = None,
        *,
        batch_size: int | None = None,
        image_ids: Sequence[int] | None = None,
        prompt_tokens: Tensor | None = None,
        on_batch: Callable[[int], None] | None = None,
        **overrides: Any,
    ) -> Samples:
        """Sample one picture per label.

        Args:
            labels: class numbers or names.
            params: the settings; None takes the defaults of `SamplingParams`.
            batch_size: pictures sampled together; None samples all at once. It does not change the pictures beyond
                rounding.
            image_ids: key each picture's noise; None counts from 0.
            prompt_tokens: (B, n <= N) int64, one row per label: tokens to keep, the pictures are completed from there.
            on_batch: called with the number of pictures of each batch, once it is sampled.
            overrides: single settings of `SamplingParams` in place of those in `params`, such as seed=3.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
            RuntimeError: logits or pixels became NaN or infinite.
        """
        ids = self.classes.ids(labels)
        if not ids:
            raise ValueError("labels: expected at least one label, got none")
        keys = list(range(len(ids))) if image_ids is None else as_ids("image_ids", image_ids).tolist()
        if len(keys) != len(ids):
            raise ValueError(f"image_ids: expected {len(ids)}, one per label, got {len(keys)}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size: expected None or at least 1, got {batch_size}")
        chosen = sampling_params(params, overrides).resolved(self.generator.config)
        if prompt_tokens is not None and len(prompt_tokens) != len(ids):
            raise ValueError(f"prompt_tokens: expected {len(ids)} rows, one per label, got {len(prompt_tokens)}")
        tokens, pixels = [], []
        size = batch_size or len(ids)
        for start in range(0, len(ids), size):
            batch = slice(start, start + size)
            prompt = None if prompt_tokens is None else prompt_tokens[batch]
            tokens.append(self.sampler(ids[batch], chosen, image_ids=keys[batch], prompt_tokens=prompt))
            pixels.append(to_uint8(self.image_decoder(tokens[-1])))
            if on_batch is not None:
                on_batch(len(tokens[-1]))
        metadata = {**self.metadata(chosen), "labels": ids, "image_ids": keys}
        return Samples(np.concatenate(pixels), torch.cat(tokens), metadata)

    def metadata(self, params: SamplingParams) -> dict[str, Any]:
        """What determines a picture besides its label and its id, as JSON values."""
        return {
            **params.resolved(self.generator.config).to_dict(),
            "model": self.source,
            "class_names": list(self.classes.names) or None,
            "dtype": _name(self.generator.dtype),
            "weight_dtype": _name(self.weight_dtype or self.generator.weight_dtype),
            "activation_dtype": self.activation_dtype and _name(self.activation_dtype),
            "decode_dtype": _name(self.image_decoder.dtype),
            "tokenizer_stage": self.tokenizer.config.stage,
            "device": str(self.generator.device),
            "versions": {"alitok_fast": __version__, "torch": torch.__version__},
        }


def _check_trained_together(generator: Checkpoint, tokenizer: Checkpoint) -> None:
    """Where the generator knows which tokenizer's tokens it was trained on, that it gets them."""
    expected = generator.provenance.get("tokenizer")
    if expected is None or expected == tokenizer.provenance.get("fingerprint"):
        return
    got = encoder_fingerprint(tokenizer.state)
    if got != expected:
        raise ValueError(
            f"tokenizer: expected the one that the generator was trained with, fingerprint {shown(expected)}, got {got}"
            f" in {tokenizer.path}; Pipeline(tokenizer, generator) takes any"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
