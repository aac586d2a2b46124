"""Generator: parity with the reference implementation's logits, causality, caching, arguments."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from alitok_fast.config import generator_preset
from alitok_fast.inference.sampler import guidance_schedule
from alitok_fast.models import Generator
from alitok_fast.models.loading import build
from alitok_fast.models.rope import rope_table
from alitok_fast.ops.sample_tokens import guided_logits
from alitok_fast.storage.checkpoint import Checkpoint, recognise
from alitok_fast.testing import relative_error, step_logits

TOLERANCE = 1e-4


@pytest.fixture(
    scope="module",
    params=["b", *(pytest.param(size, marks=pytest.mark.slow) for size in ("l", "xl"))],
)
def reference(request, golden):
    """Preset name and its golden outputs."""
    with np.load(golden / f"ar_{request.param}.npz") as outputs:
        return request.param, {name: torch.from_numpy(outputs[name]) for name in outputs.files}


def test_logits_match_reference(reference, recipe):
    name, outputs = reference
    state = recipe(f"ar_{name}")
    config = recognise(state)
    assert config == generator_preset(name)
    gen = build(Checkpoint(config, state)).eval()
    rows = slice(1 if name == "xl" else None)  # one sequence of the largest: it is the slowest test there is
    tokens, labels, positions = outputs["tokens"][rows], outputs["labels"][rows], outputs["positions"]
    with torch.inference_mode():
        conditional = gen(tokens, labels)[:, positions]
        unconditional = gen(tokens, None)[:, positions]
    assert relative_error(conditional, outputs["logits_cond"][rows]) < TOLERANCE
    assert relative_error(unconditional, outputs["logits_uncond"][rows]) < TOLERANCE

    schedule = guidance_schedule(config.num_tokens, config.guidance_scale, config.guidance_power)
    guided = torch.stack(
        [
            guided_logits(torch.cat([conditional[:, i], unconditional[:, i]]), schedule[position])
            for i, position in enumerate(positions)
        ],
        dim=1,
    )
    assert relative_error(guided, outputs["guided_logits"][rows]) < TOLERANCE


def test_rope_table_matches_reference(reference):
    name, outputs = reference
    table = rope_table(generator_preset(name))
    assert table.shape == outputs["rope_table"].shape
    assert relative_error(table, outputs["rope_table"]) < 1e-6


def test_guidance_schedule_matches_reference(reference):
    name, outputs = reference
    config = generator_preset(name)
    assert (config.guidance_scale, config.guidance_power) == (outputs["guidance_scale"], outputs["guidance_scale_pow"])
    schedule = guidance_schedule(config.num_tokens, config.guidance_scale, config.guidance_power)
    assert relative_error(schedule, outputs["cfg_scale"]) < 1e-6


def test_condition_and_embedding_rows_match_reference(reference):
    name, outputs = reference
    with torch.device("meta"):
        gen = Generator(generator_preset(name))
    labels = outputs["labels"]
    assert (labels + gen.config.first_class).tolist() == outputs["cond_ids"].tolist()
    assert outputs["none_ids"].tolist() == [gen.config.no_condition] * len(labels)


@pytest.mark.parametrize("name, millions", [("b", 177), ("l", 318), ("xl", 662)])
def test_parameter_counts(name, millions):
    with torch.device("meta"):
        gen = Generator(generator_preset(name))
    assert round(sum(p.numel() for p in gen.parameters()) / 1e6) == millions


def test_512_follows_from_the_config():
    with torch.device("meta"):
        gen = Generator(generator_preset("b-512"))
    assert gen.config.num_tokens == 33 + 1024
    assert gen.rope.shape == (1 + 33 + 1024, gen.config.head_dim // 2, 2)


def test_rope_stays_exact_in_bfloat16(tiny_generator):
    gen = tiny_generator().to(torch.bfloat16)
    assert gen.rope.dtype == torch.float32
    assert torch.equal(gen.rope, rope_table(gen.config))


def test_a_token_moves_only_later_logits(tiny_generator):
    gen = tiny_generator()
    tokens = torch.randint(gen.config.codebook_size, (2, gen.config.num_tokens))
    labels = torch.tensor([1, 2])
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % gen.config.codebook_size
    with torch.no_grad():
        difference = (gen(tokens, labels) - gen(changed, labels)).abs().amax((0, 2))
    assert difference[: 7 + 1].max() == 0  # logits at position i predict token i from the tokens before it
    assert difference[7 + 1 :].min() > 0


def test_cached_logits_equal_uncached(tiny_generator):
    gen = tiny_generator()
    tokens = torch.randint(gen.config.codebook_size, (3, gen.config.num_tokens))
    labels = torch.tensor([0, 4, 9])
    ids = torch.cat([gen.condition_ids(labels, 3).unsqueeze(1), tokens], dim=1)
    with torch.inference_mode():
        expected = gen(tokens, labels)
        for width in (1, 4, gen.config.num_tokens):
            logits = step_logits(gen, ids[:, :-1], gen.new_cache(3), width)
            assert relative_error(logits, expected[:, :-1]) < TOLERANCE


def test_rows_step_at_positions_and_in_slots_of_their_own(tiny_generator):
    gen = tiny_generator()
    count = gen.config.num_tokens
    tokens, labels = torch.randint(gen.config.codebook_size, (2, count)), torch.tensor([4, 9])
    ids = torch.cat([gen.condition_ids(labels, 2).unsqueeze(1), tokens], dim=1)
    cache, slots = gen.new_cache(5), torch.tensor([3, 0])
    with torch.inference_mode():
        expected = gen(tokens, labels)
        begun = gen.step(ids[:1, :7], cache, torch.tensor([0]), slots[:1])
        mixed = gen.step(torch.stack([ids[0, 7:9], ids[1, :2]]), cache, torch.tensor([7, 0]), slots)
        resting = gen.step(ids[:, 9:10], cache, torch.tensor([9, -1]), slots)
    assert relative_error(begun[0], expected[0, :7]) < TOLERANCE
    assert relative_error(mixed[0], expected[0, 7:9]) < TOLERANCE
    assert relative_error(mixed[1], expected[1, :2]) < TOLERANCE
    assert relative_error(resting[0, 0], expected[0, 9]) < TOLERANCE and resting[1].isnan().all()
    assert not cache.keys[:, [1, 2, 4]].any()


def test_step_refuses_other_ids_and_ends_in_nan(tiny_generator):
    gen = tiny_generator()
    cache, positions = gen.new_cache(2), torch.full((2,), gen.config.num_tokens - 1)
    with pytest.raises(ValueError, match=r"ids: expected shape \(R, W\), got \(3,\)"):
        gen.step(torch.zeros(3, dtype=torch.int64), cache, positions)
    logits = gen.step(torch.zeros(2, 2, dtype=torch.int64), cache, positions)
    assert not logits[:, 0].isnan().any() and logits[:, 1].isnan().all()


def test_labels_are_dropped_in_training_only(tiny_generator):
    gen = tiny_generator(dropout=0.0, class_dropout=0.5)
    tokens = torch.randint(gen.config.codebook_size, (64, 4))
    labels = torch.full((64,), 3)
    with torch.no_grad():
        conditional, unconditional = gen(tokens, labels)[:, 0], gen(tokens, None)[:, 0]
        trained = gen.train()(tokens, labels)[:, 0]
    near = torch.stack([(trained - c).abs().amax(1) < 1e-4 for c in (conditional, unconditional)])
    assert near.any(0).all()
    assert 15 < near[1].sum() < 49  # 64 fair coins


@pytest.mark.parametrize(
    "tokens, labels, error, message",
    [
        (torch.zeros(2, 3), [0, 1], TypeError, "tokens: expected an int64 tensor, got float32"),
        (torch.zeros(2, dtype=torch.int64), [0, 1], ValueError, r"tokens: expected shape \(B, n <= 21\), got \(2,\)"),
        (torch.zeros(2, 22, dtype=torch.int64), [0, 1], ValueError, "tokens: expected at most 21 per row, got 22"),
        (torch.full((2, 3), 32), [0, 1], ValueError, r"tokens: expected values in \[0, 32\), got 32"),
        (torch.full((2, 3), -1), [0, 1], ValueError, r"tokens: expected values in \[0, 32\), got -1"),
        (torch.zeros(2, 3, dtype=torch.int64), [0], ValueError, r"labels: expected shape \(2,\), got \(1,\)"),
        (torch.zeros(2, 3, dtype=torch.int64), [0, 10], ValueError, r"labels: expected values in \[0, 10\), got 10"),
        (torch.zeros(2, 3, dtype=torch.int64), [0.0, 1.0], TypeError, "labels: expected an int64 tensor, got float32"),
    ],
)
def test_bad_arguments(tiny_generator, tokens, labels, error, message):
    with pytest.raises(error, match=message):
        tiny_generator()(tokens, torch.tensor(labels))


def test_wrong_device_is_named(tiny_generator):
    tokens = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="tokens: expected device cpu, got meta"):
        tiny_generator()(tokens, None)


def test_empty_batch_gives_empty_logits(tiny_generator):
    gen = tiny_generator()
    logits = gen(torch.zeros(0, 5, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    assert logits.shape == (0, 6, gen.config.codebook_size)


def test_reduced_precision_is_for_the_blocks_alone(tiny_generator):
    gen = tiny_generator()
    exact = gen.output.weight.detach().clone()
    low = tiny_generator().to(torch.bfloat16)
    assert low.dtype == torch.bfloat16 and low.new_cache(1).keys.dtype == torch.bfloat16
    assert torch.equal(low.output.weight, exact) and low.norm.weight.dtype == torch.float32
    assert low.rope.dtype == torch.float32 and torch.equal(low.rope, gen.rope)
    tokens = torch.randint(gen.config.codebook_size, (2, gen.config.num_tokens))
    labels = torch.tensor([0, 9])
    with torch.no_grad():
        expected, got = gen(tokens, labels), low(tokens, labels)
        fed = torch.cat([low.condition_ids(labels, 2)[:, None], tokens[:, :-1]], 1)
        steps = step_logits(low, fed, low.new_cache(2))
    assert got.dtype == torch.float32
    bound = 0.05 * expected.abs().max()
    assert (got - expected).abs().max() < bound
    assert (steps - expected[:, :-1]).abs().max() < bound
