"""Sampling: the cached loop against an uncached one, batches and splits, settings, arguments."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from alitok_fast._library import use_reference
from alitok_fast.inference import loop as sampling_loop
from alitok_fast.inference.loop import PASSES_PER_CALL, SamplingLoop
from alitok_fast.inference.memory import plan
from alitok_fast.inference.packed_generator import PackedGenerator
from alitok_fast.inference.params import SamplingParams
from alitok_fast.inference.sampler import Sampler, guidance_schedule, sample
from alitok_fast.models import Generator
from alitok_fast.ops.sample_tokens import guided_logits, sample_tokens
from alitok_fast.testing import ReadsBack


def sample_uncached(gen, labels, scale, power, seed=0, **settings):
    """The definition: the whole sequence again for every token."""
    labels = torch.as_tensor(labels)
    schedule = guidance_schedule(gen.config.num_tokens, scale, power)
    tokens = torch.empty(len(labels), 0, dtype=torch.int64)
    for step in range(gen.config.num_tokens):
        with torch.no_grad():
            logits = gen(tokens, labels)[:, -1]
            if scale:
                logits = torch.cat([logits, gen(tokens, None)[:, -1]])
        drawn = sample_tokens(
            logits,
            guidance_scale=schedule[step] if scale else None,
            seed=seed,
            image_ids=torch.arange(len(labels)),
            step=step,
            **settings,
        )
        tokens = torch.cat([tokens, drawn.unsqueeze(1)], dim=1)
    return tokens


@pytest.mark.parametrize(
    "scale, settings",
    [(0.0, {}), (1.0, {}), (4.0, {"temperature": 0.0}), (4.0, {"temperature": 0.7, "top_k": 5}), (2.0, {"top_p": 0.8})],
)
def test_cached_equals_uncached(tiny_generator, scale, settings):
    gen = tiny_generator()
    expected = sample_uncached(gen, [1, 2, 9], scale, 1.4, **settings)
    assert torch.equal(sample(gen, [1, 2, 9], guidance_scale=scale, guidance_power=1.4, **settings), expected)


def test_guided_logits_of_the_loop_match_a_full_pass(tiny_generator, monkeypatch):
    """float32 cached logits equal uncached ones to 1e-4, guidance included, along a whole drawn sequence."""
    gen = tiny_generator()
    seen = []
    step = Generator.step
    monkeypatch.setattr(Generator, "step", lambda *given: seen.append(step(*given)) or seen[-1])
    with (
        use_reference()
    ):  # else a generator on the CPU is packed; tests/inference/test_packed_generator.py compares those logits
        tokens = Sampler(gen, window=1)([3, 4], guidance_scale=8.0, guidance_power=1.0)
    assert len(seen) == gen.config.num_tokens
    schedule = guidance_schedule(gen.config.num_tokens, 8.0, 1.0)
    with torch.no_grad():
        full = torch.cat([gen(tokens, torch.tensor([3, 4])), gen(tokens, None)])
    for step, logits in enumerate(seen):
        expected = guided_logits(full[:, step], schedule[step])
        assert (guided_logits(logits.squeeze(1), schedule[step]) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_an_image_is_the_same_in_any_batch_and_split(tiny_generator):
    gen = tiny_generator()
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 6])
    whole = sample(gen, labels, seed=5)
    split = [sample(gen, labels[a:b], seed=5, image_ids=range(a, b)) for a, b in ((0, 1), (1, 4), (4, 7))]
    assert torch.equal(torch.cat(split), whole)
    order = torch.tensor([6, 0, 3])
    assert torch.equal(sample(gen, labels[order], seed=5, image_ids=order), whole[order])


def test_seed_and_image_id_change_the_image(tiny_generator):
    gen = tiny_generator()
    a, b = sample(gen, [1, 1])
    c, _ = sample(gen, [1, 1], seed=1)
    assert not torch.equal(a, b)
    assert not torch.equal(a, c)


def test_guidance_follows_the_preset_unless_given(tiny_generator):
    gen = tiny_generator(guidance_scale=5.0, guidance_power=2.0)
    assert torch.equal(sample(gen, [1, 2]), sample(gen, [1, 2], guidance_scale=5.0, guidance_power=2.0))
    assert not torch.equal(sample(gen, [1, 2]), sample(gen, [1, 2], guidance_scale=0.0))


def test_zero_guidance_is_the_conditional_model(tiny_generator):
    gen = tiny_generator()
    assert torch.equal(sample(gen, [1, 2], guidance_scale=0.0, seed=3), sample_uncached(gen, [1, 2], 0.0, 1.0, seed=3))


def test_greedy_needs_no_noise(tiny_generator):
    gen = tiny_generator()
    assert torch.equal(sample(gen, [1, 2], temperature=0, seed=1), sample(gen, [1, 2], temperature=0, seed=2))
    assert torch.equal(sample(gen, [1, 2], temperature=0), sample(gen, [1, 2], top_k=1))


def test_schedule_rises_from_one():
    schedule = guidance_schedule(273, 16.0, 1.8)
    assert schedule[0] == 1
    assert (schedule.diff() >= 0).all()
    assert schedule[-1] < 16


def test_on_step_sees_every_prefix(tiny_generator):
    gen = tiny_generator()
    seen = []
    tokens = sample(gen, [1, 2], on_step=lambda step, so_far: seen.append((step, so_far.clone())))
    assert [step for step, _ in seen] == list(range(gen.config.num_tokens))
    assert all(torch.equal(so_far, tokens[:, : step + 1]) for step, so_far in seen)


@pytest.mark.parametrize("weight", ["output.weight", "blocks.1.mlp.w2.weight"])
def test_nan_weights_raise(tiny_generator, weight):
    gen = tiny_generator()
    gen.get_parameter(weight).data[3, 4] = float("nan")
    with pytest.raises(RuntimeError, match=r"expected finite logits, got NaN or infinity in image 0 at step 0"):
        sample(gen, [1, 2])


@pytest.mark.parametrize(
    "labels, settings, error, message",
    [
        ([], {}, ValueError, r"labels: expected shape \(B,\) with B >= 1, got \(0,\)"),
        ([[1]], {}, ValueError, r"labels: expected shape \(B,\) with B >= 1, got \(1, 1\)"),
        ([1.5], {}, TypeError, "labels: expected integers, got float32"),
        ([True], {}, TypeError, "labels: expected integers, got bool"),
        ([10], {}, ValueError, r"labels: expected values in \[0, 10\), got 10"),
        ([-1], {}, ValueError, r"labels: expected values in \[0, 10\), got -1"),
        ([1], {"image_ids": [0, 1]}, ValueError, r"image_ids: expected shape \(1,\), got \(2,\)"),
        ([1], {"guidance_scale": -1.0}, ValueError, r"guidance_scale: expected a number in \[0, 1e\+30\], got -1.0"),
        ([1], {"guidance_scale": float("nan")}, ValueError, "guidance_scale: expected a finite number, got nan"),
        ([1], {"guidance_power": 0}, ValueError, r"guidance_power: expected a number in \(0, 1e\+30\], got 0"),
        ([1], {"temperature": -0.1}, ValueError, r"temperature: expected 0 or a number in \[1e-30, 1e\+30\], got -0.1"),
        ([1], {"top_k": 0}, ValueError, "top_k: expected .*, got 0"),
        ([1], {"top_k": 2.5}, TypeError, "top_k: expected an integer, got 2.5"),
        ([1], {"seed": 1.5}, TypeError, "seed: expected an integer, got 1.5"),
        ([1], {"seed": None}, TypeError, "seed: expected an integer, got None"),
        ([1], {"seed": 2**63}, ValueError, "seed: expected an integer in .*, got 9223372036854775808"),
        (["bag"], {}, TypeError, r"labels: expected integers of shape \(B,\), got \['bag'\]"),
        ([1], {"kv_dtype": torch.float8_e4m3fn}, ValueError, "kv_dtype: expected float32 or .* CPU, got float8"),
        ([1], {"top_p": 0.0}, ValueError, r"top_p: expected .*, got 0"),
        ([1], {"top_p": 1.5}, ValueError, r"top_p: expected .*, got 1.5"),
    ],
)
def test_bad_arguments(tiny_generator, labels, settings, error, message):
    with pytest.raises(error, match=message):
        sample(tiny_generator(), labels, **settings)


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.0}, {"temperature": 0.6, "top_k": 5}, {"top_p": 0.7}, {"guidance_scale": 0.0}],
    ids=str,
)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.int8, None])
def test_the_window_changes_no_image(tiny_generator, weights, settings):
    """Nor what `on_step` sees, in its order; with prompts too."""
    gen, labels = tiny_generator(), [3, 3, 9]
    model = gen if weights is None else PackedGenerator(gen, weights)  # the generator itself steps with the references
    with use_reference(weights is None):
        expected = Sampler(model)(labels, seed=7, **settings)
        for window in (2, 5, 16):
            sampler, seen = Sampler(model, window=window), []
            assert torch.equal(sampler(labels, seed=7, **settings), expected)
            observed = sampler(labels, seed=7, on_step=lambda *given, seen=seen: seen.append(given), **settings)
            assert torch.equal(observed, expected)
            assert [step for step, _ in seen] == list(range(gen.config.num_tokens))
            assert all(torch.equal(part, expected[:, : step + 1]) for step, part in seen)
            for length in (1, 9, gen.config.num_tokens - 1, gen.config.num_tokens):
                prompt = expected[:, :length]
                assert torch.equal(sampler(labels, seed=7, prompt_tokens=prompt, **settings), expected)


@pytest.mark.parametrize(("window", "error"), [(0, ValueError), (17, ValueError), (2.0, TypeError)])
def test_bad_windows(tiny_generator, window, error):
    with pytest.raises(error, match="window: expected"):
        Sampler(tiny_generator(), window=window)


def test_training_mode_is_refused(tiny_generator):
    with pytest.raises(ValueError, match="gen: expected evaluation mode, got training mode"):
        sample(tiny_generator().train(), [1])


def test_prompt_is_kept_and_completed_as_it_would_have_been(tiny_generator):
    gen = tiny_generator()
    whole = sample(gen, [1, 2], seed=3)
    for length in (0, 1, 7, gen.config.num_tokens):
        assert torch.equal(sample(gen, [1, 2], seed=3, prompt_tokens=whole[:, :length]), whole)
    changed = (whole[:, :9] + 1) % gen.config.codebook_size
    assert torch.equal(sample(gen, [1, 2], seed=3, prompt_tokens=changed)[:, :9], changed)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (torch.zeros(1, 3, dtype=torch.int64), r"prompt_tokens: expected shape \(2, n <= 21\), got \(1, 3\)"),
        (torch.zeros(2, 22, dtype=torch.int64), r"prompt_tokens: expected shape \(2, n <= 21\), got \(2, 22\)"),
        (torch.zeros(2, 3), "prompt_tokens: expected int64, got float32"),
        (torch.full((2, 3), -1), "prompt_tokens: expected values in"),
        ([[1], [2.5]], "prompt_tokens: expected int64, got float32"),
        (3, "prompt_tokens: expected a tensor, got int"),
    ],
)
def test_bad_prompts(tiny_generator, prompt, message):
    with pytest.raises((TypeError, ValueError), match=message):
        sample(tiny_generator(), [1, 2], prompt_tokens=prompt)


@pytest.mark.parametrize("kept", [1, 4])
def test_a_sampler_draws_again_and_again(tiny_generator, kept):
    """With other labels, seeds, batch sizes and settings, some for the second time; as fresh ones do."""
    gen = tiny_generator()
    sampler = Sampler(gen)
    sampler._kept = kept
    calls = [
        ([1, 2], {}),
        ([3, 3], {"seed": 5}),
        ([3, 3], {"seed": 5, "temperature": 0.0}),
        ([1], {"seed": 5, "top_k": 3}),
        ([1, 2], {"guidance_scale": 0.0}),
        ([1, 2], {"prompt_tokens": [[1, 2], [3, 4]]}),
        ([1, 2], {}),
    ]
    for labels, settings in calls:
        assert torch.equal(sampler(labels, **settings), sample(gen, labels, **settings)), settings
        assert len(sampler._loops) <= kept
    assert sampler.loop(2, True) is sampler.loop(2, True)
    assert sampler.loop(2, True) is not sampler.loop(2, False)


def test_earlier_loops_are_freed_where_memory_is_short(tiny_generator, monkeypatch):
    gen = tiny_generator()
    sampler, per_image = Sampler(gen), plan(gen).bytes_per_image
    sampler._kept = 4

    def available(device):
        return 4 * per_image - sum(loop.batch_size * per_image for loop in sampler._loops.values())

    monkeypatch.setattr("alitok_fast.inference.memory.available_bytes", available)
    for labels in ([1], [2, 3], [4, 5, 6], [1, 2, 3, 4, 5]):
        assert torch.equal(sampler(labels), sample(gen, labels))
        assert available(None) >= 0
    assert {key[0] for key in sampler._loops} == {2}, "the last part"


def test_threads_take_turns(tiny_generator):
    sampler = Sampler(tiny_generator())
    expected = [sampler([label, label + 1], seed=label) for label in range(6)]
    with ThreadPoolExecutor(3) as pool:
        drawn = list(pool.map(lambda label: sampler([label, label + 1], seed=label), range(6)))
    assert all(torch.equal(a, b) for a, b in zip(drawn, expected, strict=True))


def test_what_on_step_gets_stays_as_it_is(tiny_generator):
    sampler, kept = Sampler(tiny_generator()), []
    tokens = sampler([1, 2], on_step=lambda _, so_far: kept.append(so_far))
    sampler([5, 6], seed=1)
    assert all(torch.equal(part, tokens[:, : step + 1]) for step, part in enumerate(kept))


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.0}, {"temperature": 0.6, "top_k": 5}, {"top_p": 0.7}],
    ids=["plain", "greedy", "top_k", "top_p"],
)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.int8])
def test_a_run_equals_single_steps(tiny_generator, weights, guided, settings):
    """Ids and cache to the last bit, whether a call draws one token, some, or a part that ends elsewhere."""
    gen = tiny_generator()
    prompt = torch.tensor([[5, 6, 7], [8, 9, 31], [0, 1, 2]])
    schedule = guidance_schedule(gen.config.num_tokens, 4.0, 1.2) if guided else None
    params = SamplingParams(seed=7, **settings)
    arguments = (torch.tensor([3, 3, 9]), schedule, params, torch.tensor([11, 2**40, -5]))
    loops = [SamplingLoop(PackedGenerator(gen, weights), 3, guided) for _ in range(3)]
    for tokens in (None, prompt):
        whole = loops[0].run(*arguments, tokens)
        seen = []
        observed = loops[1].run(*arguments, tokens, on_step=lambda _, part, seen=seen: seen.append(part.clone()))
        loops[2].start(*arguments, tokens)
        with torch.no_grad():
            for _ in range(gen.config.num_tokens):
                loops[2].do_pass()
        assert torch.equal(whole, loops[2].state.tokens) and torch.equal(whole, observed)
        assert all(torch.equal(part, whole[:, : step + 1]) for step, part in enumerate(seen))
        assert torch.equal(loops[0].cache.keys, loops[2].cache.keys)
        assert torch.equal(loops[0].cache.values, loops[2].cache.values)


def test_a_keyboard_interrupt_waits_for_a_few_steps_only(tiny_generator, monkeypatch):
    """Python handles signals between native calls: none takes longer than CALL_SECONDS, or more than a few passes."""
    gen = tiny_generator(grid=8)
    decoder, calls = PackedGenerator(gen), []
    passes = decoder.sample_passes
    monkeypatch.setattr(decoder, "sample_passes", lambda *args: calls.append(args[2]) or passes(*args))
    monkeypatch.setattr(sampling_loop, "CALL_SECONDS", 0.0)
    sampler = Sampler(decoder, window=1)
    for _ in range(2):
        calls.clear()
        sampler([1, 2])
        fewest, most = PASSES_PER_CALL
        assert max(calls) == fewest and sum(calls) == gen.config.num_tokens
    monkeypatch.setattr(sampling_loop, "CALL_SECONDS", 1e6)
    sampler([1, 2])
    calls.clear()
    sampler([1, 2])
    assert calls == [gen.config.num_tokens] and calls[0] < most


@pytest.mark.parametrize("guided", [False, True])
def test_a_step_reads_nothing_back(tiny_generator, guided):
    gen = tiny_generator()
    loop = SamplingLoop(gen, 2, guided)  # as on a CUDA device: the generator itself
    schedule = guidance_schedule(gen.config.num_tokens, 4.0, 1.2) if guided else None
    loop.start(torch.tensor([1, 2]), schedule, SamplingParams(top_k=5, top_p=0.9), torch.arange(2))
    for window in (1, 3):
        with torch.no_grad(), ReadsBack() as reads:
            loop.do_pass(window)
            assert reads.count == 0
            loop.state.ids[0, 0].item()
            assert reads.count == 1
