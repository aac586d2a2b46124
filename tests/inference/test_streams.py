"""Threads on streams of their own: what is kept from call to call is used by one stream after the other."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fake_cuda import FakeCuda

from alitok_fast import Pipeline, load_generator, load_tokenizer
from alitok_fast._library import use_reference
from alitok_fast.inference import cuda_graph, packed_twin
from alitok_fast.inference.image_decoder import GRAPHS, ImageDecoder
from alitok_fast.inference.loop import SamplingLoop
from alitok_fast.inference.params import SamplingParams
from alitok_fast.inference.quantized_generator import QuantizedGenerator
from alitok_fast.inference.sampler import Sampler, sample
from alitok_fast.models import Generator


@pytest.fixture
def fake(monkeypatch) -> FakeCuda:
    cuda_graph._capture_stream.cache_clear()
    yield FakeCuda(monkeypatch)
    cuda_graph._capture_stream.cache_clear()


def some_tokens(config, batch: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        config.codebook_size, (batch, config.num_tokens), generator=torch.Generator().manual_seed(seed)
    )


# ---- the fake itself ----


def test_the_fake_finds_work_in_no_order(fake):
    one, two = torch.cuda.Stream(), torch.cuda.Stream()
    with fake.thread("a", one):
        x = torch.zeros(3, device="cuda")
        assert x.device == torch.device("cuda", 0)
        done = one.record_event()
    with fake.thread("b", two):
        x + 1
    assert len(fake.races) == 1 and "reads float32[3] of zeros, which zeros on stream 1 writes" in fake.races[0]
    fake.races.clear()
    with fake.thread("c", fake.new_stream()):
        fake.stream.wait_event(done)
        y = x + 1
    with fake.thread("d", one):
        x.add_(1)
    assert len(fake.races) == 2, "the additions on streams 2 and 3 read what the last one writes"
    fake.races.clear()
    with fake.thread("c"):
        del y  # on stream 0, but stream 3 is its owner
        fake.sweep()
        assert fake.races == []
        fake.finish()
        x.zero_()
    assert fake.races == []


def test_the_fake_finds_memory_that_is_freed_too_early(fake):
    one, two = torch.cuda.Stream(), torch.cuda.Stream()
    with fake.thread("a", one):
        x = torch.zeros(3, device="cuda")
        two.wait_stream(one)
        with torch.cuda.stream(two):
            x + 1
        del x
        fake.sweep()
    assert len(fake.races) == 1 and "goes back to stream 1 while add on stream 2 may still use it" in fake.races[0]


def test_the_fake_replays(fake):
    with fake.thread("a"):
        x, out = torch.zeros(2, 2, device="cuda"), torch.zeros(2, 2, device="cuda")

        def work():
            out.copy_((x + 1).t().reshape(4).view(2, 2) @ x)

        graph = cuda_graph.capture(x.device, work)
        x.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        graph.replay()
        expected = (x + 1).t() @ x
    assert torch.equal(out, expected) and fake.races == []


# ---- the turns that calls take ----


class Users:
    """Threads, each with a stream of its own, that are interleaved by hand."""

    def __init__(self, fake: FakeCuda) -> None:
        self.fake, self.streams = fake, [torch.cuda.Stream() for _ in range(2 * GRAPHS + 6)]

    def __getitem__(self, number: int):
        return self.fake.thread(f"user {number}", self.streams[number])


@pytest.fixture
def users(fake) -> Users:
    return Users(fake)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_decoder_on_two_streams(fake, users, tiny_tokenizer, monkeypatch, dtype):
    """Nor may the first of them be too early: the weights are copied on the stream of the maker."""
    monkeypatch.setattr(packed_twin, "FAST", False)  # a GPU has no packed weights
    tokenizer = tiny_tokenizer()
    tokens = [some_tokens(tokenizer.config, batch, seed) for batch, seed in ((3, 0), (3, 1), (2, 2), (3, 3))]
    expected = [ImageDecoder(tokenizer, dtype)(part) for part in tokens]
    with fake.thread("maker"):
        decode = ImageDecoder(tokenizer, dtype)
    images = []
    for index, part in enumerate(tokens):
        with users[index % 2]:
            images.append(decode(part))
    assert fake.races == []
    assert all(torch.equal(got, want) for got, want in zip(images, expected, strict=True))


@pytest.mark.parametrize("prompted", [False, True])
def test_a_sampler_on_two_streams(fake, users, tiny_generator, prompted):
    gen = tiny_generator()
    prompt = some_tokens(gen.config, 2)[:, :5] if prompted else None
    calls = [([1, 2], 0), ([3, 4], 1), ([5, 6], 2), ([1, 2], 0)]
    with use_reference():  # steps with the generator itself, as on a GPU
        expected = [sample(gen, labels, seed=seed, prompt_tokens=prompt) for labels, seed in calls]
    with fake.thread("maker"):
        sampler = Sampler(gen)
    drawn = []
    for index, (labels, seed) in enumerate(calls):
        with users[index % 2]:
            drawn.append(sampler(labels, seed=seed, prompt_tokens=prompt))
    assert fake.races == []
    assert all(torch.equal(got, want) for got, want in zip(drawn, expected, strict=True))


def test_a_sampling_loop_on_two_streams(fake, users, tiny_generator):
    gen = tiny_generator()
    settings = SamplingParams(seed=7)
    arguments = [(torch.tensor([label, 3]), None, settings, torch.arange(2)) for label in range(4)]
    with fake.thread("maker"):
        loop = SamplingLoop(gen, 2, guided=False)
    for index, given in enumerate(arguments):
        with users[index % 2]:
            loop.run(*given)
    assert fake.races == []


def test_8_bit_weights_that_are_written_out_for_two_streams(fake, users, tiny_generator):
    """By whoever needs them first. Others read them on streams of their own, where nothing says that they must wait."""
    with fake.thread("maker"):
        model = QuantizedGenerator(tiny_generator(), torch.int8)
        samplers = Sampler(model), Sampler(model)
        rows = model.most_inputs + 1
        cache, ids = model.new_cache(rows), torch.zeros(rows, 1, dtype=torch.int64, device="cuda")
        positions = torch.zeros(rows, dtype=torch.int64, device="cuda")
    fake.finish()
    with fake.thread("user", users.streams[0]):
        model.expect(rows)
        assert model.wide_bytes == 0
    with fake.thread("user", users.streams[1]):  # of another thread, the fake would not see that the first has waited
        model.step(ids, cache, positions)
    assert fake.races == []
    for index, sampler in enumerate(samplers):
        with fake.thread("user", users.streams[2 + index]):
            sampler([1] * rows)
    assert fake.races == []


def test_what_on_step_gets_is_ordered_too(fake, users, tiny_generator):
    """It is a copy on the caller's stream, and what the caller does with it comes before the next turn."""
    with fake.thread("maker"):
        sampler = Sampler(tiny_generator())
    seen: list[torch.Tensor] = []
    for index in range(3):
        with users[index % 2]:
            sampler([1, 2], on_step=lambda _, so_far: seen.append(so_far + 1))
    assert fake.races == [] and len(seen) == 3 * sampler.model.config.num_tokens


def test_a_turn_that_fails_is_one_all_the_same(fake, users, tiny_generator):
    def stop(step: int, _) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with fake.thread("maker"):
        sampler = Sampler(tiny_generator())
    with users[0], pytest.raises(KeyboardInterrupt):
        sampler([1, 2], on_step=stop)
    with users[1]:
        sampler([1, 2])
    assert fake.races == []


def test_graphs_of_two_owners_at_once(fake, users, tiny_tokenizer, tiny_generator):
    """Recorded by one thread on one stream, yet each has a cuBLAS workspace of its own."""
    with fake.thread("maker"):
        gen, tokenizer = tiny_generator(), tiny_tokenizer()
        sampler, decode = Sampler(gen), ImageDecoder(tokenizer, torch.float32)
        tokens = some_tokens(tokenizer.config, 2)
        sampler([1, 2])
        decode(tokens)
    fake.finish()
    with users[0]:
        sampler([1, 2])
    with users[1]:
        decode(tokens)
    assert fake.races == []


def test_loops_and_graphs_that_give_way(fake, users, tiny_tokenizer, tiny_generator):
    """Their memory goes back to the stream that it was allocated on, which knows nothing of the last user's."""
    with fake.thread("maker"):
        sampler, decode = Sampler(tiny_generator()), ImageDecoder(tiny_tokenizer(), torch.bfloat16)
        sampler._kept = 1
    for index, batch in enumerate((*range(1, GRAPHS + 3), 1)):
        # One makes them, another uses them last, and a third, which knows of neither, drops them.
        for user in (2 * index, 2 * index + 1):
            with users[user]:
                decode(some_tokens(decode.config, batch))
                sampler([n % 4 for n in range(batch)])
    assert len(decode._graphs) == GRAPHS and len(sampler._loops) == 1
    fake.sweep()
    assert fake.races == []


def test_waiting_includes_the_turn_that_one_has(fake, users):
    with fake.thread("maker"):
        memory = torch.zeros(3, device="cuda")
        turn = cuda_graph.Turn(memory.device)
    with users[0], turn:
        memory.add_(1)
        turn.wait()
        del memory
        fake.sweep()
    assert fake.races == []


def test_a_recording_that_fails(fake, users, tiny_generator, monkeypatch):
    """It ran on a stream of its own, for which the turn's end has to wait."""
    gen, steps = tiny_generator(), []
    step = Generator.step

    def fail_once(*arguments):
        steps.append(step(*arguments))
        if len(steps) == 1:
            raise MemoryError
        return steps[-1]

    monkeypatch.setattr(Generator, "step", fail_once)
    with fake.thread("maker"):
        sampler = Sampler(gen)
    with users[0], pytest.raises(MemoryError):
        sampler([1, 2])
    with users[1]:
        sampler([1, 2])
    assert fake.races == []


@pytest.mark.parametrize("kind", ["decoder", "sampler", "loop"])
def test_owners_that_are_dropped_at_once(fake, users, tiny_tokenizer, tiny_generator, kind):
    gen, tokenizer = tiny_generator(), tiny_tokenizer()
    arguments = {"decoder": [some_tokens(tokenizer.config)], "sampler": [[1, 2]]}
    arguments["loop"] = [torch.tensor([1, 2]), None, SamplingParams(seed=7), torch.arange(2)]
    with fake.thread("maker"):
        if kind == "loop":
            owner = SamplingLoop(gen, 2, guided=False).run
        else:
            owner = Sampler(gen) if kind == "sampler" else ImageDecoder(tokenizer, torch.bfloat16)
    for index in range(2):
        with users[index]:
            owner(*arguments[kind])
    with fake.thread("maker"):
        del owner
        fake.sweep()
    assert fake.races == []


def test_a_pipeline_on_two_streams(fake, users, tiny_tokenizer, tiny_generator):
    with fake.thread("maker"):
        tokenizer, gen = tiny_tokenizer(), tiny_generator().to(torch.bfloat16)
        pipe = Pipeline(tokenizer, gen)
    for index in range(3):
        with users[index % 2]:
            pipe([1, 2], seed=index)
    assert fake.races == []


def test_real_threads(fake, tiny_tokenizer, tiny_generator):
    """That the host's lock and the device's order go together; which thread is first is left to chance."""
    tokenizer, gen = tiny_tokenizer(), tiny_generator()
    tokens, labels = some_tokens(tokenizer.config), [1, 2]
    with use_reference():
        expected = [sample(gen, labels, seed=seed) for seed in range(6)]
    images = ImageDecoder(tokenizer, torch.float32)(tokens)
    with fake.thread("maker"):
        sampler, decode = Sampler(gen), ImageDecoder(tokenizer, torch.float32)

    def use(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        with fake.thread(f"user {seed}", fake.new_stream()):
            return sampler(labels, seed=seed), decode(tokens)

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(use, range(6)))
    assert fake.races == []
    for (drawn, decoded), right in zip(results, expected, strict=True):
        assert torch.equal(drawn, right) and torch.equal(decoded, images)


def test_a_call_from_inside_its_own_turn_is_refused(tiny_generator):
    sampler = Sampler(tiny_generator())
    with pytest.raises(RuntimeError, match="turn: expected calls of one object one after the other"):
        sampler([1, 2], on_step=lambda *_: sampler([1, 2]))
    assert len(sampler([1, 2])) == 2, "and it can be called again"


# ---- how a graph is recorded ----

FLAGS = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16")]


@pytest.mark.parametrize("allowed", [True, False, (False, False)])
def test_products_are_recorded_with_exact_sums(fake, monkeypatch, allowed):
    matmul = torch.backends.cuda.matmul

    def flags() -> list:
        return [getattr(matmul, name + part) for name in FLAGS for part in ("", "_split_k")]

    before, seen = flags(), []
    try:
        for name in FLAGS:
            setattr(matmul, name, allowed)
        given = flags()
        with fake.thread("a"):
            cuda_graph.capture(torch.device("cuda", 0), lambda: seen.append(flags()))
            assert flags() == given
            assert seen == [[False, given[1], False, given[3]]] * 2, "the first is not recorded"

            def fail() -> None:
                raise ValueError

            with pytest.raises(ValueError):
                cuda_graph.capture(torch.device("cuda", 0), fail)
        assert flags() == given
    finally:
        for name, *values in zip(FLAGS, before[::2], before[1::2], strict=True):
            setattr(matmul, name, tuple(values))


def test_nothing_is_collected_meanwhile(fake):
    seen = []
    with fake.thread("a"):
        cuda_graph.capture(torch.device("cuda", 0), lambda: seen.append(gc.isenabled()))
    assert seen == [False, False] and gc.isenabled()


# ---- on a GPU ----


@pytest.mark.device
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_two_threads_on_two_streams_draw_what_one_does():
    """Bit for bit. The streams are kept busy first: what should wait for a replay on one and does not, comes early."""
    gen, tokenizer = load_generator("demo", "cuda"), load_tokenizer("demo", "cuda")
    sampler, decode = Sampler(gen), ImageDecoder(tokenizer, torch.bfloat16)

    def use(seed: int, stream: torch.cuda.Stream | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.cuda.stream(stream):
            if stream is not None:
                torch.cuda._sleep(20_000_000)
            tokens = sampler([seed % 10, 3], seed=seed)
            images = decode(tokens)
            return tokens.cpu(), images.cpu()

    expected = [use(seed) for seed in range(8)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda seed: use(seed, streams[seed % 2]), range(8)))
    for got, right in zip(results, expected, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(got, right, strict=True))
