"""A generator with 8-bit weights steps as one whose weights are those rounded ones."""

import copy
import pickle

import pytest
import torch
from torch import nn

from alitok_fast import plan, sample
from alitok_fast._library import use_reference
from alitok_fast.config import GENERATORS
from alitok_fast.inference.memory import MemoryPlan
from alitok_fast.inference.quantized_generator import QuantizedGenerator
from alitok_fast.inference.sampler import Sampler
from alitok_fast.models import Generator
from alitok_fast.ops import fused_linear
from alitok_fast.ops.quantized_linear import LARGEST, MOST_ROWS, dequantize_weight, quantize_weight, widen_weight
from alitok_fast.testing import step_logits

WEIGHTS = pytest.mark.parametrize("weights", list(LARGEST), ids=["int8", "e4m3"])


def written_out(gen, weights):
    """The generator with the rounded weights in its own dtype."""
    gen = copy.deepcopy(gen)
    for module in gen.blocks.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = dequantize_weight(*quantize_weight(module.weight, weights)).to(module.weight.dtype)
    return gen


def logits_of(model, ids, labels):
    fed = torch.cat([model.condition_ids(labels, len(ids))[:, None], ids], 1)
    return step_logits(model, fed, model.new_cache(len(ids)))


@WEIGHTS
def test_logits_are_those_of_the_rounded_weights(device, tiny_generator, weights):
    gen = tiny_generator().to(device)
    ids, labels = torch.arange(15, device=device).view(3, 5) % gen.config.codebook_size, torch.arange(3, device=device)
    quantised = logits_of(QuantizedGenerator(gen, weights), ids, labels)
    torch.testing.assert_close(quantised, logits_of(written_out(gen, weights), ids, labels), rtol=1e-4, atol=1e-4)
    original = logits_of(gen, ids, labels)
    assert not torch.equal(quantised, original)
    assert (quantised - original).norm() < (0.05 if weights == torch.int8 else 0.15) * original.norm()
    with use_reference():
        torch.testing.assert_close(
            logits_of(QuantizedGenerator(gen, weights), ids, labels), quantised, rtol=1e-4, atol=1e-4
        )


@WEIGHTS
def test_sampling(device, tiny_generator, weights):
    """Beside the generator with the rounded weights, greedily: the same tokens but for near-ties."""
    gen = tiny_generator().to(device)
    options = {"guidance_scale": 1.5, "temperature": 0}
    tokens = sample(QuantizedGenerator(gen, weights), range(10), **options)
    assert tokens.shape == (10, gen.config.num_tokens)
    assert (tokens == sample(written_out(gen, weights), range(10), **options)).float().mean() > 0.9


def test_more_rows_than_the_kernel_takes(device, tiny_generator):
    quantised = QuantizedGenerator(tiny_generator().to(device), torch.int8)
    labels = [i % 10 for i in range(20)]  # 40 rows with guidance
    together, first = sample(quantised, labels, seed=3), sample(quantised, labels[:4], seed=3)
    assert (together[:4] == first).float().mean() > 0.9


@WEIGHTS
def test_the_generator_stays_as_it_was(tiny_generator, weights):
    gen = tiny_generator()
    before = {name: tensor.clone() for name, tensor in gen.state_dict().items()}
    quantised = QuantizedGenerator(gen, weights)
    assert all(torch.equal(tensor, before[name]) for name, tensor in gen.state_dict().items())
    assert isinstance(gen.blocks[0].attn.qkv, nn.Linear)
    layers = [m for m in gen.blocks.modules() if isinstance(m, nn.Linear)]
    linear = sum(m.weight.numel() for m in layers)
    rest = sum(t.numel() for t in gen.blocks.state_dict().values()) - linear
    scales = sum(m.out_features * -(-m.in_features // 64) for m in layers)
    assert quantised.weight_bytes == linear + 4 * rest + 2 * scales


def test_memory_plan_counts_the_cache_in_the_dtype_of_the_activations(tiny_generator):
    gen = tiny_generator().bfloat16()
    quantised = QuantizedGenerator(gen, torch.int8)
    assert quantised.new_cache(1).keys.dtype == torch.bfloat16
    assert plan(quantised).bytes_per_image == plan(gen).bytes_per_image
    smaller = plan(quantised, kv_dtype=torch.float8_e4m3fn)
    assert smaller.bytes_per_image < plan(quantised).bytes_per_image


def test_other_dtypes_are_refused(tiny_generator):
    with pytest.raises(ValueError, match="dtype: expected int8 or float8_e4m3fn, got bfloat16"):
        QuantizedGenerator(tiny_generator(), torch.bfloat16)


# ---- weights that are written out for many inputs ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@WEIGHTS
def test_written_out_weights_change_no_bit(device, tiny_generator, weights, dtype):
    """Beside the way that writes each out for one product."""
    gen = tiny_generator().to(device, dtype)
    once, each = QuantizedGenerator(gen, weights), QuantizedGenerator(gen, weights)
    rows = once.most_inputs + 1
    once.expect(rows)
    ids = torch.arange(2 * rows, device=device).view(rows, 2) % gen.config.codebook_size
    for many in (ids, ids[: once.most_inputs // 2]):
        positions = torch.zeros(len(many), dtype=torch.int64, device=device)
        caches = once.new_cache(len(many)), each.new_cache(len(many))
        assert torch.equal(once.step(many, caches[0], positions), each.step(many, caches[1], positions))
        assert torch.equal(caches[0].keys, caches[1].keys) and torch.equal(caches[0].values, caches[1].values)


@WEIGHTS
def test_written_out_weights_are_read(device, tiny_generator, weights, monkeypatch):
    """By steps of many inputs and by no others; not inside use_reference, whose weights are never rounded again."""
    model = QuantizedGenerator(tiny_generator().to(device), weights)
    model.expect(model.most_inputs + 1)
    seen = []
    for name in ("module", "_wide"):
        part = getattr(model, name)
        monkeypatch.setattr(
            part, "step", lambda *given, name=name: seen.append((name, given[0].numel())), raising=False
        )
    few, many = (torch.zeros(rows, 2, dtype=torch.int64) for rows in (model.most_inputs // 2, model.most_inputs))
    for ids in (few, many):
        model.step(ids, None, None)
    with use_reference():
        model.step(many, None, None)
    assert [name for name, _ in seen] == ["module", "_wide", "module"]


def test_they_are_made_once_and_when_they_are_needed(device, tiny_generator):
    model = QuantizedGenerator(tiny_generator().to(device), torch.int8)
    before, names, size = len(model.tensors()), list(model.state_dict()), model.weight_bytes
    images = model.most_inputs // 2  # with guidance, two rows each
    sampler = Sampler(model, window=1)
    sampler([1] * images)
    model.expect(model.most_inputs)
    with use_reference():
        model.expect(2 * model.most_inputs)
    assert model.wide_bytes > 0 and len(model.tensors()) == before
    sampler([1] * (images + 1))
    assert model.wide_bytes == 0 and len(model.tensors()) > before
    made = {tensor.data_ptr() for tensor in model.tensors()}
    model.expect(4 * model.most_inputs)
    assert {tensor.data_ptr() for tensor in model.tensors()} == made
    assert list(model.state_dict()) == names and model.weight_bytes == size
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.wide_bytes > 0 and len(other.tensors()) == before  # a copy makes its own
        other.expect(model.most_inputs + 1)
        assert other.wide_bytes == 0
    assert model.wide_bytes == 0


def test_windows_count(device, tiny_generator):
    model = QuantizedGenerator(tiny_generator().to(device), torch.int8)
    images = model.most_inputs // 4
    Sampler(model, window=2)([1] * images)
    assert model.wide_bytes > 0
    Sampler(model, window=3)([1] * images)
    assert model.wide_bytes == 0


@pytest.mark.parametrize(("capability", "most"), [((8, 0), 32), ((9, 0), 128)])
def test_how_many_inputs_the_kernels_take(monkeypatch, capability, most):
    """On a GPU as many as the fused ones; wherever these do not fit, as many as quantized_linear takes."""
    model = QuantizedGenerator(Generator(GENERATORS["b"], "meta").bfloat16(), torch.int8)
    assert model.most_inputs == MOST_ROWS
    monkeypatch.setattr(fused_linear, "has_clusters", lambda _: capability >= (9, 0))
    model.device = torch.device("cuda")
    assert model.most_inputs == most
    model.dtype = torch.float16
    assert model.most_inputs == MOST_ROWS


def test_memory_plan_counts_them_once(device, tiny_generator, monkeypatch):
    gen = tiny_generator().to(device).bfloat16()
    model = QuantizedGenerator(gen, torch.int8)
    linear = sum(m.weight.numel() for m in gen.blocks.modules() if isinstance(m, nn.Linear))
    most, one = model.most_inputs, plan(model).bytes_per_image
    planned = plan(model)
    assert (planned.few_images, planned.bytes_for_many) == (most // 2, 2 * linear)
    assert planned.batch_bytes(most // 2) == most // 2 * one
    assert planned.batch_bytes(most // 2 + 1) == (most // 2 + 1) * one + 2 * linear
    assert plan(model, guided=False).few_images == most and plan(model, window=3).few_images == most // 6
    assert plan(gen).bytes_for_many == 0
    model.expect(most + 1)
    assert plan(model).batch_bytes(most) == most * one


@pytest.mark.parametrize(
    ("usable", "largest"), [(0, 0), (99, 0), (100, 1), (499, 4), (500, 5), (999, 5), (1249, 5), (1350, 6), (2050, 13)]
)
def test_the_largest_batch_leaves_room_for_them(usable, largest):
    """Where they do not fit, a batch that needs none still does."""
    planned = MemoryPlan(100, -(-usable * 10 // 9), few_images=5, bytes_for_many=750)
    assert planned.largest_batch == largest
    assert planned.batch_bytes(largest) <= usable or largest == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@WEIGHTS
def test_widen_weight(device, weights, dtype):
    """Rounded once."""
    weight, scale = quantize_weight(torch.randn(7, 150, generator=torch.Generator().manual_seed(0)), weights)
    exact = dequantize_weight(weight, scale, torch.float64).to(dtype)
    assert torch.equal(widen_weight(weight.to(device), scale.to(device), dtype).cpu(), exact)
