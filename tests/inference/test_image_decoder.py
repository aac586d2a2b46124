"""ImageDecoder: Tokenizer.decode in a dtype of its own."""

from __future__ import annotations

import pytest
import torch

from alitok_fast import _library, load_tokenizer
from alitok_fast.inference.image_decoder import ImageDecoder, fast_dtype
from alitok_fast.inference.int8_twin import Int8Linear
from alitok_fast.models.loading import build
from alitok_fast.storage.checkpoint import Checkpoint, recognise
from alitok_fast.testing import ReadsBack

CPU = torch.device("cpu")


def some_tokens(config, batch: int = 3, device: torch.device = CPU) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randint(config.codebook_size, (batch, config.num_tokens), generator=rng).to(device)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tokenizers_own_dtype_needs_no_copy(tiny_tokenizer, stage, dtype):
    tokenizer = tiny_tokenizer(stage).to(dtype)
    decode, tokens = ImageDecoder(tokenizer, dtype), some_tokens(tokenizer.config)
    assert torch.equal(decode(tokens), tokenizer.decode(tokens).float())
    tokenizer.decoder.ffn[0].weight.data.mul_(2)
    assert torch.equal(decode(tokens), tokenizer.decode(tokens).float())


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_another_dtype_leaves_the_tokenizer_alone(tiny_tokenizer, stage, dtype):
    tokenizer = tiny_tokenizer(stage)
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    images = ImageDecoder(tokenizer, dtype)(some_tokens(tokenizer.config))
    assert images.dtype == torch.float32 and 0 <= images.min() <= images.max() <= 1
    after = tokenizer.state_dict()
    assert all(value.dtype == torch.float32 and torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_within_half_a_grey_level_on_trained_weights(dtype):
    """Measured: bfloat16 0.28, int8 0.22."""
    tokenizer = load_tokenizer("demo")
    tokens = some_tokens(tokenizer.config, 16)
    assert 0 < grey_levels(tokenizer, dtype, tokens) < 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_within_a_grey_level_at_full_size(golden, recipe, dtype):
    """Measured: bfloat16 0.47, int8 0.61."""
    state = recipe("tokenizer")
    tokenizer = build(Checkpoint(recognise(state), state)).eval().requires_grad_(False)
    assert 0 < grey_levels(tokenizer, dtype, some_tokens(tokenizer.config, 1)) < 1


def grey_levels(tokenizer, dtype, tokens) -> float:
    """Root mean square deviation from float32, of 255."""
    error = ImageDecoder(tokenizer, dtype)(tokens) - tokenizer.decode(tokens)
    return 255 * error.square().mean().sqrt().item()


def test_int8_keeps_the_residual_stream_in_float32(tiny_tokenizer):
    decoder = ImageDecoder(tiny_tokenizer().bfloat16(), torch.int8)
    assert decoder.dtype == torch.int8
    linears = [m for m in decoder._decoder.transformer.modules() if isinstance(m, Int8Linear)]
    assert len(linears) == 4 * len(decoder._decoder.transformer)
    assert {p.dtype for p in decoder._decoder.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "isa, expected",
    [("avx512", torch.bfloat16), ("avx2", torch.float32), ("scalar", torch.float32), (None, torch.float32)],
)
def test_bfloat16_only_where_the_cpu_multiplies_it(tiny_tokenizer, monkeypatch, isa, expected):
    monkeypatch.setattr(_library, "detected_cpu_isa", lambda: isa)
    assert fast_dtype(CPU) == ImageDecoder(tiny_tokenizer()).dtype == expected
    assert ImageDecoder(tiny_tokenizer().to(torch.float16)).dtype == torch.float16  # what the user chose stays


def test_bad_arguments(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="decode_dtype: expected float32, bfloat16, float16, int8 on cpu, got float64"):
        ImageDecoder(tokenizer, torch.float64)
    with pytest.raises(ValueError, match="decode_dtype: expected float32, bfloat16, float16 on meta, got int8"):
        ImageDecoder(tiny_tokenizer().to("meta"), torch.int8)
    decode, tokens = ImageDecoder(tokenizer), some_tokens(tokenizer.config)
    with pytest.raises(ValueError, match=r"tokens: expected shape \(B, 21\), got \(3, 20\)"):
        decode(tokens[:, 1:])
    with pytest.raises(ValueError, match=r"tokens: expected values in \[0, 32\), got 32"):
        decode(torch.full_like(tokens, 32))
    assert decode(tokens[:0]).shape == (0, 3, 16, 16)


def test_what_the_graph_holds_reads_nothing_back(tiny_tokenizer):
    decode = ImageDecoder(tiny_tokenizer())
    tokens = some_tokens(decode.config)
    with torch.no_grad(), ReadsBack() as reads:
        decode._decode(tokens)
        assert reads.count == 0
        decode(tokens)  # the check of the range does
        assert reads.count == 1


@pytest.mark.device
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_decode_as_without():
    tokenizer = load_tokenizer("demo", "cuda")
    decode = ImageDecoder(tokenizer, torch.float32)
    for batch in (1, 3, 2, 5, 4, 6, 3, 1):  # more than are kept, and some again
        tokens = some_tokens(tokenizer.config, batch, tokenizer.device)
        torch.testing.assert_close(decode(tokens), tokenizer.decode(tokens), atol=1e-5, rtol=0)
