"""Class labels in, pictures out."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from alitok_fast import __version__
from alitok_fast.inference.image_decoder import ImageDecoder
from alitok_fast.inference.packed_generator import PackedGenerator
from alitok_fast.inference.quantized_generator import QuantizedGenerator
from alitok_fast.inference.sampler import Sampler, check_settings
from alitok_fast.models import Generator, Tokenizer
from alitok_fast.models.loading import build, open_checkpoint
from alitok_fast.storage.images import to_uint8

Label = int | str


@dataclass(frozen=True)
class Samples:
    """`images` (PIL, RGB), their `tokens` (B, N) int64, and all that is needed to draw them again."""

    images: list[Image.Image]
    tokens: Tensor
    metadata: dict[str, Any]


class Pipeline:
    """A generator, the tokenizer that it was trained on, and the names of its classes."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        generator: Generator | QuantizedGenerator,
        class_names: Sequence[str] | None = None,
        source: str = "memory",
        weight_dtype: torch.dtype | None = None,
        decode_dtype: torch.dtype | None = None,
    ) -> None:
        """A pipeline of models that are there already.

        Args:
            class_names: one a class, or None where classes go by number.
            source: a name for the metadata.
            weight_dtype: what the generator's matrices are packed in: on the CPU torch.float32, torch.bfloat16 or torch.int8
                (`PackedGenerator`), elsewhere torch.int8 or torch.float8_e4m3fn (`QuantizedGenerator`); None is the
                generator's. They are a copy, on the CPU always: a `generator` changed afterwards needs a new pipeline.
            decode_dtype: what tokens are decoded to images in, as for `ImageDecoder`: None is bfloat16 where the
                machine multiplies it faster, about half a grey level from float32. torch.int8 is for the CPU. A
                tokenizer changed afterwards needs a new pipeline.

        Raises:
            ValueError: the two models do not fit together, `weight_dtype` does not fit the generator, or
                `decode_dtype` is none of `ImageDecoder`'s.
        """
        for name in ("grid", "codebook_size"):
            have, want = getattr(generator.config, name), getattr(tokenizer.config, name)
            if have != want:
                raise ValueError(f"generator: expected {name} {want} as in the tokenizer, got {have}")
        if tokenizer.device != generator.device:
            raise ValueError(f"tokenizer: expected device {generator.device}, got {tokenizer.device}")
        self.tokenizer = tokenizer
        self.generator = generator
        self.class_names = tuple(class_names) if class_names else None
        self.source = source
        self.weight_dtype = generator.weight_dtype if isinstance(generator, QuantizedGenerator) else weight_dtype
        self.image_decoder = ImageDecoder(tokenizer, decode_dtype)
        packed = _packed(generator, weight_dtype)
        if packed is None and generator.device.type != "cpu":
            packed = generator  # nothing is packed, and the sampler waits for what this stream does to the weights
        self._sampler = None if packed is None else Sampler(packed)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        tokenizer: str | os.PathLike | None = None,
        weight_dtype: torch.dtype | None = None,
        decode_dtype: torch.dtype | None = None,
    ) -> Pipeline:
        """Load both models; `weight_dtype` and `decode_dtype` as for the constructor.

        With `weight_dtype` on a device that is not the CPU, the generator's block weights are kept in those 8 bits alone:
        `generator` is then the `QuantizedGenerator`, which samples but does not train.

        `name_or_path`: "demo" (shipped with the package), a folder that holds `tokenizer/` and `generator/`, a hub
        repository of that layout, or a generator's checkpoint, for which `tokenizer` names the tokenizer's.
        Raises FileNotFoundError or ValueError saying what was expected and found.
        """
        generator = open_checkpoint("generator", name_or_path)
        tokenizer = open_checkpoint("tokenizer", name_or_path if tokenizer is None else tokenizer)
        models = [build(part).to(device, dtype).eval() for part in (tokenizer, generator)]
        if weight_dtype is not None and models[1].device.type != "cpu":
            models[1] = QuantizedGenerator(models[1], weight_dtype)
        names = generator.provenance.get("classes")
        return cls(*models, names, str(name_or_path), weight_dtype, decode_dtype)

    @property
    def sampler(self) -> Sampler:
        """What draws the tokens. On the CPU the generator is packed for it at the first use, once for all calls."""
        if self._sampler is None:
            self._sampler = Sampler(self.generator)
        return self._sampler

    def label_ids(self, labels: Label | Sequence[Label] | Tensor | np.ndarray) -> list[int]:
        """Class numbers of labels given by number or by name; ValueError lists the names there are."""
        if isinstance(labels, Tensor | np.ndarray):
            labels = labels.tolist()
        if isinstance(labels, int | str):
            labels = [labels]
        return [self._label_id(label) for label in labels]

    def _label_id(self, label: Label) -> int:
        names = [name.casefold() for name in self.class_names or ()]
        if isinstance(label, str) and label.strip().casefold() in names:
            return names.index(label.strip().casefold())
        classes = self.generator.config.num_classes
        try:
            number = int(label) if isinstance(label, str) else label
        except ValueError:
            expected = ", ".join(self.class_names) if names else "no name (this model has none)"
            raise ValueError(f"labels: expected one of 0..{classes - 1} or {expected}, got {label!r}") from None
        if not isinstance(number, int | np.integer) or isinstance(number, bool):
            raise TypeError(f"labels: expected integers or names, got {type(label).__name__}")
        if not 0 <= number < classes:
            raise ValueError(f"labels: expected values in [0, {classes}), got {number}")
        return int(number)

    def label_name(self, label: int) -> str:
        """The class's name, or its number where it has none."""
        known = self.class_names is not None and label < len(self.class_names)
        return self.class_names[label] if known else str(label)

    def __call__(
        self,
        labels: Label | Sequence[Label] | Tensor | np.ndarray,
        seed: int = 0,
        guidance_scale: float | None = None,
        guidance_power: float | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        batch_size: int | None = None,
        image_ids: Sequence[int] | None = None,
        prompt_tokens: Tensor | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> Samples:
        """Draw one picture per label; settings as for `alitok_fast.sample`, None takes the model's default.

        Args:
            labels: class numbers or names.
            batch_size: pictures drawn together; None draws all at once. It does not change the pictures beyond
                rounding.
            image_ids: key each picture's noise; None counts from 0.
            prompt_tokens: (B, n <= N) int64, one row per label: tokens to keep, the pictures are completed from there.
            on_batch: called with the number of pictures of each batch, once it is drawn.
        """
        ids = self.label_ids(labels)
        keys = list(range(len(ids))) if image_ids is None else [int(key) for key in image_ids]
        if len(keys) != len(ids):
            raise ValueError(f"image_ids: expected {len(ids)}, one per label, got {len(keys)}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size: expected None or at least 1, got {batch_size}")
        settings = self.settings(guidance_scale, guidance_power, temperature, top_k, top_p, seed)
        if prompt_tokens is not None and len(prompt_tokens) != len(ids):
            raise ValueError(f"prompt_tokens: expected {len(ids)} rows, one per label, got {len(prompt_tokens)}")
        size = batch_size or max(len(ids), 1)
        tokens, images = [], []
        for start in range(0, max(len(ids), 1), size):  # no label at all: let `sample` say so
            batch = slice(start, start + size)
            prompt = None if prompt_tokens is None else prompt_tokens[batch]
            drawn = self.sampler(ids[batch], image_ids=keys[batch], prompt_tokens=prompt, **settings)
            tokens.append(drawn)
            images += [Image.fromarray(image) for image in to_uint8(self.image_decoder(drawn))]
            if on_batch is not None:
                on_batch(len(drawn))
        metadata = {**self.metadata(settings), "labels": ids, "image_ids": keys}
        return Samples(images, torch.cat(tokens), metadata)

    def settings(
        self,
        guidance_scale: float | None = None,
        guidance_power: float | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Arguments of `alitok_fast.sample`, checked, with the model's defaults filled in."""
        config = self.generator.config
        return asdict(check_settings(config, guidance_scale, guidance_power, temperature, top_k, top_p, seed))

    def metadata(self, settings: dict[str, Any]) -> dict[str, Any]:
        """What decides about a picture besides its label and its id: JSON values only."""
        return {
            **settings,
            "model": self.source,
            "class_names": list(self.class_names) if self.class_names else None,
            "dtype": _name(self.generator.dtype),
            "weight_dtype": _name(self.weight_dtype or self.generator.dtype),
            "decode_dtype": _name(self.image_decoder.dtype),
            "tokenizer_stage": self.tokenizer.config.stage,
            "device": str(self.generator.device),
            "versions": {"alitok_fast": __version__, "torch": torch.__version__},
        }


def _packed(
    generator: Generator | QuantizedGenerator, weight_dtype: torch.dtype | None
) -> PackedGenerator | QuantizedGenerator | None:
    """What steps out of weights in this dtype, a copy of the generator's; None takes the generator as it is."""
    if isinstance(generator, QuantizedGenerator):
        if weight_dtype not in (None, generator.weight_dtype):
            raise ValueError(
                f"weight_dtype: expected the generator's {_name(generator.weight_dtype)}, got {_name(weight_dtype)}"
            )
        return generator
    if weight_dtype is None:
        return None
    pack = PackedGenerator if generator.device.type == "cpu" else QuantizedGenerator
    return pack(generator, weight_dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
