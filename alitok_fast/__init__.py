"""AliTok image tokenizer and generator with native CPU and CUDA kernels.

| name | what it is |
|---|---|
| `Pipeline` | class labels in, pictures out |
| `SamplingParams` | guidance, temperature, top-k, top-p and seed, as one object |
| `load_tokenizer`, `load_generator`, `save_model` | models from files and to files |
| `Tokenizer`, `TokenizerConfig` | images to tokens and back |
| `Generator`, `GeneratorConfig` | logits of the next token, for training and sampling |
| `sample`, `Sampler` | tokens from a generator; a `Sampler` keeps what many calls share |
| `prepare`, `PackedGenerator`, `QuantizedGenerator` | a generator's weights rounded and laid out for sampling |
| `ImageDecoder` | tokens to images, at speed |
| `plan` | the memory that sampling needs, and how many images fit |
| `on_rows` | image rows while the tokens are still being sampled |
| `use_reference` | PyTorch definitions in place of the native operators |
| `alitok_fast.ops` | the operators as functions (docs/operators.md) |
| `alitok_fast.serving` | an engine for requests that arrive at any time, over HTTP too (docs/serving.md) |

Importing the package is light: torch and the native extension load with the first name that is used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.2.0"

_PUBLIC = {
    "Generator": "alitok_fast.models",
    "GeneratorConfig": "alitok_fast.config",
    "ImageDecoder": "alitok_fast.inference.image_decoder",
    "PackedGenerator": "alitok_fast.inference.packed_generator",
    "Pipeline": "alitok_fast.pipelines.pipeline",
    "QuantizedGenerator": "alitok_fast.inference.quantized_generator",
    "Sampler": "alitok_fast.inference.sampler",
    "SamplingParams": "alitok_fast.inference.params",
    "Tokenizer": "alitok_fast.models",
    "TokenizerConfig": "alitok_fast.config",
    "load_generator": "alitok_fast.models",
    "load_tokenizer": "alitok_fast.models",
    "on_rows": "alitok_fast.inference.streaming",
    "plan": "alitok_fast.inference.memory",
    "prepare": "alitok_fast.inference.step_model",
    "sample": "alitok_fast.inference.sampler",
    "save_model": "alitok_fast.models",
    "use_reference": "alitok_fast._library",
}

__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604 - the names that __getattr__ knows


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'alitok_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
