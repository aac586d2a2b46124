"""What is made inside torch.inference_mode() can be used outside it, and the other way round."""

from __future__ import annotations

import contextlib

import pytest
import torch
from fake_cuda import FakeCuda

from alitok_fast import Pipeline, sample
from alitok_fast._library import use_reference
from alitok_fast.inference import cuda_graph
from alitok_fast.inference.image_decoder import ImageDecoder
from alitok_fast.inference.loop import SamplingLoop
from alitok_fast.inference.packed_generator import PackedGenerator
from alitok_fast.inference.params import SamplingParams
from alitok_fast.inference.sampler import Sampler
from alitok_fast.models.kv_cache import KVCache

LABELS = [1, 2, 3]


@pytest.fixture(params=["cpu", "fake", pytest.param("cuda", marks=pytest.mark.device)])
def place(request, monkeypatch):
    """place() is a block in which models are used on a CPU, on a GPU that only pretends, or on a real one."""
    if request.param == "fake":
        cuda_graph._capture_stream.cache_clear()
        fake = FakeCuda(monkeypatch)
        yield lambda: fake.thread("main"), torch.device("cuda", 0)
        cuda_graph._capture_stream.cache_clear()
        return
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    yield contextlib.nullcontext, torch.device(request.param)


@pytest.fixture(params=[True, False], ids=["in to out", "out to in"])
def modes(request) -> tuple[torch.inference_mode, torch.inference_mode]:
    """Where a thing is made and first used, and where it is used again."""
    return torch.inference_mode(request.param), torch.inference_mode(not request.param)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("reference", [False, True])
def test_a_sampler(place, modes, tiny_generator, guided, reference):
    here, device = place
    if reference and device.type != "cpu":
        pytest.skip("the reference of cached_attention reads its position back, which cannot be recorded")
    with here(), use_reference(reference):
        gen = tiny_generator().to(device)
        with modes[0]:
            sampler, settings = Sampler(gen), {"guidance_scale": 2.0 if guided else 0.0}
            first = sampler(LABELS, **settings)
        with modes[1]:
            again = sampler(LABELS, **settings)
            prompted = sampler(LABELS, prompt_tokens=first[:, :5], **settings)
        with modes[0]:
            third = sampler(LABELS, **settings)
        assert all(torch.equal(first, other) for other in (again, prompted, third))


def test_a_sampling_loop_and_its_cache(place, modes, tiny_generator):
    here, device = place
    with here():
        gen, images = tiny_generator().to(device), torch.arange(3).to(device)
        given = torch.tensor(LABELS).to(device), None, SamplingParams(seed=5), images
        with modes[0]:
            loop, cache = SamplingLoop(gen, 3, guided=False), KVCache(gen.config, 2, device, torch.float32)
            first = loop.run(*given)
        with modes[1]:
            again = loop.run(*given)
            for tensor in (cache.keys, cache.values, cache.arrivals):
                tensor.fill_(1)
        assert torch.equal(first, again)


def test_sample(place, modes, tiny_generator):
    here, device = place
    with here():
        with modes[0]:
            gen = tiny_generator().to(device)
            first = sample(gen, LABELS)
        with modes[1]:
            assert torch.equal(sample(gen, LABELS, prompt_tokens=first[:, :3]), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_an_image_decoder(place, modes, tiny_tokenizer, dtype):
    here, device = place
    if dtype == torch.int8 and device.type != "cpu":
        pytest.skip("int8 is for the CPU")
    with here():
        tokenizer, tokens = tiny_tokenizer().to(device), torch.arange(63).view(3, 21).remainder(32).to(device)
        with modes[0]:
            decode = ImageDecoder(tokenizer, dtype)
            first = decode(tokens)
        with modes[1]:
            assert torch.equal(decode(tokens), first) and torch.equal(decode(tokens[:2]), first[:2])
        with modes[0]:
            assert torch.equal(decode(tokens), first) and torch.equal(decode(tokens[:2]), first[:2])
        assert not any(tensor.is_inference() for tensor in decode._decoder.state_dict().values())


def test_a_pipeline(place, modes, tiny_tokenizer, tiny_generator):
    here, device = place
    with here():
        tokenizer, gen = tiny_tokenizer().to(device), tiny_generator().to(device)
        with modes[0]:
            pipe = Pipeline(tokenizer, gen)
            first = pipe(LABELS)
        with modes[1]:
            again = pipe(LABELS, prompt_tokens=first.tokens[:, :4])
        assert torch.equal(first.tokens, again.tokens)
        assert [one.tobytes() for one in first.images] == [two.tobytes() for two in again.images]


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.int8])
def test_packed_weights_are_ordinary_tensors(tiny_generator, weights):
    gen = tiny_generator()
    with torch.inference_mode():
        packed = PackedGenerator(gen, weights).packed
    assert not any(value.is_inference() for value in vars(packed).values() if isinstance(value, torch.Tensor))
