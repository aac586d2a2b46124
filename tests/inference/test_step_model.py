"""What steps: the one place that packs, models that change after they were packed, copies and pickles."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from alitok_fast import Pipeline, Sampler, SamplingParams, plan, prepare, sample, use_reference
from alitok_fast.inference import sampler as sampler_module
from alitok_fast.inference.image_decoder import ImageDecoder
from alitok_fast.inference.packed_generator import PackedGenerator
from alitok_fast.inference.quantized_generator import QuantizedGenerator
from alitok_fast.inference.step_model import StepModel


@pytest.mark.parametrize("weight_dtype", [None, torch.float32, torch.bfloat16, torch.int8])
def test_a_generator_on_the_cpu_is_packed(tiny_generator, weight_dtype):
    prepared = prepare(tiny_generator(), weight_dtype)
    assert isinstance(prepared, PackedGenerator) and prepared.weight_dtype == (weight_dtype or torch.float32)
    assert prepare(prepared) is prepared and prepare(prepared, prepared.weight_dtype) is prepared


def test_elsewhere_it_steps_itself_or_in_8_bits(tiny_generator):
    gen = tiny_generator().to("meta", torch.bfloat16)  # stands in for a GPU
    assert prepare(gen) is gen and prepare(gen, torch.bfloat16) is gen
    assert isinstance(prepare(gen, torch.int8), QuantizedGenerator)


def test_the_reference_steps_itself(tiny_generator):
    gen = tiny_generator()
    with use_reference():
        assert prepare(gen) is gen


def test_float16_is_packed_exactly(tiny_generator):
    gen = tiny_generator().half()
    prepared = prepare(gen)
    assert prepared.weight_dtype == torch.float32
    assert torch.equal(sample(gen, [1, 2]), sample(copy.deepcopy(gen).float(), [1, 2]))


def test_what_cannot_step_is_named(tiny_tokenizer):
    with pytest.raises(TypeError, match="gen: expected a generator, got Tokenizer"):
        prepare(tiny_tokenizer())


def test_the_protocol_is_whole(tiny_generator):
    gen = tiny_generator()
    for model in (gen, PackedGenerator(gen), QuantizedGenerator(gen, torch.int8)):
        assert isinstance(model, StepModel) and all(isinstance(part, torch.Tensor) for part in model.tensors())
        assert not model.training
        gen.train()
        assert model.training, "read when it is used"
        gen.eval()


@pytest.mark.parametrize("place", ["", "blocks.0.attn.qkv"])
def test_a_forward_pass_of_more_than_its_weights_is_refused(tiny_generator, place):
    """Adapters and hooks change gen(...), and a packed copy of the weights would sample without them."""
    gen = tiny_generator()
    handle = gen.get_submodule(place).register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(ValueError, match="hook"):
        sample(gen, [1])
    handle.remove()
    assert sample(gen, [1]).shape[0] == 1


def test_changed_weights_are_packed_anew(tiny_generator):
    gen = tiny_generator()
    sampler = Sampler(gen)
    before = sampler([1, 2], seed=3)
    packed = sampler.model
    assert torch.equal(sampler([1, 2], seed=3), before) and sampler.model is packed, "unchanged, the copy stays"
    with torch.no_grad():
        gen.output.bias[:16] += 9
    after = sampler([1, 2], seed=3)
    assert not torch.equal(after, before) and torch.equal(after, sample(gen, [1, 2], seed=3))


def test_a_packed_generator_that_is_given_stays(tiny_generator):
    gen = tiny_generator()
    sampler = Sampler(PackedGenerator(gen))
    before = sampler([1, 2])
    with torch.no_grad():
        gen.output.bias[:16] += 9
    assert torch.equal(sampler([1, 2]), before)


def test_a_changed_tokenizer_decodes_anew(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    decode, tokens = ImageDecoder(tokenizer, torch.bfloat16), torch.zeros(1, tokenizer.config.num_tokens).long()
    before = decode(tokens)
    with torch.no_grad():
        tokenizer.decoder.ffn[0].bias += 1
    after = decode(tokens)
    assert not torch.equal(after, before)
    assert torch.equal(after, ImageDecoder(tokenizer, torch.bfloat16)(tokens))


def test_after_training_mode_it_goes_on(tiny_tokenizer, tiny_generator):
    gen = tiny_generator().train()
    pipe = Pipeline(tiny_tokenizer(), gen)
    for _ in range(2):
        with pytest.raises(ValueError, match="gen: expected evaluation mode, got training mode"):
            pipe(3)
        gen.eval()
        assert len(pipe(3)) == 1
        gen.train()


@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))], ids=["copy", "pickle"]
)
def test_copies_sample_the_same(tiny_folder, make):
    pipe = Pipeline.from_pretrained(tiny_folder)
    expected = pipe(["c3", "c4"], seed=3)
    twin = make(pipe)
    out = twin(["c3", "c4"], SamplingParams(seed=3))
    assert torch.equal(out.tokens, expected.tokens) and (out.pixels == expected.pixels).all()
    assert torch.equal(make(pipe.sampler)([3, 4], seed=3), expected.tokens)
    assert torch.equal(make(pipe.image_decoder)(expected.tokens), pipe.image_decoder(expected.tokens))


def test_a_large_cache_is_freed_after_the_call(tiny_generator, monkeypatch):
    gen = tiny_generator()
    sampler = Sampler(gen)
    sampler([1])
    assert len(sampler._loops) == 1
    monkeypatch.setattr(sampler_module, "KEPT_BYTES", plan(gen).bytes_per_image)
    sampler([1] * 8)
    assert not sampler._loops
