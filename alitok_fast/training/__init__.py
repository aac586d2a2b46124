"""Training of the tokenizer (stages 1 and 2) and of the generator; here, what a training loop of one's own needs.

Importing the package is light: torch loads with the first name that is used.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "adversarial_loss": "alitok_fast.training.losses",
    "auxiliary_loss": "alitok_fast.training.losses",
    "checkpoint_activations": "alitok_fast.training.layers",
    "clusters_of": "alitok_fast.training.clusters",
    "discriminator_loss": "alitok_fast.training.losses",
    "generator_loss": "alitok_fast.training.losses",
    "layers_of": "alitok_fast.training.layers",
    "reconstruction_loss": "alitok_fast.training.losses",
    "update_codebook": "alitok_fast.training.clusters",
}

__all__ = [*_PUBLIC]  # noqa: PLE0604 - the names that __getattr__ knows


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'alitok_fast.training' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
