"""Images pass through a tokenizer in parts, whose memory stays with the process."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

from alitok_fast.inference.image_decoder import ImageDecoder
from alitok_fast.inference.image_encoder import ImageEncoder
from alitok_fast.inference.packed_twin import has_twin
from alitok_fast.inference.parts import images_at_a_time

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("more", [-1, 0, 1, 7])
def test_parts_are_put_together_in_order(tiny_tokenizer, dtype: torch.dtype, more: int) -> None:
    tokenizer = tiny_tokenizer(2)
    count, size = images_at_a_time(CPU) + more, tokenizer.config.image_size
    images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    encode, decode = ImageEncoder(tokenizer, dtype), ImageDecoder(tokenizer, dtype)
    tokens = encode(images)
    assert tokens.shape == (count, tokenizer.config.num_tokens) and len(tokens.unique(dim=0)) == count
    assert torch.equal(tokens, torch.cat([encode(image[None]) for image in images]))
    images = decode(tokens)
    assert torch.equal(images, torch.cat([decode(part) for part in tokens.split(images_at_a_time(CPU))]))
    if dtype == torch.bfloat16 and not has_twin(dtype, CPU):
        return  # torch's own products round otherwise for another number of images
    alone = torch.cat([decode(row[None]) for row in tokens])
    assert (images - alone).abs().max() < 1e-5


@pytest.mark.parametrize("count", [0, 1])
def test_few_images(tiny_tokenizer, count: int) -> None:
    tokenizer = tiny_tokenizer(2)
    size = tokenizer.config.image_size
    tokens = ImageEncoder(tokenizer)(torch.rand(count, 3, size, size))
    assert tokens.shape == (count, tokenizer.config.num_tokens)
    assert ImageDecoder(tokenizer)(tokens).shape == (count, 3, size, size)


KEPT = """
import ctypes, sys, torch
from alitok_fast.inference.parts import keep_freed_memory

class Information(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c mapped d e used free at_the_end".split()]

library = ctypes.CDLL(None)
library.mallinfo2.restype = Information
if "keep" in sys.argv:
    keep_freed_memory(torch.device("cpu"))
blocks = [torch.empty(20 << 20, dtype=torch.uint8) for _ in range(2)]
del blocks
print(library.mallinfo2().free >> 20)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C library does not say what it keeps")
def test_freed_memory_stays(monkeypatch) -> None:
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    kept = [
        int(subprocess.run([sys.executable, "-c", KEPT, *words], check=True, capture_output=True, text=True).stdout)
        for words in ([], ["keep"])
    ]
    assert kept[0] < 10 and kept[1] >= 40
