"""Tokenizer and generator."""

from alitok_fast.models.generator import Generator
from alitok_fast.models.loading import load_generator, load_tokenizer, save_model
from alitok_fast.models.tokenizer import Tokenizer, aux_target, stage2_from_stage1

__all__ = [
    "Generator",
    "Tokenizer",
    "aux_target",
    "load_generator",
    "load_tokenizer",
    "save_model",
    "stage2_from_stage1",
]
