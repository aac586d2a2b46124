"""Model configurations and presets. Every length in the package derives from these."""

from __future__ import annotations

import dataclasses
import reprlib
from dataclasses import dataclass, field, replace
from typing import Any

_REPR = reprlib.Repr()
_REPR.maxstring = 80

# The largest of each integer: far above any model there is, and small enough that what is built from one number alone
# (layers on "meta", the rotary table of a grid) stays small. Where a file holds the weights, its shapes bound the rest.
_LARGEST = {
    "num_layers": 1024,
    "encoder_layers": 1024,
    "decoder_layers": 1024,
    "grid": 256,
    "image_size": 2**14,
    "patch_size": 2**10,
    "codebook_size": 2**24,
    "num_classes": 2**24,
    "num_buffer_tokens": 2**16,
    "prefix_tokens": 2**16,
}
_LARGEST_WIDTH = 2**17
_MAY_BE_ZERO = {"num_buffer_tokens", "prefix_tokens"}


def _require(condition: bool, name: str, expected: str, actual: object) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {_REPR.repr(actual)}")


def later(default: Any) -> Any:
    """A setting that earlier releases do not know; files name it only where it is not its default."""
    return field(default=default, metadata={"later": True})


@dataclass(frozen=True)
class Config:
    """Dictionary conversion and checks of types, shared by the configurations; unknown keys raise."""

    def to_dict(self) -> dict[str, Any]:
        """The settings by name, without those that are newer than the files of earlier releases and at their default.

        So such files stay the same, earlier releases read them, and runs that began there go on.
        """
        newer = {f.name: f.default for f in dataclasses.fields(self) if "later" in f.metadata}
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in newer or value != newer[name]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]):
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted((name for name in values if name not in known), key=str)
        if unknown:
            raise ValueError(f"{cls.__name__}: unknown key {_REPR.repr(unknown[0])}; expected one of {sorted(known)}")
        return cls(**values)

    def _check_numbers(self) -> None:
        """Integers positive (of some tokens 0 or more) and no larger than any model needs; floats finite, also in
        float32; True or False. None where the type allows it."""
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            kind, _, none = str(f.type).partition(" | ")
            if none and value is None:
                continue
            if kind == "int":
                self._check_integer(f.name, value)
            elif kind == "float":
                number = isinstance(value, int | float) and not isinstance(value, bool)
                _require(number and abs(value) <= 1e6, f.name, "a finite number of at most 1e6", value)
            elif kind == "bool":
                _require(isinstance(value, bool), f.name, "True or False", value)

    def _check_integer(self, name: str, value: Any) -> None:
        least, expected = (0, "an integer >= 0") if name in _MAY_BE_ZERO else (1, "a positive integer")
        whole = isinstance(value, int) and not isinstance(value, bool)
        _require(whole and value >= least, name, expected, value)
        largest = _LARGEST.get(name, _LARGEST_WIDTH)
        _require(value <= largest, name, f"at most {largest}", value)


@dataclass(frozen=True)
class TokenizerConfig(Config):
    """AliTok tokenizer (arXiv 2506.05289, section 3).

    `stage` 1 trains everything: its decoder is causal, begins with one class token and has an auxiliary head. `stage` 2
    has another decoder for the same tokens: bidirectional, with `num_buffer_tokens` learned tokens in front.

    The last four settings are for other alignments of tokenizer and generator, such as those that the paper compares.
    By default the model is the published one.

    Args:
        prefix_tokens: tokens in front of the image tokens, 0 or more; None is 1 + grid (the paper's text has grid).
        causal_encoder: each latent token sees all patches and the latent tokens up to itself, and patches see patches
            only. Otherwise patches and latent tokens all see each other.
        causal_decoder: each position sees those up to itself, or all; None is True in stage 1 and False in stage 2.
        auxiliary_loss: stage 1 learns to paint the first row from the prefix too, with a head of its own. There is no
            such head without prefix tokens, or in stage 2.
    """

    image_size: int = 256
    patch_size: int = 16
    codebook_size: int = 4096
    code_dim: int = 32
    encoder_width: int = 768
    encoder_layers: int = 12
    encoder_heads: int = 12
    decoder_width: int = 1024
    decoder_layers: int = 24
    decoder_heads: int = 16
    num_buffer_tokens: int = 32
    stage: int = 2
    commitment: float = 0.25
    usage_decay: float = 0.99
    prefix_tokens: int | None = later(None)
    causal_encoder: bool = later(False)
    causal_decoder: bool | None = later(None)
    auxiliary_loss: bool = later(True)

    def __post_init__(self) -> None:
        self._check_numbers()
        _require(
            self.image_size % self.patch_size == 0,
            "image_size",
            f"a multiple of patch_size {self.patch_size}",
            self.image_size,
        )
        _require(self.stage in (1, 2), "stage", "1 or 2", self.stage)
        for side in ("encoder", "decoder"):
            width, heads = getattr(self, f"{side}_width"), getattr(self, f"{side}_heads")
            _require(width % heads == 0, f"{side}_width", f"a multiple of {side}_heads {heads}", width)
        largest = self.patch_size * _LARGEST["grid"]
        _require(self.image_size <= largest, "image_size", f"at most {largest} for this patch_size", self.image_size)
        _require(self.commitment >= 0, "commitment", "a number >= 0", self.commitment)
        _require(0.0 <= self.usage_decay < 1.0, "usage_decay", "a number in [0, 1)", self.usage_decay)

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_image_tokens(self) -> int:
        return self.grid**2

    @property
    def num_prefix_tokens(self) -> int:
        """As `prefix_tokens` says; if it does not, one for the first patch, then one for each of the first row."""
        return 1 + self.grid if self.prefix_tokens is None else self.prefix_tokens

    @property
    def num_tokens(self) -> int:
        """N, prefix and image tokens together."""
        return self.num_prefix_tokens + self.num_image_tokens

    @property
    def num_start_tokens(self) -> int:
        """Learned tokens in front of the decoder's sequence: the class token, or the buffer tokens."""
        return 1 if self.stage == 1 else self.num_buffer_tokens

    @property
    def decoder_is_causal(self) -> bool:
        return self.stage == 1 if self.causal_decoder is None else self.causal_decoder

    @property
    def has_auxiliary_head(self) -> bool:
        return self.stage == 1 and self.auxiliary_loss and self.num_prefix_tokens > 0


@dataclass(frozen=True)
class GeneratorConfig(Config):
    """Decoder-only transformer over tokens (arXiv 2506.05289, section 3.3).

    `prefix_tokens` is as in the tokenizer: how many tokens come before those of the image, None for 1 + grid.
    """

    width: int = 768
    num_layers: int = 24
    num_heads: int = 16
    grid: int = 16
    codebook_size: int = 4096
    num_classes: int = 1000
    hidden_multiple: int = 256
    dropout: float = 0.1
    class_dropout: float = 0.1
    guidance_scale: float = 16.0
    guidance_power: float = 1.8
    prefix_tokens: int | None = later(None)

    def __post_init__(self) -> None:
        self._check_numbers()
        _require(self.width % self.num_heads == 0, "width", f"a multiple of num_heads {self.num_heads}", self.width)
        _require(
            self.head_dim % 4 == 0, "width", "a head dimension that is a multiple of 4 (2-D rotary pairs)", self.width
        )
        for name in ("dropout", "class_dropout"):
            _require(0.0 <= getattr(self, name) < 1.0, name, "a probability in [0, 1)", getattr(self, name))
        _require(self.guidance_scale >= 0, "guidance_scale", "a number >= 0", self.guidance_scale)
        _require(self.guidance_power > 0, "guidance_power", "a number > 0", self.guidance_power)

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def hidden(self) -> int:
        """SwiGLU width: two thirds of 4 * width, rounded up to `hidden_multiple`."""
        two_thirds = 4 * self.width * 2 // 3
        return -(-two_thirds // self.hidden_multiple) * self.hidden_multiple

    @property
    def num_prefix_tokens(self) -> int:
        return 1 + self.grid if self.prefix_tokens is None else self.prefix_tokens

    @property
    def num_tokens(self) -> int:
        """N, the number of tokens of one image."""
        return self.num_prefix_tokens + self.grid**2

    @property
    def vocabulary(self) -> int:
        """Codes, one unused slot, classes, one "no condition"."""
        return self.codebook_size + 1 + self.num_classes + 1

    @property
    def first_class(self) -> int:
        """Embedding row of label 0."""
        return self.codebook_size + 1

    @property
    def no_condition(self) -> int:
        """Embedding row of the dropped label."""
        return self.vocabulary - 1


_ALITOK = TokenizerConfig()
_B = GeneratorConfig()
_L = replace(_B, width=1024, guidance_scale=6.0, guidance_power=0.7)
_XL = replace(_B, width=1280, num_layers=32, guidance_scale=13.0, guidance_power=1.4)

TOKENIZERS: dict[str, TokenizerConfig] = {
    "demo": TokenizerConfig(
        image_size=32,
        patch_size=4,
        codebook_size=1024,
        code_dim=16,
        encoder_width=128,
        encoder_layers=4,
        encoder_heads=4,
        decoder_width=128,
        decoder_layers=4,
        decoder_heads=4,
        num_buffer_tokens=8,
    ),
    "photos-64": TokenizerConfig(
        image_size=64,
        patch_size=4,
        encoder_width=128,
        encoder_layers=3,
        encoder_heads=2,
        decoder_width=128,
        decoder_layers=3,
        decoder_heads=2,
        num_buffer_tokens=16,
    ),
    "256": _ALITOK,
    "512": replace(_ALITOK, image_size=512),
}

_DEMO = GeneratorConfig(
    width=192, num_layers=6, num_heads=4, grid=8, codebook_size=1024, num_classes=10, hidden_multiple=64, dropout=0.0,
    guidance_scale=3.0, guidance_power=0.7,
)  # fmt: skip

GENERATORS: dict[str, GeneratorConfig] = {
    "demo": _DEMO,
    "photos-64": replace(_DEMO, grid=16, codebook_size=4096, dropout=0.1),
    "b": _B,
    "l": _L,
    "xl": _XL,
    "b-512": replace(_B, grid=32),
    "l-512": replace(_L, grid=32),
    "xl-512": replace(_XL, grid=32),
}


def _preset(table: dict[str, Any], kind: str, name: str):
    if name not in table:
        raise ValueError(f"name: expected a {kind} preset out of {sorted(table)}, got {name!r}")
    return table[name]


def tokenizer_preset(name: str) -> TokenizerConfig:
    """The tokenizer preset called `name`; raises ValueError naming the known ones."""
    return _preset(TOKENIZERS, "tokenizer", name)


def generator_preset(name: str) -> GeneratorConfig:
    """The generator preset called `name`; raises ValueError naming the known ones."""
    return _preset(GENERATORS, "generator", name)
